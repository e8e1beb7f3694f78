"""Tracing a network's forward into an fx graph."""

from __future__ import annotations

import torch
from torch import fx, nn


class _Tracer(fx.Tracer):
    """Keeps normalisation layers whole: torch's own, and timm's that include the activation."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.traced_func_name = method

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d | nn.LayerNorm) or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module, method: str = "forward") -> fx.GraphModule:
    """The graph of `module.method`, in eval mode; submodules keep their paths and are shared with `module`."""
    module.eval()
    graph = _Tracer(method).trace(module)
    for node in graph.nodes:
        if node.op == "get_attr" and not isinstance(_attribute(module, node.target), torch.Tensor | nn.Module):
            raise TypeError(f"{node.target}: a traced network reads something that is no tensor")
    return fx.GraphModule(module, graph)


def _attribute(module: nn.Module, path: str) -> object:
    value: object = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def submodule(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, None if it calls none."""
    return graph.get_submodule(node.target) if node.op == "call_module" and isinstance(node.target, str) else None


def replace_module(graph: fx.GraphModule, path: str, module: nn.Module) -> None:
    """Puts `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(graph.get_submodule(parent), name, module)
