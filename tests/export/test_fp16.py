"""FP16 types on the smallest graphs that need each rule, against numpy's float16."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qat.core.errors import UserError
from qat.engine.onnxruntime_backend import PlainGraph
from qat.export.flavour_tensorrt_strong import rounded, tolerance_db
from qat.export.fp16 import rounding_count, to_fp16
from qat.export.graph import simplify, trace
from qat.export.intermediates import each_tensor
from tests.messages import refused


def graph(nodes, inputs, outputs, constants=(), opset=13):
    """nodes: (operator, inputs, outputs, attributes); each node is named after its first output."""
    made = [
        helper.make_node(
            operator, takes.split(), gives.split(), name=gives.split()[0], **(attributes[0] if attributes else {})
        )
        for operator, takes, gives, *attributes in nodes
    ]
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in io.items()]
        for io in (inputs, outputs)
    ]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(constants).items()]
    made_graph = helper.make_graph(made, "g", *values, stored)
    model = helper.make_model(made_graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model, feeds):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def types(model):
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
    }
    return kinds | {value.name: value.data_type for value in inferred.initializer}


def kept(report):
    return {entry["node"]: entry["reason"] for entry in report["fp32"]}


def sqnr(reference, found):
    return 10 * np.log10(np.sum(np.square(reference)) / np.sum(np.square(reference - found)))


def test_a_convolution_gets_fp16_weights_and_a_cast_on_either_side():
    random = np.random.default_rng(0)
    x = random.standard_normal((1, 3, 4, 5)).astype(np.float32)
    w = random.standard_normal((4, 3, 1, 1)).astype(np.float32)
    b = random.standard_normal(4).astype(np.float32)
    model = graph([("Conv", "x w b", "y")], {"x": x.shape}, {"y": (1, 4, 4, 5)}, {"w": w, "b": b})
    half, report = to_fp16(model, [{"x": x}])
    assert [node.op_type for node in half.graph.node] == ["Cast", "Conv", "Cast"]
    stored = {value.name: numpy_helper.to_array(value) for value in half.graph.initializer}
    np.testing.assert_array_equal(stored["w"], w.astype(np.float16))
    assert stored["w"].dtype == stored["b"].dtype == np.float16
    x16, w16, b16 = (value.astype(np.float16).astype(np.float64) for value in (x, w[:, :, 0, 0], b))
    exact = np.einsum("oi,nihw->nohw", w16, x16) + b16[:, None, None]
    # sums in FP32, then one rounding; ONNX Runtime leaves out that of the input unless it is written out
    np.testing.assert_allclose(run(rounded(half), {"x": x})[0], exact, rtol=2**-11 + 1e-6, atol=1e-5)
    np.testing.assert_allclose(run(half, {"x": x})[0], exact, rtol=2**-8, atol=2**-8)
    assert report["fp32"] == [] and report["fp16"] == 1 and report["casts"] == 2
    assert report["roundings"] == 4  # the input's cast, two constants, the result
    assert report["largest_fp16"] == {"tensor": "y", "max_abs": pytest.approx(np.abs(exact).max(), rel=1e-2)}


def overflowing():
    """|1000·x|, the long way: x = 1 gives 10⁶ in the middle."""
    nodes = [("Mul", "x k", "a"), ("Mul", "a a", "square"), ("Sqrt", "square", "root"), ("Relu", "root", "y")]
    return graph(nodes, {"x": (4,)}, {"y": (4,)}, {"k": np.float32([1000])})


def test_what_overflows_on_a_frame_never_passes_through_fp16():
    x = np.float32([0.01, -1, 2, 3])
    half, report = to_fp16(overflowing(), [{"x": x / 100}, {"x": x}])
    assert kept(report) == {"square": "overflow", "root": "overflow"}
    entry = report["fp32"][0]
    assert entry == {"node": "square", "operator": "Mul", "reason": "overflow", "tensor": "square", "max_abs": 9e6}
    assert types(half)["a"] == TensorProto.FLOAT16 and types(half)["square"] == TensorProto.FLOAT
    np.testing.assert_allclose(run(half, {"x": x})[0], 1000 * np.abs(x), rtol=2**-9)


def test_the_frames_decide_what_overflows():
    _, report = to_fp16(overflowing(), [{"x": np.float32([0.01, 0.02, 0.03, 0.2])}])
    assert report["fp32"] == [] and report["frames"] == 1


@pytest.mark.parametrize(("largest", "fits"), [(65504.0, True), (65520.0, False), (np.inf, True)])
def test_the_limit_is_fp16s_largest_number(largest, fits):
    """65520 is where rounding gives infinity; infinity itself FP16 has."""
    model = graph([("Relu", "x", "y")], {"x": (2,)}, {"y": (2,)})
    _, report = to_fp16(model, [{"x": np.float32([largest, 1])}])
    assert (report["fp32"] == []) == fits


def test_values_that_fp16_flushes_keep_their_nodes_in_fp32():
    nodes = [("Mul", "x small", "a"), ("Mul", "a small", "b"), ("Div", "b small", "c"), ("Div", "c small", "y")]
    model = graph(nodes, {"x": (64,)}, {"y": (64,)}, {"small": np.float32([1e-4])})
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    half, report = to_fp16(model, [{"x": x}])
    assert kept(report) == {"b": "underflow", "c": "underflow"}  # b is 1e-8·x, below half of FP16's least number
    assert sqnr(x, run(half, {"x": x})[0]) > 60


def test_a_tail_of_tiny_values_beside_large_ones_is_no_underflow():
    model = graph([("Relu", "x", "y")], {"x": (1000,)}, {"y": (1000,)})
    x = np.full(1000, 1e-9, np.float32)
    x[0] = 0.3
    assert to_fp16(model, [{"x": x}])[1]["fp32"] == []
    assert kept(to_fp16(model, [{"x": x[1:].repeat(2)[:1000]}])[1]) == {"y": "underflow"}


def test_softmax_and_the_sums_before_it_stay_fp32_but_not_the_product():
    random = np.random.default_rng(0)
    q, k = (random.standard_normal((2, 3, 8)).astype(np.float32) for _ in range(2))
    bias = random.standard_normal((2, 3, 3)).astype(np.float32)
    nodes = [
        ("Transpose", "k", "kt", {"perm": [0, 2, 1]}),
        ("MatMul", "q kt", "scores"),
        ("Mul", "scores scale", "scaled"),
        ("Add", "scaled bias", "biased"),
        ("Reshape", "biased shape", "flat"),
        ("Softmax", "flat", "weights", {"axis": -1}),
        ("Relu", "weights", "y"),
    ]
    constants = {"scale": np.float32(8**-0.5), "bias": bias, "shape": np.int64([6, 3])}
    model = graph(nodes, {"q": q.shape, "k": k.shape}, {"y": (6, 3)}, constants)
    half, report = to_fp16(model, [{"q": q, "k": k}])
    assert kept(report) == dict.fromkeys(("scaled", "biased", "flat", "weights"), "softmax")
    assert types(half)["scores"] == TensorProto.FLOAT16
    logits = (q.astype(np.float64) @ k.transpose(0, 2, 1)) * 8**-0.5 + bias
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(run(half, {"q": q, "k": k})[0], expected.reshape(6, 3), atol=3e-3)


def test_moving_values_before_a_softmax_costs_no_detour():
    """A slice of a convolution's output is the same in FP16; behind the softmax a detour through FP16 would round."""
    nodes = [("Relu", "x", "a"), ("Slice", "a zero two one", "part"), ("Softmax", "part", "p"), ("Transpose", "p", "y")]
    constants = {"zero": np.int64([0]), "two": np.int64([2]), "one": np.int64([1])}
    model = graph(nodes, {"x": (2, 6)}, {"y": (2, 2)}, constants)
    half, report = to_fp16(model, [{"x": np.ones((2, 6), np.float32)}])
    assert kept(report) == {"p": "softmax", "y": "between FP32 nodes"}
    assert types(half)["part"] == TensorProto.FLOAT16 and report["casts"] == 2
    _, report = to_fp16(model, [], keep_io=False)
    assert kept(report) == {"p": "softmax"}


