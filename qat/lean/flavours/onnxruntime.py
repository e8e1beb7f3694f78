"""`onnxruntime`: u8 activations, and a Q behind everything that its CPU has an integer kernel for.

ONNX Runtime brings a convolution to integers only where Q follows its output (`qat.lean.rules.integer_chain`). What cannot be
negative is rounded from zero up, twice as fine as s8; the rest from its smallest to its largest value.
"""

from __future__ import annotations

from qat.lean.flavours.base import UnsignedFlavour

ROLES = frozenset({"input", "identity", "add", "concat", "output", "integer"})


ONNXRUNTIME = UnsignedFlavour(
    "onnxruntime",
    ROLES,
    (
        "scale_as_depthwise",
        "integer_weights",
        "conv_as_matmul",
        "scale_as_product",
        "global_pool",
        "hard_sigmoid_as_sum",
        "silu",
    ),
)
