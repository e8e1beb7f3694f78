import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qat import engine
from qat.core.errors import UserError
from qat.engine import Options
from tests.messages import refused

BACKENDS = sorted(engine.CPU_BACKENDS)


def linear_relu(path: Path, quantized: bool = False, batch: int | str = 4) -> np.ndarray:
    """relu(x · W) of x [batch,8] in QDQ form when `quantized`, x on scale 1/32; returns W float32[8,16]."""
    weight = np.random.default_rng(3).integers(-127, 128, (8, 16)).astype(np.float32) / 64
    initializers = [numpy_helper.from_array(weight, "w")]
    nodes = []
    x, w = "x", "w"
    if quantized:
        initializers += [
            numpy_helper.from_array(np.float32(1 / 32), "x_scale"),
            numpy_helper.from_array(np.full(16, 1 / 64, np.float32), "w_scale"),
            numpy_helper.from_array(np.int8(0), "x_zero"),
            numpy_helper.from_array(np.zeros(16, np.int8), "w_zero"),
        ]
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xd"]),
            helper.make_node("QuantizeLinear", ["w", "w_scale", "w_zero"], ["wq"], axis=1),
            helper.make_node("DequantizeLinear", ["wq", "w_scale", "w_zero"], ["wd"], axis=1),
        ]
        x, w = "xd", "wd"
    nodes += [helper.make_node("MatMul", [x, w], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "linear_relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 16])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return weight


def concat_conv(path: Path, before: bool, after: bool) -> np.ndarray:
    """1×1 convolution of concat(a, b), with symmetric s8 Q/DQ before and/or after the concat; returns its weights."""
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (24, 36, 1, 1)).astype(np.float32) / 512
    initializers = {
        "w": weight,
        "ws": np.full(24, 1 / 512, np.float32),
        "wz": np.zeros(24, np.int8),
        "s": np.float32(1 / 64),
        "z": np.int8(0),
    }
    nodes = []

    def qdq(name: str, scale: str = "s", zero: str = "z") -> str:
        axis = {"axis": 0} if scale == "ws" else {}
        nodes.append(helper.make_node("QuantizeLinear", [name, scale, zero], [name + "q"], **axis))
        nodes.append(helper.make_node("DequantizeLinear", [name + "q", scale, zero], [name + "d"], **axis))
        return name + "d"

    sources = [qdq("a"), qdq("b")] if before else ["a", "b"]
    nodes.append(helper.make_node("Concat", sources, ["c"], axis=1))
    nodes.append(helper.make_node("Conv", [qdq("c") if after else "c", qdq("w", "ws", "wz")], ["y"]))
    graph = helper.make_graph(
        nodes,
        "concat_conv",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 6, 5]) for n, c in (("a", 24), ("b", 12))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 24, 6, 5])],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return weight


@pytest.fixture
def options(tmp_path):
    return Options(threads=1, cache=tmp_path / "cache")