def layer_norm(source, target, prefix=""):
    """As torch writes it before opset 17."""
    names = {name: f"{prefix}{name}" for name in ("mean", "diff", "sq", "var", "plus", "std", "norm", "scaled")}
    return [
        ("ReduceMean", source, names["mean"], {"axes": [-1]}),
        ("Sub", f"{source} {names['mean']}", names["diff"]),
        ("Pow", f"{names['diff']} two", names["sq"]),
        ("ReduceMean", names["sq"], names["var"], {"axes": [-1]}),
        ("Add", f"{names['var']} eps", names["plus"]),
        ("Sqrt", names["plus"], names["std"]),
        ("Div", f"{names['diff']} {names['std']}", names["norm"]),
        ("Mul", f"{names['norm']} gamma", names["scaled"]),
        ("Add", f"{names['scaled']} beta", target),
    ]


def test_a_decomposed_layer_norm_stays_fp32_and_its_neighbours_do_not():
    random = np.random.default_rng(0)
    x = (300 * random.standard_normal((5, 16))).astype(np.float32)  # its square does not fit
    gamma, beta = (random.standard_normal(16).astype(np.float32) for _ in range(2))
    nodes = [
        ("Relu", "x", "a"),
        *layer_norm("a", "normed"),
        ("Add", "normed a", "sum"),
        ("ReduceMean", "sum", "y", {"axes": [-1]}),
    ]
    constants = {"two": np.float32(2), "eps": np.float32(1e-5), "gamma": gamma, "beta": beta}
    model = graph(nodes, {"x": x.shape}, {"y": (5, 1)}, constants)
    half, report = to_fp16(model, [])
    inside = ("mean", "diff", "sq", "var", "plus", "std", "norm", "scaled", "normed")
    assert kept(report) == dict.fromkeys(inside, "layer norm")
    assert types(half)["sum"] == types(half)["y_fp16"] == TensorProto.FLOAT16
    a = np.maximum(x, 0).astype(np.float64)
    normed = (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5) * gamma + beta
    np.testing.assert_allclose(run(half, {"x": x})[0], (normed + a).mean(-1, keepdims=True), rtol=2**-9)


