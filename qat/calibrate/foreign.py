"""Converts a network that another tool quantized to ours, with its weights and ranges, without calibrating again.

    theirs (pytorch-quantization, CUDA-BEVFusion, ModelOpt)        ours
    LAYER._input_quantizer, LAYER.input_quantizer                  the quantizer of the tensor that LAYER takes
    LAYER._weight_quantizer, LAYER.weight_quantizer                LAYER.weight_quantizer
    BLOCK.residual_quantizer                                       that of the tensor that BLOCK's add takes as its identity
    NECK.quant_concat0._input_quantizer                            that of the tensors that NECK's first concatenation takes

Our quantizers belong to tensors, theirs to layers: if layers that read one tensor have different ranges in the file, the
largest is used for all. A layer that is float in the file, or whose range is missing or unusable, stays float. No range is
invented.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from qat.calibrate.checkpoint import save_ptq
from qat.checkpoints.reading import load_checkpoint
from qat.core.errors import UserError
from qat.core.files import atomic_set, sha256
from qat.core.locks import one_writer
from qat.core.provenance import made_by
from qat.families import family_named
from qat.families.family import Family
from qat.lean.layers import CONVOLUTIONS, ScaleShift
from qat.lean.ops import is_add, is_concat
from qat.lean.placement import FloatRule
from qat.lean.quantizer import Quantizer, weight_axis
from qat.lean.trace import submodule
from qat.model.quantized import QuantizedModel, traced_parts
from qat.model.units import UNIT_ROLES

INPUT = ("_input_quantizer", "input_quantizer")
WEIGHT = ("_weight_quantizer", "weight_quantizer")
RESIDUAL = ("residual_quantizer", "_residual_quantizer")
CONCAT = re.compile(r"(?P<module>.+)\.quant_concat\.?(?P<index>\d+)?\._?input_quantizer")


@dataclass
class _Report:
    """How a checkpoint was converted; `load_foreign` describes the keys."""

    source: str
    folded: list[str] = field(default_factory=list)
    mapped: dict[str, list[str]] = field(default_factory=dict)
    merged: dict[str, dict[str, float]] = field(default_factory=dict)
    float_layers: dict[str, str] = field(default_factory=dict)
    own_weights: list[str] = field(default_factory=list)
    also_rounded: list[str] = field(default_factory=list)
    without_range: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)
    ignored: int = 0


class _Theirs:
    """The other tool's quantizers, and which of them were used."""

    def __init__(self, quantizers: Mapping[str, Mapping[str, Any]]) -> None:
        self.all = quantizers
        self.used: set[str] = set()

    def of(self, path: str, names: Sequence[str]) -> str | None:
        """The path of the quantizer of one of these names in the module at `path`."""
        return next((f"{path}.{name}" for name in names if f"{path}.{name}" in self.all), None)

    def on(self, name: str | None) -> bool:
        """Whether it rounds."""
        return name is not None and not self.all[name]["disabled"]

    def range_fault(self, name: str) -> str | None:
        """Why its range cannot be used; None if it can."""
        theirs = self.all[name]
        amax = theirs["amax"]
        if theirs["num_bits"] != 8:
            return f"has {theirs['num_bits']} bits"
        if theirs["special"] is not None:
            return f"is special: {theirs['special']}"
        if amax is None:
            return "has no range"
        if amax.ndim > 8 or amax.numel() > 1 << 20 or amax.numel() == 0:  # checked before the values: it may be a view
            return f"has a range of shape {list(amax.shape)[:8]}"
        if not bool(torch.isfinite(amax).all()) or bool((amax < 0).any()) or float(amax.max()) <= 0:
            return "was never calibrated: its range is NaN, 0 or infinite"
        return None

    def input_fault(self, name: str) -> str | None:
        """Like `range_fault`, for a quantizer of activations."""
        fault = self.range_fault(name)
        if fault is None and self.all[name]["amax"].numel() > 1:
            return "has a range for each channel of an activation"
        if fault is None and self.all[name]["unsigned"]:
            return "is unsigned: its scale is amax/255"
        return fault

    def value(self, name: str) -> float:
        """The range of activations."""
        self.used.add(name)
        return float(self.all[name]["amax"])


def _norms(model: Any) -> Iterator[tuple[str, nn.Module, str, nn.BatchNorm2d]]:
    """Convolutions whose only consumer is a batch norm, with that norm: path, module, path, module."""
    for graph in traced_parts(model).values():
        for node in graph.graph.nodes:
            source = node.args[0] if node.args else None
            if not isinstance(submodule(graph, node), ScaleShift) or not isinstance(source, fx.Node):
                continue
            conv = submodule(graph, source)
            if isinstance(conv, CONVOLUTIONS) and len(source.users) == 1:
                norm = model.get_submodule(str(node.target))
                assert isinstance(norm, nn.BatchNorm2d)
                yield str(source.target), conv, str(node.target), norm


