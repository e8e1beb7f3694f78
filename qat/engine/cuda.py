"""The small part of CUDA used here, over NVIDIA's cuda-bindings: calls of the runtime, the driver and NVRTC; buffers, streams,
events, graphs. No torch, no pycuda.

Everything here works on the current device. Failures raise `UserError` where the user can fix them (no GPU, no
driver, no package, memory spent) and `CudaError` elsewhere.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from qat.core.errors import UserError

# By the prefix of their functions' names: cuda-bindings 12 and 13; cuda-python 11 and early 12.
MODULES = {
    "cuda": ("cuda.bindings.runtime", "cuda.cudart"),
    "nvrtc": ("cuda.bindings.nvrtc", "cuda.nvrtc"),
    "cu": ("cuda.bindings.driver", "cuda.cuda"),
}
LEGACY = 1  # another name of the default stream, whose handle is 0: cudaStreamLegacy
UNUSABLE = "; this needs an NVIDIA GPU with its driver"


class CudaError(RuntimeError):
    """A CUDA call failed. call: the function. name: CUDA's name of the error, such as "cudaErrorMemoryAllocation"."""

    def __init__(self, call: str, name: str, meaning: str) -> None:
        super().__init__(f"{call}: {meaning} ({name})")
        self.call = call
        self.name = name
        self.meaning = meaning


@cache
def module(prefix: str) -> ModuleType:
    """The module whose functions begin with a prefix of `MODULES`. Raises `UserError` where cuda-bindings is not installed."""
    for name in MODULES[prefix]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except ImportError as error:
            raise UserError(
                f"cuda-bindings: {' '.join(str(error).split())}; install the release of the driver's CUDA"
            ) from None
    raise UserError("the package cuda-bindings is not installed; fix by: pip install cuda-bindings")


def runtime() -> ModuleType:
    """The module of CUDA's runtime API. Raises `UserError` where cuda-bindings is not installed."""
    return module("cuda")


def call(name: str, *arguments: Any) -> Any:
    """Calls a function of the runtime API (cuda…), the driver's (cu…) or NVRTC's (nvrtc…).

    Returns:
        what the function returns besides the status: None, a value, or a tuple.

    Raises:
        CudaError: another status than success.
        RuntimeError: from cuda-bindings, if the library behind the function is missing.
    """
    prefix = next(prefix for prefix in MODULES if name.startswith(prefix))  # "cuda" before "cu"
    api = module(prefix)
    status, *values = getattr(api, name)(*arguments)
    if status.value:
        meaning = getattr(api, f"{prefix}GetErrorString")(status)[1]
        raise CudaError(name, status.name, meaning.decode() if isinstance(meaning, bytes) else str(meaning))
    return None if not values else values[0] if len(values) == 1 else tuple(values)


def parse_device(device: str) -> int:
    """ "cuda:1" → 1. Raises `UserError` for any other form."""
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdigit():
        raise UserError(f"device: found {device!r}, expected cuda:0 or another number")
    return int(index or 0)


@dataclass(frozen=True)
class Device:
    """A GPU as a plan depends on it. capability: such as "9.0"."""

    index: int
    name: str
    capability: str
    driver: str


def use_device(device: str | int = 0) -> Device:
    """Makes a GPU the current one and returns its description.

    Raises:
        UserError: no driver, no GPU, or no GPU with that number.
    """
    index = device if isinstance(device, int) else parse_device(device)
    try:
        count = call("cudaGetDeviceCount")
    except RuntimeError as error:  # cuda-python 11 raises its own error if there is no driver
        raise UserError(f"cuda:{index}: {getattr(error, 'meaning', error)}{UNUSABLE}") from None
    if index >= count:
        raise UserError(f"cuda:{index}: no such GPU, found {count}{UNUSABLE if not count else ''}")
    try:
        call("cudaSetDevice", index)
        properties = call("cudaGetDeviceProperties", index)
        driver = call("cudaDriverGetVersion")
    except CudaError as error:
        raise UserError(f"cuda:{index}: {error.meaning}{UNUSABLE}") from None
    name = properties.name
    return Device(
        index=index,
        name=(name.decode() if isinstance(name, bytes) else str(name)).rstrip("\0"),
        capability=f"{properties.major}.{properties.minor}",
        driver=f"{driver // 1000}.{driver % 1000 // 10}",
    )


def _out_of_memory(what: str, size: int, error: CudaError) -> UserError | CudaError:
    if error.name != "cudaErrorMemoryAllocation":
        return error
    return UserError(
        f"{what} of {size / 2**20:.0f} MiB: out of memory; close other programs on the GPU or reduce the batch size"
    )


class DeviceBuffer:
    """Memory on the GPU, freed with this object. pointer: its address. size: bytes, at least 1."""

    def __init__(self, size: int) -> None:
        self.size = max(size, 1)
        try:
            self.pointer = int(call("cudaMalloc", self.size))
        except CudaError as error:
            raise _out_of_memory("GPU memory", self.size, error) from None

    def __del__(self) -> None:
        _release("cudaFree", self, "pointer")


