"""The GPU's kernel without a GPU: its source compiled as C++ and run thread by thread, and compiled by NVRTC."""

import ctypes
import itertools
import platform
import shutil
import subprocess

import llvmlite.binding
import numpy as np
import pytest

from qat.core.errors import UserError
from qat.engine import cuda
from qat.families.bevfusion.pooling import cuda as pooling_cuda
from qat.families.bevfusion.pooling.cpu import pool
from qat.families.bevfusion.pooling.cuda import (
    SOURCE,
    DevicePattern,
    check_arrays,
    compile_kernel,
    gpu_problem,
    pool_device,
)
from qat.families.bevfusion.pooling.geometry import pooling_pattern
from tests.messages import refused

# The words of CUDA that pooling.cu uses, for a C++ compiler: one operating system's thread for each of a block's, which takes the
# blocks one after another (so that a block's shared memory can be a static), and barriers that are barriers.
SHIM = """
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
#define __device__
#define __global__
#define __launch_bounds__(threads)
#define __shared__ static
struct Index { int x, y; };
static thread_local Index threadIdx, blockIdx;
static std::unique_ptr<std::barrier<>> block, warps[8];
static void __syncthreads() { block->arrive_and_wait(); }
static void __syncwarp() { warps[threadIdx.x / 32]->arrive_and_wait(); }
static float half_to_float(unsigned short bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return half;
}
static unsigned short float_to_half(float value) {
    _Float16 half = value;
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
#include "pooling.cu"
extern "C" void launch(int across, int down, const int *row_ptr, const int *pixel, const int *depth, const WEIGHT *weights,
                       const FEATURE *features, RESULT *out, int cells, int plane) {
    block = std::make_unique<std::barrier<>>(256);
    for (auto &warp : warps) warp = std::make_unique<std::barrier<>>(32);
    std::vector<std::thread> threads;
    for (int t = 0; t < 256; ++t)
        threads.emplace_back([=] {
            threadIdx = {t, 0};
            for (int y = 0; y < down; ++y)
                for (int x = 0; x < across; ++x) {
                    blockIdx = {x, y};
                    pool(row_ptr, pixel, depth, weights, features, out, cells, plane);
                    __syncthreads();
                }
        });
    for (auto &thread : threads) thread.join();
}
"""
NUMPY = {"float": np.float32, "Half": np.float16}


