"""Strongly typed graphs: a residual block by hand, against numpy, and the parts of a small detector."""

import copy

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qat.core.errors import UserError
from qat.core.tensors import compare_tensors
from qat.core.verification import INT8_MARGIN_DB
from qat.export.flavour_tensorrt_strong import (
    ROUNDING_DB,
    rounded,
    to_tensorrt_strong,
    tolerance_db,
    verify_strong,
)
from qat.export.graph import simplify, trace
from qat.families.bevfusion.frames import random_frame
from qat.families.bevfusion.settings import pipeline_settings
from qat.lean.modes import qdq_tracing, quantizers_off
from qat.model.quantized import QuantizedModel
from qat.model.runners import run_frame, to_numpy, torch_parts
from tests.messages import refused

SCALES = {"x": 1 / 32, "c": 1 / 40}

ZERO = np.int8(0)
QDQ = ("QuantizeLinear", "DequantizeLinear")


def residual_block(weights, bias=0.1, zero=ZERO):
    """x ─► QDQ ─┬─► 1×1 Conv ─► Relu ─► QDQ ─► 1×1 Conv ─► Add ─► Relu ─► y
    └───────────────────────────────────────────┘"""
    values, nodes = {"z": zero}, []

    def pair(source, scale, zero, **attributes):
        nodes.append(helper.make_node("QuantizeLinear", [source, scale, zero], [f"{source}_q"], **attributes))
        nodes.append(helper.make_node("DequantizeLinear", [f"{source}_q", scale, zero], [f"{source}_d"], **attributes))

    for name in ("x", "c"):
        values[f"{name}_s"] = np.float32(SCALES[name])
    for name, weight in weights.items():
        values[name] = weight
        values[f"{name}_s"] = (np.abs(weight).max((1, 2, 3)).clip(1e-7) / 127).astype(np.float32)
        values[f"{name}_z"] = np.zeros(len(weight), np.int8)
        values[f"{name}_b"] = np.full(len(weight), bias, np.float32)
    pair("x", "x_s", "z")
    pair("w1", "w1_s", "w1_z", axis=0)
    nodes.append(helper.make_node("Conv", ["x_d", "w1_d", "w1_b"], ["a"]))
    nodes.append(helper.make_node("Relu", ["a"], ["c"]))
    pair("c", "c_s", "z")
    pair("w2", "w2_s", "w2_z", axis=0)
    nodes.append(helper.make_node("Conv", ["c_d", "w2_d", "w2_b"], ["e"]))
    nodes.append(helper.make_node("Add", ["e", "x_d"], ["sum"]))
    nodes.append(helper.make_node("Relu", ["sum"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 5, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 5, 6])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def strip_qdq(int8_model):
    """The graph without its Q/DQ pairs: the float network."""
    model = copy.deepcopy(int8_model)
    source = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in QDQ}
    nodes = [node for node in model.graph.node if node.op_type not in QDQ]
    for node in nodes:
        for i, name in enumerate(node.input):
            while name in source:
                name = source[name]
            node.input[i] = name
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    return model


def stored(model):
    return {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}


def makers(model):
    return {name: node for node in model.graph.node for name in node.output}


def run(model, feeds, optimized=False):
    options = ort.SessionOptions()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


@pytest.fixture
def weights():
    random = np.random.default_rng(0)
    return {name: random.uniform(-0.5, 0.5, (4, 4, 1, 1)).astype(np.float32) for name in ("w1", "w2")}


@pytest.fixture
def x():
    return np.random.default_rng(1).uniform(-4, 4, (1, 4, 5, 6)).astype(np.float32)


def half(value):
    return np.asarray(value).astype(np.float16).astype(np.float64)


def test_an_int8_block_is_integers_and_fp16_scales_to_the_last_rounding(weights, x):
    model, report = to_tensorrt_strong(residual_block(weights), "int8", [{"x": x}])
    assert report["opset"] == 19 and model.opset_import[0].version == 19 and model.ir_version >= 9
    assert report["fp32"] == [] and report["casts"] == 2  # x and y stay FP32
    assert {array.dtype.name for array in stored(model).values()} == {"int8", "float16"}

    def conv(name, value):
        scale = np.float32(np.abs(weights[name]).max((1, 2, 3)) / np.float32(127))
        whole = np.rint(weights[name][:, :, 0, 0] / scale[:, None])  # with the FP32 scale
        np.testing.assert_array_equal(stored(model)[f"{name}_q"][:, :, 0, 0], whole)
        weight = half(whole * half(scale)[:, None])
        return half(np.einsum("oi,nihw->nohw", weight, value) + half(np.float32(0.1)))

    def quantize(name, value):
        scale = half(SCALES[name])
        return half(np.clip(np.rint(np.float32(value) / np.float32(scale)), -128, 127) * scale)

    identity = quantize("x", half(x))
    inner = quantize("c", np.maximum(conv("w1", identity), 0))
    expected = np.maximum(half(conv("w2", inner) + identity), 0)
    found = run(rounded(model), {"x": x})["y"]
    # A sum may fall on the other side of a rounding: FP32's is in another order.
    assert np.mean(found == expected) > 0.95
    np.testing.assert_allclose(found, expected, rtol=2**-10, atol=2**-9)


