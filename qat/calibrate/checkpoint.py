"""The PTQ checkpoint: plain tensors and containers, from which a new process rebuilds the same quantized network.

    {"format": "bevqat-ptq", "schema": 2,
     "config":     the model's config,
     "state_dict": the float weights by BEVFusion's names, batch norm not folded,
     "amax":       {quantizer path: range},
     "disabled":   [quantizer paths that are off],
     "equalized":  {part.quantizer: what the channels that it rounds are divided by},
     "recipe":     how it was calibrated; keep_float and parts_off decide the placement, background whether biases are
                   "corrected" for the depth map's background (`qat.lean.background`) or have "absorbed" corrections,
     "weights":    after training only: {path in the parts: tensor}, batch norm folded}

Folding, placement, equalization and corrections are functions of these alone, so a reload gives bit-identical outputs. A network that
was trained after folding (`finetune`) has weights that no float state dict with batch norms gives: they are kept apart.
The float weights stay: training goes on from them as the teacher. Schema 1, which is still read, knew neither equalized
channels nor trained weights.
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
SCHEMA, READ = 2, (1, 2)


def save_ptq(
    path: str | Path,
    model: QuantizedDetector,
    float_model: CameraBEVDetector,
    recipe: Mapping[str, Any],
    trained: bool = False,
) -> None:
    """Writes the checkpoint, whole or not at all.

    Args:
        float_model: the one that `model` was made from.
        trained: `model`'s weights are others than folding `float_model` gives; they are written too.
    """
    disabled = [name for name, quantizer in quantizers(model.parts).items() if quantizer._disabled]
    placement = {
        "keep_float": [[rule.pattern, rule.reason] for rule in model.keep_float],
        "parts_off": list(model.parts_off),
        "background": model.background,
    }
    checkpoint = {
        "format": FORMAT,
        "schema": SCHEMA,
        "config": model.config,
        "state_dict": {name: tensor.detach().cpu() for name, tensor in float_model.state_dict().items()},
        "amax": {name: tensor.cpu() for name, tensor in model.amax().items()},
        "disabled": disabled,
        "equalized": {name: scales.cpu() for name, scales in model.equalized.items()},
        "recipe": {**recipe, **placement},
    }
    if trained:
        checkpoint["weights"] = {name: tensor.cpu().contiguous() for name, tensor in model.weights().items()}
    with atomic_path(path) as temporary:
        torch.save(checkpoint, temporary)


def _read(path: str | Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(path)
    if checkpoint.get("format") != FORMAT:
        raise UserError(
            f"{path}: found a checkpoint without quantizer ranges, expected a PTQ one; run calibrate on it first"
        )
    if checkpoint.get("schema") not in READ:
        found, expected = checkpoint.get("schema"), " or ".join(map(str, READ))
        raise UserError(f"{path}: found schema {found!r}, expected {expected}; calibrate again")
    return checkpoint


def _build(
    checkpoint: Mapping[str, Any], path: str | Path, as_saved: bool
) -> tuple[QuantizedDetector, CameraBEVDetector]:
    """The quantized detector, and the float one. as_saved: with equalized channels and trained weights; otherwise its
    weights are the float one's, folded."""
    try:
        recipe = checkpoint["recipe"]
        model = build_model(checkpoint["config"])
        load_state(model, checkpoint["state_dict"], str(path))
        rules = [FloatRule(pattern, reason) for pattern, reason in recipe["keep_float"]]
        quantized = QuantizedDetector(model.eval(), rules, recipe["parts_off"])
        if as_saved:
            for name, scales in checkpoint.get("equalized", {}).items():
                quantized.equalize(name, scales)
            if "weights" in checkpoint:
                quantized.load_weights(checkpoint["weights"])
        quantized.load_amax(checkpoint["amax"], checkpoint["disabled"])
        if as_saved and recipe.get("background") == "corrected":  # checkpoints of before it was done lack it
            quantized.keep_background()
        elif as_saved:
            quantized.background = recipe.get("background")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged, or made by another version: {error}; calibrate again") from None
    return quantized, model


def load_ptq(path: str | Path) -> tuple[QuantizedDetector, dict[str, Any]]:
    """The quantized detector, calibrated or trained, and its recipe.

    Raises:
        UserError: not a PTQ checkpoint, one of another schema, or one whose quantizers do not fit its config.
    """
    checkpoint = _read(path)
    return _build(checkpoint, path, as_saved=True)[0], dict(checkpoint["recipe"])


def load_float_reference(path: str | Path) -> tuple[QuantizedDetector, CameraBEVDetector]:
    """The float network that a PTQ checkpoint was made from: folded, with every quantizer off; and with its batch norms.

    The two share weights. Raises as `load_ptq`.
    """
    reference, model = _build(_read(path), path, as_saved=False)
    for quantizer in quantizers(reference.parts).values():
        quantizer.disable()
    return reference, model
