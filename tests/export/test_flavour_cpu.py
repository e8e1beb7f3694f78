"""The pass over the smallest graph that shows it, against integer arithmetic."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qat.core.errors import UserError
from qat.export.flavour_cpu import to_cpu
from qat.export.unsigned import never_negative_outputs

SCALE = np.float32(1 / 32)


def conv_graph(relu: bool) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """x ─► (Relu) ─► Q(s8) ─► DQ ─► 1×1 Conv with QDQ weights and a bias."""
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (4, 3, 1, 1)).astype(np.float32) / 256
    bias = random.integers(-1000, 1000, 4).astype(np.float32) / 8192
    values = {
        "w": weight,
        "ws": np.full(4, 1 / 256, np.float32),
        "wz": np.zeros(4, np.int8),
        "b": bias,
        "s": SCALE,
        "z": np.int8(0),
    }
    source = "r" if relu else "x"
    nodes = [helper.make_node("Relu", ["x"], ["r"])] if relu else []
    nodes += [
        helper.make_node("QuantizeLinear", [source, "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], axis=0),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 5, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 5, 6])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), weight, bias


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def parts(model: onnx.ModelProto) -> tuple[dict[str, np.ndarray], dict[str, onnx.NodeProto]]:
    values = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    return values, {node.output[0]: node for node in model.graph.node}


@pytest.fixture
def x():
    return np.random.default_rng(1).uniform(-5, 5, (1, 3, 5, 6)).astype(np.float32)


def test_signed_activations_become_u8_around_128_with_the_same_result(x):
    model, weight, bias = conv_graph(relu=False)
    changed = to_cpu(model)
    values, nodes = parts(changed)
    zero, scale = values[nodes["xq"].input[2]], values[nodes["xq"].input[1]]
    assert zero.dtype == np.uint8 and zero == 128 and scale == SCALE
    rounded = np.clip(np.rint(x / SCALE), -128, 127) * SCALE
    expected = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], rounded) + bias[:, None, None]
    np.testing.assert_allclose(run(changed, x), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-6, atol=1e-6)


def test_activations_behind_a_relu_use_all_of_u8(x):
    model, weight, bias = conv_graph(relu=True)
    changed = to_cpu(model)
    values, nodes = parts(changed)
    zero, scale = values[nodes["xq"].input[2]], values[nodes["xq"].input[1]]
    assert zero.dtype == np.uint8 and zero == 0
    np.testing.assert_allclose(scale * 255, SCALE * 127, rtol=1e-6)
    rounded = np.clip(np.rint(np.maximum(x, 0) / scale), 0, 255) * scale
    # the bias rounds to the products' scale: half a step is all it may differ
    expected = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], rounded) + bias[:, None, None]
    np.testing.assert_allclose(run(changed, x), expected, rtol=1e-6, atol=float(scale) / 256 * 0.51)


def test_activations_that_are_in_u8_already_stay_as_they_are(x):
    model, *_ = conv_graph(relu=True)
    zero = next(value for value in model.graph.initializer if value.name == "z")
    zero.CopyFrom(numpy_helper.from_array(np.uint8(0), "z"))
    changed = to_cpu(model)
    values, nodes = parts(changed)
    assert list(nodes["xq"].input) == ["r", "s", "z"] and values["s"] == SCALE
    assert "w" not in values and values["w_s8"].dtype == np.int8  # weights are integers all the same


def test_an_input_that_is_known_not_to_be_negative_uses_all_of_u8(x):
    """The BEV decoder's input comes out of the ReLU of the part before."""
    model, weight, bias = conv_graph(relu=False)
    changed = to_cpu(model, ["x"])
    values, nodes = parts(changed)
    zero, scale = values[nodes["xq"].input[2]], values[nodes["xq"].input[1]]
    assert zero.dtype == np.uint8 and zero == 0
    np.testing.assert_allclose(scale * 255, SCALE * 127, rtol=1e-6)
    rounded = np.clip(np.rint(np.abs(x) / scale), 0, 255) * scale
    expected = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], rounded) + bias[:, None, None]
    np.testing.assert_allclose(run(changed, np.abs(x)), expected, rtol=1e-6, atol=float(scale) / 256 * 0.51)


def test_only_outputs_behind_a_relu_are_never_negative():
    assert never_negative_outputs(conv_graph(relu=True)[0]) == []
    model, _, _ = conv_graph(relu=False)
    model.graph.node.append(helper.make_node("Relu", ["y"], ["z_out"]))
    model.graph.output.append(helper.make_tensor_value_info("z_out", TensorProto.FLOAT, [1, 4, 5, 6]))
    assert never_negative_outputs(model) == ["z_out"]


@pytest.mark.parametrize(("factor", "zero"), [(0.5, 0), (-0.5, 128)])
def test_a_product_with_a_positive_constant_keeps_the_sign(factor, zero):
    """An equalized part's input: what comes in is never negative, and is multiplied before it is rounded."""
    model, *_ = conv_graph(relu=False)
    model.graph.node.insert(0, helper.make_node("Mul", ["x", "factor"], ["scaled"]))
    model.graph.initializer.append(numpy_helper.from_array(np.full((1, 3, 1, 1), factor, np.float32), "factor"))
    next(node for node in model.graph.node if node.output[0] == "xq").input[0] = "scaled"
    values, nodes = parts(to_cpu(model, ["x"]))
    assert values[nodes["xq"].input[2]] == zero


def test_weights_and_biases_are_stored_as_integers():
    model, weight, bias = conv_graph(relu=False)
    values, nodes = parts(to_cpu(model))
    conv = nodes["y"]
    stored = values[nodes[conv.input[1]].input[0]]
    assert stored.dtype == np.int8
    np.testing.assert_array_equal(stored, weight * 256)
    whole, scale = (values[name] for name in nodes[conv.input[2]].input)
    assert whole.dtype == np.int32
    np.testing.assert_array_equal(whole, bias * 8192)  # 1/8192 = 1/32 · 1/256
    np.testing.assert_array_equal(scale, np.full(4, 1 / 8192, np.float32))
    assert not {"w", "b"} & set(values)


def test_the_graph_given_is_left_as_it_is():
    model, *_ = conv_graph(relu=True)
    before = model.SerializeToString()
    to_cpu(model)
    assert model.SerializeToString() == before


def test_a_graph_of_another_flavour_is_refused():
    model, *_ = conv_graph(relu=True)
    with pytest.raises(UserError, match="expected the tensorrt flavour"):
        to_cpu(to_cpu(model))
