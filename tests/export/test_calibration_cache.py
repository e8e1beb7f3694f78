"""The cache in its documented format, and its names beside the graph that it goes with."""

import struct

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qat.core.errors import UserError
from qat.export.calibration_cache import (
    activation_scales,
    read_calibration_cache,
    strip_qdq,
    write_calibration_cache,
)


def network(zero=0, kind=np.int8):
    """x ─► Reshape ─► QDQ ─► Conv ─► Relu ─► MaxPool ─► QDQ ─┬─► Conv ─► Add ─► y
    └────────────┘"""
    random = np.random.default_rng(0)
    values = {
        "shape": np.int64([1, 3, 4, 4]),
        "z": kind(zero),
        "first": np.float32(0.5),
        "second": np.float32(0.25),
        "wz": np.zeros(3, np.int8),
    }
    for name in ("w1", "w2"):
        values[name] = random.standard_normal((3, 3, 1, 1)).astype(np.float32)
        values[f"{name}_s"] = (np.abs(values[name]).max((1, 2, 3)) / 127).astype(np.float32)
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["image"])]

    def pair(source, scale, zero, **attributes):
        nodes.append(
            helper.make_node("QuantizeLinear", [source, scale, zero], [f"{source}_q"], f"{source}_q", **attributes)
        )
        nodes.append(helper.make_node("DequantizeLinear", [f"{source}_q", scale, zero], [f"{source}_d"], **attributes))

    pair("image", "first", "z")
    pair("w1", "w1_s", "wz", axis=0)
    nodes.append(helper.make_node("Conv", ["image_d", "w1_d"], ["conv1"]))
    nodes.append(helper.make_node("Relu", ["conv1"], ["onnx::relu"]))
    nodes.append(helper.make_node("MaxPool", ["onnx::relu"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]))
    pair("pooled", "second", "z")
    pair("w2", "w2_s", "wz", axis=0)
    nodes.append(helper.make_node("Conv", ["pooled_d", "w2_d"], ["conv2"]))
    nodes.append(helper.make_node("Add", ["conv2", "pooled_d"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 2, 2])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), values


def test_without_its_pairs_a_graph_is_the_float_network():
    model, values = network()
    bare = strip_qdq(model)
    assert {node.op_type for node in bare.graph.node} == {"Reshape", "Conv", "Relu", "MaxPool", "Add"}
    assert {value.name for value in bare.graph.initializer} == {"shape", "w1", "w2"}
    x = np.random.default_rng(1).standard_normal((1, 1, 3, 4, 4)).astype(np.float32)
    (found,) = ort.InferenceSession(bare.SerializeToString()).run(None, {"x": x})
    first = np.maximum(np.einsum("oi,nihw->nohw", values["w1"][:, :, 0, 0], x[0]), 0)
    pooled = first.reshape(1, 3, 2, 2, 2, 2).max((3, 5))
    expected = np.einsum("oi,nihw->nohw", values["w2"][:, :, 0, 0], pooled) + pooled
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_pair_before_an_output_leaves_the_outputs_name():
    model, _ = network()
    model.graph.node.append(helper.make_node("QuantizeLinear", ["y", "first", "z"], ["y_q"]))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["y_q", "first", "z"], ["out"]))
    model.graph.output[0].name = "out"
    bare = strip_qdq(model)
    assert [value.name for value in bare.graph.output] == ["out"] and bare.graph.node[-1].input[0] == "y"


def test_the_cache_holds_every_scale_by_the_float_graphs_names(tmp_path):
    model, _ = network()
    bare = strip_qdq(model)
    report = write_calibration_cache(model, bare, tmp_path / "part.cache")
    header, scales = read_calibration_cache(tmp_path / "part.cache")
    assert header == "TRT-8503-EntropyCalibration2"
    # the input is only reshaped; what the ReLU and the max-pooling leave of the convolution has the pooled tensor's range
    assert scales == {"x": 0.5, "image": 0.5, "conv1": 0.25, "onnx::relu": 0.25, "pooled": 0.25}
    tensors = {name for node in bare.graph.node for name in node.output} | {value.name for value in bare.graph.input}
    assert set(scales) <= tensors
    assert report == {"tensors": 5, "missing": ["conv2", "y"]}


