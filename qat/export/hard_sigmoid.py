"""Passes of the CPU flavours: HardSigmoid, and so HardSwish (x · HardSigmoid(x) at opset 13), in operators that are fast there.

    onnxruntime   x ─► DQ(s) ─► HardSigmoid ─► Q ─►   becomes   x ─► DQ(s · alpha) ─► Add beta ─► Q ─►
    openvino      x ─► HardSigmoid ─►                 becomes   x ─► · alpha ─► + beta ─► Clip 0 … 1 ─►

- ONNX Runtime has no HardSigmoid in integers, but sums. A Q whose range ends at 0 and at most at 1 saturates where HardSigmoid
  does, so it does the clipping: 0.06 ns for each element against 0.26. Reading x on a scale that is alpha times as
  large multiplies it by alpha.
- OpenVINO's HardSigmoid accepts one layout only, so everything around it is reordered: MobileNetV3-Large takes a third
  longer, with 61 reorderings for 5.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qat.export.lookups import attribute, constants, consumers, producers

Rewritten = tuple[list[onnx.NodeProto], dict[str, np.ndarray]]  # the replacing nodes, and their constants
OVER = 1e-6  # 255 · float32(1 / 255) is more than 1 by less than that


def hard_sigmoids_to_sums(model: onnx.ModelProto) -> int:
    """Rewrites those between roundings in place; returns how many."""
    graph = model.graph
    producer, readers, known = producers(graph), consumers(graph), constants(graph)

    def rewrite(node: onnx.NodeProto) -> Rewritten | None:
        before, after = producer.get(node.input[0]), readers[node.output[0]]
        if before is None or before.op_type != "DequantizeLinear" or [n.op_type for n in after] != ["QuantizeLinear"]:
            return None
        values = [known.get(name) for name in (*before.input[1:], *after[0].input[1:])]
        if len(values) != 4 or any(value is None or value.size != 1 for value in values):
            return None
        scale, _, own, zero = (value.reshape(()) for value in values if value is not None)
        if zero.dtype != np.uint8 or zero != 0 or own.astype(np.float64) * 255 > 1 + OVER:
            return None
        stem = node.output[0]
        alpha, beta = (float(attribute(node, key, usual)) for key, usual in (("alpha", 0.2), ("beta", 0.5)))
        if alpha <= 0 or beta <= 0:
            return None
        added: dict[str, np.ndarray] = {
            f"{stem}_read_scale": np.asarray(scale * np.float32(alpha), np.float32),
            f"{stem}_read_beta_u8": np.asarray(255, np.uint8),
            f"{stem}_read_beta_scale": np.asarray(beta / 255, np.float32),
            f"{stem}_read_beta_zero": np.asarray(0, np.uint8),
        }
        nodes = [
            helper.make_node(
                "DequantizeLinear",
                [before.input[0], f"{stem}_read_scale", before.input[2]],
                [f"{stem}_read"],
                name=f"{node.name}_input_dq",
            ),
            helper.make_node(
                "DequantizeLinear",
                [f"{stem}_read_beta_u8", f"{stem}_read_beta_scale", f"{stem}_read_beta_zero"],
                [f"{stem}_read_beta"],
                name=f"{node.name}_beta_dq",
            ),
            helper.make_node("Add", [f"{stem}_read", f"{stem}_read_beta"], [stem], name=node.name),
        ]
        return nodes, added

    return _rewrite(graph, rewrite)


def hard_sigmoids_to_clips(model: onnx.ModelProto) -> int:
    """Rewrites all of them in place; returns how many."""

    def rewrite(node: onnx.NodeProto) -> Rewritten:
        stem = node.output[0]
        alpha, beta = (float(attribute(node, key, usual)) for key, usual in (("alpha", 0.2), ("beta", 0.5)))
        values = {"alpha": alpha, "beta": beta, "least": 0.0, "most": 1.0}
        added = {f"{stem}_read_{key}": np.asarray(value, np.float32) for key, value in values.items()}
        nodes = [
            helper.make_node("Mul", [node.input[0], f"{stem}_read_alpha"], [f"{stem}_read"], name=f"{node.name}_mul"),
            helper.make_node(
                "Add", [f"{stem}_read", f"{stem}_read_beta"], [f"{stem}_read_sum"], name=f"{node.name}_add"
            ),
            helper.make_node(
                "Clip", [f"{stem}_read_sum", f"{stem}_read_least", f"{stem}_read_most"], [stem], name=node.name
            ),
        ]
        return nodes, added

    return _rewrite(model.graph, rewrite)


def _rewrite(graph: onnx.GraphProto, rewrite: Callable[[onnx.NodeProto], Rewritten | None]) -> int:
    nodes: list[onnx.NodeProto] = []
    added: dict[str, np.ndarray] = {}
    changed = 0
    for node in graph.node:
        found = rewrite(node) if node.op_type == "HardSigmoid" else None
        nodes += found[0] if found else [node]
        if found:
            added |= found[1]
            changed += 1
    if changed:
        outputs = {value.name for value in graph.output}
        used = outputs | {name for node in nodes for name in node.input}
        kept = [n for n in nodes if n.op_type != "DequantizeLinear" or n.output[0] in used]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in added.items())
    return changed
