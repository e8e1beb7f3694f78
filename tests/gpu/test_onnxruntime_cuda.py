"""ONNX Runtime's CUDA and TensorRT providers, where there is a GPU that they run on."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from qat import engine
from qat.engine import Options, layers_by_device

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def has_gpu() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


pytestmark = pytest.mark.skipif(not has_gpu(), reason="no NVIDIA GPU here")
PROVIDERS = {"onnxruntime-cuda": "CUDAExecutionProvider", "onnxruntime-tensorrt": "TensorrtExecutionProvider"}


@pytest.fixture(params=sorted(PROVIDERS))
def backend(request):
    provider = PROVIDERS[request.param]
    if provider not in ort.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {provider}: pip install 'onnxruntime-gpu[cuda,cudnn]'")
    return request.param


def conv_relu(path: Path, batch: int | str = 2) -> np.ndarray:
    """relu of a 1×1 convolution of x [batch,8,16,16]; returns its weights float32[16,8]."""
    weight = np.random.default_rng(0).standard_normal((16, 8, 1, 1)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["y"])],
        "conv_relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 16, 16, 16])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return weight[:, :, 0, 0]


def expected_of(weight, x):
    return np.maximum(np.einsum("oi,nihw->nohw", weight, x), 0)


def test_fp32_is_fp32_and_runs_on_the_gpu(tmp_path, backend):
    weight = conv_relu(tmp_path / "g.onnx")
    built = engine.build(tmp_path / "g.onnx", backend, "fp32", Options(cache=tmp_path / "cache"))
    feeds = built.example_feeds()
    # TensorRT rounds inputs to TF32's ten bits, and its provider cannot be told to leave it.
    rtol, atol = (1e-4, 1e-5) if backend == "onnxruntime-cuda" else (5e-3, 2e-2)
    np.testing.assert_allclose(built.run(feeds)["y"], expected_of(weight, feeds["x"]), rtol=rtol, atol=atol)
    assert built.transfer_ms > 0
    assert layers_by_device(built.profile(feeds))[PROVIDERS[backend]] > 0


def test_outputs_stay_on_the_device_and_belong_to_the_next_run(tmp_path, backend):
    weight = conv_relu(tmp_path / "g.onnx")
    built = engine.build(tmp_path / "g.onnx", backend, "fp32", Options(cache=None))
    feeds = built.example_feeds()
    values = built.run_on_device(feeds)
    assert values["y"].device_name() == "cuda"
    np.testing.assert_allclose(values["y"].numpy(), expected_of(weight, feeds["x"]), rtol=5e-3, atol=2e-2)
    place = values["y"].data_ptr()
    assert built.run_on_device(feeds)["y"].data_ptr() == place


def test_a_batch_that_varies_runs_in_every_size(tmp_path, backend):
    weight = conv_relu(tmp_path / "g.onnx", "n")
    built = engine.build(tmp_path / "g.onnx", backend, "fp32", Options(cache=None))
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 8, 16, 16)).astype(np.float32)
        np.testing.assert_allclose(built.run({"x": x})["y"], expected_of(weight, x), rtol=5e-3, atol=2e-2)


def test_a_saved_engine_computes_the_same(tmp_path, backend):
    conv_relu(tmp_path / "g.onnx")
    built = engine.build(tmp_path / "g.onnx", backend, "fp32", Options(cache=tmp_path / "cache"))
    feeds, file = built.example_feeds(), tmp_path / f"part{engine.ending(backend)}"
    built.save(file)
    loaded = engine.load(file, backend, "fp32")
    np.testing.assert_allclose(loaded.run(feeds)["y"], built.run(feeds)["y"], rtol=1e-5, atol=1e-6)


def test_tensorrt_takes_the_fp16_flag_of_an_fp32_typed_graph(tmp_path):
    if PROVIDERS["onnxruntime-tensorrt"] not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no TensorrtExecutionProvider")
    weight = conv_relu(tmp_path / "g.onnx")
    built = engine.build(tmp_path / "g.onnx", "onnxruntime-tensorrt", "fp16", Options(cache=tmp_path / "cache"))
    feeds = built.example_feeds()
    np.testing.assert_allclose(built.run(feeds)["y"], expected_of(weight, feeds["x"]), rtol=2e-2, atol=2e-2)


def test_the_gpu_is_named(backend):
    device = engine.identify(backend)
    assert device.name and device.fingerprint != engine.identify("onnxruntime").fingerprint


def test_inputs_go_through_page_locked_memory_where_cuda_bindings_is_installed(tmp_path, backend):
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    conv_relu(tmp_path / "g.onnx")
    built = engine.build(tmp_path / "g.onnx", backend, "fp32", Options(cache=None))
    built.run(built.example_feeds())
    assert built._bound.pinned
