"""Reads from a PTQ checkpoint which tensors are quantized, with which scales, and which layers stay float."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import fx

from qat.calibrate.checkpoint import load_ptq
from qat.core.console import results_console
from qat.lean.quantizer import BOUND, QUANTIZED, Quantizer
from qat.model.quantized import QuantizedModel

LAYERS = tuple(quantized for _, quantized in QUANTIZED)


@dataclass(frozen=True)
class Group:
    """The tensors that share one activation quantizer. feeds: layers and operations that take one of them. channels: the
    smallest and the largest of what its channels are divided by before it; None where they are not. state: "on" in the default
    flavour, "watched" (calibrated for the flavours that round it) or "off" (float: its whole part is, or it was left so for a
    budget, or a checkpoint from elsewhere has no range for it: amax and scale are None then)."""

    part: str
    quantizer: str
    tensors: list[str]
    feeds: list[str]
    amax: float | None
    scale: float | None
    state: str
    channels: tuple[float, float] | None = None


@dataclass(frozen=True)
class Layer:
    """A layer with INT8 weights. scales: the smallest and the largest of its channels'."""

    part: str
    path: str
    kind: str
    weights: int
    channels: int
    scales: tuple[float, float]
    state: str


@dataclass(frozen=True)
class FloatLayer:
    """A layer that stays float: by which rule, why, and in which flavours (empty for all)."""

    part: str
    name: str
    rule: str
    reason: str
    flavours: tuple[str, ...] = ()


@dataclass
class Inspection:
    """All findings."""

    recipe: dict[str, Any]
    groups: list[Group] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    floats: list[FloatLayer] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        return asdict(self)


def _feeds(node: fx.Node) -> list[str]:
    return [str(user.target) if user.op == "call_module" else user.name for user in node.users]


def inspect_detector(model: QuantizedModel, recipe: dict[str, Any]) -> Inspection:
    """Reads a calibrated detector."""
    found = Inspection(recipe)
    for part, inventory in model.inventory.items():
        graph = model.parts[part]
        assert isinstance(graph, fx.GraphModule)
        off = part in model.parts_off
        feeds: dict[str, list[str]] = {}
        for node in graph.graph.nodes:
            if node.op == "call_module":
                feeds.setdefault(str(node.target), []).extend(_feeds(node))
        for name, tensors in inventory.quantizers.items():
            quantizer = graph.get_submodule(name)
            assert isinstance(quantizer, Quantizer)
            owner = quantizer if quantizer.shares is None else quantizer.shares
            amax = None if owner.amax is None else float(owner.amax)
            state = "off" if off or quantizer.off else "watched" if quantizer._disabled else "on"
            state = "off" if amax is None else state
            taking = [f for f in dict.fromkeys(feeds[name]) if f not in inventory.quantizers]
            divisors = model.equalized.get(f"{part}.{name}")
            channels = None if divisors is None else (float(divisors.min()), float(divisors.max()))
            scale = None if amax is None else amax / BOUND
            found.groups.append(Group(part, name, list(tensors), taking, amax, scale, state, channels))
        for path in inventory.quantized:
            layer = graph.get_submodule(path)
            assert isinstance(layer, LAYERS)
            weights, weight = layer.weight_quantizer, layer.weight
            assert isinstance(weights, Quantizer) and isinstance(weight, torch.Tensor)
            scales = weights.range.flatten() / BOUND
            found.layers.append(
                Layer(
                    part,
                    path,
                    type(layer).__name__.removeprefix("Quantized"),
                    weight.numel(),
                    scales.numel(),
                    (float(scales.min()), float(scales.max())),
                    "off" if off or weights.off else "watched" if weights._disabled else "on",
                )
            )
            if weights.off and not off:
                found.floats.append(
                    FloatLayer(part, path, "budget", "in INT8 it loses more mAP than the budget allows")
                )
        found.floats += [
            FloatLayer(part, name, kept.rule, kept.reason, kept.flavours) for name, kept in inventory.kept.items()
        ]
        if off:
            reason = model.family.recipe(model.config).off_reason or "the part is float as a whole"
            found.floats.append(FloatLayer(part, "*", "parts_off", reason))
    return found


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Reads a PTQ checkpoint.

    Raises:
        UserError: it is not a PTQ checkpoint, or damaged.
    """
    return inspect_detector(*load_ptq(path))


def print_inspection(found: Inspection, name: str) -> None:
    """Prints three tables: groups of activations, layers, what stays float."""
    console = results_console()
    recipe = found.recipe
    frames, method = recipe.get("frames", "?"), recipe.get("method", "?")
    groups = Table(title=f"{name}: activations, {method} over {frames} frames", title_justify="left")
    for heading in ("part", "quantizer", "amax", "scale", "tensors that share it", "feeds", "state"):
        groups.add_column(heading, justify="right" if heading in ("amax", "scale") else "left", overflow="fold")
    for g in found.groups:
        groups.add_row(
            g.part,
            g.quantizer,
            "none" if g.amax is None else f"{g.amax:.4g}",
            "" if g.scale is None else f"{g.scale:.3g}",
            ", ".join(g.tensors),
            ", ".join(g.feeds),
            g.state
            if g.channels is None
            else f"{g.state}, channels divided by {g.channels[0]:.3g} … {g.channels[1]:.3g}",
        )
    layers = Table(title="layers with INT8 weights", title_justify="left")
    for heading in ("part", "layer", "kind", "weights", "channels", "scales", "state"):
        layers.add_column(heading, justify="right" if heading in ("weights", "channels") else "left", overflow="fold")
    for layer in found.layers:
        low, high = layer.scales
        cells = (layer.part, layer.path, layer.kind, f"{layer.weights:,}", str(layer.channels))
        layers.add_row(*cells, f"{low:.2g} … {high:.2g}", layer.state)
    floats = Table(title="what stays float", title_justify="left")
    for heading in ("part", "rule", "how many", "which", "why"):
        floats.add_column(heading, overflow="fold")
    together: dict[tuple[str, str, str], list[str]] = {}
    for f in found.floats:
        together.setdefault((f.part, f.rule, f.reason), []).append(f.name)
    for (part, rule, reason), names in together.items():
        floats.add_row(part, rule, str(len(names)), ", ".join(names), reason)
    for table in (groups, layers, floats):
        console.print(table)
    on = [g for g in found.groups if g.state == "on"]
    shared = sum(len(g.tensors) > 1 for g in on)
    console.print(
        f"{len(on)} activation quantizers on, {shared} of them shared by several tensors; "
        f"{sum(layer.state == 'on' for layer in found.layers)} layers with INT8 weights",
        highlight=False,
    )