def _neutral_norms(
    pairs: Sequence[tuple[str, nn.Module, str, nn.BatchNorm2d]], state: dict[str, torch.Tensor]
) -> list[str]:
    """Adds to each folded convolution in `state` a batch norm that only adds its bias; returns those convolutions.

    With variance 1 − ε the sum σ² + ε is 1 exactly in float32 for the ε that networks use, so folding restores the
    weights bit for bit.
    """
    folded = []
    for path, conv, norm_path, norm in pairs:
        weight = state.get(f"{path}.weight")
        names = ("weight", "bias", "running_mean", "running_var")
        if weight is None or any(f"{norm_path}.{name}" in state for name in names) or f"{path}.bias" not in state:
            continue
        zeros = torch.zeros(norm.num_features)
        variance = torch.full_like(zeros, 1 - round(norm.eps * 2**24) / 2**24)
        bias = zeros if conv.bias is not None else state.pop(f"{path}.bias").float()
        values = dict(zip(names, (torch.ones_like(zeros), bias, zeros.clone(), variance), strict=True))
        state.update({f"{norm_path}.{name}": value for name, value in values.items()})
        state[f"{norm_path}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
        folded.append(path)
    return folded


def _factor(norm: nn.BatchNorm2d) -> torch.Tensor:
    """The factor by which folding the batch norm multiplies each output channel of the convolution before it."""
    variance = norm.running_var
    assert variance is not None
    return norm.weight.detach() / (variance + norm.eps).sqrt()


def _weight_amax(layer: nn.Module, theirs: Mapping[str, Any], factor: torch.Tensor | None) -> torch.Tensor | str:
    """The range of each output channel of our layer, or the reason why the file has none.

    factor: of folding, which multiplied the channels after their quantizer saw the weights.
    """
    amax = theirs["amax"].detach().float()
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    axis, shape = weight_axis(layer), [1] * weight.ndim
    shape[axis] = channels = weight.shape[axis]
    if amax.numel() == 1:
        amax = amax.reshape(1).expand(channels)
    else:
        if amax.ndim == weight.ndim:
            at = [d for d, size in enumerate(amax.shape) if size > 1]
        else:
            at = [a % weight.ndim for a in theirs["axis"]] if theirs["axis"] else [axis]
        if at != [axis] or amax.numel() != channels:
            return f"its weights have ranges of shape {list(amax.shape)} there, not one for each of {channels} output channels"
    if factor is not None:
        amax = amax.reshape(-1) * factor.abs()
    # A channel of zeros: as in `qat.lean.quantizer.weight_range`.
    return torch.maximum(amax, amax.max() * 2.0**-16).reshape(shape)


def _decide(
    theirs: _Theirs, path: str, layer: nn.Module, factor: torch.Tensor | None
) -> tuple[str | None, torch.Tensor | None]:
    """Why a layer stays float, or None; and the range of its weights, None for their largest values."""
    incoming, weights = theirs.of(path, INPUT), theirs.of(path, WEIGHT)
    for name, what in ((incoming, "input"), (weights, "weights")):
        if name is None:
            return f"the checkpoint has no quantizer for its {what}", None
        if not theirs.on(name):
            return f"the checkpoint switches the quantizer of its {what} off", None
    assert incoming is not None and weights is not None
    fault = theirs.input_fault(incoming)
    if fault is not None:
        return f"{incoming} {fault}", None
    found = theirs.all[weights]
    per_channel = found["axis"] is not None and [a % layer.weight.ndim for a in found["axis"]] == [weight_axis(layer)]
    if found["amax"] is None and found["num_bits"] == 8 and found["special"] is None and per_channel:
        return None, None  # such a quantizer uses the largest magnitudes at run time
    fault = theirs.range_fault(weights)
    if fault is None and found["unsigned"]:
        fault = "is unsigned"
    if fault is not None:
        return f"{weights} {fault}", None
    amax = _weight_amax(layer, found, factor)
    return (amax, None) if isinstance(amax, str) else (None, amax)


def _owner(node: fx.Node) -> str:
    """The path of the module whose forward made a node."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]).removeprefix("net").lstrip(".") if stack else ""


def _concats(theirs: _Theirs, graph: fx.GraphModule) -> dict[fx.Node, str]:
    """The other tool's quantizer of each concatenation, if the match is certain: the numbers count the concatenations of a
    module in order, and an unnumbered quantizer belongs to its only one."""
    by_owner: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if is_concat(node):
            by_owner.setdefault(_owner(node), []).append(node)
    found = {}
    for name in theirs.all:
        match = CONCAT.fullmatch(name) if len(name) < 1000 else None
        nodes = by_owner.get(match["module"], []) if match else []
        index = int(match["index"][:6]) if match and match["index"] else 0
        if index < len(nodes) and match is not None and (match["index"] or len(nodes) == 1):
            found[nodes[index]] = name
    return found


def _set_activations(
    model: QuantizedModel, part: str, theirs: _Theirs, report: _Report, layers: Mapping[str, object]
) -> None:
    """Sets the ranges of one part's activation quantizers, and switches off quantizers without a range."""
    graph, inventory = model.parts[part], model.inventory[part]
    assert isinstance(graph, fx.GraphModule)
    concats = _concats(theirs, graph)
    values: dict[str, dict[str, float]] = {name: {} for name in inventory.quantizers}
    silent: dict[str, list[str]] = {name: [] for name in inventory.quantizers}
    for node in graph.graph.nodes:
        quantizer = submodule(graph, node)
        if not isinstance(quantizer, Quantizer) or node.target not in values or quantizer.role not in UNIT_ROLES:
            continue
        for user in node.users:
            path = str(user.target)
            if user.op == "call_module" and path in layers:
                name = theirs.of(path, INPUT)
            elif is_add(user):
                name = theirs.of(_owner(user), RESIDUAL)
                if not theirs.on(name) or (name is not None and theirs.input_fault(name)):
                    silent[node.target].append(f"{part}.{user.name} in {_owner(user)}")
                    continue
            else:
                name = concats.get(user)
            if name is not None and theirs.on(name) and theirs.input_fault(name) is None:
                values[node.target][name] = theirs.value(name)
    for name, found in values.items():
        quantizer = graph.get_submodule(name)
        assert isinstance(quantizer, Quantizer)
        full = f"{part}.{name}"
        if not found:
            quantizer.off = quantizer._disabled = True
            if quantizer.role in UNIT_ROLES:
                report.without_range.append(full)
            continue
        quantizer.set_range(torch.tensor(max(found.values())))
        report.mapped[full] = list(found)
        if max(found.values()) != min(found.values()):
            report.merged[full] = found
        report.also_rounded += silent[name]


def load_foreign(
    checkpoint: Mapping[str, Any],
    model: Any,
    source: str | Path,
    ignore_prefixes: Sequence[str] = (),
    keep_float: Sequence[FloatRule] = (),
    parts_off: Mapping[str, Sequence[str]] | None = None,
) -> tuple[QuantizedModel, Any, dict[str, Any]]:
    """The quantized detector that a checkpoint of another tool describes.

    Args:
        checkpoint: `load_checkpoint`'s, with "state_dict" and "quantizers". Batch norm may be folded in it or not.
        model: the float network of its config; it gets the checkpoint's weights. Batch norms that were folded only add the
            bias.
        source: the file, for messages.
        ignore_prefixes: names in the checkpoint with these prefixes are ignored ("encoders.lidar.", "fuser.").
        keep_float: layers to leave float besides those that the checkpoint does.
        parts_off: scopes of parts whose quantizers are placed but off, and in which flavours, as for `QuantizedModel`.

    Returns:
        the quantized detector and `model` in eval mode, as `qat.calibrate.save_ptq` takes them; and a report:
        "source"; "folded": convolutions whose batch norm was folded; "mapped": {our activation quantizer: the one that it
        takes its range from}; "merged": {ours: {theirs: range}} where ranges differ and the largest is used;
        "float_layers": {layer: why it stays float}; "own_weights": layers whose weights' range was not stored and is their
        largest magnitudes, as that quantizer would compute; "also_rounded": adds whose identity is rounded
        here and was not there, since it is a quantized layer's input too; "without_range": our activation quantizers that
        are off because they have no range; "unused": {theirs: why}; "ignored": number of names that the prefixes left out.

    Raises:
        UserError: the checkpoint has no quantizers, or none that fits this model, or its weights do not fit.
    """
    source = str(source)
    given = checkpoint.get("quantizers")
    if not given:
        raise UserError(
            f"{source}: found no quantizers, expected a network quantized by pytorch-quantization or ModelOpt; run calibrate "
            "on it instead"
        )
    prefixes = tuple(ignore_prefixes)
    tensors = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, torch.Tensor)}
    state = {name: value for name, value in tensors.items() if not name.startswith(prefixes)}
    theirs = _Theirs({name: value for name, value in given.items() if not name.startswith(prefixes)})
    report = _Report(source, ignored=len(tensors) + len(given) - len(state) - len(theirs.all))

    model_family = family_named(model.family)
    blank = QuantizedModel(model, keep_float, {})  # the places of our quantizers do not depend on the weights
    pairs = list(_norms(model))
    report.folded = _neutral_norms(pairs, state)
    model_family.load_state(model, state, source)

    factors = {path: _factor(norm) for path, _, _, norm in pairs}
    rules, ranges = list(keep_float), {}
    for part, inventory in blank.inventory.items():
        for path in inventory.quantized:
            layer = blank.parts[part].get_submodule(path)
            why, amax = _decide(theirs, path, layer, factors.get(path))
            if why is not None:
                rules.append(FloatRule(path, f"{Path(source).name}: {why}"))
                report.float_layers[path] = why
            else:
                ranges[path] = amax
    if not ranges:
        raise UserError(
            f"{source}: found {len(theirs.all)} quantizers, of which none matches a layer of this network (such as "
            f"{next(iter(theirs.all), 'none')}); use the config that the checkpoint was made with"
        )

    quantized = QuantizedModel(model, rules, parts_off)
    for part, inventory in quantized.inventory.items():
        for path in inventory.quantized:
            amax, name = ranges[path], theirs.of(path, WEIGHT)
            assert name is not None
            theirs.used.add(name)
            if amax is None:
                report.own_weights.append(path)
            else:
                quantizer = quantized.parts[part].get_submodule(f"{path}.weight_quantizer")
                assert isinstance(quantizer, Quantizer)
                quantizer.set_range(amax)
        _set_activations(quantized, part, theirs, report, dict.fromkeys(inventory.quantized))
    report.unused = _unused(theirs, report)
    return quantized.eval(), model, {**vars(report)}


