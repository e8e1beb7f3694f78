"""`onnxruntime`: u8 activations, and a Q behind everything that its CPU has an integer kernel for.

ONNX Runtime brings a convolution to integers only where Q follows its output (`qat.lean.rules.integer_chain`). What cannot be
negative is rounded from zero up, twice as fine as s8; the rest from its smallest to its largest value.
"""

from __future__ import annotations

from qat.lean.flavours.base import Flavour
from qat.lean.quantizer import U8, U8_AFFINE, Spec

ROLES = frozenset({"input", "identity", "add", "concat", "output", "integer"})


class _Unsigned(Flavour):
    def activation(self, least: float) -> Spec:
        return U8 if least >= 0 else U8_AFFINE


ONNXRUNTIME = _Unsigned(
    "onnxruntime",
    ROLES,
    ("integer_weights", "conv_as_matmul", "scale_as_product", "global_pool", "hard_sigmoid_as_sum", "silu"),
)
