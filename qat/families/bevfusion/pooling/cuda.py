"""BEV pooling on a GPU: a CUDA kernel, compiled through NVRTC on first use, on tensors that are already on the GPU.

pattern = DevicePattern(cache.get(*matrices))                                # uploaded once for a camera geometry
pool_device(pattern, depth_weights, features, out, stream)                   # with __cuda_array_interface__ or DLPack

The depth weights and features that an engine left on the device stay there, and neither the frustum tensor nor the sparse
matrix is made: the kernel (pooling.cu) reads them through the pattern's indices.

It uses `cuda-bindings`, NVIDIA's thin layer over the driver and NVRTC, which TensorRT's engines need anyway
(`qat.engine.cuda`). `cuda-core` would be another package over the few calls used; CuPy is an array library of over 100 MB. Also
required is the NVRTC library of the same CUDA major version, from a toolkit, JetPack or the wheel nvidia-cuda-nvrtc-cu12; no
compiler and no CUDA header.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qat.core.errors import UserError
from qat.engine import cuda
from qat.engine.device_arrays import DeviceArray, check_place, read, stream_handle, wait_for_arrays
from qat.families.bevfusion.pooling.geometry import PoolPattern

SOURCE = Path(__file__).with_name("pooling.cu")
CELLS, THREADS, CHUNK = 32, 256, 128  # constants of the kernel: cells, threads and most channels of a block
C_TYPES = {"float32": "float", "float16": "Half"}
INSTALL = "install it: pip install 'bevqat[gpu]'"


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns CUDA's errors into one line."""
    try:
        yield
    except cuda.CudaError as error:
        raise UserError(f"GPU pooling: {error}") from None
    except UserError as error:
        line = str(error)
        raise UserError(line if line.startswith("GPU pooling: ") else f"GPU pooling: {line}") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _start() -> None:
    """Initialises the driver; within `_refusals`.

    Raises:
        UserError: no package, no driver or no GPU.
    """
    try:
        cuda.call("cuInit", 0)
    except cuda.CudaError as error:
        raise UserError(f"no usable GPU: {error}") from None
    except RuntimeError as error:  # raised by cuda-bindings if there is no driver library
        raise UserError(f"found no CUDA driver ({_reason(error)}), expected one; pool on the CPU") from None


def _supported() -> list[int]:
    """The compute capabilities that NVRTC compiles for, 90 for 9.0. Raises `UserError` without NVRTC."""
    try:
        return list(cuda.call("nvrtcGetSupportedArchs"))
    except cuda.CudaError:
        raise
    except RuntimeError as error:
        raise UserError(f"found no NVRTC library ({_reason(error)}), expected one; {INSTALL}") from None


def gpu_problem() -> str | None:
    """Why this machine cannot pool on its first GPU, in one line: no package, driver, GPU, or NVRTC for it; None if it can.

    The kernel is not compiled: a failure to compile is not a problem of the machine.
    """
    try:
        with _refusals():
            _start()
            if not cuda.call("cuDeviceGetCount"):
                return "GPU pooling: found no GPU, expected one"
            _architecture(*_compute_capability(0))
    except UserError as error:
        return str(error)
    return None


def compile_kernel(
    architecture: str, channels: int, weight: str = "float", feature: str = "float", result: str = "float"
) -> bytes:
    """Compiles pooling.cu; needs NVRTC, and no GPU.

    Args:
        architecture: compute_87 for PTX, sm_87 for a CUBIN.
        channels: C.
        weight, feature, result: types of depth weights, features and grid, float or Half.

    Raises:
        UserError: no NVRTC, or it refuses the source, with its log.
    """
    options = [
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        f"-DCHANNELS={channels}",
        f"-DWEIGHT={weight}",
        f"-DFEATURE={feature}",
        f"-DRESULT={result}",
    ]
    binary = architecture.startswith("sm_")
    size, get = ("nvrtcGetCUBINSize", "nvrtcGetCUBIN") if binary else ("nvrtcGetPTXSize", "nvrtcGetPTX")
    with _refusals():
        _supported()  # raises without NVRTC
        program = cuda.call("nvrtcCreateProgram", SOURCE.read_bytes(), b"pooling.cu", 0, None, None)
        try:
            cuda.call("nvrtcCompileProgram", program, len(options), [option.encode() for option in options])
            code = bytearray(cuda.call(size, program))
            cuda.call(get, program, code)
        except cuda.CudaError as error:
            if error.call != "nvrtcCompileProgram":
                raise
            log = bytearray(cuda.call("nvrtcGetProgramLogSize", program))
            cuda.call("nvrtcGetProgramLog", program, log)
            text = " ".join(log.decode(errors="replace").replace("\0", " ").split())
            raise UserError(f"{SOURCE.name}: NVRTC for {architecture}: {error.name}: {text}") from None
        finally:
            cuda.call("nvrtcDestroyProgram", program)
    return bytes(code)


