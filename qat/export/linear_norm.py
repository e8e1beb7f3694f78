"""A pass of every graph: a batch norm behind a linear layer, which torch writes between two transposes, goes into the layer.

    before   x ─► MatMul ─► Transpose ─► BatchNormalization ─► Transpose ─► y          after   x ─► MatMul' ─► Add ─► y

Linear + BatchNorm1d over [N,P,C] (a pillar encoder's layers). onnxsim folds norms behind convolutions alone.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from qat.export.lookups import attribute, constants, consumers, replace_nodes

KINDS = ("Transpose", "BatchNormalization", "Transpose")
SWAPPED = [0, 2, 1]


def fold_linear_norms(model: onnx.ModelProto) -> int:
    """Folds every such batch norm, in place; returns how many."""
    graph = model.graph
    known, readers = constants(graph), consumers(graph)
    outputs = {value.name for value in graph.output}
    made: dict[str, list[onnx.NodeProto]] = {}  # the last tensor of a chain → what computes it now
    gone: set[str] = set()  # tensors that are no longer computed
    added: dict[str, np.ndarray] = {}
    for product in [node for node in graph.node if node.op_type == "MatMul"]:
        chain = [product]
        for kind in KINDS:
            following = readers[chain[-1].output[0]]
            if chain[-1].output[0] in outputs or len(following) != 1 or following[0].op_type != kind:
                break
            chain.append(following[0])
        if len(chain) <= len(KINDS):
            continue
        norm, last = chain[2], chain[-1].output[0]
        weight, statistics = known.get(product.input[1]), [known.get(name) for name in norm.input[1:]]
        swapped = all(list(attribute(node, "perm")) == SWAPPED for node in (chain[1], chain[3]))
        if weight is None or weight.ndim != 2 or not swapped or any(value is None for value in statistics):
            continue
        scale, bias, mean, variance = (np.asarray(value, np.float64) for value in statistics)
        factor = scale / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
        added[f"{last}_weight"] = (weight * factor).astype(np.float32)
        added[f"{last}_bias"] = (bias - mean * factor).astype(np.float32)
        made[last] = [
            helper.make_node("MatMul", [product.input[0], f"{last}_weight"], [f"{last}_product"], name=product.name),
            helper.make_node("Add", [f"{last}_product", f"{last}_bias"], [last], name=norm.name),
        ]
        gone.update(node.output[0] for node in chain)
    if made:
        nodes = [n for node in graph.node for n in made.get(node.output[0], [] if node.output[0] in gone else [node])]
        replace_nodes(graph, nodes, added)
        kept = [value for value in graph.value_info if value.name not in gone]
        del graph.value_info[:]
        graph.value_info.extend(kept)
    return len(made)
