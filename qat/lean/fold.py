"""Folds batch norm into the layer before it.

    before  x ─► conv ─► bn ─► y          after  x ─► conv' ─► y

w' = w·γ/√(σ² + ε), b' = (b − μ)·γ/√(σ² + ε) + β for each output channel (Jacob et al., CVPR 2018, §3.2). Folding is done
before calibration, because a quantizer must see the weights that the engine will round. It works on calls: a convolution that
is called twice, followed by two norms, becomes two; one that also feeds something else keeps its norm, as a scale and shift.
"""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from qat.lean.layers import TRANSPOSED, WEIGHTED, ScaleShift
from qat.lean.trace import replace_module, submodule


def fold_batch_norm(graph: fx.GraphModule) -> int:
    """Folds every batch norm whose only input is a layer that feeds nothing else. Returns how many calls.

    It changes copies of the modules: those of the traced network do not change.
    """
    calls: dict[str, list[tuple[fx.Node, fx.Node | None]]] = {}  # a layer's path → its calls, and the norms after them
    for node in graph.graph.nodes:
        layer = submodule(graph, node)
        if isinstance(layer, WEIGHTED):
            norm = next(iter(node.users)) if len(node.users) == 1 else None
            folds = norm is not None and isinstance(submodule(graph, norm), ScaleShift) and _channels(layer, node)
            calls.setdefault(str(node.target), []).append((node, norm if folds else None))
    folded = 0
    for path, found in calls.items():
        layer = graph.get_submodule(path)
        made: dict[str | None, str] = {}
        for node, norm_node in found:
            key = None if norm_node is None else str(norm_node.target)
            if key not in made:
                made[key] = path if not made else _free(graph, path)
                if norm_node is not None:
                    own = submodule(graph, norm_node)
                    assert isinstance(own, ScaleShift)
                    replace_module(graph, made[key], folded_layer(layer, own))
                elif made[key] != path:
                    replace_module(graph, made[key], layer)
            node.target = made[key]
            node.meta["path"] = made[key]
            if norm_node is not None:
                norm_node.replace_all_uses_with(node)
                graph.graph.erase_node(norm_node)
                folded += 1
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    for path, norm in list(graph.named_modules()):
        if isinstance(norm, ScaleShift) and path not in called:  # timm's norms contain their activation function
            holder = nn.Module()
            holder._modules.update(norm._modules)
            replace_module(graph, path, holder)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return folded


def _channels(layer: nn.Module, node: fx.Node) -> bool:
    """Whether the layer's output channels are on dimension 1, like a batch norm's."""
    value = node.meta.get("val")
    return not isinstance(layer, nn.Linear) or (isinstance(value, torch.Tensor) and value.ndim == 2)


def _free(graph: fx.GraphModule, path: str) -> str:
    taken = {name for name, _ in graph.named_modules()}
    count = 1
    while f"{path}_{count}" in taken:
        count += 1
    return f"{path}_{count}"


def folded_layer(layer: nn.Module, norm: ScaleShift) -> nn.Module:
    """A layer with a batch norm's scale and shift in its weight and bias."""
    weight, bias, mean, variance = norm.statistics
    result = copy.copy(layer)
    result._parameters = dict(layer._parameters)
    own, before = layer.weight, layer.bias
    assert isinstance(own, torch.Tensor)
    factor = weight * torch.rsqrt(variance + norm.eps)
    if isinstance(layer, TRANSPOSED):  # [in, out/groups, …]
        groups = layer.groups
        shape = (groups, 1, len(factor) // groups) + (1,) * (own.ndim - 2)
        parted = own.detach().reshape(groups, own.shape[0] // groups, *own.shape[1:])
        scaled = (parted * factor.reshape(shape)).reshape(own.shape)
    else:
        scaled = own.detach() * factor.reshape(-1, *(1,) * (own.ndim - 1))
    shift = before.detach() if isinstance(before, torch.Tensor) else torch.zeros_like(mean)
    result.weight = nn.Parameter(scaled, requires_grad=own.requires_grad)
    result.bias = nn.Parameter((shift - mean) * torch.rsqrt(variance + norm.eps) * weight + bias)
    return result
