"""Arrays of other libraries on the GPU, taken as they are: `__cuda_array_interface__` (CuPy, Numba, torch) or DLPack."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from qat.core.errors import UserError
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


def take(value: Any, spec: TensorSpec, where: str, stream: int, device: int = 0) -> DeviceArray:
    """The memory behind an array of another library, without a copy.

    Args:
        spec: what it has to be.
        where: named in errors, such as "camera.plan: input img".
        stream: that will read it: DLPack's producer makes its own work come first there. The `stream` of a
            `__cuda_array_interface__` is handed on in the result: the caller waits for it.
        device: number of the GPU.

    Raises:
        UserError: neither protocol, on the host or another GPU, not contiguous, or of another dtype or shape.
    """
    try:
        interface = getattr(value, "__cuda_array_interface__", None)
    except RuntimeError as error:  # torch, of a tensor that requires grad
        raise UserError(f"{where}: found a {type(value).__name__} that cannot be shared: {error}") from None
    mend = "copy it to the GPU first, or use run() for numpy arrays"
    if interface is not None:
        array, contiguous = _from_interface(interface, value)
    elif hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        kind, number = (int(part) for part in value.__dlpack_device__())
        if kind not in (CUDA, CUDA_MANAGED):
            raise UserError(f"{where}: found an array in the host's memory, expected one on cuda:{device}; {mend}")
        if number != device:
            raise UserError(f"{where}: found an array on cuda:{number}, expected cuda:{device}; copy it there first")
        try:
            array, contiguous, _ = _from_capsule(
                value.__dlpack__(stream=stream or 1)
            )  # DLPack's name of the default stream
        except ValueError as error:
            raise UserError(f"{where}: found {error}, expected {spec}") from None
    else:
        raise UserError(
            f"{where}: found {type(value).__name__}, expected an array with __cuda_array_interface__ or __dlpack__; {mend}"
        )
    if not spec.accepts_shape(array.dtype, array.shape):
        raise UserError(f"{where}: found {array.spec}, expected {spec}")
    if not contiguous:
        raise UserError(
            f"{where}: found strides of another order than C's, expected a contiguous array; make it contiguous"
        )
    return array


def stream_handle(stream: Any) -> int:
    """The CUDA stream behind an integer, a torch.cuda.Stream, a cupy.cuda.Stream, or what has `__cuda_stream__`.

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
    raise UserError(f"stream: found {type(stream).__name__}, expected an integer handle or a torch or CuPy stream")