class PinnedBuffer:
    """Page-locked memory of the host, which copies to and from the GPU go through at full speed."""

    def __init__(self, size: int) -> None:
        self.size = max(size, 1)
        try:
            self.pointer = int(call("cudaHostAlloc", self.size, 0))
        except CudaError as error:
            raise _out_of_memory("pinned memory", self.size, error) from None

    def view(self, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """An array over the buffer's first bytes; it keeps the buffer alive."""
        wanted = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if wanted > self.size:
            raise ValueError(f"{wanted} bytes of a buffer of {self.size}")
        memory = (ctypes.c_byte * wanted).from_address(self.pointer)
        memory.owner = self  # type: ignore[attr-defined]
        return np.frombuffer(memoryview(memory), dtype).reshape(shape)

    def __del__(self) -> None:
        _release("cudaFreeHost", self, "pointer")


class Stream:
    """A stream that is not synchronised with the default one. handle: for the runtime API, and as an integer."""

    def __init__(self) -> None:
        self.native = call("cudaStreamCreateWithFlags", runtime().cudaStreamNonBlocking)
        self.handle = int(self.native)

    def synchronize(self) -> None:
        """Waits until all that was enqueued is done; raises `CudaError` where any of it failed."""
        call("cudaStreamSynchronize", self.native)

    def __del__(self) -> None:
        _release("cudaStreamDestroy", self, "native")


class Event:
    """A point in a stream. timed: whether times between it and others are measured; without them it costs less."""

    def __init__(self, timed: bool = True) -> None:
        if timed:
            self.native = call("cudaEventCreate")
        else:
            self.native = call("cudaEventCreateWithFlags", runtime().cudaEventDisableTiming)

    def record(self, stream: int) -> None:
        """Marks the point reached so far in the stream (an integer handle)."""
        call("cudaEventRecord", self.native, stream)

    def milliseconds_since(self, earlier: Event) -> float:
        """Between two recorded events; waits for this one."""
        call("cudaEventSynchronize", self.native)
        return float(call("cudaEventElapsedTime", earlier.native, self.native))

    def __del__(self) -> None:
        _release("cudaEventDestroy", self, "native")


class Graph:
    """The work enqueued on a stream during `capture`, launched as one.

    Raises:
        CudaError: something that was enqueued cannot be part of a graph.
    """

    def __init__(self, stream: Stream, enqueue: Callable[[], None]) -> None:
        # Thread-local: work of other threads (such as building another engine) is not captured.
        call("cudaStreamBeginCapture", stream.native, runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        failed = None
        try:
            enqueue()
        except Exception as error:
            failed = error
        try:
            graph = call("cudaStreamEndCapture", stream.native)  # always: the stream must leave capture mode
        except CudaError as error:
            raise failed or error from None
        if failed is not None:
            call("cudaGraphDestroy", graph)
            raise failed
        try:
            # The function without a version had other arguments before CUDA 12.
            name = "cudaGraphInstantiateWithFlags"
            self.native = call(name if hasattr(runtime(), name) else "cudaGraphInstantiate", graph, 0)
        finally:
            call("cudaGraphDestroy", graph)

    def launch(self, stream: int) -> None:
        """Enqueues the whole graph on a stream (an integer handle)."""
        call("cudaGraphLaunch", self.native, stream)

    def __del__(self) -> None:
        _release("cudaGraphExecDestroy", self, "native")


def _release(function: str, holder: Any, attribute: str) -> None:
    """Frees what a constructor allocated, once; silent while the interpreter or the driver shuts down."""
    handle = holder.__dict__.pop(attribute, None)
    if handle is None:
        return
    try:
        getattr(runtime(), function)(handle)
    except Exception:
        return


def upload(buffer: int, source: int, size: int, stream: int) -> None:
    """Enqueues a copy from the host (an address, pinned) to the device."""
    call("cudaMemcpyAsync", buffer, source, size, runtime().cudaMemcpyKind.cudaMemcpyHostToDevice, stream)


def download(target: int, buffer: int, size: int, stream: int) -> None:
    """Enqueues a copy from the device to the host (an address, pinned)."""
    call("cudaMemcpyAsync", target, buffer, size, runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)


def wait(stream: int, event: Event) -> None:
    """Makes a stream (an integer handle) wait for the point that the event marked last."""
    call("cudaStreamWaitEvent", stream, event.native, 0)


def wait_for(stream: int, other: int) -> None:
    """Makes `stream` wait for the work that is enqueued on `other` now. Both are integer handles."""
    event = Event(timed=False)
    event.record(other)
    wait(stream, event)


def capturing(stream: int) -> bool:
    """Whether a stream (an integer handle) is capturing into a CUDA graph; the default stream cannot."""
    if stream in (0, LEGACY):
        return False
    status = call("cudaStreamIsCapturing", stream)
    return bool(status == runtime().cudaStreamCaptureStatus.cudaStreamCaptureStatusActive)


def device_of(pointer: int) -> int | None:
    """The number of the GPU whose memory holds an address; None for host memory, page-locked or not.

    Raises:
        CudaError: CUDA does not know the address.
    """
    attributes = call("cudaPointerGetAttributes", pointer)
    kinds = runtime().cudaMemoryType
    on_gpu = attributes.type in (kinds.cudaMemoryTypeDevice, kinds.cudaMemoryTypeManaged)
    return int(attributes.device) if on_gpu else None
