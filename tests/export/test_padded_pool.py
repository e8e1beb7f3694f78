"""Zeros around a MaxPool's input, which ONNX Runtime's optimizer takes for its own padding (onnxruntime#24737)."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qat.engine.onnxruntime_backend import PlainGraph
from qat.export.padded_pool import pads_into_pools


def graph(pads=(1, 1, 1, 1), kernel=3, stride=2, relu=False, value=None, size=(9, 12)):
    """x ─► (Relu) ─► Pad ─► MaxPool; pads: top, left, bottom, right."""
    top, left, bottom, right = pads
    values = {"pads": np.array([0, 0, top, left, 0, 0, bottom, right], np.int64)}
    if value is not None:
        values["value"] = np.float32(value)
    nodes = [helper.make_node("Relu", ["x"], ["r"])] if relu else []
    nodes += [
        helper.make_node("Pad", ["r" if relu else "x", *values], ["padded"]),
        helper.make_node("MaxPool", ["padded"], ["y"], kernel_shape=[kernel] * 2, strides=[stride] * 2),
    ]
    built = helper.make_graph(
        nodes,
        "pool",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, *size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, "rows", "columns"])],
        [numpy_helper.from_array(array, name) for name, array in values.items()],
    )
    return helper.make_model(built, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def run(model, x, optimized=False):
    return PlainGraph(model.SerializeToString(), optimized=optimized).run({"x": x})["y"]


def expected(x, pads, kernel, stride):
    """By numpy, window by window."""
    top, left, bottom, right = pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    rows, columns = ((n - kernel) // stride + 1 for n in x.shape[2:])
    windows = [
        [
            x[:, :, i * stride : i * stride + kernel, j * stride : j * stride + kernel].max((2, 3))
            for j in range(columns)
        ]
        for i in range(rows)
    ]
    return np.moveaxis(np.array(windows), (0, 1), (2, 3))


@pytest.fixture
def x():
    """Mostly negative, so that zeros at the border win."""
    return np.random.default_rng(0).standard_normal((2, 4, 9, 12)).astype(np.float32) - 2


def test_the_optimizer_computes_something_else_without_the_pass(x):
    """If this fails, ONNX Runtime was fixed, and the pass is for older versions."""
    model = graph()
    assert not np.array_equal(run(model, x), run(model, x, optimized=True))


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("pads", [(1, 1, 1, 1), (0, 2, 1, 0), (2, 0, 2, 1)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (3, 1), (3, 3)])
def test_the_pass_keeps_the_zeros(x, pads, kernel, stride, optimized):
    model = graph(pads, kernel, stride)
    assert pads_into_pools(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert not any(node.op_type == "Pad" for node in model.graph.node)
    np.testing.assert_array_equal(run(model, x, optimized), expected(x, pads, kernel, stride))


def test_behind_a_relu_the_padding_alone_is_enough(x):
    model = graph(relu=True, value=0)
    assert pads_into_pools(model) == 1
    assert [node.op_type for node in model.graph.node] == ["Relu", "MaxPool"]
    np.testing.assert_array_equal(run(model, x + 2, True), expected(np.maximum(x + 2, 0), (1, 1, 1, 1), 3, 2))


@pytest.mark.parametrize(
    "other", [dict(value=1.0), dict(pads=(3, 0, 0, 0)), dict(pads=(-1, 0, 0, 0))], ids=["ones", "wide", "cropped"]
)
def test_other_pads_stay(other):
    model = graph(**other)
    assert pads_into_pools(model) == 0 and model == graph(**other)
