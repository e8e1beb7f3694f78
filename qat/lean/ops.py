"""Properties of a canonical graph's functions that rules need."""

from __future__ import annotations

import torch
from torch import fx, nn

from qat.lean.canonical import arguments
from qat.lean.quantizer import Quantizer
from qat.lean.trace import aten, submodule

ADDS = (aten.add.Tensor,)
MULTIPLICATIONS = (aten.mul.Tensor,)
CONCATS = (aten.cat.default, aten.concat.default)
RESHAPES = (torch.reshape, aten.flatten.using_ints, aten.permute.default, aten.transpose.int, aten.contiguous.default)
# The functions above, and functions that move values without changing them, or leave some out.
MOVES = (
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.roll.default,
    aten.movedim.int,
    aten.t.default,
    aten.clone.default,
)
PARTS = (
    aten.slice.Tensor,
    aten.select.int,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.index_select.default,
)
MAX_POOLS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
AVERAGE_POOLS = (
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
    aten.avg_pool1d.default,
    aten.adaptive_avg_pool1d.default,
)
PADS = (aten.constant_pad_nd.default, aten.pad.default)
RESIZES = (
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest2d.default,
    aten._upsample_nearest_exact2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bilinear2d.default,
)
# Activation functions that never go below a number, and that number.
LEAST = {nn.SiLU: -0.27846455, nn.Hardswish: -0.375, nn.GELU: -0.17004, nn.Mish: -0.30884, nn.Tanh: -1.0}
NEVER_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Softmax, nn.Hardsigmoid, nn.Softplus)
ACTIVATIONS = (*LEAST, *NEVER_NEGATIVE, nn.LeakyReLU, nn.Hardtanh)


def two_tensors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Both arguments of an elementwise function if both are computed tensors."""
    found = [source for source in node.args[:2] if isinstance(source, fx.Node) and source.op != "get_attr"]
    return (found[0], found[1]) if len(found) == 2 else None


def is_add(node: fx.Node) -> bool:
    """Whether the node adds two computed tensors."""
    return node.target in ADDS and two_tensors(node) is not None and bool(node.kwargs.get("alpha", 1) == 1)


def is_multiplication(node: fx.Node) -> bool:
    """Whether the node multiplies two computed tensors, value by value."""
    return node.target in MULTIPLICATIONS and two_tensors(node) is not None


def is_concat(node: fx.Node) -> bool:
    """Whether the node concatenates."""
    return node.target in CONCATS


def concatenated(node: fx.Node) -> list[fx.Node]:
    """The inputs of a concatenation, in any form."""
    tensors = arguments(node)["tensors"]
    return [source for source in tensors if isinstance(source, fx.Node)]


def is_global_mean(node: fx.Node) -> bool:
    """Whether the node averages over height and width."""
    if node.target is aten.adaptive_avg_pool2d.default:
        return list(arguments(node)["output_size"]) in ([1, 1], [1])
    if node.target is not aten.mean.dim or "val" not in node.args[0].meta:  # type: ignore[union-attr]
        return False
    given, rank = arguments(node), node.args[0].meta["val"].ndim  # type: ignore[union-attr]
    return rank == 4 and sorted(d % rank for d in given["dim"] or ()) == [2, 3] and bool(given["keepdim"])


def is_resize(node: fx.Node) -> bool:
    """Whether the node interpolates, within the range of its input."""
    return node.target in RESIZES


def is_zero_pad(node: fx.Node) -> bool:
    """Whether the node adds zeros around a tensor."""
    if node.target not in PADS:
        return False
    given = arguments(node)
    return given.get("mode", "constant") == "constant" and (given.get("value") or 0) == 0


def passes_values_on(node: fx.Node) -> bool:
    """Whether every output value is one of the input's values, or zero: pooling by maximum, reshapes, padding."""
    return node.target in (*MAX_POOLS, *RESHAPES, *MOVES) or is_zero_pad(node)


def source_of(node: fx.Node) -> fx.Node | None:
    """A node's first argument."""
    source = node.args[0] if node.args else None
    return source if isinstance(source, fx.Node) else None


def least_values(graph: fx.GraphModule, inputs: dict[str, float] | None = None) -> dict[fx.Node, float]:
    """A lower bound of each node's values, −∞ if unknown.

    Args:
        inputs: the same for the graph's inputs, by name.
    """
    infinite = float("inf")
    found: dict[fx.Node, float] = {}

    def of(value: object) -> float:
        if isinstance(value, fx.Node):
            return found.get(value, -infinite)
        return float(value) if isinstance(value, int | float) else -infinite

    for node in graph.graph.nodes:
        source = source_of(node)
        least = -infinite
        module = submodule(graph, node)
        if node.op == "placeholder":
            least = (inputs or {}).get(str(node.target), -infinite)
        elif node.op == "get_attr":
            value = attribute_or_none(graph, str(node.target))
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                least = -infinite if isinstance(value, nn.Parameter) else float(value.min())
        elif isinstance(module, NEVER_NEGATIVE):
            least = 0.0
        elif isinstance(module, nn.Hardtanh):
            least = float(module.min_val)
        elif module is not None and type(module) in LEAST:
            least = LEAST[type(module)]
        elif isinstance(module, nn.LeakyReLU):
            least = 0.0 if of(source) >= 0 else -infinite
        elif isinstance(module, Quantizer):
            least = of(source)
        elif is_concat(node):
            least = min((of(value) for value in concatenated(node)), default=-infinite)
        elif node.target in ADDS:
            least = of(node.args[0]) + of(node.args[1])
        elif node.target in MULTIPLICATIONS or node.target is aten.div.Tensor:
            least = 0.0 if of(node.args[0]) >= 0 and of(node.args[1]) >= 0 else gated(graph, node)
        elif is_zero_pad(node):
            least = min(of(source), 0.0)
        elif (
            node.target in (*MAX_POOLS, *RESHAPES, *MOVES, *PARTS, *RESIZES, *AVERAGE_POOLS) or node.target == "expand"
        ):
            least = of(source)
        elif node.target in (aten.exp.default, aten.abs.default, aten.square.default):
            least = 0.0
        elif node.target in (aten.clamp.default, aten.clamp_min.default):
            low = arguments(node).get("min")
            least = max(of(source), float(low) if isinstance(low, int | float) else -infinite)
        elif getattr(node.target, "__name__", "") == "getitem":
            least = of(source)
        found[node] = least
    return found


def gated(graph: fx.GraphModule, node: fx.Node) -> float:
    """The lower bound of x · sigmoid(x) and x · hardsigmoid(x); −∞ for other products."""

    def unrounded(value: object) -> object:
        while isinstance(value, fx.Node) and isinstance(submodule(graph, value), Quantizer):
            value = value.args[0]
        return value

    a, b = (unrounded(value) for value in node.args[:2])
    for gate, value in ((a, b), (b, a)):
        module = submodule(graph, gate)
        if isinstance(gate, fx.Node) and unrounded(source_of(gate)) is value:
            if isinstance(module, nn.Sigmoid):
                return LEAST[nn.SiLU]
            if isinstance(module, nn.Hardsigmoid):
                return LEAST[nn.Hardswish]
    return -float("inf")


def attribute_or_none(graph: fx.GraphModule, path: str) -> object:
    """The tensor at a path."""
    value: object = graph
    for name in path.split("."):
        value = getattr(value, name, None)
    return value
