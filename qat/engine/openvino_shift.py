"""A graph pass before OpenVINO compiles: Q/DQ pairs in s8 around concatenations become u8 with zero point 128.

    before   x ─► Q(s8, zero 0)   ─► DQ ─► Concat ─► …        …─► Concat ─► Q(s8, zero 0)   ─► DQ ─► Conv
    after    x ─► Q(u8, zero 128) ─► DQ ─► Concat ─► …        …─► Concat ─► Q(u8, zero 128) ─► DQ ─► Conv

Both compute the same numbers: round(x/s) clipped to [−128, 127], times s. OpenVINO (seen in 2026.4.1, CPU) makes that
shift itself when it computes a concatenation in INT8, and then computes a convolution behind it wrongly (2 dB SQNR in
tests/engine/test_engines.py's graph). With the shift written in the graph, the result is right, at the same speed.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as ops

# Operations that do not change values: a pair beyond them also counts as around the concatenation.
PASSES = ("Concat", "MaxPool", "Interpolate", "Relu", "Reshape", "Transpose")


def _source(node: ov.Node, port: int = 0) -> ov.Node:
    return node.input(port).get_source_output().get_node()


def _consumers(node: ov.Node) -> list[ov.Node]:
    return [target.get_node() for output in node.outputs() for target in output.get_target_inputs()]


def _reaches_concat(node: ov.Node, forward: bool) -> bool:
    if node.get_type_name() == "Concat":
        return True
    if node.get_type_name() not in PASSES:
        return False
    following = _consumers(node) if forward else [_source(node)]
    return any(_reaches_concat(other, forward) for other in following)


def _signed_pair(multiply: ov.Node) -> ov.Node | None:
    """The first of an activation's FakeQuantize → Convert(i8) → Convert(f32) → Subtract(0) → Multiply, or None."""
    chain = [multiply]
    for kind in ("Subtract", "Convert", "Convert", "FakeQuantize"):
        if chain[-1].get_input_size() == 0 or _source(chain[-1]).get_type_name() != kind:
            return None
        chain.append(_source(chain[-1]))
    quantize = chain[-1]
    if chain[3].get_element_type() != ov.Type.i8 or _source(quantize).get_type_name() == "Constant":
        return None
    zero = _source(_source(chain[1], 1)) if _source(chain[1], 1).get_type_name() == "Convert" else _source(chain[1], 1)
    if zero.get_type_name() != "Constant" or np.any(zero.data):
        return None
    return quantize


def shift_concatenated(model: ov.Model) -> None:
    """Rewrites the pairs in place."""
    for multiply in model.get_ordered_ops():
        if multiply.get_type_name() != "Multiply":
            continue
        quantize = _signed_pair(multiply)
        if quantize is None:
            continue
        before, after = [_source(quantize)], _consumers(multiply)
        if not (any(_reaches_concat(n, False) for n in before) or any(_reaches_concat(n, True) for n in after)):
            continue
        shifted = ops.fake_quantize(
            quantize.input(0).get_source_output(),
            quantize.input(1).get_source_output(),
            quantize.input(2).get_source_output(),
            ops.constant(np.float32(0)),
            ops.constant(np.float32(255)),
            256,
        )
        stored = ops.convert(ops.convert(shifted, "u8"), "f32")
        zero = ops.convert(ops.constant(np.uint8(128)), "f32")
        multiply.input(0).replace_source_output(ops.subtract(stored, zero).output(0))
    model.validate_nodes_and_infer_types()
