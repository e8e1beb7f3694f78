"""The PTQ checkpoint: plain tensors and containers, from which a new process rebuilds the same quantized network.

    {"format": "bevqat-ptq", "schema": 3,
     "family":     its family's name; absent for BEVFusion's,
     "config":     the model's config,
     "state_dict": the float weights by the network's names, batch norm not folded,
     "amax":       {quantizer path: range},
     "ends":       {quantizer path: the smallest and the largest value seen},
     "disabled":   [quantizer paths that are off in every flavour],
     "equalized":  {part.quantizer: the divisors of the channels that it rounds},
     "recipe":     how it was calibrated; keep_float and parts_off decide the placement, background whether biases are
                   "corrected" for the depth map's background (`qat.lean.background`) or have "absorbed" corrections,
     "weights":    after training only: {path in the parts: tensor}, batch norm folded}

Folding, placement, equalization and corrections are functions of these only, so a reload has bit-identical outputs. A network that
was trained after folding (`finetune`) has weights that no float state dict with batch norms has: they are stored separately.
The float weights are kept: they are the teacher of further training.

Schemas 1 and 2 are still read. Schema 1 has neither equalized channels nor trained weights. Both list quantizers that the
default flavour does not use as disabled, and name some quantizers by the number of an operation in the graph (`quant_add_3`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qat.calibrate.old_names import absorbed_layers, old_names, old_weights, really_off
from qat.checkpoints.reading import load_checkpoint, save_plain
from qat.core.errors import UserError
from qat.core.files import atomic_path
from qat.families import DEFAULT, KEY, family_of
from qat.lean.flavours import FLAVOURS
from qat.lean.modes import quantizers
from qat.lean.placement import FloatRule
from qat.model.quantized import QuantizedModel

FORMAT = "bevqat-ptq"
SCHEMA, READ = 3, (1, 2, 3)


def save_ptq(
    path: str | Path,
    model: QuantizedModel,
    float_model: Any,
    recipe: Mapping[str, Any],
    trained: bool = False,
) -> None:
    """Writes the checkpoint, whole or not at all.

    Args:
        float_model: the one that `model` was made from.
        trained: `model`'s weights differ from the folded weights of `float_model`; they are written too.
    """
    placement = {
        "keep_float": [
            [rule.pattern, rule.reason, *([list(rule.flavours)] if rule.flavours else [])] for rule in model.keep_float
        ],
        "parts_off": {name: list(flavours) for name, flavours in model.off_in.items()},
        "background": model.background,
        "absorbed": sorted(model.absorbed),
    }
    checkpoint = {
        "format": FORMAT,
        "schema": SCHEMA,
        **({} if model.family.name == DEFAULT else {KEY: model.family.name}),
        "config": model.config,
        "state_dict": {name: tensor.detach().cpu() for name, tensor in float_model.state_dict().items()},
        "amax": {name: tensor.cpu() for name, tensor in model.amax().items()},
        "ends": {name: ends.cpu() for name, ends in model.ends().items()},
        "disabled": model.float_names(),
        "equalized": {name: scales.cpu() for name, scales in model.equalized.items()},
        "recipe": {**recipe, **placement},
    }
    if trained:
        checkpoint["weights"] = {name: tensor.cpu().contiguous() for name, tensor in model.weights().items()}
    with atomic_path(path) as temporary:
        save_plain(checkpoint, temporary)


def _checked(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    if checkpoint.get("format") != FORMAT:
        raise UserError(
            f"{path}: found a checkpoint without quantizer ranges, expected a PTQ one; run calibrate on it first"
        )
    if checkpoint.get("schema") not in READ:
        found, expected = checkpoint.get("schema"), " or ".join(map(str, READ))
        newer = isinstance(found, int) and found > SCHEMA
        fix = "update bevqat, or calibrate again with this version" if newer else "calibrate again"
        raise UserError(f"{path}: found schema {found!r}, expected {expected}; {fix}")
    _check_sections(checkpoint, path)
    return checkpoint


def _check_sections(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Raises `UserError` for a section that is missing or has another type: the file was truncated or edited."""

    def fail(section: str, found: object, expected: str) -> UserError:
        what = "none" if found is None else f"a {type(found).__name__}"
        return UserError(f"{path}: {section}: found {what}, expected {expected}: damaged; calibrate again")

    def texts(section: str, found: object) -> None:
        if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
            raise fail(section, found, "a list of names")

    for section in ("config", "recipe"):
        if not isinstance(checkpoint.get(section), Mapping):
            raise fail(section, checkpoint.get(section), "a section")
    for section in ("amax", *(name for name in ("equalized", "weights", "ends") if name in checkpoint)):
        found = checkpoint.get(section)
        if not isinstance(found, Mapping):
            raise fail(section, found, "a tensor for each name")
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                raise fail(f"{section}: {name}", value, "a tensor")
            if not bool(value.isfinite().all()):
                raise UserError(
                    f"{path}: {section}: {name}: found NaN or infinity, expected finite values; calibrate again"
                )
            if section == "equalized" and not bool((value > 0).all()):
                found = f"{value.min().item():g}"
                raise UserError(f"{path}: {section}: {name}: found {found}, expected values above 0; calibrate again")
    texts("disabled", checkpoint.get("disabled"))
    recipe = checkpoint["recipe"]
    parts = recipe.get("parts_off")
    if isinstance(parts, Mapping):
        for name, flavours in parts.items():
            texts("recipe: parts_off", [name])
            texts(f"recipe: parts_off: {name}", flavours)
    else:
        texts("recipe: parts_off", parts)
    texts("recipe: absorbed", recipe.get("absorbed", []))
    rules = recipe.get("keep_float")
    if not isinstance(rules, list | tuple):
        raise fail("recipe: keep_float", rules, "a list of patterns with reasons")
    for rule in rules:
        if not isinstance(rule, list | tuple) or len(rule) not in (2, 3):
            raise fail("recipe: keep_float", rule, "a pattern and a reason")
        texts("recipe: keep_float", rule[:2])
        texts("recipe: keep_float", rule[2] if len(rule) == 3 else [])
    if (background := recipe.get("background")) not in (None, "corrected", "absorbed"):
        raise UserError(
            f"{path}: recipe: background: found {background!r}, expected corrected or absorbed; calibrate again"
        )
    family_of(checkpoint, str(path)).check_config(checkpoint["config"], f"{path}: config")


