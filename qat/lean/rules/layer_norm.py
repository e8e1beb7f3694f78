"""Layer norm stays in float, between a dequantized sum and the next layer's quantizer.

    before  x ─► norm ─► linear          after  x ─► norm ─► Q ─► linear

Why: it divides by a standard deviation computed from its own input, so rounding that input moves every output; the
residual stream that it reads is the sum of all layers before and has the widest range of all; no engine has an INT8
kernel for it (at opset 13 it is written as means, products and a square root). The residual adds of a network that
normalises before its layers ("pre-norm": ViT, Swin, ConvNeXt) have no quantizer either: the rule for adds asks for
the identity only where engines fuse the add into a convolution, and a linear layer followed by a layer scale, a
permutation or a window merge is not such a place.
"""

from __future__ import annotations

from torch import nn

from qat.lean.placement import Placement, rule


@rule
def layer_norm(placement: Placement) -> None:
    """Notes every layer norm (and RMS norm) as float."""
    for node in placement.nodes():
        module = placement.module(node)
        if isinstance(module, nn.LayerNorm) or type(module).__name__ in ("LayerNorm2d", "RmsNorm", "RMSNorm"):
            placement.keep(str(node.target), "layer_norm", "layer norm: divides by its input's own deviation")
