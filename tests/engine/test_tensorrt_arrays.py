"""Arrays of other libraries: the two protocols, read as their makers write them. What stands for the GPU's memory is the host's."""

from types import SimpleNamespace

import numpy as np
import pytest

from qat.core.errors import UserError
from qat.engine import TensorSpec, cuda
from qat.engine.device_arrays import DeviceArray, _from_capsule, stream_handle, take, wait_for_arrays

SPEC = TensorSpec("float32", (2, None, 3))


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    """Every address is GPU 0's, as CUDA would say; returns a function that makes it another's, None for the host."""

    def say(device: int | None) -> None:
        monkeypatch.setattr(cuda, "device_of", lambda pointer: device)

    say(0)
    return say


class OnGpu:
    """An array that offers what CuPy and torch do, over numpy's memory."""

    def __init__(self, array: np.ndarray, stream: int | None = None, read_only: bool = False) -> None:
        interface = array.__array_interface__
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": interface["shape"],
            "typestr": interface["typestr"],
            "strides": None if array.flags.c_contiguous else array.strides,
            "data": (interface["data"][0], read_only),
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


def test_an_array_of_another_gpu_or_of_the_host_is_refused_whatever_its_interface_says(on_gpu):
    array = OnGpu(np.zeros((2, 5, 3), np.float32))
    on_gpu(1)
    assert "found an array on cuda:1, expected cuda:0" in refused(array)
    on_gpu(None)
    assert "found an array in the host's memory, expected one on cuda:0" in refused(array)
    take(OnGpu(np.zeros((2, 0, 3), np.float32)), SPEC, "x", stream=7)  # nothing there that could be elsewhere


def test_what_is_written_may_not_be_read_only():
    array = OnGpu(np.zeros((2, 5, 3), np.float32), read_only=True)
    assert take(array, SPEC, "x", stream=7).shape == (2, 5, 3)
    with pytest.raises(UserError, match="x: found a read-only array"):
        take(array, SPEC, "x", stream=7, writable=True)


def test_an_address_that_the_reader_cannot_take_is_refused():
    whole = np.zeros(64 + 256, np.uint8)
    start = -whole.ctypes.data % 256
    for shift, fits in ((0, True), (16, False)):
        array = OnGpu(whole[start + shift : start + shift + 64])
        if fits:
            assert take(array, TensorSpec("uint8", (64,)), "x", 7, alignment=256).pointer % 256 == 0
        else:
            with pytest.raises(UserError, match="expected an address that is a multiple of 256"):
                take(array, TensorSpec("uint8", (64,)), "x", 7, alignment=256)


def test_a_producer_that_refuses_is_one_line():
    class Refuses:
        def __dlpack_device__(self):
            return (2, 0)

        def __dlpack__(self, stream=None):
            raise BufferError("requires grad")

    assert "found a Refuses that cannot be shared: requires grad" in refused(Refuses())


def test_every_stream_that_an_array_is_written_on_is_waited_for_once(monkeypatch):
    waits = []
    monkeypatch.setattr(cuda, "wait_for", lambda stream, other: waits.append((stream, other)))
    wait_for_arrays([DeviceArray(4096, "int8", (1,), stream) for stream in (None, 5, 9, 5, 7)], 7)
    assert waits == [(7, 5), (7, 9)]
    waits.clear()
    wait_for_arrays([DeviceArray(4096, "int8", (1,), cuda.LEGACY)], 0)  # two names of the default stream
    assert waits == []


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
    own = cuda.Stream.__new__(cuda.Stream)
    own.handle = 6
    assert stream_handle(own) == 6

    class Native:  # cuda-bindings' CUstream
        def __int__(self):
            return 7

    assert stream_handle(Native()) == 7
    with pytest.raises(UserError, match="stream: found str"):
        stream_handle("main")