def built(folder, channels, weight, feature, result):
    """pooling.cu as a host library."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the kernel's source with")
    source = folder / "shim.cpp"
    source.write_text(SHIM)
    library = folder / "pooling.so"
    defines = [
        f"-D{k}={v}" for k, v in {"CHANNELS": channels, "WEIGHT": weight, "FEATURE": feature, "RESULT": result}.items()
    ]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", f"-I{SOURCE.parent}"]
    done = subprocess.run([compiler, *flags, *defines, source, "-o", library], capture_output=True, text=True)
    if done.returncode and ("barrier" in done.stderr or "_Float16" in done.stderr or "c++20" in done.stderr):
        pytest.skip(f"this g++ lacks C++20's barrier or _Float16: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def case(channels, shape, seed=0, bins=9, plane=40):
    """Points of two cameras, three fifths of them in five cells (one with hundreds), some outside; one cell row empty."""
    random = np.random.default_rng(seed)
    nz, nx, ny = shape
    cells = random.integers(-1, [nx, ny + 1, nz + 1], (2 * bins * plane, 3))
    crowded = random.random(len(cells)) < 0.6
    cells[crowded] = np.array([[0, 0, 0], [2, 3, 0], [2, 4, 0], [nx - 2, ny - 1, nz - 1], [2, 3, 0]])[
        random.integers(0, 5, crowded.sum())
    ]
    points = (cells.reshape(2, bins, 5, plane // 5, 3) + 0.5).astype(np.float32)
    pattern = pooling_pattern(points, [0.0, nx, 1.0], [0.0, ny, 1.0], [0.0, nz, 1.0])
    weights = random.random((2, bins, 5, plane // 5), np.float32)
    features = random.standard_normal((2, 5, plane // 5, channels)).astype(np.float32)
    return pattern, weights, features


def fused_multiply_adds():
    return platform.machine() in ("aarch64", "arm64") or llvmlite.binding.get_host_cpu_features().get("fma", False)


@pytest.mark.parametrize(
    ("channels", "types", "shape"),
    [
        (10, ("float", "float", "float"), (2, 9, 11)),
        (80, ("Half", "Half", "Half"), (1, 7, 13)),
        (150, ("float", "Half", "float"), (1, 8, 8)),  # more channels than a block has
    ],
    ids=["fp32, two layers", "fp16", "mixed, two blocks of channels"],
)
def test_the_kernels_source_gives_the_cpus_result(tmp_path, channels, types, shape):
    library = built(tmp_path, channels, *types)
    pattern, weights, features = case(channels, shape)
    assert np.diff(pattern.row_ptr).max() > 64 and (np.diff(pattern.row_ptr) == 0).any()
    nz, nx, ny = shape
    weights, features = weights.astype(NUMPY[types[0]]), features.astype(NUMPY[types[1]])
    out = np.full((1, nz * channels, nx, ny), np.nan, NUMPY[types[2]])
    cells = nz * nx * ny
    pointers = [
        a.ctypes.data_as(ctypes.c_void_p)
        for a in (pattern.row_ptr, pattern.pixel, pattern.depth, weights, features, out)
    ]
    library.launch(-(-cells // 32), -(-channels // 128), *pointers, cells, nx * ny)
    expected = pool(pattern, weights.astype(np.float32), features.astype(np.float32))
    if fused_multiply_adds():
        np.testing.assert_array_equal(out, expected.astype(out.dtype))
    else:
        np.testing.assert_allclose(out, expected, rtol=1e-5 if out.dtype == np.float32 else 1e-3, atol=1e-4)
    exact = np.zeros((cells, channels))
    values = weights.reshape(-1)[pattern.depth].astype(np.float64)
    np.add.at(exact, pattern.cell, values[:, None] * features.reshape(-1, channels)[pattern.pixel].astype(np.float64))
    exact = exact.reshape(nz, nx * ny, channels).transpose(0, 2, 1).reshape(out.shape)
    tolerance = 2e-5 if out.dtype == np.float32 else 2e-3
    np.testing.assert_allclose(out, exact, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def nvrtc():
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed: pip install 'bevqat[gpu]'")
    from cuda.bindings import nvrtc

    try:
        _, known = nvrtc.nvrtcGetSupportedArchs()
    except RuntimeError as error:
        pytest.skip(f"no NVRTC library: {error}")
    return known


@pytest.mark.parametrize("capability", [72, 87, 90])
def test_nvrtc_compiles_the_kernel_for_jetson_and_hopper(nvrtc, capability):
    if capability not in nvrtc:
        pytest.skip(f"this NVRTC no longer compiles for {capability / 10}")
    for types in itertools.product(("float", "Half"), repeat=3):
        ptx = compile_kernel(f"compute_{capability}", 80, *types).decode()
        assert f".target sm_{capability}" in ptx and ".entry pool(" in ptx and "fma.rn.f32" in ptx
        assert ("cvt.f32.f16" in ptx) == ("Half" in types[:2]) and ("cvt.rn.f16.f32" in ptx) == (types[2] == "Half")
    assert compile_kernel(f"sm_{capability}", 80).startswith(b"\x7fELF")
    compile_kernel(f"compute_{capability}", 1000)  # channels of several blocks: no more shared memory than a block has


def test_nvrtcs_complaint_is_one_line(nvrtc):
    with pytest.raises(
        UserError, match=r"pooling.cu: NVRTC for compute_90: NVRTC_ERROR_COMPILATION: .*Quarter"
    ) as error:
        compile_kernel("compute_90", 80, "Quarter")
    assert "\n" not in str(error.value)


class OnDevice:
    """Only what an array on a GPU says of itself; nobody looks at its address here."""

    def __init__(self, shape, typestr="<f4", strides=None, read_only=False):
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (1 << 20, read_only),
            "strides": strides,
            "version": 3,
        }


def test_arrays_that_the_kernel_could_not_read_are_refused():
    pattern, weights, features = case(10, (2, 9, 11))
    good = {
        "depth_weights": OnDevice(weights.shape),
        "features": OnDevice(features.shape, "<f2"),
        "out": OnDevice((1, 20, 9, 11)),
    }
    assert [array.dtype for array in check_arrays(pattern, **good)] == ["float32", "float16", "float32"]
    contiguous = OnDevice(features.shape, strides=(40 * 10 * 4, 8 * 10 * 4, 10 * 4, 4))
    check_arrays(pattern, **good | {"features": contiguous})
    for change, message in (
        ({"features": features}, "features: found an array in the host's memory, expected one on cuda:0"),
        ({"features": [1.0]}, "features: found list, expected an array with __cuda_array_interface__ or __dlpack__"),
        ({"features": OnDevice(features.shape, "<f8")}, "features: found float64.*, expected float32 or float16"),
        ({"features": OnDevice(features.shape, strides=(4, 8, 16, 32))}, "strides that are not in C order"),
        ({"features": OnDevice(features.shape[1:])}, r"found depth weights \[2, 9, 5, 8\] and features \[5, 8, 10\]"),
        ({"features": OnDevice((3, 5, 8, 10))}, "= 80 and D = 9 as in the pattern"),
        ({"depth_weights": OnDevice((2, 8, 5, 8))}, "D = 9 as in the pattern"),
        ({"depth_weights": OnDevice((2, 10, 5, 8))}, "D = 9 as in the pattern"),
        ({"depth_weights": OnDevice((2, 9, 8, 5))}, "as in the pattern"),
        ({"out": OnDevice((1, 20, 9, 11), read_only=True)}, "out: found a read-only array, expected one that may"),
        ({"out": OnDevice((20, 9, 11))}, r"out: found \[20, 9, 11\], expected \[1, 20, 9, 11\]"),
    ):
        with pytest.raises(UserError, match=message):
            check_arrays(pattern, **good | change)


class Capsule:
    """numpy's DLPack capsules, said to be of a GPU."""

    def __init__(self, array, device=0):
        self.array, self.device, self.asked = array, device, None

    def __dlpack_device__(self):
        return (2, self.device)

    def __dlpack__(self, stream=None):
        self.asked = stream
        return self.array.__dlpack__()


