"""The form that both CPU flavours begin with: activations in u8, weights and biases stored as integers.

    before   x ─► Q(s8) ─► DQ ─┐                    after   x ─► Q(u8) ─► DQ ──────────────┐
             w ─► Q(s8) ─► DQ ─┼─► Conv ─► Relu ─►          w in s8 ─────► DQ(per channel) ┼─► Conv ─► Relu ─► Q(u8) ─►
             b in FP32 ────────┘                            b in s32 ────► DQ(s_x·s_w) ────┘

- Activations that cannot be negative take u8 with zero point 0 over the same range, amax/255 for amax/127: twice as fine,
  and a ReLU before a zero point of 0 folds into the rounding. The others take u8 with zero point 128, which is the same
  rounding as s8. What was traced in u8 (`qat.lean.modes.unsigned_background`) stays as it is.
- Weights are stored as integers, a quarter of the bytes.
- Biases become s32 on the scale of the products: without that ONNX Runtime leaves the convolution in float.
- The convolution before a residual add has Q/DQ on its output: its watched quantizer is on while these flavours are
  traced (`qat.lean.modes.watched_on`). ONNX Runtime fuses it only so, and OpenVINO is a fifth faster with it
  (benchmarks/flavours.py).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qat.core.errors import UserError
from qat.export.lookups import attribute, constants, consumers, producers

NEVER_NEGATIVE = ("Relu", "Sigmoid", "Softmax")
# What gives nothing negative when its data inputs hold nothing negative.
KEEPS_SIGN = (
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Concat",
    "Add",
    "Mul",
    "Reshape",
    "Transpose",
    "Slice",
    "Flatten",
)


class _Graph:
    """Lookups over a graph that is being changed."""

    def __init__(self, graph: onnx.GraphProto, never_negative: Collection[str] = ()) -> None:
        self.graph = graph
        self.producer, self.consumers, self.constants = producers(graph), consumers(graph), constants(graph)
        self.added: dict[str, np.ndarray] = {}
        self._signs: dict[str, bool] = dict.fromkeys(never_negative, True)

    def add(self, name: str, value: np.ndarray) -> str:
        self.added[name] = value
        return name

    def never_negative(self, name: str) -> bool:
        """Whether the operators before this tensor rule negative values out."""
        if name not in self._signs:
            node = self.producer.get(name)
            if node is None or name in self.constants:
                sign = name in self.constants and bool((self.constants[name] >= 0).all())
            elif node.op_type in NEVER_NEGATIVE:
                sign = True
            elif node.op_type in ("QuantizeLinear", "DequantizeLinear") or (
                node.op_type == "Resize" and attribute(node, "mode", b"nearest") in (b"nearest", b"linear")
            ):
                sign = self.never_negative(node.input[0])
            else:
                count = 1 if node.op_type in ("Reshape", "Slice") else len(node.input)
                sign = node.op_type in KEEPS_SIGN and all(self.never_negative(i) for i in node.input[:count])
            self._signs[name] = sign
        return self._signs[name]


def _store_weight(g: _Graph, quantize: onnx.NodeProto, dequantize: onnx.NodeProto) -> None:
    """w ─► Q ─► DQ becomes an s8 initializer ─► DQ."""
    weight, scale = (g.constants[name] for name in quantize.input[:2])
    axis = attribute(quantize, "axis", 1)
    shape = [1] * weight.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    # float32 throughout, and rounding half to even: what QuantizeLinear does
    rounded = np.rint(weight / scale.astype(np.float32).reshape(shape))
    dequantize.input[0] = g.add(f"{quantize.input[0]}_s8", np.clip(rounded, -128, 127).astype(np.int8))
    g.graph.node.remove(quantize)


def _shift_activation(g: _Graph, quantize: onnx.NodeProto, dequantize: onnx.NodeProto) -> None:
    """Q ─► DQ in s8 becomes u8, zero point 0 where nothing is negative, else 128."""
    scale = g.constants[quantize.input[1]]
    if g.never_negative(quantize.input[0]):
        scale, zero = (scale.astype(np.float64) * 127 / 255).astype(np.float32), np.uint8(0)
    else:
        zero = np.uint8(128)
    names = [g.add(f"{quantize.output[0]}_scale", np.asarray(scale, np.float32).reshape(()))]
    names.append(g.add(f"{quantize.output[0]}_zero", np.asarray(zero)))
    for node in (quantize, dequantize):
        del node.input[1:]
        node.input.extend(names)


def _store_bias(g: _Graph, conv: onnx.NodeProto) -> onnx.NodeProto | None:
    """A convolution's FP32 bias becomes s32 ─► DQ; returns the DQ."""
    if len(conv.input) < 3 or conv.input[2] not in g.constants:
        return None
    pairs = [g.producer.get(name) for name in conv.input[:2]]
    if any(node is None or node.op_type != "DequantizeLinear" for node in pairs):
        return None
    scales = [g.added.get(node.input[1], g.constants.get(node.input[1])) for node in pairs if node is not None]
    if scales[0] is None or scales[1] is None or scales[0].size != 1:
        return None
    bias = g.constants[conv.input[2]].astype(np.float64)
    scale = (scales[0].astype(np.float64).ravel()[0] * scales[1].astype(np.float64).ravel()).astype(np.float32)
    whole = np.rint(bias / scale.astype(np.float64))
    if not np.abs(whole).max(initial=0) < 2**31:
        return None  # a channel of near-zero weights: its convolution stays in float
    scale = np.broadcast_to(scale, bias.shape).copy()
    stem = conv.output[0]
    inputs = [g.add(f"{stem}_bias_s32", whole.astype(np.int32)), g.add(f"{stem}_bias_scale", scale)]
    conv.input[2] = f"{stem}_bias"
    return helper.make_node("DequantizeLinear", inputs, [conv.input[2]], name=f"{stem}_bias_dq", axis=0)