@pytest.mark.parametrize("opset", [13, 17, 19, None])
@pytest.mark.parametrize("keep_io", [True, False])
def test_an_int8_block_is_within_tolerance_of_the_fp32_typed_one(weights, x, opset, keep_io):
    typed = residual_block(weights)
    model, report = to_tensorrt_strong(typed, "int8", [{"x": x}], opset, keep_io=keep_io)
    reference, exact = run(typed, {"x": x}), run(strip_qdq(typed), {"x": x})
    entry = verify_strong(model, report, reference, {"x": x}, exact)["y"]
    assert entry["passed"] and entry["tolerance_db"] < entry["quantization_db"]
    io_type = np.float32 if keep_io else np.float16
    fused = run(model, {"x": x.astype(io_type)}, optimized=True)["y"]
    assert fused.dtype == io_type
    assert compare_tensors(reference["y"], fused.astype(np.float32))["sqnr_db"] >= entry["tolerance_db"]


def test_before_opset_19_casts_stand_around_fp32_pairs(weights, x):
    model, report = to_tensorrt_strong(residual_block(weights), "int8", [{"x": x}], 13)
    made = makers(model)
    for name in ("a", "e"):
        for source in made[name].input[:2]:
            assert made[source].op_type == "Cast" and made[made[source].input[0]].op_type == "DequantizeLinear"
        assert stored(model)[made[name].input[2]].dtype == np.float16  # TensorRT wants a bias that is stored
    assert {entry["reason"] for entry in report["fp32"]} == {"no FP16 form in opset 13"}


def test_nearly_dead_channels_get_scales_that_fp16_holds(weights, x):
    weights["w1"][0] = 0
    weights["w1"][1] = np.float32([3e-5, -5e-4, 1e-6, 0]).reshape(4, 1, 1)
    model, report = to_tensorrt_strong(residual_block(weights), "int8", [{"x": x}])
    assert report["raised_scales"] == [
        {"tensor": "w1", "zero": 1, "coarsened": 1, "largest": pytest.approx(5e-4 / 127, rel=1e-6)}
    ]
    scale = stored(model)[makers(model)["w1_d"].input[1]]
    assert scale.dtype == np.float16 and scale[0] == 2**-14 and scale[1] == 2**-17
    whole = stored(model)["w1_q"]
    np.testing.assert_array_equal(whole[0], 0)
    np.testing.assert_array_equal(whole[1].ravel(), [4, -66, 0, 0])  # in steps of 2⁻¹⁷
    assert stored(model)["w2_s"].dtype == np.float16
    assert report["fp32"] == []


def test_weights_of_tiny_channels_alone_keep_fp32_scales(weights, x):
    weights["w1"] *= 1e-3
    model, report = to_tensorrt_strong(residual_block(weights), "int8", [{"x": x}])
    reasons = {entry["node"]: entry["reason"] for entry in report["fp32"]}
    assert reasons["w1_d"] == "scale" and stored(model)["w1_s"].dtype == np.float32
    assert report["raised_scales"] == []


def test_a_bias_that_overflows_keeps_its_convolution_in_fp32(weights, x):
    model, report = to_tensorrt_strong(residual_block(weights, bias=1e5), "int8", [{"x": x}])
    reasons = {entry["node"]: (entry["reason"], entry["max_abs"]) for entry in report["fp32"]}
    assert reasons["a"][0] == reasons["e"][0] == "constant overflow"
    assert stored(model)["w1_b"].dtype == np.float32
    # what the ReLU hands on is clipped by its quantizer to 127/40, which FP16 holds
    assert reasons["c"][0] == "overflow" and "c_d" not in reasons
    np.testing.assert_allclose(run(model, {"x": x})["y"], run(residual_block(weights, 1e5), {"x": x})["y"], rtol=1e-3)


def test_an_overflow_that_onnx_runtime_hides_is_found(weights, x):
    """On frames like those given all fits; on one 10⁵ times as bright the rounding that ONNX Runtime leaves out does not."""
    model = strip_qdq(residual_block(weights))
    strong, report = to_tensorrt_strong(model, "fp16", [{"x": x}], keep_io=True)
    assert verify_strong(strong, report, run(model, {"x": x}), {"x": x})["y"]["passed"]
    bright = {"x": x * np.float32(1e5)}
    with pytest.raises(UserError, match="NaN or infinite"):
        verify_strong(strong, report, run(model, bright), bright)


