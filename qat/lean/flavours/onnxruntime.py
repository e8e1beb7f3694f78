"""`onnxruntime`: u8 activations, and a Q after every operation that has an integer kernel on its CPU.

ONNX Runtime computes a convolution in integers only if a Q follows its output (`qat.lean.rules.integer_chain`). Tensors that
cannot be negative are rounded from zero up, twice as fine as s8; others from their smallest to their largest value.
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
