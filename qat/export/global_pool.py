"""A pass of the `onnxruntime` flavour: a mean over height and width, between roundings, becomes a global average pooling.

    before   x ─► DQ ─► ReduceMean over H, W ─► Q ─►        after   x ─► DQ ─► GlobalAveragePool ─► Q ─►

Both compute the same. ONNX Runtime computes the second in integers, channels last, and the first in float, over axes that
are not adjacent in memory: 0.03 ns for each element against 0.53, an eighth of EfficientNet-B0's time.
"""

from __future__ import annotations

import onnx

from qat.export.lookups import attribute, constants, consumers, opset_of, producers


def means_to_pools(model: onnx.ModelProto) -> int:
    """Rewrites them in place; returns how many."""
    graph = model.graph
    producer, readers, known = producers(graph), consumers(graph), constants(graph)
    if not any(node.op_type == "ReduceMean" for node in graph.node):
        return 0
    ranks = _ranks(model)
    newest = opset_of(model) >= 18  # axes given as an input
    changed = 0
    for node in graph.node:
        if node.op_type != "ReduceMean" or attribute(node, "keepdims", 1) != 1:
            continue
        before = producer.get(node.input[0])
        axes = known.get(node.input[1]) if newest and len(node.input) > 1 else attribute(node, "axes")
        if (
            before is not None
            and before.op_type == "DequantizeLinear"
            and [reader.op_type for reader in readers[node.output[0]]] == ["QuantizeLinear"]
            and axes is not None
            # Only for four dimensions: with fewer, -1 and -2 would not be height and width.
            and ranks.get(node.input[0]) == 4
            and sorted(int(axis) % 4 for axis in axes) == [2, 3]
        ):
            node.op_type = "GlobalAveragePool"
            del node.attribute[:], node.input[1:]
            changed += 1
    return changed


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = [*inferred.value_info, *inferred.input]
    return {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")}