def _architecture(major: int, minor: int) -> str:
    """The target for this compute capability: machine code, or PTX for the driver to compile if the GPU is newer than NVRTC.

    Raises:
        UserError: the GPU is older than this NVRTC compiles for.
    """
    known, wanted = _supported(), 10 * major + minor
    if wanted in known:
        return f"sm_{wanted}"
    if older := [value for value in known if value < wanted]:
        return f"compute_{max(older)}"
    raise UserError(
        f"found a GPU of compute capability {major}.{minor}, expected one that this NVRTC compiles for, "
        f"from {min(known) / 10:.1f}; install cuda-bindings and NVRTC of an older CUDA"
    )


def _compute_capability(device: int) -> tuple[int, int]:
    kinds, handle = cuda.module("cu").CUdevice_attribute, cuda.call("cuDeviceGet", device)
    major, minor = (
        cuda.call("cuDeviceGetAttribute", kind, handle)
        for kind in (
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return major, minor


@cache
def _context(device: int) -> Any:
    """The device's primary context, which torch, TensorRT and the CUDA runtime use too; kept until the process ends."""
    try:
        return cuda.call("cuDevicePrimaryCtxRetain", cuda.call("cuDeviceGet", device))
    except cuda.CudaError as error:
        raise UserError(f"GPU {device}: {error}") from None


@contextmanager
def _current(device: int) -> Iterator[None]:
    """Makes the device's context current in this thread inside the block; CUDA's errors there are one line."""
    with _refusals():
        _start()
        cuda.call("cuCtxPushCurrent", _context(device))
        try:
            yield
        finally:
            cuda.call("cuCtxPopCurrent")


_KERNELS: dict[tuple[Any, ...], Any] = {}
_COMPILING = threading.Lock()


def _kernel(device: int, channels: int, weight: str, feature: str, result: str) -> Any:
    """The loaded kernel, compiled at the first call for these; the device's context is current."""
    key = (device, channels, weight, feature, result)
    with _COMPILING:
        if key not in _KERNELS:
            code = compile_kernel(_architecture(*_compute_capability(device)), channels, weight, feature, result)
            _KERNELS[key] = cuda.call("cuModuleGetFunction", cuda.call("cuModuleLoadData", code), b"pool")
    return _KERNELS[key]


class DevicePattern:
    """A `PoolPattern` on a GPU: 8 bytes for each frustum point in the grid, 4 for each cell.

    device: the GPU's number. shape: (nz, nx, ny). pixels: N·fH·fW. bins: D. ready: whether its memory holds a pattern.
    """

    def __init__(self, pattern: PoolPattern, device: int = 0) -> None:
        """Allocates and uploads.

        Raises:
            UserError: no package, driver or such GPU, or not enough of its memory.
        """
        self.device = device
        self._buffer: cuda.DeviceBuffer | None = None
        self.upload(pattern)

    def upload(self, pattern: PoolPattern) -> None:
        """Replaces this pattern by another, in the same memory if it fits; waits for the GPU's work.

        Do not call it between the capture of a CUDA graph with `pool_device` and its replay: the addresses may change. If it
        raises, there is no pattern until the next upload.
        """
        arrays = [np.ascontiguousarray(a, np.int32) for a in (pattern.row_ptr, pattern.pixel, pattern.depth)]
        places = np.cumsum([0, *(-(-array.nbytes // 256) * 256 for array in arrays)])
        self.ready = False
        with _current(self.device):
            cuda.call("cuCtxSynchronize")
            if self._buffer is None or places[-1] > self._buffer.size:
                self._buffer = None  # freed first: there may not be room for both
                self._buffer = cuda.DeviceBuffer(int(places[-1]))
            self.row_ptr, self.pixel, self.depth = (self._buffer.pointer + int(place) for place in places[:-1])
            for address, array in zip((self.row_ptr, self.pixel, self.depth), arrays, strict=True):
                if array.nbytes:
                    cuda.call("cuMemcpyHtoD", address, array.ctypes.data, array.nbytes)
            # A copy from pageable memory may return before the last of it has arrived, and streams need not wait for it.
            cuda.call("cuCtxSynchronize")
        self.shape, self.pixels, self.bins = pattern.shape, pattern.pixels, pattern.bins
        self.ready = True

    def close(self) -> None:
        """Frees the memory; afterwards only `upload` works."""
        self.ready, self._buffer = False, None

    def __enter__(self) -> DevicePattern:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _array(name: str, value: Any, stream: int, device: int, write: bool = False) -> DeviceArray:
    """Reads an array.

    Raises:
        UserError: not on a GPU, not contiguous, of another type than float32 and float16, or read-only where written.
    """
    array = read(value, f"GPU pooling: {name}", stream, device, write)
    if array.dtype not in C_TYPES:
        raise UserError(f"GPU pooling: {name}: found {array.spec}, expected {' or '.join(C_TYPES)}")
    return array


def check_arrays(
    pattern: DevicePattern | PoolPattern, depth_weights: Any, features: Any, out: Any, stream: int = 0, device: int = 0
) -> list[DeviceArray]:
    """`pool_device`'s checks of the arrays' descriptions; needs no GPU. stream: an integer handle.

    Raises:
        UserError: like `pool_device`.
    """
    weights = _array("depth weights", depth_weights, stream, device)
    context = _array("features", features, stream, device)
    grid = _array("out", out, stream, device, write=True)
    if len(weights.shape) == 4 and len(context.shape) == 4:
        n, fh, fw, channels = context.shape
        fits = n * fh * fw == pattern.pixels and weights.shape == (n, pattern.bins, fh, fw) and channels > 0
    else:
        fits = False
    if not fits:
        raise UserError(
            f"GPU pooling: found depth weights {list(weights.shape)} and features {list(context.shape)}, "
            f"expected [N,D,fH,fW] and [N,fH,fW,C] with N·fH·fW = {pattern.pixels} and D = {pattern.bins} as in the pattern"
        )
    nz, nx, ny = pattern.shape
    if grid.shape != (1, nz * channels, nx, ny):
        raise UserError(f"GPU pooling: out: found {list(grid.shape)}, expected {[1, nz * channels, nx, ny]}")
    return [weights, context, grid]


def pool_device(pattern: DevicePattern, depth_weights: Any, features: Any, out: Any, stream: Any = 0) -> None:
    """Queues BEV pooling on a stream, and does not wait for it.

    The same sums in the same order as `qat.runtime.pool`: bit-identical from run to run. FP16 inputs are summed in FP32 and
    an FP16 grid is rounded once. The kernel is compiled at the first call for a number of channels and these types (some
    tenths of a second); later calls queue one launch and may be captured in a CUDA graph.

    Args:
        pattern: of the arrays' GPU.
        depth_weights: [N,D,fH,fW] on the GPU. features: [N,fH,fW,C], channels-last. Each float32 or float16, contiguous,
            with `__cuda_array_interface__` or DLPack; work on the stream that this names is waited for.
        out: float32 or float16 [1, C·nz, nx, ny], x first; wholly written.
        stream: a CUstream or its address, 0 for the default stream; or CuPy's, torch's or an engine's `stream`.

    Raises:
        UserError: arrays of other sizes or types, on the host or another GPU, a pattern that was closed or whose upload
            failed, no NVRTC, or the driver refuses.
    """
    if not pattern.ready:
        raise UserError("GPU pooling: found a pattern that was closed or whose upload failed; call its upload()")
    handle = stream_handle(stream)
    arrays = check_arrays(pattern, depth_weights, features, out, handle, pattern.device)
    weights, context, grid = arrays
    nz, nx, ny = pattern.shape
    cells, channels = nz * nx * ny, context.shape[3]
    if not cells:
        return
    with _current(pattern.device):
        for name, array in zip(("depth weights", "features", "out"), arrays, strict=True):
            check_place(array, f"GPU pooling: {name}", pattern.device)
        kernel = _kernel(pattern.device, channels, *(C_TYPES[array.dtype] for array in arrays))
        wait_for_arrays(arrays, handle)
        values = (pattern.row_ptr, pattern.pixel, pattern.depth, weights.pointer, context.pointer, grid.pointer)
        cuda.call(
            "cuLaunchKernel",
            kernel, -(-cells // CELLS), -(-channels // min(channels, CHUNK)), 1, THREADS, 1, 1, 0, handle,
            ((*values, cells, nx * ny), (*[ctypes.c_void_p] * 6, ctypes.c_int, ctypes.c_int)), 0,
        )  # fmt: skip
