"""TensorRT on a GPU: build, run, graph, zero-copy, profiles, inspector, sidecar; compared with ONNX Runtime or numpy.

Needs no torch: in a lab without the suite's packages, with onnx and pytest, `python -m pytest
tests/gpu/test_tensorrt_gpu.py -p no:cacheprovider --noconftest`.
BEVQAT_TACTIC_SOURCES names the tactic sources where cuBLAS and cuDNN are stand-ins (docs/tensorrt.md).
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qat.core.errors import UserError
from qat.engine import Options, TensorRtOptions, build, cuda
from qat.engine.device_arrays import DeviceArray
from qat.engine.inspector import find
from qat.engine.tensorrt_builder import sidecar_path
from qat.engine.tensorrt_capabilities import Capabilities, tensorrt_module
from qat.engine.tensorrt_options import Profile


def _missing() -> str:
    try:
        cuda.use_device(0)
        tensorrt_module()
    except UserError as error:
        return str(error)
    return ""


MISSING = _missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING or "runs")

SOURCES = tuple(os.environ["BEVQAT_TACTIC_SOURCES"].split(",")) if os.environ.get("BEVQAT_TACTIC_SOURCES") else None
X_SCALE, H_SCALE = np.float32(3 / 127), np.float32(4 / 127)
OPTIONS = Options(cache=None, tensorrt=TensorRtOptions(tactic_sources=SOURCES))
WEAK = not MISSING and Capabilities(tensorrt_module()).weak_typing


def weights(seed: int, *shape: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape)
    return values.astype(np.float32)


def convolutions(path: Path, quantized: bool, batch: int | str = 1) -> Path:
    """x → conv 3×3 → ReLU → conv 1×1 → y, 32 channels; with symmetric s8 Q/DQ as the `tensorrt` flavour writes them."""
    nodes, initializers = [], {"w1": weights(1, 32, 32, 3, 3), "w2": weights(2, 32, 32, 1, 1)}

    def qdq(name: str, scale: np.ndarray, axis: int | None = None) -> str:
        if not quantized:
            return name
        initializers[f"{name}_s"] = scale
        initializers[f"{name}_z"] = np.zeros(np.shape(scale), np.int8)
        extra = {} if axis is None else {"axis": axis}
        nodes.append(
            helper.make_node("QuantizeLinear", [name, f"{name}_s", f"{name}_z"], [f"{name}_q"], f"q_{name}", **extra)
        )
        nodes.append(
            helper.make_node(
                "DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], [f"{name}_d"], f"dq_{name}", **extra
            )
        )
        return f"{name}_d"

    def per_channel(name: str) -> np.ndarray:
        return (np.abs(initializers[name]).max((1, 2, 3)) / 127).astype(np.float32)

    first = [qdq("x", X_SCALE), qdq("w1", per_channel("w1"), 0)]
    nodes.append(helper.make_node("Conv", first, ["h0"], "/one/Conv", pads=[1, 1, 1, 1]))
    nodes.append(helper.make_node("Relu", ["h0"], ["h"], "/one/Relu"))
    nodes.append(helper.make_node("Conv", [qdq("h", H_SCALE), qdq("w2", per_channel("w2"), 0)], ["y"], "/two/Conv"))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 32, 12, 12]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in initializers.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "convolutions", values[:1], values[1:], stored),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def fake_quantized(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values / scale), -128, 127) * scale


def expected(x: np.ndarray, quantized: bool) -> np.ndarray:
    """The same in numpy, in double precision."""
    w1, w2 = weights(1, 32, 32, 3, 3).astype(np.float64), weights(2, 32, 32, 1, 1).astype(np.float64)
    x = x.astype(np.float64)
    if quantized:
        w1, w2 = (fake_quantized(w, np.abs(w).max((1, 2, 3), keepdims=True) / 127) for w in (w1, w2))
        x = fake_quantized(x, X_SCALE)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    h = np.maximum(np.einsum("nchwij,ocij->nohw", windows, w1), 0)
    if quantized:
        h = fake_quantized(h, H_SCALE)
    return np.einsum("nchw,oc->nohw", h, w2[:, :, 0, 0])


def sqnr(reference: np.ndarray, found: np.ndarray) -> float:
    noise = np.sum((reference - found.astype(np.float64)) ** 2)
    return float(10 * np.log10(np.sum(reference**2) / max(noise, 1e-300)))


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 32, 12, 12)).astype(np.float32)


def on_gpu(array: np.ndarray) -> DeviceArray:
    """A copy on the GPU that offers `__cuda_array_interface__`."""
    buffer, pinned, stream = cuda.DeviceBuffer(array.nbytes), cuda.PinnedBuffer(array.nbytes), cuda.Stream()
    pinned.view(array.dtype, array.shape)[...] = array
    cuda.upload(buffer.pointer, pinned.pointer, array.nbytes, stream.handle)
    stream.synchronize()
    return DeviceArray(buffer.pointer, array.dtype.name, array.shape, None, buffer)


def from_gpu(array: DeviceArray) -> np.ndarray:
    size = int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize
    pinned, stream = cuda.PinnedBuffer(size), cuda.Stream()
    cuda.download(pinned.pointer, array.pointer, size, stream.handle)
    stream.synchronize()
    return pinned.view(array.dtype, array.shape).copy()


# FP32 sums 288 products: 20·log10(2^24/√288) is above 110. FP16 rounds values and weights to 2⁻¹¹: 74 dB less a few layers.
# INT8's numpy reference rounds at the same places: what is left are values that fall on another side of a threshold.
@pytest.mark.parametrize(("precision", "least_db"), [("fp32", 95), ("fp16", 50), ("int8", 30)])
def test_each_precision_computes_what_numpy_does(tmp_path, x, precision, least_db):
    if not WEAK and precision != "fp32":
        pytest.skip("this TensorRT has no precision flags: see the strongly typed test")
    path = convolutions(tmp_path / "g.onnx", precision == "int8")
    engine = build(path, "tensorrt", precision, OPTIONS)
    assert sqnr(expected(x, precision == "int8"), engine.run({"x": x})["y"]) > least_db
    assert engine.size_bytes and engine.transfer_ms > 0


def test_onnx_runtime_agrees(tmp_path, x):
    runtime = pytest.importorskip("onnxruntime")
    path = convolutions(tmp_path / "g.onnx", False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    reference = session.run(None, {"x": x})[0].astype(np.float64)
    assert sqnr(reference, build(path, "tensorrt", "fp32", OPTIONS).run({"x": x})["y"]) > 95


def test_a_cuda_graph_gives_what_eager_runs_give(tmp_path, x):
    path = convolutions(tmp_path / "g.onnx", False)
    graphed = build(path, "tensorrt", "fp32", OPTIONS)
    eager = build(path, "tensorrt", "fp32", replace(OPTIONS, tensorrt=replace(OPTIONS.tensorrt, cuda_graph=False)))
    for seed in range(3):  # replays read their inputs anew
        feeds = {"x": np.random.default_rng(seed).standard_normal(x.shape).astype(np.float32)}
        assert sqnr(eager.run(feeds)["y"].astype(np.float64), graphed.run(feeds)["y"]) > 95
    assert graphed.graph_refused == "" and eager.graph_refused == "switched off"


def test_arrays_on_the_gpu_are_read_and_written_in_place(tmp_path, x):
    engine = build(convolutions(tmp_path / "g.onnx", False), "tensorrt", "fp32", OPTIONS)
    reference = engine.run({"x": x})["y"]
    given, target = on_gpu(x), on_gpu(np.zeros_like(reference))
    assert np.array_equal(from_gpu(engine.run_device({"x": given})["y"]), reference)
    stream = cuda.Stream()
    assert engine.run_device({"x": given}, {"y": target}, stream.handle)["y"] is target
    stream.synchronize()
    assert np.array_equal(from_gpu(target), reference)
    assert np.array_equal(engine.run({"x": x})["y"], reference)  # its own buffers again
    with pytest.raises(UserError, match="host's memory"):
        engine.run_device({"x": x})
    with pytest.raises(UserError, match="input x: missing"):
        engine.run_device({})


def test_arrays_that_tensorrt_or_the_gpu_cannot_take_are_refused(tmp_path, x):
    engine = build(convolutions(tmp_path / "g.onnx", False), "tensorrt", "fp32", OPTIONS)
    given, y = on_gpu(x), on_gpu(np.zeros((1, 32, 12, 12), np.float32))
    wide = on_gpu(np.zeros(x.size + 64, np.float32))
    pinned = cuda.PinnedBuffer(x.nbytes)
    for array, said in (
        (DeviceArray(wide.pointer + 16, "float32", x.shape), "a multiple of 256"),
        (DeviceArray(pinned.pointer, "float32", x.shape), "host's memory"),
    ):
        with pytest.raises(UserError, match=said):
            engine.run_device({"x": array}, {"y": y})
    locked = SimpleNamespace(__cuda_array_interface__=y.__cuda_array_interface__ | {"data": (y.pointer, True)})
    with pytest.raises(UserError, match="read-only"):
        engine.run_device({"x": given}, {"y": locked})
    engine.run_device({"x": given}, {"y": y})


def test_runs_on_several_streams_do_not_disturb_one_another(tmp_path):
    engine = build(convolutions(tmp_path / "g.onnx", False), "tensorrt", "fp32", OPTIONS)
    feeds = [np.random.default_rng(seed).standard_normal((1, 32, 12, 12)).astype(np.float32) for seed in range(60)]
    given, wanted = [on_gpu(x) for x in feeds], [engine.run({"x": x})["y"] for x in feeds]
    targets = [on_gpu(np.zeros_like(wanted[0])) for _ in feeds]
    streams = [cuda.Stream() for _ in range(4)]
    for turn, (x, y) in enumerate(zip(given, targets, strict=True)):
        engine.run_device({"x": x}, {"y": y}, streams[turn % 4])
    last = engine.run({"x": feeds[0]})["y"]  # on its own stream, behind them all
    assert np.array_equal(last, wanted[0])
    for y, expected_y in zip(targets, wanted, strict=True):
        assert np.array_equal(from_gpu(y), expected_y)
    own = engine.run_device({"x": given[1]}, None, 0)["y"]
    assert own.__cuda_array_interface__["stream"] == 1
    cuda.call("cudaStreamSynchronize", 0)
    assert np.array_equal(from_gpu(own), wanted[1])


def test_torch_tensors_are_taken_on_their_own_stream(tmp_path, x):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here")
    engine = build(convolutions(tmp_path / "g.onnx", False), "tensorrt", "fp32", OPTIONS)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        given, target = torch.from_numpy(x).cuda(), torch.empty(1, 32, 12, 12, device="cuda")
        engine.run_device({"x": given}, {"y": target}, stream)
        found = target.cpu().numpy()
    assert np.array_equal(found, engine.run({"x": x})["y"])


def test_dynamic_batches_run_within_their_profile(tmp_path):
    path = convolutions(tmp_path / "g.onnx", False, "n")
    profile = Profile("x", (1, 32, 12, 12), (2, 32, 12, 12), (4, 32, 12, 12))
    engine = build(path, "tensorrt", "fp32", replace(OPTIONS, tensorrt=replace(OPTIONS.tensorrt, profiles=(profile,))))
    assert engine.inputs["x"].shape == (None, 32, 12, 12)
    assert engine.example_feeds()["x"].shape[0] == 2
    for batch in (1, 4, 2, 4):
        x = np.random.default_rng(batch).standard_normal((batch, 32, 12, 12)).astype(np.float32)
        y = engine.run({"x": x})["y"]
        assert y.shape == (batch, 32, 12, 12) and sqnr(expected(x, False), y) > 95
    # The layers' times, which 8.5 and 8.6 do not give from a second context; then it runs as before.
    assert sum(layer.ms or 0 for layer in engine.layers({"x": x})) > 0 and engine.profile()
    assert np.array_equal(engine.run({"x": x})["y"], y)
    engine.enqueue()
    engine.stream.synchronize()
    with pytest.raises(UserError, match=r"found shape \[5, 32, 12, 12\], expected between \[1"):
        engine.run({"x": np.ones((5, 32, 12, 12), np.float32)})
    with pytest.raises(UserError, match="expected a profile for it"):
        build(path, "tensorrt", "fp32", OPTIONS)


@pytest.mark.skipif(not WEAK, reason="no INT8 flag in this TensorRT")
def test_the_inspector_says_what_runs_in_int8_and_where_time_goes(tmp_path, x):
    engine = build(convolutions(tmp_path / "g.onnx", True), "tensorrt", "int8", OPTIONS)
    assert engine.facts.quantized == ("/one/Conv", "/two/Conv")
    found = engine.findings()
    assert found.int8 == ("/one/Conv", "/two/Conv") and not found.fallbacks and not found.hidden
    layers = engine.layers({"x": x})
    assert sum(layer.ms or 0 for layer in layers) > 0
    assert find(layers, engine.facts.quantized).int8 == found.int8
    profile = engine.profile({"x": x}, runs=2)
    assert {"name", "type", "precision", "ms"} == set(profile[0])


def test_a_saved_plan_loads_and_its_sidecar_refuses_other_versions_and_gpus(tmp_path, x):
    from qat.engine.tensorrt_backend import load

    engine = build(convolutions(tmp_path / "g.onnx", False), "tensorrt", "fp32", OPTIONS)
    path = tmp_path / "g.plan"
    engine.save(path)
    again = load(path, "fp32", OPTIONS, "cuda:0")
    assert np.array_equal(again.run({"x": x})["y"], engine.run({"x": x})["y"])
    sidecar = json.loads(sidecar_path(path).read_text())
    for field, value, said in (
        ("tensorrt", "7.0.0", "built by TensorRT 7.0.0"),
        ("capability", "1.0", "capability 1.0"),
    ):
        sidecar_path(path).write_text(json.dumps({**sidecar, field: value}))
        with pytest.raises(UserError, match=said):
            load(path, "fp32", OPTIONS, "cuda:0")
    sidecar_path(path).unlink()
    assert load(path, "fp32", OPTIONS, "cuda:0").facts is None
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load the plan") as caught:
        load(path, "fp32", OPTIONS, "cuda:0")
    assert "\n" not in str(caught.value)


def test_plans_are_cached_by_graph_and_options_and_damaged_ones_rebuilt(tmp_path, x):
    path = convolutions(tmp_path / "g.onnx", False)
    options = replace(OPTIONS, cache=tmp_path / "cache")
    first = build(path, "tensorrt", "fp32", options).run({"x": x})["y"]
    (plan,) = (tmp_path / "cache").glob("*.plan")
    written = plan.stat().st_mtime_ns
    assert np.array_equal(build(path, "tensorrt", "fp32", options).run({"x": x})["y"], first)
    assert plan.stat().st_mtime_ns == written
    build(path, "tensorrt", "fp32", replace(options, tensorrt=replace(options.tensorrt, tf32=True)))
    assert len(list((tmp_path / "cache").glob("*.plan"))) == 2
    plan.write_bytes(b"damaged")
    assert sqnr(first.astype(np.float64), build(path, "tensorrt", "fp32", options).run({"x": x})["y"]) > 95


def test_a_timing_cache_is_written_and_read(tmp_path):
    path, timings = convolutions(tmp_path / "g.onnx", False), tmp_path / "timing.cache"
    options = replace(OPTIONS, tensorrt=replace(OPTIONS.tensorrt, timing_cache=timings))
    build(path, "tensorrt", "fp32", options)
    assert timings.stat().st_size > 0
    build(path, "tensorrt", "fp32", options)
    timings.write_bytes(b"damaged")
    build(path, "tensorrt", "fp32", options)
    assert timings.read_bytes() != b"damaged"


@pytest.mark.skipif(not WEAK, reason="types of inputs are the graph's in this TensorRT")
def test_fp16_inputs_and_outputs_as_the_reference_builds_them(tmp_path, x):
    options = replace(OPTIONS.tensorrt, input_formats=("fp16:chw",), output_formats=("fp16:chw",))
    engine = build(convolutions(tmp_path / "g.onnx", False), "tensorrt", "fp16", replace(OPTIONS, tensorrt=options))
    assert str(engine.inputs["x"]) == "float16[1,32,12,12]" and engine.outputs["y"].dtype == "float16"
    assert sqnr(expected(x, False), engine.run({"x": x.astype(np.float16)})["y"]) > 50


def test_a_graph_that_tensorrt_cannot_read_is_one_line(tmp_path):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    node = helper.make_node("Nonsense", ["x"], ["y"], "/odd/Nonsense", domain="no.such.domain")
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("no.such.domain", 1)]
    onnx.save(
        helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]), opset_imports=opsets),
        tmp_path / "g.onnx",
    )
    with pytest.raises(UserError, match="cannot read it") as caught:
        build(tmp_path / "g.onnx", "tensorrt", "fp32", OPTIONS)
    assert "\n" not in str(caught.value) and "Nonsense" in str(caught.value)


@pytest.mark.skipif(
    MISSING == "" and not Capabilities(tensorrt_module()).strong_typing, reason="no strongly typed networks"
)
def test_fp16_types_build_strongly_typed(tmp_path, x):
    from onnx.numpy_helper import from_array

    kinds = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 32, 12, 12]) for name in ("x", "y")]
    weight = from_array(weights(2, 32, 32, 1, 1).astype(np.float16), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], "/one/Conv")], "g", kinds[:1], kinds[1:], [weight]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "g.onnx")
    engine = build(tmp_path / "g.onnx", "tensorrt", "fp16", OPTIONS)
    reference = np.einsum(
        "nchw,oc->nohw", x.astype(np.float64), weights(2, 32, 32, 1, 1)[:, :, 0, 0].astype(np.float64)
    )
    assert engine.facts.strongly_typed and sqnr(reference, engine.run({"x": x.astype(np.float16)})["y"]) > 50
