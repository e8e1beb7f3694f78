"""`onnxruntime`: u8 activations, and a Q behind every convolution, as its CPU kernels want them.

ONNX Runtime brings a convolution to integers only where Q follows its output. What cannot be negative is rounded from zero up,
twice as fine as s8; the rest as s8, stored in u8.
"""

from __future__ import annotations

from qat.lean.flavours.base import Flavour
from qat.lean.quantizer import U8, U8_SHIFTED, Spec

ROLES = frozenset({"input", "identity", "add", "concat", "output"})


class _Unsigned(Flavour):
    def activation(self, least: float) -> Spec:
        return U8 if least >= 0 else U8_SHIFTED


ONNXRUNTIME = _Unsigned(
    "onnxruntime",
    ROLES,
    ("integer_weights", "early_rounding", "conv_as_matmul", "scale_as_product"),
)
