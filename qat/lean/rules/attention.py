"""The two matmuls of attention and its softmax stay in float; the linear layers around them are INT8.

    before  x ─► qkv ─┬─ q ─┐                          after  x ─► Q ─► qkv ─┬─ q ─┐
                      ├─ k ─┴► matmul ─► softmax ─┐                          ├─ k ─┴► matmul ─► softmax ─┐
                      └─ v ───────────────────────┴► matmul ─► proj          └─ v ───────────────────────┴► matmul ─► Q ─► proj

Why: softmax returns a few large probabilities and many near zero, which one symmetric s8 scale (half of it unused)
represents badly; TensorRT fuses the whole attention into one FP16 kernel if it has no Q/DQ inside, and falls back to
separate kernels otherwise (Developer Guide, "Multi-head attention fusion"); and in a windowed or
small-image backbone the two products are a small share of the work (Swin-T: 49 tokens a window).
"""

from __future__ import annotations

from torch import nn

from qat.lean.canonical import PATH
from qat.lean.layers import DynamicConvolution, Einsum, Product
from qat.lean.placement import Placement, rule

REASONS = {
    Product: "attention: a product of two activations, which engines fuse in FP16",
    Einsum: "a product of two activations, written as einsum",
    DynamicConvolution: "its weight is computed from the input",
}


@rule
def attention(placement: Placement) -> None:
    """Keeps every product of two activations, and every softmax, float."""
    for node in placement.nodes():
        module = placement.module(node)
        if type(module) in REASONS:
            placement.keep(str(node.meta[PATH]), "attention", REASONS[type(module)])
        elif isinstance(module, nn.Softmax):
            reason = "softmax: its output spans too many magnitudes for one scale"
            placement.keep(str(node.meta[PATH]), "attention", reason)
