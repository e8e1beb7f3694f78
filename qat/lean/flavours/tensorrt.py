"""`tensorrt` and `tensorrt-strong`: symmetric s8 everywhere, as TensorRT's explicit quantization requires.

It rounds the inputs of weighted layers, the identities of residual adds and concatenated tensors: a convolution's output
before an add stays float, so that convolution, add and ReLU become one INT8 kernel. Transposed convolutions have one scale
for the whole weight: some releases refuse one for each channel (NVIDIA/TensorRT#2380, #1694, #1699).
"""

from __future__ import annotations

from torch import nn

from qat.lean.flavours.base import Flavour
from qat.lean.layers import TRANSPOSED
from qat.lean.quantizer import S8, S8_TENSOR, Spec

ROLES = frozenset({"input", "identity", "add", "concat"})


class _TensorRT(Flavour):
    def weight(self, layer: nn.Module) -> Spec:
        return S8_TENSOR if isinstance(layer, TRANSPOSED) else S8


TENSORRT = _TensorRT("tensorrt", ROLES)
TENSORRT_STRONG = _TensorRT("tensorrt-strong", ROLES)
