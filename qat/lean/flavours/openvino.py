"""`openvino`: like `onnxruntime`, in the form that is fastest on OpenVINO's CPU plugin."""

from __future__ import annotations

from qat.lean.flavours.base import UnsignedFlavour

ROLES = frozenset({"input", "identity", "add", "concat", "output"})


OPENVINO = UnsignedFlavour(
    "openvino",
    ROLES,
    ("integer_weights", "conv_as_matmul", "scale_as_product", "hard_sigmoid_as_clip"),
)