def test_a_rounding_to_fp16_costs_what_the_tolerance_is_derived_from():
    random = np.random.default_rng(0)
    value = np.exp2(random.uniform(-8, 8, 1_000_000)) * random.choice([-1, 1], 1_000_000)
    # each value against its own error: a tensor's large values would outweigh the others
    relative = np.square((value - half(value)) / np.exp2(np.floor(np.log2(np.abs(value)))))
    energy = np.square(value / np.exp2(np.floor(np.log2(np.abs(value)))))
    assert pytest.approx(10 * np.log10(energy.mean() / relative.mean()), abs=0.05) == ROUNDING_DB
    assert tolerance_db("fp16", 120) == pytest.approx(38.5, abs=0.1)
    assert tolerance_db("fp32") == tolerance_db("fp16", 0) == 80
    assert tolerance_db("int8", 0, 40.0) == pytest.approx(40 + INT8_MARGIN_DB, abs=1e-3)
    assert tolerance_db("int8", 120, None) == tolerance_db("fp16", 120)


def test_fp32_writes_no_other_types(weights, x):
    model = strip_qdq(residual_block(weights))
    strong, report = to_tensorrt_strong(model, "fp32", [{"x": x}])
    assert {array.dtype.name for array in stored(strong).values()} == {"float32"}
    assert report["roundings"] == 0 and report["opset"] == 13
    np.testing.assert_array_equal(run(strong, {"x": x})["y"], run(model, {"x": x})["y"])


def test_bad_input_is_one_clear_line(weights):
    model = residual_block(weights)
    with pytest.raises(UserError, match="precision: found 'bf16', expected one of fp32, fp16, int8"):
        to_tensorrt_strong(model, "bf16", [])
    with refused("precision fp16", "found 4 QuantizeLinear in the graph", "expected none"):
        to_tensorrt_strong(model, "fp16", [])
    with pytest.raises(UserError, match="expected the tensorrt flavour"):
        to_tensorrt_strong(residual_block(weights, zero=np.uint8(128)), "int8", [])  # as traced in a CPU flavour
    with pytest.raises(UserError, match="opset 999: onnx's version converter found"):
        to_tensorrt_strong(model, "int8", [], 999)


@pytest.fixture(scope="module")
def exported(fresh_config, small_cameras, make_detector):
    """part → (INT8 graph, graph without Q/DQ, inputs) of the small detector, calibrated on one made-up frame."""
    settings = pipeline_settings(fresh_config())
    detector = QuantizedModel(make_detector(fresh_config()))
    frame = random_frame(settings, seed=7)
    seen = {}
    modules = detector.activation_quantizers()
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].abs().max().clamp(min=1e-3))
        )
        for name, module in modules.items()
    ]
    with quantizers_off(detector), torch.inference_mode():
        tensors = to_numpy(run_frame(detector, frame))
        parts = torch_parts(detector)
    inputs = {
        name: {own: tensors[tensor] for own, tensor in part.inputs.items()}
        for name, part in detector.plan.parts.items()
    }
    for handle in handles:
        handle.remove()
    for name, module in modules.items():
        module.set_range(seen[name].clone())
    graphs = {}
    for name, part in parts.items():
        wrapper = part.wrapper
        with qdq_tracing():
            feeds = [torch.from_numpy(inputs[name][tensor]) for tensor in wrapper.inputs]
            model = simplify(trace(wrapper, feeds, wrapper.inputs, wrapper.outputs, 13), name)
        graphs[name] = model, strip_qdq(model), inputs[name]
    return graphs


@pytest.mark.parametrize("part", ["camera.backbone", "camera.vtransform", "fuser", "head.bbox"])
def test_parts_of_a_detector_are_within_tolerance(exported, part):
    model, bare, feeds = exported[part]
    reference, exact = run(model, feeds), run(bare, feeds)
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    cases = [("fp16", bare, None, exact, None)]
    cases += [("int8", model, opset, reference, exact if quantized else None) for opset in (13, 19)]
    for precision, source, opset, expected, unquantized in cases:
        strong, report = to_tensorrt_strong(source, precision, [feeds], opset)
        kept = {entry["operator"] for entry in report["fp32"] if "opset" not in entry["reason"]}
        assert kept <= {"Softmax", "Reshape", "Concat"}, (precision, opset)
        entries = verify_strong(strong, report, expected, feeds, unquantized)
        assert all(entry["passed"] for entry in entries.values()), (precision, opset, entries)
        again, _ = to_tensorrt_strong(copy.deepcopy(source), precision, [feeds], opset)
        assert again.SerializeToString(deterministic=True) == strong.SerializeToString(deterministic=True)
