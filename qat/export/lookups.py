"""Look-ups and node replacement for the passes over ONNX graphs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


def constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """The values of initializers and Constant nodes, by tensor name."""
    found = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def consumers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each tensor, in the graph's order; an empty list for one without readers."""
    found: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            found[name].append(node)
    return found


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """The node that computes each tensor."""
    return {name: node for node in graph.node for name in node.output}


def replace_nodes(
    graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto], added: Mapping[str, np.ndarray] | None = None
) -> None:
    """Sets a graph's nodes, adds constants, and removes constants that no node reads."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    used = {name for node in copies for name in node.input}
    kept = [value for value in graph.initializer if value.name in used]
    kept += [numpy_helper.from_array(value, name) for name, value in (added or {}).items()]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value as Python's or numpy's."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def opset_of(model: onnx.ModelProto) -> int:
    """A graph's opset version of ONNX's own operators."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
