"""The compiled inner loops of BEV pooling. Imported on first use: importing numba takes half a second.

Three steps take most of the time. Each is written in LLVM's vectors, because the loops that numba compiles from Python keep
their values in memory:

- A cell's sum stays in registers while its entries are added (`_sum_entries`), up to 80 channels at once; a loop over
  channels in Python loads and stores the sum for every entry. The features of an entry a little ahead are prefetched:
  they are scattered, and the hardware cannot guess them.
- The grid has its channels outermost, the sums have them innermost: blocks of 16 × 16 are transposed in registers
  (`_store_transposed`), and written past the cache where whole cache lines can be. A plain store would first read the
  line from memory, and what is written (41 MB at full size) would push the features out of the cache.
- Cells are visited in tiles: those of a tile see the same few columns of pixels, whose features and weights stay cached.

Vectors of 16 are what AVX-512 has; for AVX2 and NEON, LLVM splits them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from qat.core.machine import threads_of

LANES = 16
TILE_X, TILE_Y = 16, 64  # cells
AHEAD = 8  # distance from the entry that is added to the one that is prefetched
WORTH_A_THREAD = 1 << 14  # entries and cells; a thread costs some 0.1 ms

_I32, _I64, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_BYTES = ir.IntType(8).as_pointer()
_VECTOR = ir.VectorType(_FLOAT, LANES)


def _pointer(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    return make_array(kind)(context, builder, array).data


def _vector_at(builder: Any, pointer: Any, index: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [index]), _VECTOR.as_pointer())


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """lanes[i] is the source of lane i: 0 to 15 are a's lanes, 16 to 31 are b's."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, LANES), lanes))


def _sum_entries(vectors: int) -> Callable[..., Any]:
    """Makes f(weights, features, depth, pixel, begin, end, channels, first, sums, at) → None, which computes

    sums[at + i] = Σ weights[depth[p]] · features[pixel[p] · channels + first + i], begin ≤ p < end, i < 16 · vectors

    in the order of p, with one rounding for each product and sum where the processor has fused multiply-adds.
    """

    @intrinsic
    def add(
        typing: Any, weights: Any, features: Any, depth: Any, pixel: Any,
        begin: Any, end: Any, channels: Any, first: Any, sums: Any, at: Any,
    ) -> Any:  # fmt: skip
        whole = types.int64
        signature = types.void(weights, features, depth, pixel, whole, whole, whole, whole, sums, whole)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            weight, feature, depth, pixel, out = (
                _pointer(context, builder, kinds[i], args[i]) for i in (0, 1, 2, 3, 8)
            )
            last = builder.sub(make_array(kinds[3])(context, builder, args[3]).nitems, ir.Constant(_I64, 1))
            begin, end, channels, first, at = (args[i] for i in (4, 5, 6, 7, 9))
            feature = builder.gep(feature, [first])
            prefetch = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32]), "llvm.prefetch.p0"
            )
            read_keep = [ir.Constant(_I32, value) for value in (0, 3, 1)]

            def index(array: Any, p: Any) -> Any:
                return builder.zext(builder.load(builder.gep(array, [p])), _I64)

            sums = [cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * LANES)) for _ in range(vectors)]
            with cgutils.for_range_slice(builder, begin, end, ir.Constant(_I64, 1)) as (p, _):
                ahead = builder.add(p, ir.Constant(_I64, AHEAD))
                ahead = builder.select(builder.icmp_signed("<", ahead, last), ahead, last)
                coming = builder.bitcast(builder.gep(weight, [index(depth, ahead)]), _BYTES)
                builder.call(prefetch, [coming, *read_keep])
                coming = builder.gep(feature, [builder.mul(index(pixel, ahead), channels)])
                for v in range(vectors):
                    line = builder.bitcast(builder.gep(coming, [ir.Constant(_I64, v * LANES)]), _BYTES)
                    builder.call(prefetch, [line, *read_keep])
                value = builder.load(builder.gep(weight, [index(depth, p)]))
                nothing = ir.Constant(_VECTOR, ir.Undefined)
                value = builder.insert_element(nothing, value, ir.Constant(_I32, 0))
                value = _shuffle(builder, value, nothing, [0] * LANES)
                source = builder.mul(index(pixel, p), channels)
                for v, total in enumerate(sums):
                    place = _vector_at(builder, feature, builder.add(source, ir.Constant(_I64, v * LANES)))
                    product = builder.fmul(value, builder.load(place, align=4), flags=("contract",))
                    builder.store(builder.fadd(product, builder.load(total), flags=("contract",)), total)
            for v, total in enumerate(sums):
                place = _vector_at(builder, out, builder.add(at, ir.Constant(_I64, v * LANES)))
                builder.store(builder.load(total), place, align=4)
            return context.get_dummy_value()

        return signature, generate

    return add


