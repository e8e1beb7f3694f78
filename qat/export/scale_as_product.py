"""A pass of the CPU flavours: a convolution that only scales one channel becomes a product, channels last.

    before   x ─► Conv 1×1 ─► Relu ─► Q ─► DQ ─►          after   x ─► NHWC ─► · w ─► + b ─► Relu ─► Q ─► DQ ─► NCHW ─►

The first convolution over a depth map has one input channel and stays float. OpenVINO computes it as a matrix product with a
depth of one, and reorders its result in memory for the INT8 convolution after it: 9 ms of 94 for the full-size camera part. The
product, including the rounding, takes 2 ms (ONNX Runtime takes as long as before). Following layers read channels last.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qat.export.conv_as_matmul import plain_attributes
from qat.export.lookups import constants, consumers, replace_nodes
from qat.export.sunk_transpose import TO_NCHW, TO_NHWC

CHAIN = ("Relu", "QuantizeLinear", "DequantizeLinear")


def scales_to_products(model: onnx.ModelProto) -> int:
    """Rewrites 1×1 convolutions of one channel with constant float weights, in place, if only Relu, Q and DQ follow;
    returns how many."""
    graph = model.graph
    known, readers = constants(graph), consumers(graph)
    outputs = {value.name for value in graph.output}
    changed = 0
    for conv in [node for node in graph.node if node.op_type == "Conv"]:
        attributes = {a.name: helper.get_attribute_value(a) for a in conv.attribute}
        weight = known.get(conv.input[1])
        parameters = [known.get(name) for name in conv.input[1:]]
        if (
            any(value is None for value in parameters)
            or weight is None
            or weight.shape[1:] != (1, 1, 1)
            or weight.dtype != np.float32
            or any(attributes.get(key, value) != value for key, value in plain_attributes(2).items())
        ):
            continue
        last = conv
        for kind in CHAIN:
            following = readers[last.output[0]]
            if last.output[0] in outputs or len(following) != 1 or following[0].op_type != kind:
                break
            last = following[0]
        else:
            _rewrite(graph, conv, last, [value.reshape(-1) for value in parameters if value is not None])
            changed += 1
    return changed


def _rewrite(graph: onnx.GraphProto, conv: onnx.NodeProto, last: onnx.NodeProto, parameters: list[np.ndarray]) -> None:
    stem = conv.output[0]
    # Outside the layer's scope: otherwise `qat.export.bisect` would match a channels-last tensor with the layer's result.
    scope = conv.name.replace("/", "_")
    nodes = [helper.make_node("Transpose", [conv.input[0]], [f"{stem}_nhwc"], name=f"{scope}_nhwc", perm=TO_NHWC)]
    for kind, value in zip(("Mul", "Add"), parameters, strict=False):
        name = f"{stem}_{kind.lower()}"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), f"{name}_by"))
        nodes.append(
            helper.make_node(kind, [nodes[-1].output[0], f"{name}_by"], [name], name=f"{scope}_{kind.lower()}")
        )
    nodes[-1].output[0] = stem
    back = helper.make_node(
        "Transpose", [f"{last.output[0]}_nhwc"], [last.output[0]], name=f"{scope}_nchw", perm=TO_NCHW
    )
    last.output[0] = back.input[0]
    found: list[onnx.NodeProto] = []
    for node in graph.node:
        found += nodes if node is conv else [node]
        if node is last:
            found.append(back)
    replace_nodes(graph, found)
