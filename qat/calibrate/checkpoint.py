"""The PTQ checkpoint: plain tensors and containers, from which a new process rebuilds the same quantized network.

    {"format": "bevqat-ptq", "schema": 1,
     "config":     the model's config,
     "state_dict": the float weights by BEVFusion's names, batch norm not folded,
     "amax":       {quantizer path: range},
     "disabled":   [quantizer paths that are off],
     "recipe":     how it was calibrated; keep_float and parts_off decide the placement}

Folding and placement are functions of these alone, so a reload gives bit-identical outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qat.core.errors import UserError
from qat.core.files import atomic_path
from qat.lean import QuantizedDetector
from qat.lean.modes import quantizers
from qat.lean.placement import FloatRule
from qat.models import CameraBEVDetector, build_model, load_checkpoint, load_state

FORMAT = "bevqat-ptq"
SCHEMA = 1


def save_ptq(
    path: str | Path, model: QuantizedDetector, float_model: CameraBEVDetector, recipe: Mapping[str, Any]
) -> None:
    """Writes the checkpoint, whole or not at all. `float_model` is the one that `model` was made from."""
    disabled = [name for name, quantizer in quantizers(model.parts).items() if quantizer._disabled]
    placement = {
        "keep_float": [[rule.pattern, rule.reason] for rule in model.keep_float],
        "parts_off": list(model.parts_off),
    }
    checkpoint = {
        "format": FORMAT,
        "schema": SCHEMA,
        "config": model.config,
        "state_dict": {name: tensor.detach().cpu() for name, tensor in float_model.state_dict().items()},
        "amax": {name: tensor.cpu() for name, tensor in model.amax().items()},
        "disabled": disabled,
        "recipe": {**recipe, **placement},
    }
    with atomic_path(path) as temporary:
        torch.save(checkpoint, temporary)


def load_ptq(path: str | Path) -> tuple[QuantizedDetector, dict[str, Any]]:
    """The quantized detector and its recipe.

    Raises:
        UserError: not a PTQ checkpoint, one of another schema, or one whose quantizers do not fit its config.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.get("format") != FORMAT:
        raise UserError(
            f"{path}: found a checkpoint without quantizer ranges, expected a PTQ one; run calibrate on it first"
        )
    if checkpoint.get("schema") != SCHEMA:
        raise UserError(f"{path}: found schema {checkpoint.get('schema')!r}, expected {SCHEMA}; calibrate again")
    try:
        recipe = checkpoint["recipe"]
        model = build_model(checkpoint["config"])
        load_state(model, checkpoint["state_dict"], str(path))
        rules = [FloatRule(pattern, reason) for pattern, reason in recipe["keep_float"]]
        quantized = QuantizedDetector(model.eval(), rules, recipe["parts_off"])
        quantized.load_amax(checkpoint["amax"], checkpoint["disabled"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged, or made by another version: {error}; calibrate again") from None
    return quantized, dict(recipe)