def never_negative_outputs(model: onnx.ModelProto, never_negative: Collection[str] = ()) -> list[str]:
    """The graph's outputs that cannot be negative, given the inputs that cannot."""
    g = _Graph(model.graph, never_negative)
    return [output.name for output in model.graph.output if g.never_negative(output.name)]


def to_unsigned(model: onnx.ModelProto, never_negative: Collection[str] = ()) -> onnx.ModelProto:
    """The u8 form of a `tensorrt`-flavoured graph; the argument is left as it is.

    Args:
        never_negative: the graph's inputs that cannot be negative, for the graph alone does not tell: the part before
            this one ends in a ReLU.

    Raises:
        UserError: the graph's activations are neither in symmetric s8 nor in u8 from zero.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    g = _Graph(model.graph, never_negative)
    found = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    zeros = [g.constants.get(node.input[2]) if len(node.input) > 2 else None for node in found]
    signed = any(zero is not None and zero.dtype == np.int8 for zero in zeros)  # a CPU flavour's graph has none left
    for quantize, zero in zip(found, zeros, strict=True):
        if zero is None or zero.any() or zero.dtype not in (np.int8, np.uint8) or not signed:
            raise UserError(f"{quantize.name}: found another zero point than 0 in s8, expected the tensorrt flavour")
        if zero.dtype == np.uint8:
            continue
        for dequantize in g.consumers[quantize.output[0]]:
            if quantize.input[0] in g.constants:
                _store_weight(g, quantize, dequantize)
            else:
                _shift_activation(g, quantize, dequantize)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        bias = _store_bias(g, node) if node.op_type == "Conv" else None
        nodes += [bias, node] if bias is not None else [node]
    used = {name for node in nodes for name in node.input}
    kept = [node for node in nodes if node.op_type != "Constant" or node.output[0] in used]
    initializers = [value for value in model.graph.initializer if value.name in used]
    initializers += [numpy_helper.from_array(value, name) for name, value in g.added.items() if name in used]
    del model.graph.node[:], model.graph.initializer[:]
    del model.graph.value_info[:]  # it records s8 for what is u8 now; inferred anew by whoever needs it
    model.graph.node.extend(kept)
    model.graph.initializer.extend(initializers)
    onnx.checker.check_model(model, full_check=True)
    return model
