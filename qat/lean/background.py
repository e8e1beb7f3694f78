"""Keeps the constant that fills most of a depth map's, or a pillar grid's, tensors exact under rounding.

A depth map is zero except at pixels with a lidar point (a grid of pillars except at cells with one), so every tensor computed from it alone holds one constant
for each channel nearly everywhere: its background. Rounding moves that constant by up to half a step, the same way at
every pixel, and a 5×5 convolution adds 25 times as much: not noise, which would cancel, but an offset of whole channels.

    before   x ─► Q ─► conv(Q(W), b)          after   x ─► Q ─► conv(Q(W), b + e),   e = Σ W·β − Σ Q(W)·Q(β)

β being the background of x and the sums over input channels and taps: the convolution's output has the float
network's background exactly, and so has the input of the next one. (Bias correction, Nagel et al., ICCV 2019, §4.2, with an
expectation that is known without data.) Within reach of the image's border, where padding replaces some of the taps, e is too
large by their share. It holds for one flavour's steps.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat.lean.layers import ScaleShift
from qat.lean.ops import MAX_POOLS, is_multiplication
from qat.lean.quantizer import QuantizedConv2d, Quantizer
from qat.lean.trace import submodule

DEPTH = "depth"
SOURCES = (
    DEPTH,
    "spatial_features",
)  # inputs that are zero almost everywhere: a depth map, a grid of scattered pillars
ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Sigmoid,
    ScaleShift,
)


def _through(layer: nn.Module | None, value: torch.Tensor) -> torch.Tensor | None:
    """A module's result for a map filled with `value`, float64[C]; None if unknown."""
    if isinstance(layer, Quantizer):
        return value
    if isinstance(layer, ELEMENTWISE):
        norm = isinstance(layer, ScaleShift)  # the module computes in its own type
        found = layer((value.float() if norm else value).reshape(1, -1, 1, 1))
        return found.double().flatten()
    if isinstance(layer, nn.Conv2d):
        bias = 0.0 if layer.bias is None else layer.bias.double()
        return _summed(layer, layer.weight, value) + bias
    return None


def _summed(layer: nn.Conv2d, weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Away from the border: Σ over input channels and taps of weight · value, float64[out channels]."""
    taps = weight.double().sum((2, 3), keepdim=True)
    if value.numel() == 1:  # zero for each of the input's channels
        value = value.expand(weight.shape[1] * layer.groups)
    return F.conv2d(value.reshape(1, -1, 1, 1), taps, groups=layer.groups).flatten()


@dataclass
class BackgroundInput:
    """A convolution's input. value: its background in the float network, float64[C]. quantizer: rounds it, if any. rectified:
    whether it is the output of a ReLU."""

    value: torch.Tensor
    quantizer: Quantizer | None
    rectified: bool


def backgrounds(graph: fx.GraphModule, sources: Collection[str] = SOURCES) -> dict[str, BackgroundInput]:
    """Convolutions with INT8 weights whose input is computed only from an input of `sources`, by path."""
    values: dict[fx.Node, torch.Tensor | None] = {}
    found = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder" and node.target in sources:
            values[node] = torch.zeros(1, dtype=torch.float64)
            continue
        if is_multiplication(node):  # x · gate(x)
            factors = [values.get(source) for source in node.args[:2]]
            if factors[0] is not None and factors[1] is not None:
                values[node] = factors[0] * factors[1]
            continue
        single = (node.op == "call_module" and len(node.args) == 1) or node.target in MAX_POOLS
        source = node.args[0] if single else None
        value = values.get(source) if isinstance(source, fx.Node) else None
        if value is None or not isinstance(source, fx.Node):
            continue
        if node.target in MAX_POOLS:
            values[node] = value
            continue
        layer, before = submodule(graph, node), submodule(graph, source)
        value = value.to(_device(layer))
        if isinstance(layer, QuantizedConv2d):
            quantizer = before if isinstance(before, Quantizer) else None
            origin = source.args[0] if quantizer is not None else source
            rectified = isinstance(origin, fx.Node) and isinstance(submodule(graph, origin), nn.ReLU)
            found[str(node.target)] = BackgroundInput(value, quantizer, rectified)
        values[node] = _through(layer, value)
    return found


def _device(layer: nn.Module | None) -> torch.device:
    parameter = None if layer is None else next(layer.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@torch.no_grad()
def correct_backgrounds(graph: fx.GraphModule, absorbed: Collection[str] = ()) -> list[str]:
    """Sets the `background_shift` of every layer that `backgrounds` lists, from the current weights, ranges and steps.

    Args:
        absorbed: paths of layers whose bias includes its correction.

    Returns:
        the layers' paths.
    """
    layers = {path: taken for path, taken in backgrounds(graph).items() if path not in absorbed}
    for path, taken in layers.items():
        layer = graph.get_submodule(path)
        assert isinstance(layer, QuantizedConv2d)
        if taken.quantizer is not None and not taken.quantizer._disabled and taken.quantizer.amax is None:
            continue  # not calibrated yet
        rounded = taken.value if taken.quantizer is None else taken.quantizer(taken.value.float()).double()
        exact = _summed(layer, layer.weight, taken.value)
        shift = exact - _summed(layer, layer.weight_quantizer(layer.weight), rounded)
        layer.background_shift = shift.float()
    return list(layers)


@torch.no_grad()
def absorb_backgrounds(graph: fx.GraphModule) -> list[str]:
    """Adds the `background_shift` of every layer that is INT8 now to its bias, for training; returns those layers."""
    found = []
    for path, layer in graph.named_modules():
        if not isinstance(layer, QuantizedConv2d) or layer.background_shift is None or layer.weight_quantizer._disabled:
            continue
        bias = layer.background_shift if layer.bias is None else layer.bias + layer.background_shift
        layer.bias = nn.Parameter(bias.clone())
        layer.background_shift = None
        found.append(path)
    return found
