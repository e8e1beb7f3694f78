"""A pass of the CPU flavours: what a Resize or a MaxPool takes in is rounded on the scale of what it gives.

    before   Conv ─► Relu ─► Resize ─► Q ─► DQ ─►        after   Conv ─► Relu ─► Q ─► DQ ─► Resize ─► Q ─► DQ ─►
             (or Add ─► Relu; or MaxPool)                                    └─ same scale ──┘

ONNX Runtime brings a convolution (or an add) to integers only where Q follows it, and OpenVINO writes the result in FP32 where
it does not: the first convolution of a ResNet, before its pooling, takes twice as long so. Neither operator leaves the range
of its inputs, so the scale after it serves before it. The largest of rounded values is the rounded largest: with MaxPool nothing
changes. What is interpolated is rounded once more than in PyTorch's simulation, by the same half step at most, and averaged.
"""

from __future__ import annotations

import onnx
from onnx import helper

from qat.export.lookups import attribute, consumers, producers

BOUNDED = (b"nearest", b"linear")  # a cubic Resize overshoots


def round_early(model: onnx.ModelProto) -> int:
    """Inserts the pairs in place; returns how many."""
    graph = model.graph
    producer, readers = producers(graph), consumers(graph)
    nodes: list[onnx.NodeProto] = []
    inserted = 0
    for node in graph.node:
        after = readers[node.output[0]]
        source = producer.get(node.input[0]) if node.op_type in ("Resize", "MaxPool") else None
        if (
            source is not None
            and source.op_type in ("Conv", "ConvTranspose", "Add", "Relu")
            and len(readers[node.input[0]]) == 1
            and [n.op_type for n in after] == ["QuantizeLinear"]
            and (node.op_type == "MaxPool" or attribute(node, "mode", b"nearest") in BOUNDED)
        ):
            stem, parameters = node.input[0], after[0].input[1:]
            nodes += [
                helper.make_node("QuantizeLinear", [stem, *parameters], [f"{stem}_q"], name=f"{node.name}_input_q"),
                helper.make_node(
                    "DequantizeLinear", [f"{stem}_q", *parameters], [f"{stem}_dq"], name=f"{node.name}_input_dq"
                ),
            ]
            node.input[0] = f"{stem}_dq"
            inserted += 1
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return inserted