def _store_transposed(past_cache: bool) -> Callable[..., Any]:
    """Makes f(source, at, source_stride, target, to, target_stride) → None, which computes, for i, j < 16,

    target[to + i · target_stride + j] = source[at + j · source_stride + i]

    past_cache: with non-temporal stores; every row of the target must then begin at a multiple of 64 bytes.
    """

    @intrinsic
    def store(
        typing: Any, source: Any, at: Any, source_stride: Any, target: Any, to: Any, target_stride: Any
    ) -> Any:  # fmt: skip
        whole = types.int64
        signature = types.void(source, whole, whole, target, whole, whole)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, at, source_stride, _, to, target_stride = args
            source = _pointer(context, builder, signature.args[0], args[0])
            target = _pointer(context, builder, signature.args[3], args[3])

            def row(pointer: Any, start: Any, stride: Any, i: int) -> Any:
                return _vector_at(builder, pointer, builder.add(start, builder.mul(stride, ir.Constant(_I64, i))))

            rows = [builder.load(row(source, at, source_stride, i), align=4) for i in range(LANES)]
            step = LANES // 2
            while step:  # rows i and i + step exchange the off-diagonal blocks of step × step that they are part of
                upper = [LANES + lane - step if lane & step else lane for lane in range(LANES)]
                lower = [LANES + lane if lane & step else lane + step for lane in range(LANES)]
                for i in range(LANES):
                    if not i & step:
                        a, b = rows[i], rows[i + step]
                        rows[i], rows[i + step] = _shuffle(builder, a, b, upper), _shuffle(builder, a, b, lower)
                step //= 2
            for i, value in enumerate(rows):
                stored = builder.store(value, row(target, to, target_stride, i), align=64 if past_cache else 4)
                if past_cache:
                    stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
            return context.get_dummy_value()

        return signature, generate

    return store


def _taking(typing: Any, counter: Any) -> Any:
    """Atomic counter[0]++; returns the old value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0])
        return builder.atomic_rmw("add", pointer, ir.Constant(_I64, 1), "monotonic")

    return types.int64(counter), generate


def _publishing(typing: Any) -> Any:
    """Waits until other threads see this thread's stores past the cache, which nothing else orders."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