@pytest.mark.parametrize("inverse", ["Div", "Reciprocal"])
def test_an_rms_norm_stays_fp32(inverse):
    random = np.random.default_rng(0)
    x = (300 * random.standard_normal((5, 16))).astype(np.float32)  # its square does not fit
    gamma = random.standard_normal(16).astype(np.float32)
    one = ("Div", "one root", "inverse") if inverse == "Div" else ("Reciprocal", "root", "inverse")
    nodes = [
        ("Relu", "x", "a"),
        ("Mul", "a a", "square"),
        ("ReduceMean", "square", "mean", {"axes": [-1]}),
        ("Add", "mean eps", "plus"),
        ("Sqrt", "plus", "root"),
        one,
        ("Mul", "a inverse", "normed"),
        ("Mul", "normed gamma", "scaled"),
        ("Relu", "scaled", "y"),
    ]
    constants = {"eps": np.float32(1e-5), "one": np.float32(1), "gamma": gamma}
    if inverse != "Div":
        del constants["one"]
    half, report = to_fp16(graph(nodes, {"x": x.shape}, {"y": x.shape}, constants), [])
    inside = ("square", "mean", "plus", "root", "inverse", "normed", "scaled")
    assert kept(report) == dict.fromkeys(inside, "layer norm")
    a = np.maximum(x, 0).astype(np.float64)
    expected = np.maximum(a / np.sqrt(np.square(a).mean(-1, keepdims=True) + 1e-5) * gamma, 0)
    np.testing.assert_allclose(run(half, {"x": x})[0], expected, rtol=2**-9)


def test_a_row_of_zeros_divided_by_its_guarded_norm_is_zero():
    nodes = [
        ("Relu", "x", "a"),
        ("ReduceL2", "a", "norm", {"axes": [-1]}),
        ("Clip", "norm least", "held"),
        ("Expand", "held shape", "wide"),
        ("Div", "a wide", "unit"),
        ("Add", "unit unit", "y"),
    ]
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    x[1] = 0
    constants = {"least": np.float32(1e-12), "shape": np.int64([3, 8])}
    half, report = to_fp16(graph(nodes, {"x": x.shape}, {"y": x.shape}, constants), [{"x": x[[0, 2, 2]]}])
    assert {"norm", "held", "unit"} <= kept(report).keys() and "a" not in kept(report)
    a = np.maximum(x, 0)
    expected = 2 * a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12)
    np.testing.assert_allclose(run(half, {"x": x})[0], expected, rtol=2**-9, atol=2**-11)


