"""Layer norm stays float, between a dequantized sum and the next layer's quantizer.

    before  x ─► norm ─► linear          after  x ─► norm ─► Q ─► linear

Why: it divides by a standard deviation computed from its own input, so rounding that input changes every output; the
residual stream that it reads is the sum of all earlier layers and has the widest range of all; no engine has an INT8
kernel for it (at opset 13 it consists of means, products and a square root). The residual adds of a network that
normalises before its layers ("pre-norm": ViT, Swin, ConvNeXt) have no quantizer either: the rule for adds quantizes
the identity only where engines fuse the add into a convolution, and a linear layer followed by a layer scale, a
permutation or a window merge is not such a place.
"""

from __future__ import annotations

from qat.lean.canonical import PATH
from qat.lean.placement import Placement, rule
from qat.lean.trace import aten

NORMS = (aten.layer_norm.default, aten.group_norm.default, aten.instance_norm.default, aten.rms_norm.default)


@rule
def layer_norm(placement: Placement) -> None:
    """Keeps every norm that computes its deviation from its own input float."""
    for node in placement.nodes():
        if node.target in NORMS:
            name = str(node.target).split(".")[1].replace("_", " ")
            placement.keep(str(node.meta[PATH]), "layer_norm", f"{name}: divides by its input's own deviation")
