"""A pass of the CPU flavours: channels stay last through Slice and Softmax.

    before   ─► NCHW ─┬─► Slice(1) ─► Softmax(1) ─►          after   ─┬─► Slice(3) ─► Softmax(3) ─► NCHW ─►
                      └─► Slice(1) ─► NHWC ─►                         └─► Slice(3) ─►

A matrix product (`qat.export.conv_as_matmul`) leaves its channels last, so a softmax over them reads memory in order. A softmax
over the second of four dimensions takes ONNX Runtime 20 ms of 310 for the depth weights of the full-size camera part
(benchmarks/flavours.py). The context stays channels-last and is not transposed at all.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qat.export.lookups import attribute, constants, consumers

TO_NCHW, TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]
PLACE = {0: 0, 1: 3, 2: 1, 3: 2}  # of a dimension of NCHW in NHWC


def sink_transposes(model: onnx.ModelProto) -> int:
    """Pushes transposes to NCHW down behind the nodes that follow them, in place, if all of these are Slice, Softmax and
    transposes back; returns how many were moved."""
    graph = model.graph
    outputs = {value.name for value in graph.output}
    known = constants(graph)
    moved = 0
    while (found := _next(graph, outputs, known)) is not None:
        transpose, consumers = found
        for node in consumers:
            at = list(graph.node).index(node)
            source = transpose.input[0]
            if node.op_type == "Transpose":  # the two cancel
                _rename(graph, node.output[0], source, outputs)
                if node.output[0] in outputs:
                    node.CopyFrom(helper.make_node("Identity", [source], [node.output[0]], name=node.name))
                else:
                    del graph.node[at]
                continue
            node.input[0] = source
            if node.op_type == "Slice":
                axes = np.array([PLACE[int(axis)] for axis in known[node.input[3]]], np.int64)
                node.input[3] = f"{node.output[0]}_axes_nhwc"
                graph.initializer.append(numpy_helper.from_array(axes, node.input[3]))
                known[node.input[3]] = axes
            else:
                for attribute in node.attribute:
                    if attribute.name == "axis":
                        attribute.i = PLACE[attribute.i]
            output = node.output[0]
            node.output[0] = f"{output}_nhwc"
            back = helper.make_node("Transpose", [node.output[0]], [output], name=f"{node.name}_nchw", perm=TO_NCHW)
            graph.node.insert(at + 1, back)
        graph.node.remove(transpose)
        moved += 1
    _drop_identities(graph, outputs)
    return moved


def _next(
    graph: onnx.GraphProto, outputs: set[str], known: dict[str, np.ndarray]
) -> tuple[onnx.NodeProto, list[onnx.NodeProto]] | None:
    """A transpose that can move, and its consumers."""
    readers = consumers(graph)

    def follows(node: onnx.NodeProto, name: str) -> bool:
        if node.input[0] != name or name in node.input[1:]:
            return False
        if node.op_type == "Slice":
            return len(node.input) > 3 and all(0 <= axis < 4 for axis in known.get(node.input[3], [-1]))
        if node.op_type == "Softmax":
            axis = attribute(node, "axis")
            return isinstance(axis, int) and 0 <= axis < 4
        return node.op_type == "Transpose" and attribute(node, "perm") == TO_NHWC

    for node in graph.node:
        if node.op_type != "Transpose" or attribute(node, "perm") != TO_NCHW or node.output[0] in outputs:
            continue
        after = readers[node.output[0]]
        if after and all(follows(consumer, node.output[0]) for consumer in after):
            return node, after
    return None


def _rename(graph: onnx.GraphProto, old: str, new: str, outputs: set[str]) -> None:
    if old not in outputs:
        for node in graph.node:
            for at, name in enumerate(node.input):
                if name == old:
                    node.input[at] = new


def _drop_identities(graph: onnx.GraphProto, outputs: set[str]) -> None:
    """Removes an Identity before a graph output: the node before it gets the output's name, unless others read its result."""
    for node in [n for n in graph.node if n.op_type == "Identity" and n.output[0] in outputs]:
        source = node.input[0]
        producer = next((n for n in graph.node if source in n.output), None)
        readers = [n for n in graph.node if source in n.input]
        if producer is not None and readers == [node] and source not in outputs:
            producer.output[list(producer.output).index(source)] = node.output[0]
            graph.node.remove(node)