def _base(checkpoint: Mapping[str, Any], path: str | Path, finite: bool = True) -> tuple[QuantizedModel, Any]:
    """The quantized model with the float model's folded weights, without ranges; and the float model."""
    with _telling(path):
        recipe = checkpoint["recipe"]
        family = family_of(checkpoint, str(path))
        model = family.build(checkpoint["config"])
        family.load_state(model, checkpoint["state_dict"], str(path), finite=finite)
        rules = [FloatRule(pattern, reason, tuple(*flavours)) for pattern, reason, *flavours in recipe["keep_float"]]
        parts = recipe["parts_off"]
        off = parts if isinstance(parts, Mapping) else dict.fromkeys(parts, tuple(FLAVOURS))
        return QuantizedModel(model.eval(), rules, off), model


@contextmanager
def _telling(path: str | Path) -> Iterator[None]:
    """Inside the block, errors mean a damaged file."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        found = error.args[0] if error.args else type(error).__name__  # str() of a KeyError has quotes around it
        raise UserError(f"{path}: damaged, or made by another version: {found}; calibrate again") from None


def _settle(quantized: QuantizedModel, checkpoint: Mapping[str, Any], path: str | Path, as_saved: bool) -> None:
    """Sets the checkpoint's ranges in a `_base`. as_saved: also equalized channels and trained weights."""
    with _telling(path):
        recipe = checkpoint["recipe"]
        names = (lambda name: name) if checkpoint["schema"] >= 3 else old_names(quantized, checkpoint)
        if as_saved:
            for name, scales in checkpoint.get("equalized", {}).items():
                quantized.equalize(names(name), scales)
            if "weights" in checkpoint:
                weights = checkpoint["weights"]
                quantized.load_weights(weights if checkpoint["schema"] >= 3 else old_weights(quantized, weights))
        amax = {names(name): value for name, value in checkpoint["amax"].items()}
        disabled = [names(name) for name in checkpoint["disabled"]]
        if checkpoint["schema"] < 3:
            disabled = really_off(quantized, amax, disabled)
        quantized.load_amax(amax, disabled, checkpoint.get("ends"))
        if as_saved and recipe.get("background") == "absorbed":
            quantized.background = "absorbed"
            quantized.absorbed = absorbed_layers(quantized, recipe)
            quantized.use(quantized.flavour)
        elif as_saved and recipe.get("background") == "corrected":  # older checkpoints lack it
            quantized.keep_background()


def _float(reference: QuantizedModel) -> QuantizedModel:
    for quantizer in quantizers(reference.parts).values():
        quantizer.off = quantizer._disabled = True
    return reference


def ptq_of(checkpoint: dict[str, Any], path: str | Path, finite: bool = True) -> tuple[QuantizedModel, Any]:
    """The quantized model of a checkpoint that `load_checkpoint` read, calibrated or trained, and the float network.

    finite: False accepts weights that are NaN or infinite, to examine their effect.

    Raises:
        UserError: not a PTQ checkpoint, one of another schema, or one whose quantizers do not fit its config.
    """
    quantized, model = _base(_checked(checkpoint, path), path, finite)
    _settle(quantized, checkpoint, path, as_saved=True)
    return quantized, model


def reference_of(checkpoint: dict[str, Any], path: str | Path) -> tuple[QuantizedModel, Any]:
    """The float network of a PTQ checkpoint, folded with every quantizer off; and the same with its batch norms.

    The two share weights. Raises like `ptq_of`.
    """
    reference, model = _base(_checked(checkpoint, path), path)
    _settle(reference, checkpoint, path, as_saved=False)
    return _float(reference), model


def student_and_teacher(checkpoint: dict[str, Any], path: str | Path) -> tuple[QuantizedModel, QuantizedModel, Any]:
    """The models of `ptq_of` and `reference_of`, from one trace, without shared weights. Raises like `ptq_of`."""
    student, _ = _base(_checked(checkpoint, path), path)
    teacher = copy.deepcopy(student)  # its float network too, whose unchanged layers the graphs share
    _settle(student, checkpoint, path, as_saved=True)
    _settle(teacher, checkpoint, path, as_saved=False)
    return student, _float(teacher), teacher.network


def recipe_of(path: str | Path) -> dict[str, Any]:
    """The recipe of a PTQ checkpoint's file, without building a network; raises like `ptq_of`."""
    return dict(_checked(load_checkpoint(path), path)["recipe"])


def load_ptq(path: str | Path, finite: bool = True) -> tuple[QuantizedModel, dict[str, Any]]:
    """The quantized model of a file, and its recipe; raises like `ptq_of`."""
    checkpoint = load_checkpoint(path)
    return ptq_of(checkpoint, path, finite)[0], dict(checkpoint["recipe"])


def load_float_reference(path: str | Path) -> tuple[QuantizedModel, Any]:
    """`reference_of` of a file."""
    return reference_of(load_checkpoint(path), path)