def test_arrays_with_dlpack_are_taken_and_told_the_stream():
    pattern, weights, features = case(10, (2, 9, 11))
    given = Capsule(weights), Capsule(features.astype(np.float16)), Capsule(np.zeros((1, 20, 9, 11), np.float32))
    arrays = check_arrays(pattern, *given, stream=7)
    assert [array.pointer for array in arrays] == [capsule.array.ctypes.data for capsule in given]
    assert [capsule.asked for capsule in given] == [7, 7, 7]
    with refused("GPU pooling: features", "found an array on cuda:1", "expected cuda:0"):
        check_arrays(pattern, given[0], Capsule(features, 1), given[2])


class Gpu:
    """Stands for CUDA where there is none: notes the calls, hands out addresses, refuses what it is told to."""

    def __init__(self):
        self.calls, self.refuse, self.place = [], set(), itertools.count(1 << 20, 1 << 20)

    def __call__(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name in self.refuse:
            raise cuda.CudaError(name, "cudaErrorMemoryAllocation", "out of memory")
        return next(self.place) if name == "cudaMalloc" else None


@pytest.fixture
def gpu(monkeypatch):
    stand_in = Gpu()
    monkeypatch.setattr(cuda, "call", stand_in)
    monkeypatch.setattr(cuda, "device_of", lambda pointer: 0)
    monkeypatch.setattr(pooling_cuda, "_context", lambda device: "primary")
    monkeypatch.setattr(pooling_cuda, "_kernel", lambda *key: key)
    return stand_in


def arrays_of(weights, features, shape):
    nz, nx, ny = shape
    return OnDevice(weights.shape), OnDevice(features.shape), OnDevice((1, nz * features.shape[3], nx, ny))


def test_a_pattern_whose_memory_is_gone_is_refused(gpu):
    pattern, weights, features = case(10, (2, 9, 11))
    arrays = arrays_of(weights, features, (2, 9, 11))
    on_device = DevicePattern(pattern)
    pool_device(on_device, *arrays)
    assert gpu.calls[-2][0] == "cuLaunchKernel"

    larger, *_ = case(10, (2, 30, 30), bins=30)
    gpu.refuse = {"cudaMalloc"}
    with pytest.raises(UserError, match=r"GPU pooling: GPU memory of .* MiB: out of memory"):
        on_device.upload(larger)
    with refused("GPU pooling", "found a pattern that was closed or whose upload failed"):
        pool_device(on_device, *arrays)
    gpu.refuse = set()
    on_device.upload(pattern)
    pool_device(on_device, *arrays)
    on_device.close()
    with pytest.raises(UserError, match="was closed"):
        pool_device(on_device, *arrays)


def test_the_launch_is_on_an_engines_own_stream_and_behind_what_wrote_the_arrays(gpu, monkeypatch):
    pattern, weights, features = case(10, (2, 9, 11))
    given, context, out = arrays_of(weights, features, (2, 9, 11))
    given.__cuda_array_interface__["stream"] = 5
    monkeypatch.setattr(cuda, "wait_for", lambda stream, other: gpu.calls.append(("waits", stream, other)))
    stream = cuda.Stream.__new__(cuda.Stream)
    stream.handle = 77
    pool_device(DevicePattern(pattern), given, context, out, stream)
    waits, launch = gpu.calls[-3:-1]
    assert waits == ("waits", 77, 5)
    assert launch[0] == "cuLaunchKernel" and launch[9] == 77
    assert launch[1][2:] == ("float", "float", "float") and launch[10][0][6:] == (2 * 9 * 11, 99)


def test_where_no_gpu_can_be_used_the_reason_is_one_line():
    problem = gpu_problem()
    if problem is None:
        pytest.skip("a GPU can be used here: tests/gpu has it")
    assert problem.startswith("GPU pooling: ") and "\n" not in problem and "GPU pooling: GPU pooling" not in problem


def test_a_kernel_that_does_not_compile_is_no_problem_of_the_machines(nvrtc, tmp_path, monkeypatch):
    source = tmp_path / "pooling.cu"
    source.write_text("no kernel")
    call = cuda.call
    monkeypatch.setattr(pooling_cuda, "SOURCE", source)
    monkeypatch.setattr(pooling_cuda, "_compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "call", lambda name, *given: call(name, *given) if name.startswith("nvrtc") else 1)
    assert gpu_problem() is None
    with pytest.raises(UserError, match=r"pooling.cu: NVRTC for sm_90"):
        compile_kernel("sm_90", 8)
