// BEV pooling on the GPU: out[z, c, x, y] = sum of weights[depth[p]] * features[pixel[p], c] over the entries p of cell
// (z * nx + x) * ny + y. Compiled by qat/families/bevfusion/pooling/cuda.py, which defines
//
//   CHANNELS                 C
//   WEIGHT, FEATURE, RESULT  float or Half: what the three tensors hold
//
// A block has CELLS consecutive cells, and at most 128 channels of them (blockIdx.y says which). A warp sums one cell at a
// time, its lanes across the channels, which lie side by side in memory. The entries of a cell are fetched 32 at once, one
// by each lane: index, then weight behind it, would otherwise be two waits for every entry, and a cell beside the ego has
// hundreds. One lane adds all entries of its channels in their order, so the result is always the same bits, and those of
// the CPU's kernel where that has fused multiply-adds. The sums are turned around in shared memory: the grid has its
// channels outermost, so neighbouring lanes must write neighbouring cells.
//
// No header is included: NVRTC's wheel brings none, not even cuda_fp16.h.

#define CELLS 32
#define WARPS 8
#define LANES 32
#define CHUNK (CHANNELS < 128 ? CHANNELS : 128)
#define PER_LANE ((CHUNK + LANES - 1) / LANES)

struct Half {
    unsigned short bits;
};

#ifdef __CUDACC_RTC__
__device__ inline float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ inline unsigned short float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

__device__ inline float load(const float *at) { return *at; }
__device__ inline float load(const Half *at) { return half_to_float(at->bits); }
__device__ inline void store(float *at, float value) { *at = value; }
__device__ inline void store(Half *at, float value) { at->bits = float_to_half(value); }

extern "C" __global__ void __launch_bounds__(WARPS * LANES)
pool(const int *row_ptr, const int *pixel, const int *depth, const WEIGHT *weights, const FEATURE *features,
     RESULT *out, int cells, int plane) {
    __shared__ float tile[CELLS][CHUNK + 1];  // + 1: a column's values are in different banks
    __shared__ float entry_weight[WARPS][LANES];
    __shared__ int entry_pixel[WARPS][LANES];
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int first_cell = blockIdx.x * CELLS, first = blockIdx.y * CHUNK;
    const int width = CHANNELS - first < CHUNK ? CHANNELS - first : CHUNK;

    for (int slot = warp; slot < CELLS && first_cell + slot < cells; slot += WARPS) {
        const int begin = row_ptr[first_cell + slot], end = row_ptr[first_cell + slot + 1];
        float sums[PER_LANE] = {};
        for (int start = begin; start < end; start += LANES) {
            const int count = end - start < LANES ? end - start : LANES;
            if (lane < count) {
                entry_weight[warp][lane] = load(weights + depth[start + lane]);
                entry_pixel[warp][lane] = pixel[start + lane];
            }
            __syncwarp();
#pragma unroll 4
            for (int k = 0; k < count; ++k) {
                const float weight = entry_weight[warp][k];
                const FEATURE *feature = features + (long long)entry_pixel[warp][k] * CHANNELS + first;
#pragma unroll
                for (int i = 0; i < PER_LANE; ++i) {
                    const int c = lane + i * LANES;
                    if (c < width) sums[i] = fmaf(weight, load(feature + c), sums[i]);
                }
            }
            __syncwarp();  // before the next 32 overwrite these
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            const int c = lane + i * LANES;
            if (c < width) tile[slot][c] = sums[i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < width * CELLS; i += WARPS * LANES) {
        const int c = i / CELLS, cell = first_cell + i % CELLS;
        if (cell < cells) {
            const long long channel = (long long)(cell / plane) * CHANNELS + first + c;
            store(out + channel * plane + cell % plane, tile[i % CELLS][c]);
        }
    }
}
