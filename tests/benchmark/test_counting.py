"""Multiply-accumulates and bytes, beside a hand's count and torch's FlopCounterMode; the roofline."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qat.benchmark.counting import count_graph, count_parts, roofline_ms
from qat.core.errors import UserError


def save(path, nodes, constants, shape=(1, 2, 8, 8), out="y", out_type=TensorProto.FLOAT, in_type=TensorProto.FLOAT):
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", in_type, shape)],
        [helper.make_tensor_value_info(out, out_type, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def test_a_convolution_is_counted_as_by_hand(tmp_path):
    """x [1,2,8,8] ─ 3×3, stride 2, 4 channels ─► [1,4,4,4]."""
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2])
    constants = {"w": np.ones((4, 2, 3, 3), np.float32), "b": np.ones(4, np.float32)}
    count = count_graph(save(tmp_path / "a.onnx", [node], constants))
    assert count.macs == {"fp32": 4 * 4 * 4 * 2 * 9}
    assert count.bytes == 4 * (2 * 64 + 4 * 2 * 9 + 4 + 4 * 16)


def test_a_rounded_convolution_is_int8_and_moves_bytes(tmp_path):
    """Q/DQ on input, weight and, behind the ReLU, on the output."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s", "wz"], ["wd"]),
        helper.make_node("Conv", ["xd", "wd"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["rq"]),
        helper.make_node("DequantizeLinear", ["rq", "s", "z"], ["rd"]),
        helper.make_node("Conv", ["rd", "v"], ["y"]),  # a float weight: not INT8
    ]
    constants = {
        "s": np.float32(0.1),
        "z": np.uint8(0),
        "wz": np.int8(0),
        "w": np.ones((4, 2, 3, 3), np.int8),
        "v": np.ones((3, 4, 1, 1), np.float32),
    }
    count = count_graph(save(tmp_path / "a.onnx", nodes, constants))
    assert count.macs == {"int8": 4 * 64 * 18, "fp32": 3 * 64 * 4}
    first, second = count.layers
    assert first.bytes == 2 * 64 + 4 * 18 + 4 * 64
    assert second.bytes == 4 * 64 + 4 * 3 * 4 + 4 * 3 * 64


def test_half_floats_are_counted_by_type_or_by_the_builders_flag(tmp_path):
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    typed = save(
        tmp_path / "typed.onnx",
        [node],
        {"w": np.ones((4, 2, 1, 1), np.float16)},
        in_type=TensorProto.FLOAT16,
        out_type=TensorProto.FLOAT16,
    )
    flagged = save(tmp_path / "flagged.onnx", [node], {"w": np.ones((4, 2, 1, 1), np.float32)})
    expected = 2 * (2 * 64 + 8 + 4 * 64)
    for count in (count_graph(typed), count_graph(flagged, "fp16")):
        assert (count.macs, count.bytes) == ({"fp16": 4 * 2 * 64}, expected)
    assert count_graph(flagged).macs == {"fp32": 512}


class _Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 5, padding=4, dilation=2, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, groups=2)
        self.linear = nn.Linear(20, 7)
        self.gemm = nn.Linear(7, 5)

    def forward(self, x):
        x = self.up(torch.relu(self.grouped(self.first(x))))
        x = self.linear(x)  # over the last axis of four: a MatMul
        x = x @ x.transpose(2, 3)
        return self.gemm(x.flatten(1)[:, :7])


def test_counts_equal_torchs_flop_counter(tmp_path):
    network, x = _Network().eval(), torch.zeros(2, 3, 12, 20)
    torch.onnx.export(network, (x,), tmp_path / "a.onnx", opset_version=13, dynamo=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    count = count_graph(tmp_path / "a.onnx")
    assert {layer.type for layer in count.layers} == {"Conv", "ConvTranspose", "MatMul", "Gemm"}
    assert 2 * sum(count.macs.values()) == counter.get_total_flops()


def test_a_batch_of_any_size_counts_as_one(tmp_path):
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    weight = {"w": np.ones((4, 2, 1, 1), np.float32)}
    free = count_graph(save(tmp_path / "free.onnx", [node], weight, shape=("batch", 2, 8, 8)))
    fixed = count_graph(save(tmp_path / "fixed.onnx", [node], weight))
    assert free == fixed


def test_what_is_no_graph_is_refused(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"a\.onnx: not an ONNX graph"):
        count_graph(tmp_path / "a.onnx")


def test_a_graph_that_is_not_at_hand_is_told(tmp_path):
    assert count_parts({"fuser": None}, "fp32") == "the graph that fuser was built from is not among the folders"


def test_the_roofline_is_the_longer_of_computing_and_moving():
    macs = {"int8": 4_000_000, "fp32": 1_000_000}
    # 4 M at 4 G/s and 1 M at 1 G/s: 2 ms; 30 MB at 10 GB/s: 3 ms
    assert roofline_ms(macs, 10_000_000, {"int8": 4.0, "fp32": 1.0}, 10.0) == (pytest.approx(2.0), "compute")
    assert roofline_ms(macs, 30_000_000, {"int8": 4.0, "fp32": 1.0}, 10.0) == (pytest.approx(3.0), "memory")
    assert roofline_ms(macs, 30_000_000, {"int8": 4.0, "fp32": 1.0}, None) == (pytest.approx(2.0), "compute")
    assert roofline_ms(macs, 1, {"int8": 4.0}, 10.0) is None