_take: Any = intrinsic(_taking)
_publish: Any = intrinsic(_publishing)
_sum_16, _sum_32, _sum_48, _sum_64, _sum_80 = (_sum_entries(vectors) for vectors in (1, 2, 3, 4, 5))
_store_block, _store_block_past_cache = _store_transposed(False), _store_transposed(True)


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def _sum_cell(weights, features, depth, pixel, begin, end, channels, sums, at):
    """sums[at + c] = Σ weights[depth[p]] · features[pixel[p] · channels + c], begin ≤ p < end, for all channels c."""
    first = 0
    while channels - first >= 80:
        _sum_80(weights, features, depth, pixel, begin, end, channels, first, sums, at + first)
        first += 80
    left = (channels - first) // 16
    if left == 4:
        _sum_64(weights, features, depth, pixel, begin, end, channels, first, sums, at + first)
    elif left == 3:
        _sum_48(weights, features, depth, pixel, begin, end, channels, first, sums, at + first)
    elif left == 2:
        _sum_32(weights, features, depth, pixel, begin, end, channels, first, sums, at + first)
    elif left == 1:
        _sum_16(weights, features, depth, pixel, begin, end, channels, first, sums, at + first)
    first += left * 16
    if first < channels:
        for c in range(first, channels):
            sums[at + c] = 0
        for p in range(begin, end):
            weight, source = weights[depth[p]], pixel[p] * np.int64(channels)
            for c in range(first, channels):
                sums[at + c] += weight * features[source + c]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _pool_tiles(row_ptr, pixel, depth, weights, features, out, shape, past_cache, counter):
    """Takes tiles by the counter until none is left, and computes their cells.

    A tile is TILE_X rows of about TILE_Y cells: its ends in each row are moved to multiples of 16 cells of the plane, so that
    a block of 16 belongs to one tile and is 64 bytes aligned if the plane is.
    """
    nz, channels, nx, ny = shape
    plane = nx * ny
    across = (ny + TILE_Y - 1) // TILE_Y
    down = (nx + TILE_X - 1) // TILE_X
    sums = np.empty((TILE_Y + LANES) * channels, np.float32)
    whole = channels // LANES * LANES
    while True:
        tile = _take(counter)
        if tile >= nz * down * across:
            break
        z, rest = tile // (down * across), tile % (down * across)
        left = rest % across * TILE_Y
        right = min(left + TILE_Y, ny)
        top = rest // across * TILE_X
        for x in range(top, min(top + TILE_X, nx)):
            begin = (x * ny + left + LANES - 1) // LANES * LANES
            end = min((x * ny + right + LANES - 1) // LANES * LANES, plane)
            for i in range(end - begin):
                cell = z * plane + begin + i
                _sum_cell(
                    weights, features, depth, pixel, row_ptr[cell], row_ptr[cell + 1], channels, sums, i * channels
                )
            blocks = max(end - begin, 0) // LANES * LANES
            for c in range(0, whole, LANES):
                target = (z * channels + c) * plane + begin
                for i in range(0, blocks, LANES):
                    if past_cache:
                        _store_block_past_cache(sums, i * channels + c, channels, out, target + i, plane)
                    else:
                        _store_block(sums, i * channels + c, channels, out, target + i, plane)
            for i in range(end - begin):  # incomplete blocks: the last channels, the last cells of the plane
                for c in range(whole if i < blocks else 0, channels):
                    out[(z * channels + c) * plane + begin + i] = sums[i * channels + c]
    _publish()


def empty_grid(shape: tuple[int, ...]) -> np.ndarray:
    """float32 of this shape, uninitialised, at a multiple of 64 bytes, as stores past the cache need it."""
    size = int(np.prod(shape))
    memory = np.empty(size + LANES, np.float32)
    start = -memory.ctypes.data % 64 // 4
    return memory[start : start + size].reshape(shape)


def pool_cells(
    row_ptr: np.ndarray,
    pixel: np.ndarray,
    depth: np.ndarray,
    weights: np.ndarray,
    features: np.ndarray,
    out: np.ndarray,
    threads: int,
) -> None:
    """out[z, c, x, y] = Σ weights[depth[p]] · features[pixel[p], c] over the entries p of cell (z·nx + x)·ny + y.

    Args:
        row_ptr, pixel, depth: a `PoolPattern`'s. weights: float32[N·D·fH·fW]. features: float32[pixels,C].
        out: float32[nz,C,nx,ny], contiguous.
        threads: 0 for one on each core.

    One thread adds all entries of a cell in order, so the result does not depend on the number of threads. Threads take tiles
    dynamically, so that a crowded tile or a busy core does not make the others wait. (Plain threads, not numba's: those spin
    while they wait, which takes time from the engines' threads, and cannot be started from two threads at once.)
    """
    nz, _, nx, ny = out.shape
    tiles = nz * -(-nx // TILE_X) * -(-ny // TILE_Y)
    wanted = min(threads_of(threads), tiles, max(1, (len(pixel) + nz * nx * ny) // WORTH_A_THREAD))
    counter = np.zeros(1, np.int64)
    past_cache = out.ctypes.data % 64 == 0 and nx * ny % LANES == 0
    arguments = (
        row_ptr, pixel, depth, weights, features.reshape(-1), out.reshape(-1), out.shape, past_cache, counter,
    )  # fmt: skip
    helpers = [threading.Thread(target=_pool_tiles, args=arguments) for _ in range(wanted - 1)]
    for helper in helpers:
        helper.start()
    try:
        _pool_tiles(*arguments)
    finally:
        for helper in helpers:
            helper.join()