def _unused(theirs: _Theirs, report: _Report) -> dict[str, str]:
    """The reason why each active quantizer of the other tool is unused."""
    found = {}
    for name in theirs.all:
        if name in theirs.used or not theirs.on(name):
            continue
        layer, _, kind = name.rpartition(".")
        fault = theirs.range_fault(name)
        if layer in report.float_layers and kind in (*INPUT, *WEIGHT):
            found[name] = f"{layer} stays float: {report.float_layers[layer]}"
        else:
            found[name] = fault or "no tensor here that certainly matches the one it rounds"
    return found


def load_foreign_file(
    path: str | Path,
    checkpoint: Mapping[str, Any],
    family: Family,
    config: Mapping[str, Any],
    prefix: str | None = None,
) -> tuple[QuantizedModel, Any, dict[str, Any]]:
    """`load_foreign` for a whole model, or for the part of it under `prefix` in the file.

    Args:
        checkpoint: from `load_checkpoint` of `path`.
        config: of the network that `family` builds.

    Raises:
        UserError: like `load_foreign`; or there is nothing of the network under the prefix.
    """
    left_out = None
    if prefix is not None:
        checkpoint, left_out = family.take_piece(checkpoint, prefix, str(path))
    quantized, model, report = load_foreign(checkpoint, family.build(config), path)
    if left_out is not None:
        report["ignored"] = left_out
    return quantized, model, report


@one_writer("out")
def import_checkpoint(
    path: Path, out: Path, config: str | Path | None = None, prefix: str | None = None
) -> dict[str, Any]:
    """Writes our PTQ checkpoint of a network that another tool quantized; returns `load_foreign`'s report.

    Args:
        config: None for config.yaml next to the checkpoint.

    Raises:
        UserError: like `load_foreign_file`; or no config.
    """
    from qat.model.opening import read_config

    checkpoint = load_checkpoint(path)
    if "quantizers" not in checkpoint:
        raise UserError(f"{path}: found no quantizers of another tool, expected some; run calibrate on it instead")
    family, settings = read_config(path.parent / "config.yaml" if config is None else config, prefix)
    quantized, model, report = load_foreign_file(path, checkpoint, family, settings, prefix)
    recipe = {"method": "imported", "imported": {"file": path.name, "sha256": sha256(path), "prefix": prefix}}
    recipe["made"] = {"import-ptq": made_by()}
    budget = (
        out.with_suffix(f".budget.{kind}") for kind in ("json", "png")
    )  # file of an earlier checkpoint with this name
    with atomic_set(out, *budget) as stage:
        save_ptq(stage / out.name, quantized, model, recipe)
    return report
