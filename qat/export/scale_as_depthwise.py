"""A pass of the ONNX Runtime flavour: a scale and a shift of each channel between roundings become a depthwise 1×1 convolution.

    before   x ─► DQ ─► · a ─► + b ─► Relu ─► Q ─►          after   x ─► DQ ─► Conv(a ─► Q ─► DQ, b) ─► Relu ─► Q ─►

This is a batch norm without a layer before it (DenseNet, RepVGG). It becomes one integer kernel instead of a product and a
sum, in integers or, as here, in float. (`qat.export.integer_weights` stores a in s8 and b in s32 after this.) Only the bias is
rounded, like a convolution's: with one scale per channel the weight is exactly ±127 steps.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from qat.export.lookups import constants, consumers, producers, replace_nodes

MOST = 127
LARGEST_BIAS = 2.0**30  # steps


def _channels(value: np.ndarray | None) -> np.ndarray | None:
    """The values of a constant [1,C,1,1] or [C,1,1]; None of others."""
    if value is None or value.dtype != np.float32 or value.ndim not in (3, 4) or value.size < 2:
        return None
    return value.reshape(-1) if value.shape[-3] == value.size else None


def weight_steps(scale: np.ndarray, shift: np.ndarray, step: float) -> np.ndarray:
    """float32[C]: each channel's step, chosen so that its shift fits an s32 bias too. step: of the input."""
    least = np.abs(shift.astype(np.float64)) / (step * LARGEST_BIAS)
    steps = np.maximum(np.abs(scale.astype(np.float64)) / MOST, least)
    return np.where(steps > 0, steps, 1.0).astype(np.float32)


def scales_to_depthwise(model: onnx.ModelProto) -> int:
    """Rewrites them in place; returns how many."""
    graph = model.graph
    known, readers, producer = constants(graph), consumers(graph), producers(graph)
    outputs = {value.name for value in graph.output}
    removed: set[str] = set()  # outputs of the removed sums
    made: dict[str, list[onnx.NodeProto]] = {}  # by the output of the product that they replace
    added: dict[str, np.ndarray] = {}

    def alone(node: onnx.NodeProto, kind: str) -> onnx.NodeProto | None:
        following = readers[node.output[0]]
        fits = node.output[0] not in outputs and len(following) == 1 and following[0].op_type == kind
        return following[0] if fits else None

    for product in graph.node:
        total = alone(product, "Add") if product.op_type == "Mul" else None
        if total is None:
            continue
        taken = [name for name in product.input if name not in known]
        scale = next((_channels(known.get(name)) for name in product.input if name in known), None)
        shift = next((_channels(known.get(name)) for name in total.input if name in known), None)
        before = producer.get(taken[0]) if len(taken) == 1 else None
        if scale is None or shift is None or scale.size != shift.size or before is None:
            continue
        step = known.get(before.input[1]) if before.op_type == "DequantizeLinear" else None
        if step is None or step.size != 1 or alone(alone(total, "Relu") or total, "QuantizeLinear") is None:
            continue
        stem = total.output[0]
        weight = [f"{stem}_weight", f"{stem}_weight_scale", f"{stem}_weight_zero"]
        steps = weight_steps(scale, shift, float(step.reshape(())))
        added |= zip(weight, (scale.reshape(-1, 1, 1, 1), steps, np.zeros(scale.size, np.int8)), strict=True)
        added[f"{stem}_shift"] = shift
        pair = [f"{stem}_weight_q", f"{stem}_weight_dq"]
        made[product.output[0]] = [
            helper.make_node("QuantizeLinear", weight, pair[:1], name=f"{stem}_weight_quantize", axis=0),
            helper.make_node("DequantizeLinear", [pair[0], *weight[1:]], pair[1:], name=pair[1], axis=0),
            helper.make_node(
                "Conv",
                [taken[0], pair[1], f"{stem}_shift"],
                [stem],
                name=total.name,
                group=scale.size,
                kernel_shape=[1, 1],
            ),
        ]
        removed.add(stem)
    if made:
        kept = (node for node in graph.node if node.output[0] not in removed)
        replace_nodes(graph, [new for node in kept for new in made.get(node.output[0], [node])], added)
    return len(made)
