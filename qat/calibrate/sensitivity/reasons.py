"""Why layers stay float, and how a range was chosen, from a checkpoint's recipe and rules."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from qat.calibrate.sensitivity.result import FloatLayers
from qat.lean.equalize import INPUTS
from qat.lean.modes import quantizers
from qat.model.quantized import QuantizedModel


def kept_in_float(model: QuantizedModel, macs: Mapping[str, int], recipe: Mapping[str, Any]) -> list[FloatLayers]:
    """The layers that stay float and why, the largest share of the multiply-accumulates first.

    Args:
        macs: of every weighted layer, as `counting_macs` notes them.
        recipe: of the checkpoint: whether a budget or another tool switched layers off.
    """
    if budget := recipe.get("budget"):
        off = "budget", f"INT8 costs more {budget['of']} than the budget of {budget['drop']:g} allows"
    elif recipe.get("method") == "imported":
        off = "imported", "the tool that quantized the network left it float"
    else:
        off = "off", "switched off in the checkpoint"
    groups: dict[tuple[str, str, str], list[str]] = {}
    own = quantizers(model.parts)
    for part, inventory in model.inventory.items():
        if part in model.parts_off:
            reason = model.family.recipe(model.config).off_reason or "the part is float as a whole"
            groups[part, "parts_off", reason] = [name for name in macs if name.startswith(f"{part}.")]
            continue
        for name, kept in inventory.kept.items():
            if kept.flavours and model.flavour not in kept.flavours:
                continue
            groups.setdefault((part, kept.rule, kept.reason), []).append(f"{part}.{name}")
        for path in inventory.quantized:
            if own[f"{part}.{path}.weight_quantizer"].off:
                groups.setdefault((part, *off), []).append(f"{part}.{path}")
    total = sum(macs.values())
    found = [
        FloatLayers(*group, layers, round(sum(macs.get(layer, 0) for layer in layers) / total, 6))
        for group, layers in groups.items()
        if layers  # a view transform that does not downsample has none
    ]
    return sorted(found, key=lambda group: -group.macs_share)


def range_method(quantizer: str, recipe: Mapping[str, Any]) -> str:
    """The method by which calibration chose the range of `part.quantizer`, in words; "unknown" if the recipe does not say."""
    if recipe.get("finetune", {}).get("learn_ranges"):
        return "learned"
    equalized = quantizer in recipe.get("equalized", ())
    if equalized and recipe.get("equalize", INPUTS) == INPUTS:
        return "max, channels equalized"
    method = next(
        (other for pattern, other in recipe.get("by_layer", ()) if fnmatch.fnmatchcase(quantizer, pattern)),
        recipe.get("default_method", recipe.get("method", "unknown")),
    )
    if method == "percentile" and recipe.get("percentile"):
        method = f"percentile {recipe['percentile']:g}"
    return f"{method}, channels equalized" if equalized else str(method)
