"""Arrays and streams of other libraries on the GPU, used without copying: `__cuda_array_interface__` (CuPy, Numba, torch) or DLPack."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qat.core.errors import UserError
from qat.engine import cuda
from qat.engine.base import TensorSpec

CUDA, CUDA_MANAGED = 2, 13  # kDLCUDA and kDLCUDAManaged of DLDeviceType
# DLDataTypeCode to the letter of numpy's type string.
DLPACK_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h, the first member of what a capsule named "dltensor" points to."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class DeviceArray:
    """A C-contiguous array on the GPU.

    pointer: its address. dtype: numpy's name. stream: on which its contents are written, None where they are ready.
    owner: kept alive with it.
    """

    pointer: int
    dtype: str
    shape: tuple[int, ...]
    stream: int | None = None
    owner: Any = None

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "data": (self.pointer, False),
            "typestr": np.dtype(self.dtype).str,
            "shape": self.shape,
            "strides": None,
            "stream": self.stream,
            "version": 3,
        }

    @property
    def spec(self) -> TensorSpec:
        """Its dtype and shape."""
        return TensorSpec(self.dtype, self.shape)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...] | None, step: int) -> bool:
    """Whether strides are those of C order; step: what one element counts. An axis of size 1 may have any."""
    if strides is None or 0 in shape:
        return True
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _from_interface(interface: dict[str, Any], owner: Any) -> tuple[DeviceArray, bool]:
    """The array, and whether it is contiguous."""
    dtype, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
    array = DeviceArray(interface["data"][0] or 0, dtype.name, shape, interface.get("stream"), owner)
    return array, _contiguous(shape, interface.get("strides"), dtype.itemsize)


def _from_capsule(capsule: Any) -> tuple[DeviceArray, bool, int]:
    """The array, whether it is contiguous, and its device type. The capsule stays unconsumed: its end frees the tensor."""
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _Tensor.from_address(get_pointer(capsule, b"dltensor"))
    kind = DLPACK_KINDS.get(tensor.dtype.code)
    if kind is None or tensor.dtype.lanes != 1:
        raise ValueError(f"DLPack type code {tensor.dtype.code} × {tensor.dtype.lanes}")
    bits = tensor.dtype.bits
    dtype = np.dtype(np.bool_) if kind == "b" else np.dtype(f"{kind}{bits // 8}")
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    array = DeviceArray((tensor.data or 0) + tensor.byte_offset, dtype.name, shape, None, capsule)
    return array, _contiguous(shape, strides, 1), tensor.device_type


def read(value: Any, where: str, stream: int, device: int = 0, writable: bool = False) -> DeviceArray:
    """The memory of another library's array, without a copy and without a CUDA call.

    Args:
        where: named in errors, such as "camera.plan: input img".
        stream: that will read it: DLPack's producer makes its own work come first there. The `stream` of a
            `__cuda_array_interface__` is handed on in the result: `wait_for_arrays` waits for it.
        device: number of the GPU. writable: whether it is to be written.

    Raises:
        UserError: neither protocol, on the host or another GPU by DLPack, not contiguous, or read-only but to be written.
    """
    try:
        interface = getattr(value, "__cuda_array_interface__", None)
    except (
        RuntimeError,
        TypeError,
        KeyError,
    ) as error:  # torch, for a tensor that requires grad or has a special type
        raise UserError(f"{where}: found a {type(value).__name__} that cannot be shared: {error}") from None
    fix = "copy it to the GPU first"
    if interface is not None:
        array, contiguous = _from_interface(interface, value)
        if writable and interface["data"][1]:
            raise UserError(f"{where}: found a read-only array, expected one that may be written")
    elif hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        kind, number = (int(part) for part in value.__dlpack_device__())
        if kind not in (CUDA, CUDA_MANAGED):
            raise UserError(f"{where}: found an array in the host's memory, expected one on cuda:{device}; {fix}")
        if number != device:
            raise UserError(f"{where}: found an array on cuda:{number}, expected cuda:{device}; copy it there first")
        try:
            array, contiguous, _ = _from_capsule(
                value.__dlpack__(stream=stream or 1)
            )  # DLPack's name of the default stream
        except (ValueError, RuntimeError, BufferError) as error:
            raise UserError(f"{where}: found a {type(value).__name__} that cannot be shared: {error}") from None
    else:
        raise UserError(
            f"{where}: found {type(value).__name__}, expected an array with __cuda_array_interface__ or __dlpack__; {fix}"
        )
    if not contiguous:
        raise UserError(
            f"{where}: found strides that are not in C order, expected a contiguous array; make it contiguous"
        )
    return array


def check_place(array: DeviceArray, where: str, device: int) -> None:
    """Raises `UserError` if an array is on the host or another GPU, which `__cuda_array_interface__` does not tell."""
    if 0 in array.shape:
        return
    try:
        found = cuda.device_of(array.pointer)
    except cuda.CudaError as error:
        raise UserError(f"{where}: found an address that CUDA does not know ({error}), expected an array") from None
    if found is None:
        raise UserError(
            f"{where}: found an array in the host's memory, expected one on cuda:{device}; copy it to the GPU first"
        )
    if found != device:
        raise UserError(f"{where}: found an array on cuda:{found}, expected cuda:{device}; copy it there first")


def take(
    value: Any,
    spec: TensorSpec,
    where: str,
    stream: int,
    device: int = 0,
    writable: bool = False,
    alignment: int = 1,
) -> DeviceArray:
    """`read`, and checks dtype, shape and place.

    Args:
        spec: the expected dtype and shape.
        where, stream, device, writable: as in `read`.
        alignment: of its address, in bytes.

    Raises:
        UserError: like `read` and `check_place`; or another dtype, shape or alignment.
    """
    array = read(value, where, stream, device, writable)
    if not spec.accepts_shape(array.dtype, array.shape):
        raise UserError(f"{where}: found {array.spec}, expected {spec}")
    check_place(array, where, device)
    if array.pointer % alignment:
        raise UserError(
            f"{where}: found an array at {array.pointer:#x}, expected an address that is a multiple of {alignment}; "
            "copy it into separate memory"
        )
    return array


def wait_for_arrays(arrays: Iterable[DeviceArray], stream: int) -> None:
    """Makes a stream wait for what is enqueued now on the streams that the arrays are written on."""
    producers = {array.stream or cuda.LEGACY for array in arrays if array.stream is not None}
    for producer in sorted(producers - {stream or cuda.LEGACY}):
        cuda.wait_for(stream, producer)


def stream_handle(stream: Any) -> int:
    """The CUDA stream behind an integer, a torch.cuda.Stream, a cupy.cuda.Stream, an engine's `stream`, a CUstream of
    cuda-bindings, or any object with `__cuda_stream__`.

    Raises:
        UserError: something else.
    """
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr", "handle"):
        if isinstance(found := getattr(stream, attribute, None), int):
            return found
    if hasattr(stream, "__int__") and not isinstance(stream, float):  # CUstream and cudaStream_t
        return int(stream)
    raise UserError(f"stream: found {type(stream).__name__}, expected an integer handle or a torch or CuPy stream")
