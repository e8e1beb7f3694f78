"""A pass of the `onnxruntime` flavour: a 1×1 convolution (or one in 1d of one place) whose output stays float becomes a matrix product.

    before   x ─► DQ ─┐                        after   x ─► DQ ─► NHWC ─┐
             w ─► DQ ─┼─► Conv ─► y                    wᵀ ──────► DQ ───┴─► MatMul ─► Add ─► NCHW ─► y
             b ─► DQ ─┘                                                     b (FP32) ──┘

ONNX Runtime's CPU has no convolution from integers to float: without a Q after it, DQ ─► Conv is computed in float. It has
such a matrix product (MatMulIntegerToFloat), so depth logits and context are computed from INT8 without being rounded.
The transpose before it cancels with the one after the preceding integer convolution.

Applied only if nothing after it is rounded: in the middle of a network (Conv ─► SiLU ─► Q) it makes both backends slower.
There ONNX Runtime needs a Q after the convolution, and OpenVINO, which has convolutions from integers to float, reorders
the matrix product's result: EfficientNet-B0 takes 1.6 times as long.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qat.export.lookups import consumers, producers, replace_nodes


def plain_attributes(dims: int) -> dict[str, object]:
    """The attributes of a convolution that looks at one place, of these dimensions."""
    ones = [1] * dims
    return {"kernel_shape": ones, "strides": ones, "dilations": ones, "pads": [0] * 2 * dims, "group": 1}


def convs_to_matmuls(model: onnx.ModelProto) -> int:
    """Rewrites 1×1 convolutions of rounded inputs and stored s8 weights, with no Q anywhere behind, in place; returns how many."""
    graph = model.graph
    constants = {value.name: value for value in graph.initializer}
    producer, readers = producers(graph), consumers(graph)

    rounded_behind: dict[str, bool] = {}
    for node in reversed(graph.node):  # consumers before producers
        behind = node.op_type == "QuantizeLinear" or any(rounded_behind.get(name, False) for name in node.output)
        for name in node.input:
            rounded_behind[name] = rounded_behind.get(name, False) or behind

    nodes: list[onnx.NodeProto] = []
    dropped: set[str] = set()
    changed = 0
    for node in graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        dims = len(attributes.get("kernel_shape", ()))
        plain = node.op_type == "Conv" and all(attributes.get(k, v) == v for k, v in plain_attributes(dims).items())
        pairs = [producer.get(name) for name in node.input[:2]] if plain else []
        if (
            not pairs
            or any(pair is None or pair.op_type != "DequantizeLinear" for pair in pairs)
            or pairs[1] is None
            or pairs[1].input[0] not in constants
            or "kernel_shape" not in attributes
            or rounded_behind.get(node.output[0], False)
        ):
            nodes.append(node)
            continue
        weight_dq, stem = pairs[1], node.output[0]
        weight = numpy_helper.to_array(constants[weight_dq.input[0]])
        weight = weight.reshape(weight.shape[:2]).T  # [in, out]
        stored = f"{weight_dq.input[0]}_t"
        if stored not in constants:  # else of another convolution with the same weights
            constants[stored] = numpy_helper.from_array(np.ascontiguousarray(weight), stored)
            graph.initializer.append(constants[stored])
        parameters = list(weight_dq.input[1:])
        unpacked = helper.make_node(
            "DequantizeLinear", [stored, *parameters], [f"{stem}_weight"], name=f"{node.name}_weight_dq"
        )
        if weight_dq.attribute:  # one scale for each output channel, which is the last dimension now
            unpacked.attribute.append(helper.make_attribute("axis", 1))
        nodes += [
            helper.make_node(
                "Transpose",
                [node.input[0]],
                [f"{stem}_nhwc"],
                # Outside the layer's scope: `qat.export.bisect` finds the layer's result by the last transpose there.
                name=f"{node.name.replace('/', '_')}_nhwc",
                perm=[0, *range(2, dims + 2), 1],
            ),
            unpacked,
            helper.make_node(
                "MatMul", [f"{stem}_nhwc", f"{stem}_weight"], [f"{stem}_product"], name=f"{node.name}_matmul"
            ),
        ]
        last = f"{stem}_product"
        if len(node.input) > 2:
            last = f"{stem}_sum"
            nodes.append(helper.make_node("Add", [f"{stem}_product", node.input[2]], [last], name=f"{node.name}_add"))
        nodes.append(
            helper.make_node(
                "Transpose", [last], [stem], name=f"{node.name}_nchw", perm=[0, dims + 1, *range(1, dims + 1)]
            )
        )
        if len(readers[weight_dq.output[0]]) == 1:
            dropped.add(weight_dq.output[0])
        changed += 1
    replace_nodes(graph, [node for node in nodes if node.output[0] not in dropped])
    return changed
