"""A pass of the CPU flavours: weights and biases are stored as integers.

    before   w ─► Q(s8) ─► DQ ─┐                 after   w in s8 ──► DQ(per channel) ─┐
             x ─► Q ───► DQ ───┼─► Conv ─►               x ─► Q ───► DQ ──────────────┼─► Conv ─►
             b in FP32 ────────┘                         b in s32 ─► DQ(s_x·s_w) ─────┘

Weights take a quarter of the bytes. Without an s32 bias on the scale of the products ONNX Runtime leaves the convolution in float.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qat.export.lookups import attribute, constants, consumers, producers


def _store_weight(
    graph: onnx.GraphProto, quantize: onnx.NodeProto, dequantize: onnx.NodeProto, known: dict[str, np.ndarray]
) -> None:
    weight, scale = (known[name] for name in quantize.input[:2])
    shape = [1] * weight.ndim
    if scale.size > 1:
        shape[attribute(quantize, "axis", 1)] = scale.size
    # like QuantizeLinear: float32 throughout, and rounding half to even
    rounded = np.rint(weight / scale.astype(np.float32).reshape(shape))
    stored = f"{quantize.input[0]}_s8"
    known[stored] = np.clip(rounded, -128, 127).astype(np.int8)
    dequantize.input[0] = stored


def _store_bias(
    conv: onnx.NodeProto, producer: dict[str, onnx.NodeProto], known: dict[str, np.ndarray]
) -> onnx.NodeProto | None:
    """A convolution's FP32 bias becomes s32 ─► DQ; returns the DQ."""
    if len(conv.input) < 3 or conv.input[2] not in known:
        return None
    pairs = [producer.get(name) for name in conv.input[:2]]
    if any(node is None or node.op_type != "DequantizeLinear" for node in pairs):
        return None
    scales = [known.get(node.input[1]) for node in pairs if node is not None]
    if scales[0] is None or scales[1] is None or scales[0].size != 1:
        return None
    bias = known[conv.input[2]].astype(np.float64)
    scale = (scales[0].astype(np.float64).ravel()[0] * scales[1].astype(np.float64).ravel()).astype(np.float32)
    whole = np.rint(bias / scale.astype(np.float64))
    if not np.abs(whole).max(initial=0) < 2**31:
        return None  # a channel of near-zero weights: its convolution stays in float
    stem = conv.output[0]
    known[f"{stem}_bias_s32"] = whole.astype(np.int32)
    known[f"{stem}_bias_scale"] = np.broadcast_to(scale, bias.shape).copy()
    conv.input[2] = f"{stem}_bias"
    inputs = [f"{stem}_bias_s32", f"{stem}_bias_scale"]
    return helper.make_node("DequantizeLinear", inputs, [conv.input[2]], name=f"{stem}_bias_dq", axis=0)


def store_integers(model: onnx.ModelProto) -> int:
    """Stores every weight that is rounded in s8, and its layer's bias, in place; returns the number of weights."""
    graph = model.graph
    producer, readers, known = producers(graph), consumers(graph), constants(graph)
    own = set(known)
    stored = 0
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        zero = known.get(node.input[2]) if node.op_type == "QuantizeLinear" and len(node.input) > 2 else None
        if node.op_type == "QuantizeLinear" and node.input[0] in known and zero is not None and zero.dtype == np.int8:
            for dequantize in readers[node.output[0]]:
                _store_weight(graph, node, dequantize, known)
            stored += 1
            continue
        bias = _store_bias(node, producer, known) if node.op_type == "Conv" else None
        nodes += [bias, node] if bias is not None else [node]
    used = {name for node in nodes for name in node.input}
    kept = [node for node in nodes if node.op_type != "Constant" or node.output[0] in used]
    initializers = [value for value in graph.initializer if value.name in used]
    initializers += [numpy_helper.from_array(known[name], name) for name in known if name not in own and name in used]
    del graph.node[:], graph.initializer[:]
    del graph.value_info[:]  # inferred again if needed
    graph.node.extend(kept)
    graph.initializer.extend(initializers)
    return stored