def test_the_file_is_a_header_and_big_endian_hexadecimal(tmp_path):
    model, _ = network()
    next(value for value in model.graph.initializer if value.name == "first").CopyFrom(
        numpy_helper.from_array(np.float32(1.0), "first")
    )
    write_calibration_cache(model, strip_qdq(model), tmp_path / "c", version=100300)
    lines = (tmp_path / "c").read_text().split("\n")
    assert lines[:3] == ["TRT-100300-EntropyCalibration2", "x: 3f800000", "image: 3f800000"]
    assert lines[-1] == ""


def test_a_cache_written_by_a_builder_is_read(tmp_path):
    """As TensorRT's documentation shows one, and with the names that it gives to tensors without one."""
    path = tmp_path / "CalibrationTable"
    path.write_text("TRT-7000-EntropyCalibration2\ndata: 3c008912\n(Unnamed Layer* 5) [Constant]_output: 3F800000\n")
    header, scales = read_calibration_cache(path)
    assert header == "TRT-7000-EntropyCalibration2"
    (scale,) = struct.unpack("<f", bytes([0x12, 0x89, 0x00, 0x3C]))
    assert scales == {"data": scale, "(Unnamed Layer* 5) [Constant]_output": 1.0}


def test_a_tensor_quantized_in_two_ways_takes_the_larger_scale():
    model, _ = network()
    model.graph.node.insert(8, helper.make_node("QuantizeLinear", ["pooled", "first", "z"], ["again_q"]))
    model.graph.node.insert(9, helper.make_node("DequantizeLinear", ["again_q", "first", "z"], ["again_d"]))
    next(node for node in model.graph.node if node.op_type == "Add").input[1] = "again_d"
    onnx.checker.check_model(model, full_check=True)
    assert activation_scales(model)["pooled"] == 0.5


def test_a_cubic_resize_hands_no_scale_on():
    for mode, expected in (("linear", 0.25), ("cubic", None)):
        model, _ = network()
        model.graph.initializer.append(numpy_helper.from_array(np.float32([1, 1, 2, 2]), "scales"))
        model.graph.node.append(helper.make_node("Resize", ["pooled_d", "", "scales"], ["resized"], mode=mode))
        assert activation_scales(model).get("resized") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found an empty file, expected a first line such as TRT-8503-EntropyCalibration2"),
        ("data: 3c008912\n", "found 'data: 3c008912', expected a first line"),
        (
            "TRT-8503-EntropyCalibration2\ndata 3c008912\n",
            ":2: found 'data 3c008912', expected NAME: eight hexadecimal",
        ),
        ("TRT-8503-EntropyCalibration2\ndata: 3c00\n", ":2: found 'data: 3c00', expected NAME"),
        ("TRT-8503-EntropyCalibration2\ndata: 7fc00000\n", ":2: found the scale nan for data, expected a positive"),
        ("TRT-8503-EntropyCalibration2\ndata: 00000000\n", "found the scale 0.0 for data"),
        ("TRT-8503-EntropyCalibration2\na: 3c008912\na: 3c008912\n", ":3: found a a second time"),
    ],
)
def test_a_damaged_cache_is_one_clear_line(tmp_path, text, message):
    (tmp_path / "c").write_text(text)
    with pytest.raises(UserError) as error:
        read_calibration_cache(tmp_path / "c")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_text_or_no_file_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="found no readable file"):
        read_calibration_cache(tmp_path / "none")
    (tmp_path / "c").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="bytes that are no text"):
        read_calibration_cache(tmp_path / "c")


def test_names_must_be_those_of_the_graph_beside(tmp_path):
    model, _ = network()
    renamed = strip_qdq(model)
    for node in renamed.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = "other" if name == "pooled" else name
    with pytest.raises(UserError, match=r"found no tensor 'pooled' in the float graph \(1 such names\).*use strip_qdq"):
        write_calibration_cache(model, renamed, tmp_path / "c")
    with pytest.raises(UserError, match="found Q/DQ in the graph to go with the cache"):
        write_calibration_cache(model, model, tmp_path / "c")
    with pytest.raises(UserError, match="found no Q/DQ pair on an activation"):
        write_calibration_cache(strip_qdq(model), strip_qdq(model), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_another_flavour_is_refused():
    with pytest.raises(UserError, match="expected the tensorrt flavour"):
        strip_qdq(network(zero=128, kind=np.uint8)[0])  # as activations are in the CPU flavours
    with pytest.raises(UserError, match="image_q: found another zero point than 0 in s8"):
        strip_qdq(network(zero=3)[0])
