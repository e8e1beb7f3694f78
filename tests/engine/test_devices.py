"""Settings and devices: what is asked for is what the backend's own object says, and what is not there is named."""

import ctypes
import gc
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest
from onnx import helper, numpy_helper

from qat import engine
from qat.core.errors import UserError
from qat.core.machine import cores
from qat.engine import Options, layers_by_device
from qat.engine import onnxruntime_backend as onnxruntime
from qat.engine import openvino_backend as openvino
from tests.messages import refused

BACKENDS = sorted(engine.CPU_BACKENDS)
CUDA_HERE = "CUDAExecutionProvider" in ort.get_available_providers()
two_cores = pytest.mark.skipif(len(cores()) < 2, reason="one core: there is nothing to pin to")


def affine(path: Path, dtype: type = np.float32, batch: int | str = 2) -> Path:
    """y = x · W + 1 of x [batch,4], W a permutation times two."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "one"], ["y"])],
        "affine",
        [helper.make_tensor_value_info("x", kind, [batch, 4])],
        [helper.make_tensor_value_info("y", kind, [batch, 4])],
        [
            numpy_helper.from_array(2 * np.eye(4, dtype=dtype)[::-1].copy(), "w"),
            numpy_helper.from_array(np.ones(4, dtype), "one"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@pytest.fixture
def graph(tmp_path):
    return affine(tmp_path / "g.onnx")


def made(how: str, graph: Path, backend: str, options: Options, folder: Path):
    """The same engine built, taken from the cache, or loaded from its file."""
    if how == "built":
        return engine.build(graph, backend, "fp32", Options(**{**vars(options), "cache": None}))
    if how == "cached":
        engine.build(graph, backend, "fp32", options)
        return engine.build(graph, backend, "fp32", options)
    file = folder / f"part{engine.ending(backend)}"
    engine.build(graph, backend, "fp32", options).save(file)
    return engine.load(file, backend, "fp32", options)


HOW = ("built", "cached", "loaded")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pinning", [False, True])
def test_openvino_runs_with_the_threads_hint_and_precision_it_is_told(tmp_path, graph, how, threads, pinning):
    if threads > len(cores()):
        pytest.skip("OpenVINO takes no more threads than there are cores")
    options = Options(threads, tmp_path / "cache", pinning)
    compiled = made(how, graph, "openvino", options, tmp_path).compiled
    assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
    assert compiled.get_property("ENABLE_CPU_PINNING") is pinning
    assert compiled.get_property("NUM_STREAMS") == 1
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("spinning", [False, True])
def test_onnxruntime_runs_with_the_threads_it_is_told_and_spins_as_told(tmp_path, graph, how, spinning):
    options = Options(3, tmp_path / "cache", spinning=spinning)
    settings = made(how, graph, "onnxruntime", options, tmp_path).settings
    assert settings.intra_op_num_threads == 3
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == str(int(spinning))


COUNT_PINNED = """
import os, sys, time
from pathlib import Path
from qat import engine