@pytest.mark.parametrize(("scale", "kind"), [(500.0, TensorProto.FLOAT16), (530.0, TensorProto.FLOAT)])
def test_what_the_largest_code_overflows_is_not_in_fp16_behind_it_either(scale, kind):
    """Frames that never reach the largest code say nothing of it."""
    nodes = [
        ("QuantizeLinear", "x s z", "q"),
        ("DequantizeLinear", "q s z", "d"),
        ("Concat", "d d", "c", {"axis": 1}),
        ("AveragePool", "c", "p", {"kernel_shape": [2, 2]}),
        ("Relu", "p", "r"),
        ("Mul", "r k", "y"),
    ]
    constants = {"s": np.float32(scale), "z": np.int8(0), "k": np.float32(1e-3)}
    model = graph(nodes, {"x": (1, 1, 2, 2)}, {"y": (1, 2, 1, 1)}, constants, 19)
    half, report = to_fp16(model, [{"x": np.full((1, 1, 2, 2), 1000, np.float32)}])
    assert {types(half).get(name) for name in "cpr"} == {kind}
    assert ("r" in kept(report)) == (kind == TensorProto.FLOAT)
    assert np.isfinite(run(half, {"x": np.full((1, 1, 2, 2), 1e6, np.float32)})[0]).all()


def test_onnx_runtime_runs_a_layer_norm_between_fp16_layers_from_opset_17_on():
    """Its optimizer leaves a Cast out there, and then refuses its own graph."""
    random = np.random.default_rng(0)
    x, gamma, beta = (random.standard_normal(shape).astype(np.float32) for shape in ((5, 16), 16, 16))
    nodes = [("Relu", "x", "a"), *layer_norm("a", "normed"), ("Add", "normed a", "sum"), ("Relu", "sum", "y")]
    constants = {"two": np.float32(2), "eps": np.float32(1e-5), "gamma": gamma, "beta": beta}
    model = graph(nodes, {"x": x.shape}, {"y": x.shape}, constants)
    half, _ = to_fp16(onnx.version_converter.convert_version(model, 19), [{"x": x}])
    plain, optimized = (PlainGraph(half.SerializeToString(), optimized=on).run({"x": x})["y"] for on in (False, True))
    np.testing.assert_allclose(optimized, plain, atol=2**-9)


def test_a_constant_that_both_precisions_read_is_exact_for_fp32():
    third = np.float32([1 / 3])
    nodes = [("Mul", "x third", "a"), ("Softmax", "a", "p"), ("Mul", "p third", "y")]
    half, _ = to_fp16(graph(nodes, {"x": (3,)}, {"y": (3,)}, {"third": third}), [])
    stored = {value.name: numpy_helper.to_array(value) for value in half.graph.initializer}
    np.testing.assert_array_equal(stored["third"], third)
    np.testing.assert_array_equal(stored["third_fp16"], third.astype(np.float16))


@pytest.mark.parametrize(("value", "reason"), [(1e5, "constant overflow"), (1e-9, "constant underflow")])
def test_constants_that_fp16_does_not_hold_keep_their_node(value, reason):
    nodes = [("Relu", "x", "a"), ("Mul", "a k", "b"), ("Div", "b k", "y")]
    x = np.float32([1, 2, 3])
    half, report = to_fp16(graph(nodes, {"x": (3,)}, {"y": (3,)}, {"k": np.float32([value])}), [])
    assert kept(report) == {"b": reason, "y": reason}
    np.testing.assert_array_equal(run(half, {"x": x})[0], x)


def test_constant_nodes_are_treated_as_initializers_are():
    k = helper.make_node("Constant", [], ["k"], name="k", value=numpy_helper.from_array(np.float32([2])))
    model = graph([("Mul", "x k", "y")], {"x": (3,)}, {"y": (3,)}, {"k": np.float32([2])})
    del model.graph.initializer[:]
    model.graph.node.insert(0, k)
    half, _ = to_fp16(model, [])
    assert [node.op_type for node in half.graph.node] == ["Cast", "Mul", "Cast"]
    np.testing.assert_array_equal(run(half, {"x": np.float32([1, 2, 3])})[0], [2, 4, 6])


def test_resize_keeps_fp32_scales():
    x = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3)
    attributes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    model = graph(
        [("Resize", "x none scales", "y", attributes)],
        {"x": x.shape},
        {"y": (1, 1, 4, 6)},
        {"scales": np.float32([1, 1, 2, 2]), "none": np.float32([])},
    )
    model.graph.node[0].input[1] = ""
    half, report = to_fp16(model, [{"x": x}])
    assert report["fp32"] == [] and types(half)["scales"] == TensorProto.FLOAT
    np.testing.assert_array_equal(run(half, {"x": x})[0], x.repeat(2, 2).repeat(2, 3))


