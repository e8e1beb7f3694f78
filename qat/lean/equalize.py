"""Equalizes the channels of an activation, so that one scale suits them all: of a part's input, or between two layers.

    before   x ─► Q ─┬─► conv(W₁)           after   x ─► · 1/s ─► Q ─┬─► conv(W₁ · s)
                     └─► conv(W₂)                                    └─► conv(W₂ · s)

An activation has one scale for all channels, so a channel that stays small is rounded as coarsely as the largest one. In a
pooled BEV grid the channels' largest magnitudes differ by a factor of 25 and more (camera-tiny), and the INT8 decoder loses
more by that than by everything else. Divided by s, its magnitude over the largest channel's, every channel uses the whole
range of INT8; the consumers' weights are multiplied by s, so that the function does not change. (Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction", ICCV 2019, do this between two layers. At a part's input there is
no preceding layer for 1/s, and other files rely on the tensor's meaning, so the division is explicit: one product for each
value, which runtimes fuse with the rounding.)

    before   conv(W₀, b₀) ─► ReLU ─► Q ─► conv(W₁)      after   conv(W₀/s, b₀/s) ─► ReLU ─► Q ─► conv(W₁ · s)

Tensors computed only from the depth map (`qat.lean.background`) are equalized too, for the same reason: their large values are
few and in few channels. There the preceding convolution absorbs 1/s at no cost. Between all other convolutions it gains camera-tiny
almost nothing (docs/calibrate.md), but a detector over pillars 8 dB at its maps in s8 (model/lidar-tiny): a family's recipe says
which (INPUTS, INSIDE).

It is done if it pays: if the expected noise at the consumers' outputs, from rounded inputs and rounded weights together, falls
to a half or less; where a family wants it between all layers, and it costs nothing, if it falls at all. (Scaled weights are rounded more
coarsely, so dense inputs of nearly one size may gain nothing.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from qat.lean.background import DEPTH, backgrounds
from qat.lean.insert import Inventory
from qat.lean.quantizer import BOUND, QuantizedConv2d, QuantizedConvTranspose2d, weight_range
from qat.lean.trace import replace_module, submodule

INPUTS, INSIDE = "inputs", "inside"  # parts' inputs and what comes from the depth map; between all other layers
GAIN = {INPUTS: 2.0, INSIDE: 1.0}  # of the noise's power, from which it is done
FLOOR = 2.0**-5  # the smallest s: calibration uses only some frames, and values beyond a channel's range are clipped


class ChannelScale(nn.Module):
    """x [B,C,H,W] → x · inverse, inverse [1,C,1,1]."""

    inverse: torch.Tensor

    def __init__(self, scales: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("inverse", (1.0 / scales).reshape(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.inverse


@dataclass
class _Place:
    """A place where channels can be equalized. call: the quantizer's only call. takers: the convolutions after it. before: path
    of the convolution that computes these channels, followed by a ReLU; None for a part's input. kind: INPUTS or INSIDE."""

    call: fx.Node
    takers: list[fx.Node]
    before: str | None
    kind: str


def _convolution_before(graph: fx.GraphModule, node: fx.Node) -> str | None:
    """The only convolution that feeds this ReLU, which feeds only a quantizer."""
    if not isinstance(submodule(graph, node), nn.ReLU) or len(node.users) != 1:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return str(source.target) if isinstance(submodule(graph, source), nn.Conv2d) and len(source.users) == 1 else None


def _place(graph: fx.GraphModule, name: str) -> _Place | None:
    """The place for a quantizer; None if its channels cannot be equalized."""
    calls = [node for node in graph.graph.nodes if node.op == "call_module" and node.target == name]
    if len(calls) != 1 or not isinstance(calls[0].args[0], fx.Node):
        return None
    takers = list(calls[0].users)
    for node in takers:
        layer = submodule(graph, node)
        if not (isinstance(layer, QuantizedConv2d | QuantizedConvTranspose2d) and layer.groups == 1):
            return None
    source = calls[0].args[0]
    if not takers:
        return None
    if source.op == "placeholder":
        return _Place(calls[0], takers, None, INPUTS)
    before = _convolution_before(graph, source)
    from_depth = {str(node.target) for node in takers} <= set(backgrounds(graph, (DEPTH,)))
    return None if before is None else _Place(calls[0], takers, before, INPUTS if from_depth else INSIDE)


def equalizable(graph: fx.GraphModule, inventory: Inventory, kind: str = INPUTS) -> dict[str, list[str]]:
    """Quantizers of a kind of place whose channels can be equalized, with the paths of the convolutions that would be scaled."""
    found = {}
    for name in inventory.quantizers:
        place = _place(graph, name)
        if place is not None and place.kind == kind:
            found[name] = [str(node.target) for node in place.takers]
    return found