def pinned():
    found = 0
    for task in os.listdir("/proc/self/task"):
        lines = Path(f"/proc/self/task/{task}/status").read_text().splitlines()
        found += next(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list")).isdigit()
    return found

graph, threads, expected = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
free = engine.build(graph, "onnxruntime", "fp32", engine.Options(threads, None))
free.run(free.example_feeds())
time.sleep(0.3)
print(pinned())
held = engine.build(graph, "onnxruntime", "fp32", engine.Options(threads, None, pinning=True))
until = time.monotonic() + 10  # a thread pins itself when it starts
while pinned() < expected and time.monotonic() < until:
    time.sleep(0.05)
print(pinned())
"""


@two_cores
@pytest.mark.skipif(sys.platform != "linux", reason="threads' processors are read from /proc")
@pytest.mark.parametrize("threads", [0, 2])
def test_onnxruntime_pins_threads_when_told_and_never_by_itself(graph, threads):
    expected = (threads or len(cores())) - 1  # the caller's own thread is left alone
    command = [sys.executable, "-c", COUNT_PINNED, str(graph), str(threads), str(expected)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.split() == ["0", str(expected)], done.stderr


def test_more_pinned_threads_than_cores_are_refused(graph):
    count = len(cores())
    with refused("pinning", f"found {count + 1} threads", f"expected at most {count}"):
        engine.build(graph, "onnxruntime", "fp32", Options(count + 1, None, pinning=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache", [False, True])
def test_a_saved_engine_computes_the_same_without_its_graph(tmp_path, graph, backend, cache):
    options = Options(1, tmp_path / "cache" if cache else None)
    built = engine.build(graph, backend, "fp32", options)
    feeds = built.example_feeds()
    expected = built.run(feeds)["y"]
    np.testing.assert_allclose(expected, 2 * feeds["x"][:, ::-1] + 1, rtol=1e-6)
    file = tmp_path / f"part{engine.ending(backend)}"
    built.save(file)
    assert built.size_bytes == file.stat().st_size > 0
    graph.unlink()
    loaded = engine.load(file, backend, "fp32", options)
    np.testing.assert_array_equal(loaded.run(feeds)["y"], expected)
    assert loaded.inputs == built.inputs and loaded.outputs == built.outputs
    assert loaded.size_bytes == file.stat().st_size
    assert loaded.profile(runs=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_built_file_is_refused_in_one_line(tmp_path, graph, backend):
    file = tmp_path / f"part{engine.ending(backend)}"
    engine.build(graph, backend, "fp32", Options(1, None)).save(file)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match=r"part\..* cannot (load|read) it") as error:
        engine.load(file, backend, "fp32", Options(1))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file; write it with bevqat build"):
        engine.load(tmp_path / "none", backend, "fp32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_processor_is_named(backend):
    device = engine.identify(backend)
    assert device.name and len(device.fingerprint) == 16
    assert device == engine.identify(BACKENDS[0])


@pytest.mark.parametrize("backend", ["openvino-gpu", "openvino-npu"])
def test_a_device_that_openvino_does_not_find_is_named_with_those_there_are(graph, backend):
    kind = engine.BACKENDS[backend].device
    there = ov.Core().available_devices
    if any(name.startswith(kind) for name in there):
        pytest.skip(f"OpenVINO has a {kind} here")
    for ask in (lambda: engine.build(graph, backend, "fp16", Options(cache=None)), lambda: engine.identify(backend)):
        with pytest.raises(UserError, match=f"openvino: found the devices {', '.join(there)}, expected {kind}; ") as e:
            ask()
        assert "\n" not in str(e.value)


@pytest.mark.skipif(CUDA_HERE, reason="this ONNX Runtime has its CUDA provider")
@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_a_provider_that_this_onnxruntime_lacks_says_what_to_install(graph, backend):
    device = engine.BACKENDS[backend].device
    for ask in (lambda: engine.build(graph, backend, "fp32"), lambda: engine.identify(backend)):
        with pytest.raises(UserError, match=f"found the providers .*CPUExecutionProvider, expected {device}; fix") as e:
            ask()
        assert "onnxruntime-gpu" in str(e.value) and "\n" not in str(e.value)


def test_a_session_that_fell_back_to_the_cpu_is_refused(graph):
    settings = onnxruntime.session_options(Options(1))
    session = ort.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])
    onnxruntime.check_used(session, "CPUExecutionProvider")
    with pytest.raises(UserError, match="CUDAExecutionProvider did not start") as error:
        onnxruntime.check_used(session, "CUDAExecutionProvider")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(
    "AzureExecutionProvider" not in ort.get_available_providers(), reason="no provider that takes no operators"
)
def test_a_provider_that_took_no_operator_is_refused(graph):
    # Azure's provider runs operators of its own alone: a real session, in which the CPU runs all of this graph.
    providers = ["AzureExecutionProvider", "CPUExecutionProvider"]
    session = ort.InferenceSession(str(graph), onnxruntime.session_options(Options(1)), providers=providers)
    with refused("AzureExecutionProvider", "none", "CPUExecutionProvider"):
        onnxruntime.check_used(session, "AzureExecutionProvider")


def test_a_profile_says_where_each_operator_ran(graph):
    layers = engine.build(graph, "onnxruntime", "fp32", Options(1, None)).profile(runs=1)
    assert layers_by_device(layers) == {"CPUExecutionProvider": len(layers)} and layers


def test_cuda_takes_fp16_of_graphs_that_are_typed_so(tmp_path, graph):
    with refused("found an FP32-typed graph", "expected FP16 types:", "tensorrt-strong"):
        engine.build(graph, "onnxruntime-cuda", "fp16")
    typed = affine(tmp_path / "typed.onnx", np.float16)
    if not CUDA_HERE:  # then the next thing that is missing is the provider
        with pytest.raises(UserError, match="expected CUDAExecutionProvider"):
            engine.build(typed, "onnxruntime-cuda", "fp16")


def test_providers_are_told_the_precision_and_where_the_timing_cache_lies(tmp_path):
    (cpu,) = onnxruntime.provider_options("CPUExecutionProvider", "int8", None)
    assert cpu == ("CPUExecutionProvider", {})
    cuda, last = onnxruntime.provider_options("CUDAExecutionProvider", "fp32", None)
    assert cuda[1]["use_tf32"] == "0" and last == cpu
    for precision, fp16, int8 in (("fp32", "0", "0"), ("fp16", "1", "0"), ("int8", "1", "1")):
        first, second, third = onnxruntime.provider_options("TensorrtExecutionProvider", precision, tmp_path)
        assert (first[1]["trt_fp16_enable"], first[1]["trt_int8_enable"]) == (fp16, int8)
        assert first[1]["trt_timing_cache_path"] == str(tmp_path)
        unquantized, *_ = onnxruntime.provider_options("TensorrtExecutionProvider", precision, None, quantized=False)
        assert (unquantized[1]["trt_fp16_enable"], unquantized[1]["trt_int8_enable"]) == (fp16, "0")
        assert (second, third) == (cuda, cpu)


@pytest.mark.parametrize("batch", [2, "n"])
def test_bound_buffers_give_the_same_outputs_and_keep_their_place(tmp_path, batch):
    # On the CPU's memory: the same code as on a GPU's, with another device's name.
    built = engine.build(affine(tmp_path / "g.onnx", batch=batch), "onnxruntime", "fp32", Options(1, None))
    bound = onnxruntime.DeviceRun(built._session, built.inputs, built.outputs, "cpu")
    random = np.random.default_rng(0)
    first, second = (random.standard_normal((2, 4)).astype(np.float32) for _ in range(2))
    values = bound.run({"x": first})
    arrays = bound.fetch(values)
    place = values["y"].data_ptr()
    again = bound.run({"x": second})
    np.testing.assert_allclose(arrays["y"], 2 * first[:, ::-1] + 1, rtol=1e-6)  # the caller's own
    np.testing.assert_allclose(bound.fetch(again)["y"], 2 * second[:, ::-1] + 1, rtol=1e-6)
    np.testing.assert_allclose(np.from_dlpack(again["y"]), 2 * second[:, ::-1] + 1, rtol=1e-6)
    assert bound.transfer_ms > 0 and not bound.pinned
    if batch == 2:
        assert again["y"].data_ptr() == place
    else:
        more = random.standard_normal((5, 4)).astype(np.float32)
        np.testing.assert_allclose(bound.fetch(bound.run({"x": more}))["y"], 2 * more[:, ::-1] + 1, rtol=1e-6)


def test_an_input_without_pinned_memory_is_not_written_to(tmp_path):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))
    values = [helper.make_tensor_value_info(name, kind, [2]) for name in ("a", "b", "sum")]
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"])]
    model = helper.make_model(
        helper.make_graph(nodes, "sum", values[:2], values[2:]),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "g.onnx")
    built = engine.build(tmp_path / "g.onnx", "onnxruntime", "fp32", Options(1, None))
    left = [None, np.zeros(2, np.float32)]  # pinned memory is spent for the first input alone
    bound = onnxruntime.DeviceRun(built._session, built.inputs, built.outputs, "cpu", lambda shape, dtype: left.pop(0))
    first, second = ({name: np.full(2, value, np.float32) for name in "ab"} for value in (1, 2))
    for feeds, expected in ((first, 2), (second, 4)):
        np.testing.assert_array_equal(bound.fetch(bound.run(feeds))["sum"], [expected] * 2)
    np.testing.assert_array_equal(first["a"], [1, 1])
    assert not bound.pinned


def test_pinned_memory_is_given_back_with_its_array(monkeypatch):
    memory = (ctypes.c_byte * 24)()
    freed = []
    fine = SimpleNamespace(value=0)
    runtime = SimpleNamespace(
        cudaHostAlloc=lambda size, flags: (fine, ctypes.addressof(memory)),
        cudaFreeHost=lambda address: freed.append(address) or (fine,),
    )
    monkeypatch.setattr(onnxruntime.cuda, "module", lambda prefix: runtime)
    array = onnxruntime.pinned_array([2, 3], np.dtype(np.float32))
    assert array.ctypes.data == ctypes.addressof(memory) and array.shape == (2, 3) and not freed
    del array
    gc.collect()
    assert freed == [ctypes.addressof(memory)]


def test_outputs_stay_on_a_gpu_alone(graph):
    built = engine.build(graph, "onnxruntime", "fp32", Options(1, None))
    with pytest.raises(UserError, match="found an engine on the CPU, expected one on a GPU"):
        built.run_on_device(built.example_feeds())
    assert built.transfer_ms == 0


@pytest.mark.skipif("BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="no bfloat16 here")
def test_bfloat16_is_for_what_int8_graphs_leave_in_float(graph):
    for precision, expected in (("int8", ov.Type.bf16), ("fp32", ov.Type.f32)):
        compiled = engine.build(graph, "openvino", precision, Options(cache=None, bfloat16=True)).compiled
        assert compiled.get_property("INFERENCE_PRECISION_HINT") == expected


def test_bfloat16_is_refused_where_the_cpu_has_none(graph, monkeypatch):
    monkeypatch.setattr(openvino.ov.Core, "get_property", lambda core, device, name: ["FP32", "INT8"])
    with refused("bfloat16", "no bfloat16 arithmetic on this CPU", "omit"):
        engine.build(graph, "openvino", "int8", Options(cache=None, bfloat16=True))