def test_geometry_stays_fp32_until_it_meets_features():
    """Metres times a matrix, to cells; the features that are scattered there stay FP16 up to the ScatterND."""
    random = np.random.default_rng(0)
    matrix = random.uniform(900, 1000, (3, 3)).astype(np.float32)
    features = random.standard_normal((4, 2)).astype(np.float32)
    points = random.uniform(0, 1, (4, 3)).astype(np.float32)
    nodes = [
        ("MatMul", "points matrix", "cells"),
        ("Floor", "cells", "whole"),
        ("Cast", "whole", "index", {"to": TensorProto.INT64}),
        ("Mod", "index ten", "folded"),
        ("Slice", "folded zero one one", "first"),
        ("Relu", "features", "positive"),
        ("ScatterND", "grid first positive", "y"),
    ]
    constants = {
        "points": points,
        "ten": np.int64([10]),
        "zero": np.int64([0]),
        "one": np.int64([1]),
        "grid": np.zeros((10, 2), np.float32),
    }
    model = graph(nodes, {"matrix": (3, 3), "features": (4, 2)}, {"y": (10, 2)}, constants)
    feeds = {"matrix": matrix, "features": features}
    half, report = to_fp16(model, [feeds], geometry=["matrix"], keep_io=False)
    assert kept(report) == {"cells": "geometry", "whole": "geometry", "y": "geometry operator"}
    assert report["fp32_io"] == ["matrix"]
    assert types(half)["matrix"] == TensorProto.FLOAT and types(half)["features"] == TensorProto.FLOAT16
    np.testing.assert_allclose(
        run(half, feeds | {"features": features.astype(np.float16)})[0], run(model, feeds)[0], rtol=2**-11
    )


def test_a_convolution_of_geometry_is_features():
    nodes = [("Sub", "points middle", "near"), ("Conv", "near w", "y")]
    constants = {"middle": np.float32([[[1]]]), "w": np.ones((2, 3, 1), np.float32)}
    model = graph(nodes, {"points": (1, 3, 5)}, {"y": (1, 2, 5)}, constants)
    points = np.random.default_rng(0).uniform(0, 8, (1, 3, 5)).astype(np.float32)
    _, report = to_fp16(model, [{"points": points}], geometry=["points"])
    assert kept(report) == {"near": "geometry"}


def test_inputs_and_outputs_become_fp16_on_request_where_they_fit():
    nodes = [("Relu", "x", "y"), ("Mul", "y y", "z")]
    model = graph(nodes, {"x": (2,)}, {"y": (2,), "z": (2,)})
    x = np.float32([3, 400])
    half, report = to_fp16(model, [{"x": x}], keep_io=False)
    assert [v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)] == [10, 10, 1]
    assert report["fp32_io"] == ["z"] and kept(report) == {"z": "overflow"}
    y, z = run(half, {"x": x.astype(np.float16)})
    assert y.dtype == np.float16 and z.dtype == np.float32
    np.testing.assert_array_equal(z, x**2)


def test_two_readers_share_one_cast():
    nodes = [
        ("Relu", "x", "a"),
        ("Softmax", "a", "p", {"axis": 0}),
        ("Softmax", "a", "q", {"axis": 1}),
        ("Add", "p q", "y"),
    ]
    half, report = to_fp16(graph(nodes, {"x": (2, 2)}, {"y": (2, 2)}), [])
    assert report["casts"] == 5  # x, a, p, q, y
    assert sum(node.op_type == "Cast" and node.input[0] == "a" for node in half.graph.node) == 1


def test_qdq_before_opset_19_stays_fp32_between_casts():
    nodes = [
        ("Relu", "x", "a"),
        ("QuantizeLinear", "a s z", "q"),
        ("DequantizeLinear", "q s z", "d"),
        ("Relu", "d", "y"),
    ]
    constants = {"s": np.float32(0.1), "z": np.int8(0)}
    x = np.float32([-1, 0.26, 3])
    for opset, expected in ((13, {"q", "d"}), (19, set())):
        half, report = to_fp16(graph(nodes, {"x": (3,)}, {"y": (3,)}, constants, opset), [{"x": x}])
        assert set(kept(report)) == expected
        assert types(half)["s"] == (TensorProto.FLOAT if opset == 13 else TensorProto.FLOAT16)
        np.testing.assert_allclose(run(half, {"x": x})[0], [0, 0.3, 3], rtol=2**-10)


