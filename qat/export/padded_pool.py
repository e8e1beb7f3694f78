"""A pass of every flavour: zeros around a MaxPool's input become the MaxPool's padding and a lower bound.

    before   x ─► Pad(0) ─► MaxPool ─►          after   x ─► MaxPool(pads) ─► Max(·, floor) ─►

ONNX Runtime's optimizer merges the two of the left into MaxPool(pads) alone (onnxruntime#24737), whose padding is −∞: negative
values at the border come out where zero is larger. `floor`, [1,1,oH,oW], is 0 where a window reaches into the padding and
the least float elsewhere, so the right side is the left one for every input. Behind a ReLU no value is below zero, and
the Max is left out.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qat.export.intermediates import tensor_types
from qat.export.lookups import attribute, constants, consumers, producers

NEVER_NEGATIVE = ("Relu", "Sigmoid", "Softmax")


def _pads(node: onnx.NodeProto, known: dict[str, np.ndarray]) -> list[int] | None:
    """[top, left, bottom, right] of a Pad with zeros of the last two of four dimensions; None for another one."""
    if attribute(node, "mode", b"constant") != b"constant" or len(node.input) < 2 or node.input[1] not in known:
        return None
    if len(node.input) > 2 and node.input[2] and (node.input[2] not in known or known[node.input[2]].any()):
        return None
    pads = [int(n) for n in known[node.input[1]]]
    if len(pads) != 8 or min(pads) < 0 or any(pads[i] for i in (0, 1, 4, 5)) or len(node.input) > 3:
        return None
    return [pads[2], pads[3], pads[6], pads[7]]


def pads_into_pools(model: onnx.ModelProto) -> int:
    """Rewrites the pairs in place; returns how many."""
    graph = model.graph
    known, readers, producer = constants(graph), consumers(graph), producers(graph)
    outputs = {value.name for value in graph.output}
    found = []
    for pool in graph.node:
        pad = producer.get(pool.input[0]) if pool.op_type == "MaxPool" else None
        if pad is None or pad.op_type != "Pad" or pad.output[0] in outputs or len(readers[pad.output[0]]) > 1:
            continue
        pads = _pads(pad, known)
        kernel = attribute(pool, "kernel_shape")
        plain = (
            attribute(pool, "auto_pad", b"NOTSET") == b"NOTSET"
            and not any(attribute(pool, "pads", [0]))
            and not attribute(pool, "ceil_mode", 0)
            and set(attribute(pool, "dilations", [1])) == {1}
            and len(pool.output) == 1
        )
        # ONNX requires a padding smaller than the kernel, so every window contains a value of the input.
        if (
            pads is None
            or not plain
            or len(kernel) != 2
            or max(pads[0::2]) >= kernel[0]
            or max(pads[1::2]) >= kernel[1]
        ):
            continue
        found.append((pad, pool, pads, kernel))
    if not found:
        return 0
    types = tensor_types(model)
    changed = 0
    for pad, pool, pads, kernel in found:
        size = [d.dim_value for d in types[pad.input[0]].shape.dim][2:]
        if len(size) != 2 or 0 in size:
            continue
        stride = attribute(pool, "strides", [1, 1])
        source = producer.get(pad.input[0])
        if source is None or source.op_type not in NEVER_NEGATIVE:
            touches = [
                [
                    begin < before or begin + window > before + length
                    for begin in range(0, before + length + after - window + 1, step)
                ]
                for length, window, step, before, after in zip(size, kernel, stride, pads[:2], pads[2:], strict=True)
            ]
            reached = np.array(touches[0])[:, None] | np.array(touches[1])[None]
            floor = np.where(reached, 0.0, np.finfo(np.float32).min).astype(np.float32)[None, None]
            name = f"{pool.output[0]}_floor"
            graph.initializer.append(numpy_helper.from_array(floor, name))
            bounded = helper.make_node(
                "Max",
                [f"{pool.output[0]}_unbounded", name],
                [pool.output[0]],
                name=f"{pool.name.replace('/', '_')}_bounded",
            )
            pool.output[0] = f"{pool.output[0]}_unbounded"
            graph.node.insert(list(graph.node).index(pool) + 1, bounded)
        pool.input[0] = pad.input[0]
        for old in [a for a in pool.attribute if a.name == "pads"]:
            pool.attribute.remove(old)
        pool.attribute.append(helper.make_attribute("pads", pads))
        graph.node.remove(pad)
        changed += 1
    used = {name for node in graph.node for name in node.input}
    for value in [v for v in graph.initializer if v.name not in used]:
        graph.initializer.remove(value)
    for node in [n for n in graph.node if n.op_type == "Constant" and n.output[0] not in used | outputs]:
        graph.node.remove(node)
    del graph.value_info[:]
    return changed
