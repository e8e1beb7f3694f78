"""Arrays of other libraries: the two protocols, read as their makers write them. What stands for the GPU's memory is the host's."""

from types import SimpleNamespace

import numpy as np
import pytest

from qat.core.errors import UserError
from qat.engine import TensorSpec
from qat.engine.device_arrays import DeviceArray, _from_capsule, stream_handle, take

SPEC = TensorSpec("float32", (2, None, 3))


class OnGpu:
    """An array that offers what CuPy and torch do, over numpy's memory."""

    def __init__(self, array: np.ndarray, stream: int | None = None) -> None:
        interface = array.__array_interface__
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": interface["shape"],
            "typestr": interface["typestr"],
            "strides": None if array.flags.c_contiguous else array.strides,
            "data": interface["data"],
            "stream": stream,
            "version": 3,
        }


class Capsule:
    """numpy's DLPack capsules, said to be of a GPU."""

    def __init__(self, array: np.ndarray, device: tuple[int, int]) -> None:
        self.array, self.device, self.asked = array, device, None

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, stream=None):
        self.asked = stream
        return self.array.__dlpack__()


def refused(value, spec=SPEC) -> str:
    with pytest.raises(UserError) as caught:
        take(value, spec, "p.plan: input x", stream=7)
    assert str(caught.value).startswith("p.plan: input x: found ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_cuda_array_interface_is_taken_without_a_copy():
    array = np.zeros((2, 5, 3), np.float32)
    taken = take(OnGpu(array, stream=9), SPEC, "x", stream=7)
    assert (taken.pointer, taken.dtype, taken.shape, taken.stream) == (array.ctypes.data, "float32", (2, 5, 3), 9)


def test_a_dlpack_capsule_is_taken_without_a_copy_and_told_the_stream():
    for dtype in (np.float32, np.float16, np.int8, np.uint8, np.int64, np.bool_):
        array = np.zeros((4, 5, 3), dtype)[2:]
        source = Capsule(array, (2, 0))
        taken = take(source, TensorSpec(np.dtype(dtype).name, (2, 5, 3)), "x", stream=7)
        assert (taken.pointer, taken.dtype, taken.shape) == (array.ctypes.data, np.dtype(dtype).name, (2, 5, 3))
        assert source.asked == 7


def test_a_capsule_says_where_its_tensor_is_and_whether_it_is_contiguous():
    array = np.zeros((4, 6), np.float32)
    assert _from_capsule(array.__dlpack__())[1:] == (True, 1)
    assert _from_capsule(array[:, ::2].__dlpack__())[1] is False


def test_what_does_not_fit_is_one_line():
    assert "host's memory" in refused(Capsule(np.zeros((2, 5, 3), np.float32), (1, 0)))
    assert "cuda:1, expected cuda:0" in refused(Capsule(np.zeros((2, 5, 3), np.float32), (2, 1)))
    assert "found ndarray" not in refused(np.zeros((2, 5, 3), np.float32))  # numpy offers DLPack: it is on the host
    assert "found list" in refused([1, 2])
    assert "found float16[2,5,3], expected float32[2,?,3]" in refused(OnGpu(np.zeros((2, 5, 3), np.float16)))
    assert "found float32[2,5,4]" in refused(OnGpu(np.zeros((2, 5, 4), np.float32)))
    assert "strides" in refused(OnGpu(np.zeros((2, 3, 5), np.float32).transpose(0, 2, 1)))
    assert "strides" in refused(Capsule(np.zeros((2, 3, 5), np.float32).transpose(0, 2, 1), (2, 0)))


def test_the_default_stream_has_dlpacks_name():
    source = Capsule(np.zeros(3, np.float32), (2, 0))
    take(source, TensorSpec("float32", (3,)), "x", stream=0)
    assert source.asked == 1


def test_an_axis_of_size_one_may_have_any_stride():
    array = np.zeros((1, 8, 3), np.float32)[:, ::8]
    assert array.strides[1] != 12
    assert take(Capsule(array, (2, 0)), TensorSpec("float32", (1, None, 3)), "x", stream=7).shape == (1, 1, 3)


def test_own_results_offer_the_interface():
    ours = DeviceArray(4096, "float16", (1, 2), 5)
    assert ours.__cuda_array_interface__ == {
        "data": (4096, False), "typestr": "<f2", "shape": (1, 2), "strides": None, "stream": 5, "version": 3
    }  # fmt: skip
    assert take(ours, TensorSpec("float16", (1, 2)), "x", stream=7).pointer == 4096


def test_streams_of_other_libraries_are_taken_by_their_handles():
    assert stream_handle(12) == 12
    assert stream_handle(SimpleNamespace(cuda_stream=3)) == 3  # torch
    assert stream_handle(SimpleNamespace(ptr=4)) == 4  # CuPy
    assert stream_handle(SimpleNamespace(__cuda_stream__=lambda: (0, 5))) == 5  # cuda.core
    with pytest.raises(UserError, match="stream: found str"):
        stream_handle("main")