@pytest.mark.parametrize("scale", [2.0**-18, 600.0])
def test_scales_that_fp16_does_not_hold_keep_their_pair_in_fp32(scale):
    nodes = [("QuantizeLinear", "x s z", "q"), ("DequantizeLinear", "q s z", "y")]
    model = graph(nodes, {"x": (3,)}, {"y": (3,)}, {"s": np.float32(scale), "z": np.int8(0)}, 19)
    half, report = to_fp16(model, [])
    assert kept(report) == {"q": "scale", "y": "scale"}
    np.testing.assert_array_equal(run(half, {"x": np.float32([0, 1, 100]) * scale})[0], np.float32([0, 1, 100]) * scale)


def test_roundings_are_counted_along_the_longest_path():
    """Each product rounds its constant and its result; what moves or selects values rounds nothing."""
    nodes = [
        ("Mul", "x k", "a"),
        ("Relu", "a", "b"),
        ("Reshape", "b shape", "c"),
        ("Mul", "c k", "d"),
        ("Mul", "x k", "e"),
        ("Add", "d e", "y"),
    ]
    model = graph(nodes, {"x": (4,)}, {"y": (4,)}, {"k": np.float32([2]), "shape": np.int64([4])})
    assert rounding_count(to_fp16(model, [])[0]) == 1 + 2 + 2 + 1
    assert rounding_count(model) == 0


def test_the_same_graph_gives_the_same_bytes_and_is_left_as_it_is():
    model, feeds = overflowing(), [{"x": np.float32([0.01, -1, 2, 3])}]
    before = model.SerializeToString(deterministic=True)
    first, second = (to_fp16(model, feeds)[0].SerializeToString(deterministic=True) for _ in range(2))
    assert first == second and model.SerializeToString(deterministic=True) == before


def test_every_tensor_is_seen_whatever_a_session_may_hold():
    model = overflowing()
    frames = [{"x": np.float32([1, 2, 3, 4])}, {"x": np.float32([5, 6, 7, 8])}]
    for budget in (1, 40, 1 << 20):
        seen = list(each_tensor(model, frames, budget))
        assert [name for name, _ in seen] == ["x", "a", "square", "root", "y"] * 2
        np.testing.assert_array_equal(seen[7][1], np.square(np.float32(1000) * frames[1]["x"]))


def test_bad_input_is_one_clear_line():
    model = overflowing()
    with refused("geometry", "found matrix", "expected names of the graph's tensors"):
        to_fp16(model, [], geometry=["matrix"])
    with pytest.raises(UserError, match="frames: found z, expected the input x too"):
        to_fp16(model, [{"z": np.zeros(4, np.float32)}])
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["t"])], "b", [], [helper.make_tensor_value_info("t", 1, [4])]
    )
    model.graph.node.append(helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    with pytest.raises(UserError, match="w: found If with a graph inside"):
        to_fp16(model, [])


class Attention(torch.nn.Module):
    """A pre-norm transformer block's first half, and its feed-forward's GELU."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.qkv = torch.nn.Linear(8, 24)
        self.feed = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 16), torch.nn.GELU())
        self.bias = torch.nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        attention = (q * 8**-0.5 @ k.transpose(-2, -1) + self.bias).softmax(-1)
        return self.feed(x + attention @ v)


def test_what_torch_writes_for_a_transformer_block_keeps_norms_and_softmax():
    torch.manual_seed(0)
    block, x = Attention().eval(), torch.randn(2, 6, 8)
    for parameter in block.parameters():  # affine pairs of 1 and 0 would be simplified away
        torch.nn.init.normal_(parameter, std=0.5)
    model = simplify(trace(block, [x], ["x"], ["y"], 13), "block")
    half, report = to_fp16(model, [{"x": x.numpy()}])
    reasons = Counter(entry["reason"] for entry in report["fp32"])
    assert reasons == {"layer norm": 18, "softmax": 2}
    by_type = {node.op_type for node in half.graph.node if types(half).get(node.output[0]) == TensorProto.FLOAT16}
    assert {"MatMul", "Erf"} <= by_type and not {"ReduceMean", "Sqrt", "Softmax"} & by_type
    expected = block(x).detach().numpy()
    assert sqnr(expected, run(rounded(half), {"x": x.numpy()})[0]) > tolerance_db("fp16", report["roundings"])