def by_input(layer: nn.Module) -> torch.Tensor:
    """A convolution's weights as [O,C,kh,kw]; a transposed one has C first."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight


def output_noise(
    steps: torch.Tensor, scales: torch.Tensor, energy: torch.Tensor, weights: Sequence[torch.Tensor]
) -> float:
    """Expected square of the rounding noise in all output channels of convolutions, for one position of each.

    A step of width q adds q²/12 (uniform noise): the inputs' through the weights, the weights' through the inputs.

    Args:
        steps: of the input's channels, in the input's original units, [C].
        scales: divisor of each channel, [C].
        energy: mean square of each channel, [C].
        weights: [O,C,kh,kw] each.
    """
    total = 0.0
    for weight in weights:
        kernel = weight.detach().double()
        total += float((steps.double().square() * kernel.square().sum((0, 2, 3))).sum())
        scaled = kernel * scales.double().reshape(1, -1, 1, 1)
        weight_steps = scaled.abs().amax((1, 2, 3)) / BOUND
        taps = kernel.shape[2] * kernel.shape[3]
        total += float(weight_steps.square().sum() * (energy.double() / scales.double().square()).sum() * taps)
    return total / 12


def channel_scales(
    largest: torch.Tensor, energy: torch.Tensor, weights: Sequence[torch.Tensor], kind: str = INPUTS
) -> torch.Tensor | None:
    """The divisor of each channel, float32[C], 1 for the largest; None if equalizing does not pay.

    The range of a channel that was zero on every frame is unknown: it keeps the tensor's.

    Args:
        largest: magnitude of each channel, [C].
        energy: mean square of each channel, [C].
        weights: of the consumers, [O,C,kh,kw] each.
    """
    top = float(largest.max())
    if top == 0.0:
        return None
    relative = (largest.float() / top).clamp(min=FLOOR)
    scales = torch.where(largest > 0, relative, torch.ones_like(relative))
    ones = torch.ones_like(scales)
    step = top / BOUND
    before = output_noise(step * ones, ones, energy, weights)
    after = output_noise(step * scales, scales, energy, weights)
    return scales if after > 0 and before / after >= GAIN[kind] else None


def _divide_outputs(graph: fx.GraphModule, path: str, scales: torch.Tensor) -> None:
    """Replaces the convolution at `path` by a copy whose output channels are divided."""
    layer = copy.copy(graph.get_submodule(path))
    assert isinstance(layer, nn.Conv2d)
    layer._parameters = dict(layer._parameters)
    own = scales.to(layer.weight.device)
    wanted = layer.weight.requires_grad
    layer.weight = nn.Parameter(layer.weight.detach() / own.reshape(-1, 1, 1, 1), requires_grad=wanted)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach() / own, requires_grad=layer.bias.requires_grad)
    if isinstance(layer, QuantizedConv2d):
        layer.weight_quantizer.set_range(weight_range(layer))
    replace_module(graph, path, layer)


def equalize(graph: fx.GraphModule, name: str, scales: torch.Tensor) -> None:
    """Divides the input of quantizer `name` by `scales` and multiplies its consumers' weights by them, in place.

    The layers get their own weights (until then they share the float network's), with their ranges. The caller must set the
    quantizer's range: the largest magnitude of all channels, as in `channel_scales`.

    Raises:
        ValueError: `equalizable` does not list the quantizer, or it has another number of channels.
    """
    place = _place(graph, name)
    if place is None:
        raise ValueError(f"{name}: its channels cannot be equalized")
    layers = [graph.get_submodule(str(node.target)) for node in place.takers]
    if any(by_input(layer).shape[1] != len(scales) for layer in layers):
        raise ValueError(f"{name}: found {len(scales)} scales, expected {by_input(layers[0]).shape[1]}")
    if place.before is not None:
        _divide_outputs(graph, place.before, scales)
    else:
        path = f"{name}_scale"
        graph.add_submodule(path, ChannelScale(scales))
        with graph.graph.inserting_before(place.call):
            scaled_input = graph.graph.call_module(path, (place.call.args[0],))
            place.call.replace_input_with(place.call.args[0], scaled_input)  # type: ignore[arg-type]
    for layer in layers:
        assert isinstance(layer, QuantizedConv2d | QuantizedConvTranspose2d)
        own = scales.to(layer.weight.device)
        places = (-1, 1, 1, 1) if isinstance(layer, nn.ConvTranspose2d) else (1, -1, 1, 1)
        scaled = layer.weight.detach() * own.reshape(places)
        layer.weight = nn.Parameter(scaled, requires_grad=layer.weight.requires_grad)
        layer.weight_quantizer.set_range(weight_range(layer))
    graph.graph.lint()
    graph.recompile()
