"""BEV pooling on a GPU: a CUDA kernel, compiled through NVRTC on first use, over tensors that are there already.

pattern = DevicePattern(cache.get(*matrices))                                # uploaded once for a camera geometry
pool_device(pattern, depth_weights, features, out, stream)                   # anything with __cuda_array_interface__

The depth weights and features that an engine left on the device stay there, and neither the frustum tensor nor the sparse
matrix is made: the kernel (pooling.cu) reads them through the pattern's indices.

It goes through `cuda-bindings`, NVIDIA's own thin layer over the driver and NVRTC, which TensorRT's engines need anyway.
`cuda-core` would be another package over the same calls, of which we need six; CuPy brings an array library of over 100 MB.
What is needed besides is the NVRTC library of the same CUDA major version, from a toolkit, JetPack or the wheel
nvidia-cuda-nvrtc-cu12; no compiler and no CUDA header.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qat.core.errors import UserError
from qat.core.geometry import PoolPattern

SOURCE = Path(__file__).with_name("pooling.cu")
CELLS, THREADS, CHUNK = 32, 256, 128  # the kernel's: cells of a block, threads of a block, channels of a block at most
C_TYPES = {"<f4": "float", "<f2": "Half"}
INSTALL = "install it: pip install 'bevqat[gpu]'"


def _cuda() -> tuple[Any, Any]:
    """The modules `driver` and `nvrtc` of cuda-bindings.

    Raises:
        UserError: it is not installed.
    """
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError:
        raise UserError(f"GPU pooling: found no package cuda-bindings, expected it; {INSTALL}") from None
    return driver, nvrtc


def _check(what: str, answer: Sequence[Any]) -> Any:
    """The results of a call of cuda-bindings, whose first one is its status.

    Raises:
        UserError: the status is not success.
    """
    status, *results = answer
    if status.value:
        raise UserError(f"GPU pooling: {what}: found {status.name}, expected success")
    return results[0] if len(results) == 1 else results


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _start() -> tuple[Any, Any]:
    """`_cuda`, the driver initialised.

    Raises:
        UserError: no package, no driver or no GPU.
    """
    driver, nvrtc = _cuda()
    try:
        _check("no usable GPU: cuInit", driver.cuInit(0))
    except RuntimeError as error:  # cuda-bindings' own, where there is no driver library
        raise UserError(
            f"GPU pooling: found no CUDA driver ({_reason(error)}), expected one; pool on the CPU"
        ) from None
    return driver, nvrtc


def gpu_problem() -> str | None:
    """Why pooling on the first GPU cannot work here, in one line; None if it can."""
    try:
        driver, _ = _start()
        if not _check("cuDeviceGetCount", driver.cuDeviceGetCount()):
            return "GPU pooling: found no GPU, expected one"
        _code(*_compute_capability(0), 1, "float", "float", "float")
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
        weight, feature, result: what depth weights, features and grid hold, float or Half.

    Raises:
        UserError: no NVRTC, or it refuses the source, with its log.
    """
    _, nvrtc = _cuda()
    source = SOURCE.read_bytes()
    try:
        program = _check("nvrtcCreateProgram", nvrtc.nvrtcCreateProgram(source, b"pooling.cu", 0, None, None))
    except RuntimeError as error:
        raise UserError(f"GPU pooling: found no NVRTC library ({_reason(error)}), expected one; {INSTALL}") from None
    options = [
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        f"-DCHANNELS={channels}",
        f"-DWEIGHT={weight}",
        f"-DFEATURE={feature}",
        f"-DRESULT={result}",
    ]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status.value:
            log = bytearray(_check("nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            text = " ".join(log.decode(errors="replace").replace("\0", " ").split())
            raise UserError(f"{SOURCE.name}: NVRTC for {architecture}: {status.name}: {text}")
        kind = "CUBIN" if architecture.startswith("sm_") else "PTX"
        code = bytearray(_check(kind, getattr(nvrtc, f"nvrtcGet{kind}Size")(program)))
        _check(kind, getattr(nvrtc, f"nvrtcGet{kind}")(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _code(major: int, minor: int, channels: int, weight: str, feature: str, result: str) -> bytes:
    """Machine code for this compute capability; PTX for the driver to compile if the GPU is newer than NVRTC.

    Raises:
        UserError: the GPU is older than this NVRTC compiles for.
    """
    _, nvrtc = _cuda()
    try:
        known = _check("nvrtcGetSupportedArchs", nvrtc.nvrtcGetSupportedArchs())
    except RuntimeError as error:
        raise UserError(f"GPU pooling: found no NVRTC library ({_reason(error)}), expected one; {INSTALL}") from None
    wanted = 10 * major + minor
    if wanted in known:
        architecture = f"sm_{wanted}"
    elif older := [value for value in known if value < wanted]:
        architecture = f"compute_{max(older)}"
    else:
        raise UserError(
            f"GPU pooling: found a GPU of compute capability {major}.{minor}, expected one that this NVRTC compiles for, "
            f"from {min(known) / 10:.1f}; install cuda-bindings and NVRTC of an older CUDA"
        )
    return compile_kernel(architecture, channels, weight, feature, result)


def _compute_capability(device: int) -> tuple[int, int]:
    driver, _ = _start()
    attribute = driver.CUdevice_attribute
    handle = _check("cuDeviceGet", driver.cuDeviceGet(device))
    names = ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR")
    major, minor = (
        _check("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(getattr(attribute, name), handle)) for name in names
    )
    return major, minor


@cache
def _context(device: int) -> Any:
    """The device's primary context, which torch, TensorRT and the CUDA runtime use too; kept until the process ends."""
    driver, _ = _start()
    return _check(
        "cuDevicePrimaryCtxRetain",
        driver.cuDevicePrimaryCtxRetain(_check(f"GPU {device}: cuDeviceGet", driver.cuDeviceGet(device))),
    )


@contextmanager
def _current(device: int) -> Iterator[Any]:
    """Makes the device's context this thread's for a while; gives the driver."""
    driver, _ = _start()
    _check("cuCtxPushCurrent", driver.cuCtxPushCurrent(_context(device)))
    try:
        yield driver
    finally:
        driver.cuCtxPopCurrent()


_KERNELS: dict[tuple[Any, ...], Any] = {}
_COMPILING = threading.Lock()


def _kernel(device: int, channels: int, weight: str, feature: str, result: str) -> Any:
    """The loaded kernel, compiled at the first call for these; the device's context is current."""
    key = (device, channels, weight, feature, result)
    with _COMPILING:
        if key not in _KERNELS:
            driver, _ = _cuda()
            code = _code(*_compute_capability(device), channels, weight, feature, result)
            module = _check("cuModuleLoadData", driver.cuModuleLoadData(code))
            _KERNELS[key] = _check("cuModuleGetFunction", driver.cuModuleGetFunction(module, b"pool"))
    return _KERNELS[key]


class DevicePattern:
    """A `PoolPattern` on a GPU: 8 bytes for each frustum point in the grid, 4 for each cell.

    device: the GPU's number. shape: (nz, nx, ny). pixels: N·fH·fW. last_depth: the pattern's.
    """

    def __init__(self, pattern: PoolPattern, device: int = 0) -> None:
        """Allocates and uploads.

        Raises:
            UserError: no package, driver or such GPU, or not enough of its memory.
        """
        self.device = device
        self._memory = 0
        self._capacity = 0
        self.upload(pattern)

    def upload(self, pattern: PoolPattern) -> None:
        """Puts another pattern in this one's place, in the same memory where it fits; waits for what the GPU is doing.

        Not between the capture of a CUDA graph with `pool_device` in it and its replay: the addresses may change.
        """
        arrays = [np.ascontiguousarray(a, np.int32) for a in (pattern.row_ptr, pattern.pixel, pattern.depth)]
        places = np.cumsum([0, *(-(-array.nbytes // 256) * 256 for array in arrays)])
        with _current(self.device) as driver:
            _check("cuCtxSynchronize", driver.cuCtxSynchronize())
            if places[-1] > self._capacity:
                self._free(driver)
                what = f"{places[-1] / 1e6:.0f} MB of GPU memory"
                self._memory = int(_check(what, driver.cuMemAlloc(int(places[-1]))))
                self._capacity = int(places[-1])
            self.row_ptr, self.pixel, self.depth = (self._memory + int(place) for place in places[:-1])
            for address, array in zip((self.row_ptr, self.pixel, self.depth), arrays, strict=True):
                if array.nbytes:
                    _check("cuMemcpyHtoD", driver.cuMemcpyHtoD(address, array.ctypes.data, array.nbytes))
            # A copy from pageable memory may return before the last of it has arrived, and streams need not wait for it.
            _check("cuCtxSynchronize", driver.cuCtxSynchronize())
        self.shape, self.pixels, self.last_depth = pattern.shape, pattern.pixels, pattern.last_depth

    def _free(self, driver: Any) -> None:
        if self._memory:
            driver.cuMemFree(self._memory)
        self._memory = self._capacity = 0

    def close(self) -> None:
        """Gives the memory back; no further use."""
        if self._memory:
            with _current(self.device) as driver:
                self._free(driver)

    def __enter__(self) -> DevicePattern:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter is shutting down, and the driver with it
            self.close()


@dataclass(frozen=True)
class _Array:
    """What `__cuda_array_interface__` says. stream: the one whose work the contents wait for, or None."""

    address: int
    shape: tuple[int, ...]
    c_type: str
    stream: int | None


def _array(name: str, value: Any, write: bool = False) -> _Array:
    """Reads the interface.

    Raises:
        UserError: not on a GPU, not contiguous, of another type than float32 and float16, or read-only where written.
    """
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is None:
        raise UserError(
            f"GPU pooling: {name}: found {type(value).__name__}, expected an array on the GPU "
            "(with __cuda_array_interface__); for numpy arrays there is qat.runtime.pool"
        )
    shape, kind = tuple(interface["shape"]), interface["typestr"]
    address, read_only = interface["data"]
    strides = interface.get("strides")
    size = int(kind[2:]) if kind[2:].isdigit() else 0
    expected = tuple(int(np.prod(shape[i + 1 :])) * size for i in range(len(shape)))
    strided = strides is not None and any(
        found != wanted for found, wanted, length in zip(strides, expected, shape, strict=True) if length > 1
    )
    if kind not in C_TYPES or strided or (write and read_only):
        how = f"{', strided' if strided else ''}{', read-only' if write and read_only else ''}"
        raise UserError(
            f"GPU pooling: {name}: found {kind}{list(shape)}{how}, expected contiguous"
            f"{', writable' if write else ''} <f4 or <f2"
        )
    return _Array(int(address or 0), shape, C_TYPES[kind], interface.get("stream"))


def check_arrays(pattern: DevicePattern | PoolPattern, depth_weights: Any, features: Any, out: Any) -> list[_Array]:
    """What `pool_device` refuses is refused here; needs no GPU.

    Raises:
        UserError: as `pool_device`.
    """
    weights = _array("depth weights", depth_weights)
    context = _array("features", features)
    grid = _array("out", out, write=True)
    if len(weights.shape) == 4 and len(context.shape) == 4:
        n, fh, fw, channels = context.shape
        _, bins, *_ = weights.shape
        fits = n * fh * fw == pattern.pixels and weights.shape == (n, bins, fh, fw) and channels > 0
    else:
        fits = False
    if not fits:
        raise UserError(
            f"GPU pooling: found depth weights {list(weights.shape)} and features {list(context.shape)}, "
            f"expected [N,D,fH,fW] and [N,fH,fW,C] with N·fH·fW = {pattern.pixels} as in the pattern"
        )
    if pattern.last_depth >= int(np.prod(weights.shape)):
        raise UserError(f"GPU pooling: found {bins} bins, fewer depth bins than the pattern's")
    nz, nx, ny = pattern.shape
    if grid.shape != (1, nz * channels, nx, ny):
        raise UserError(f"GPU pooling: out: found {list(grid.shape)}, expected {[1, nz * channels, nx, ny]}")
    return [weights, context, grid]


def _wait_for(driver: Any, producers: set[int], stream: int) -> None:
    """Makes the stream wait for what has been queued on these others."""
    for producer in producers - {stream}:
        flags = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
        event = _check("cuEventCreate", driver.cuEventCreate(flags))
        try:
            _check("cuEventRecord", driver.cuEventRecord(event, producer))
            _check("cuStreamWaitEvent", driver.cuStreamWaitEvent(stream, event, 0))
        finally:
            driver.cuEventDestroy(event)  # freed when it has happened


def pool_device(pattern: DevicePattern, depth_weights: Any, features: Any, out: Any, stream: Any = 0) -> None:
    """Queues BEV pooling on a stream, and does not wait for it.

    The same sums in the same order as `qat.runtime.pool`: bit-identical from run to run. FP16 inputs are summed in FP32 and
    an FP16 grid is rounded once. The kernel is compiled at the first call for a number of channels and these types (some
    tenths of a second); later calls queue one launch and may be captured in a CUDA graph.

    Args:
        pattern: of the arrays' GPU.
        depth_weights: [N,D,fH,fW] on the GPU. features: [N,fH,fW,C], channels-last. Each float32 or float16, contiguous,
            with `__cuda_array_interface__`; work on the stream that this names is waited for.
        out: float32 or float16 [1, C·nz, nx, ny], x first; wholly written.
        stream: a CUstream or its address, 0 for the default stream; or an object with `ptr` or `cuda_stream` (CuPy's,
            torch's).

    Raises:
        UserError: arrays of other sizes or types, no NVRTC, or the driver refuses.
    """
    weights, context, grid = check_arrays(pattern, depth_weights, features, out)
    handle = int(getattr(stream, "ptr", getattr(stream, "cuda_stream", stream)))
    nz, nx, ny = pattern.shape
    cells, channels = nz * nx * ny, context.shape[3]
    if not cells:
        return
    with _current(pattern.device) as driver:
        kernel = _kernel(pattern.device, channels, weights.c_type, context.c_type, grid.c_type)
        _wait_for(driver, {array.stream for array in (weights, context, grid) if array.stream}, handle)
        values = (pattern.row_ptr, pattern.pixel, pattern.depth, weights.address, context.address, grid.address)
        launch = driver.cuLaunchKernel(
            kernel, -(-cells // CELLS), -(-channels // min(channels, CHUNK)), 1, THREADS, 1, 1, 0, handle,
            ((*values, cells, nx * ny), (*[ctypes.c_void_p] * 6, ctypes.c_int, ctypes.c_int)), 0,
        )  # fmt: skip
        _check("cuLaunchKernel", launch)
