"""`openvino`: as `onnxruntime`, with the form that measures fastest on OpenVINO's CPU plugin."""

from __future__ import annotations

from qat.lean.flavours.base import Flavour
from qat.lean.quantizer import U8, U8_AFFINE, Spec

ROLES = frozenset({"input", "identity", "add", "concat", "output"})


class _OpenVINO(Flavour):
    def activation(self, least: float) -> Spec:
        return U8 if least >= 0 else U8_AFFINE


OPENVINO = _OpenVINO(
    "openvino",
    ROLES,
    ("integer_weights", "conv_as_matmul", "scale_as_product", "hard_sigmoid_as_clip"),
)
