"""The two matmuls of attention and its softmax stay in float; the linear layers around them are INT8.

    before  x ─► qkv ─┬─ q ─┐                          after  x ─► Q ─► qkv ─┬─ q ─┐
                      ├─ k ─┴► matmul ─► softmax ─┐                          ├─ k ─┴► matmul ─► softmax ─┐
                      └─ v ───────────────────────┴► matmul ─► proj          └─ v ───────────────────────┴► matmul ─► Q ─► proj

Why: softmax gives a few large probabilities and many near zero, which one symmetric s8 scale (half of it unused)
serves badly; TensorRT fuses the whole of attention into one FP16 kernel when no Q/DQ stands inside, and falls back to
separate kernels when one does (Developer Guide, "Multi-head attention fusion"); and in a windowed or
small-image backbone the two products are a small share of the work (Swin-T: 49 tokens a window).
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from qat.lean.placement import Placement, rule

MATMULS = (torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm")
REASON = "attention: a product of two activations, which engines fuse in FP16"


@rule
def attention(placement: Placement) -> None:
    """Notes every product of two activations, and every softmax, as float."""
    for node in placement.nodes():
        tensors = [source for source in node.args[:2] if isinstance(source, fx.Node)]
        if node.op in ("call_function", "call_method") and node.target in MATMULS and len(tensors) == 2:
            placement.keep(node.name, "attention", REASON)
        elif isinstance(placement.module(node), nn.Softmax) or node.target in (torch.softmax, "softmax"):
            placement.keep(node.name, "attention", "softmax: its output spans too many magnitudes for one scale")
