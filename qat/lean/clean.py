"""Brings a traced graph into the form that the rules read.

    before   conv ─► dropout ─► identity ─► add          after   conv ─► add
    before   q, k, v ─► scaled_dot_product_attention     after   q·s ─► matmul(·, kᵀ) ─► softmax ─► matmul(·, v)

What does nothing at inference would hide from a rule that an add follows a convolution. The fused attention is one
call that no exporter writes at opset 13; its formula (Vaswani et al., NeurIPS 2017, eq. 1) is.
"""

from __future__ import annotations

import math

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat.lean.trace import submodule


def _is_inert(graph: fx.GraphModule, node: fx.Node) -> bool:
    module = submodule(graph, node)
    if isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d) or type(module).__name__ == "DropPath":
        return True
    return node.op == "call_function" and node.target is F.dropout


def remove_inert(graph: fx.GraphModule) -> int:
    """Erases dropout, drop path and identities. The graph must have been traced in eval mode. Returns how many."""
    inert = [node for node in graph.graph.nodes if _is_inert(graph, node)]
    for node in inert:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return len(inert)


def unfuse_attention(graph: fx.GraphModule) -> int:
    """Replaces each scaled_dot_product_attention by its matmuls. Returns how many.

    Raises:
        TypeError: one has a mask, is causal or has dropout, which no camera backbone here does.
    """
    fused = [node for node in graph.graph.nodes if node.target is F.scaled_dot_product_attention]
    for node in fused:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        extra = {name: given[name] for name in ("attn_mask", "dropout_p", "is_causal", "enable_gqa") if given.get(name)}
        if extra:
            raise TypeError(f"{node.name}: attention with {', '.join(extra)} cannot be unfused")
        query, key, value = (given[name] for name in names[:3])
        with graph.graph.inserting_before(node):
            # d is read from the tensor, as the fused call does: a constant once the shapes are.
            scaled = graph.graph.call_function(_scaled, (query, given.get("scale")))
            turned = graph.graph.call_method("transpose", (key, -2, -1))
            product = graph.graph.call_function(torch.matmul, (scaled, turned))
            weights = graph.graph.call_function(torch.softmax, (product, -1))
            result = graph.graph.call_function(torch.matmul, (weights, value))
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()
    return len(fused)


def _scaled(query: torch.Tensor, scale: float | None) -> torch.Tensor:
    return query * (1.0 / math.sqrt(int(query.shape[-1])) if scale is None else scale)


def clean(graph: fx.GraphModule) -> None:
    """All of it, in place; and whatever no output needs goes (timm computes stages after the last one asked for)."""
    graph.graph.eliminate_dead_code()
    remove_inert(graph)
    unfuse_attention(graph)