@pytest.fixture
def x():
    return np.random.default_rng(0).uniform(-3, 3, (4, 8)).astype(np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_engine_equals_numpy(tmp_path, options, x, backend):
    weight = linear_relu(tmp_path / "g.onnx")
    got = engine.build(tmp_path / "g.onnx", backend, "fp32", options).run({"x": x})["y"]
    np.testing.assert_allclose(got, np.maximum(x @ weight, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_engine_equals_integer_arithmetic(tmp_path, options, x, backend):
    weight = linear_relu(tmp_path / "g.onnx", quantized=True)
    got = engine.build(tmp_path / "g.onnx", backend, "int8", options).run({"x": x})["y"]
    rounded = np.clip(np.rint(x * 32), -128, 127) / 32
    np.testing.assert_allclose(got, np.maximum(rounded @ weight, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_int8_convolution_behind_a_concat_equals_integer_arithmetic(tmp_path, options, backend, before, after):
    weight = concat_conv(tmp_path / "g.onnx", before, after)
    random = np.random.default_rng(1)
    feeds = {n: random.uniform(-2.5, 2.5, (1, c, 6, 5)).astype(np.float32) for n, c in (("a", 24), ("b", 12))}
    engine_ = engine.build(tmp_path / "g.onnx", backend, "int8", options)
    rounded = np.clip(np.rint(np.concatenate([feeds["a"], feeds["b"]], 1) * 64), -128, 127) / 64
    expected = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], rounded)
    np.testing.assert_allclose(engine_.run(feeds)["y"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_specs_come_from_the_graph(tmp_path, options, backend):
    linear_relu(tmp_path / "g.onnx", batch="n")
    built = engine.build(tmp_path / "g.onnx", backend, "fp32", options)
    assert {name: str(spec) for name, spec in built.inputs.items()} == {"x": "float32[?,8]"}
    assert {name: str(spec) for name, spec in built.outputs.items()} == {"y": "float32[?,16]"}
    assert built.run({"x": np.ones((2, 8), np.float32)})["y"].shape == (2, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_built_engine_is_reused_and_a_damaged_one_is_rebuilt(tmp_path, options, x, backend):
    linear_relu(tmp_path / "g.onnx")
    first = engine.build(tmp_path / "g.onnx", backend, "fp32", options).run({"x": x})["y"]
    (built,) = options.cache.iterdir()
    stamp = built.stat().st_mtime_ns
    second = engine.build(tmp_path / "g.onnx", backend, "fp32", options).run({"x": x})["y"]
    assert built.stat().st_mtime_ns == stamp
    built.write_bytes(built.read_bytes()[:100])
    third = engine.build(tmp_path / "g.onnx", backend, "fp32", options).run({"x": x})["y"]
    assert np.array_equal(first, second) and np.array_equal(first, third)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_graph_or_option_does_not_take_a_cached_engine(tmp_path, options, x, backend):
    linear_relu(tmp_path / "g.onnx")
    engine.build(tmp_path / "g.onnx", backend, "fp32", options)
    engine.build(tmp_path / "g.onnx", backend, "fp32", Options(threads=2, cache=options.cache))
    linear_relu(tmp_path / "g.onnx", quantized=True)
    engine.build(tmp_path / "g.onnx", backend, "int8", options)
    # ONNX Runtime's file is the optimized graph, which is the same for any number of threads.
    assert len(list(options.cache.iterdir())) == (2 if backend == "onnxruntime" else 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_cache_builds_the_same_engine(tmp_path, options, x, backend):
    linear_relu(tmp_path / "g.onnx")
    with_cache = engine.build(tmp_path / "g.onnx", backend, "fp32", options).run({"x": x})["y"]
    without = engine.build(tmp_path / "g.onnx", backend, "fp32", Options(threads=1, cache=None)).run({"x": x})["y"]
    np.testing.assert_array_equal(with_cache, without)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_is_heard_after_engines_came_and_went(tmp_path, backend):
    """In a process of its own: it was a segmentation fault, on processors with AMX."""
    linear_relu(tmp_path / "g.onnx")
    code = (
        "import os, signal\nfrom qat import engine\n"
        f"build = lambda: engine.build({str(tmp_path / 'g.onnx')!r}, {backend!r}, 'fp32', engine.Options(cache=None))\n"
        "built = build()\nbuilt = build()\ndel built\n"
        "signal.signal(signal.SIGINT, lambda *_: print('heard'))\nos.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_belong_to_the_caller(tmp_path, options, x, backend):
    linear_relu(tmp_path / "g.onnx")
    built = engine.build(tmp_path / "g.onnx", backend, "fp32", options)
    first = built.run({"x": x})["y"]
    kept = first.copy()
    built.run({"x": -x})
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantized", [False, True])
def test_profile_names_every_layer_with_its_precision(tmp_path, options, backend, quantized):
    linear_relu(tmp_path / "g.onnx", quantized)
    built = engine.build(tmp_path / "g.onnx", backend, "int8" if quantized else "fp32", options)
    layers = built.profile(runs=2)
    assert layers and all(layer["ms"] >= 0 and layer["type"] and layer["name"] for layer in layers)
    assert any("float" in layer["precision"] or "f32" in layer["precision"] for layer in layers)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "input x: missing, expected float32[4,8]"),
        ({"x": np.ones((4, 9), np.float32)}, "input x: found float32[4,9], expected float32[4,8]"),
        ({"x": np.ones((4, 8))}, "input x: found float64[4,8], expected float32[4,8]"),
        ({"x": np.ones((4, 8), np.float32), "z": np.ones(1)}, "input 'z': unknown, expected x"),
    ],
)
def test_a_wrong_input_is_named_with_what_was_expected(tmp_path, options, backend, feeds, message):
    linear_relu(tmp_path / "g.onnx")
    built = engine.build(tmp_path / "g.onnx", backend, "fp32", options)
    with pytest.raises(UserError) as error:
        built.run(feeds)
    assert str(error.value).endswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_is_no_graph_is_refused_in_one_line(tmp_path, options, backend):
    (tmp_path / "g.onnx").write_bytes(b"not a graph")
    with pytest.raises(
        UserError, match=r"g\.onnx: not an ONNX graph .*; expected a file written by export-camera"
    ) as error:
        engine.build(tmp_path / "g.onnx", backend, "fp32", options)
    assert "\n" not in str(error.value)


def test_openvino_takes_a_model_of_its_own_and_nobody_else_does(tmp_path, options):
    import openvino as ov

    linear_relu(tmp_path / "g.onnx")
    ov.save_model(ov.Core().read_model(tmp_path / "g.onnx"), tmp_path / "g.xml", compress_to_fp16=False)
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    runs = [
        engine.build(tmp_path / name, "openvino", "fp32", options).run({"x": x})["y"] for name in ("g.onnx", "g.xml")
    ]
    np.testing.assert_array_equal(*runs)
    with pytest.raises(UserError, match=r"g\.xml: not an ONNX graph"):
        engine.build(tmp_path / "g.xml", "onnxruntime", "fp32", options)
    (tmp_path / "g.xml").write_bytes(b"<?xml version='1.0'?><net>")
    with pytest.raises(UserError, match=r"g\.xml: OpenVINO cannot read it"):
        engine.build(tmp_path / "g.xml", "openvino", "fp32", options)


def test_unknown_backend_precision_and_file_are_refused(tmp_path):
    with refused("backend: found 'tpu'", "expected", "openvino", "onnxruntime"):
        linear_relu(tmp_path / "g.onnx")
        engine.build(tmp_path / "g.onnx", "tpu", "fp32")
    with pytest.raises(UserError, match="precision: found 'int4'"):
        engine.build(tmp_path / "g.onnx", "openvino", "int4")
    with pytest.raises(UserError, match="no such file; write it with export-camera"):
        engine.build(tmp_path / "none.onnx", "openvino", "fp32")


def test_onnxruntime_on_the_cpu_refuses_fp16(tmp_path):
    linear_relu(tmp_path / "g.onnx")
    with pytest.raises(UserError, match="use fp32 or int8"):
        engine.build(tmp_path / "g.onnx", "onnxruntime", "fp16")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_package_says_what_to_install(tmp_path, backend):
    linear_relu(tmp_path / "g.onnx")
    package = engine.BACKENDS[backend].package
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from qat import engine\nfrom qat.core.errors import UserError\n"
        f"try: engine.build({str(tmp_path / 'g.onnx')!r}, {backend!r}, 'fp32')\n"
        "except UserError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"pip install {package}" in out
