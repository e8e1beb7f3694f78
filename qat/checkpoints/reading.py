"""Reads checkpoints: tensors and plain containers. Nothing in a file is executed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from qat.checkpoints.pickled import is_module, is_plainly_saved, module_state, quantizer_settings, read_pickled
from qat.checkpoints.unpickle import Record
from qat.checkpoints.weights import BESIDE, choose_weights, has_tensors, without_wrappers
from qat.core.console import note
from qat.core.errors import UserError
from qat.core.kinds import kind_of_file

STATE_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
)  # other tools' keys for what we call state_dict
# Entries of a TensorQuantizer in a state dict: pytorch-quantization's `…_input_quantizer._amax`, ModelOpt's
# `….input_quantizer._amax`; a network's own "quantizer" (a codebook, say) has other names under it.
QUANTIZER_STATE = (
    "_amax",
    "_scale",
    "_zero_point",
    "_pre_quant_scale",
    "_bias_value",
    "_amax_for_smoothing",
    "clip.clip_value_min",
    "clip.clip_value_max",
)


def _quantizer_part(name: object) -> tuple[str, str] | None:
    """The quantizer's path and the attribute that a name in a state dict stands for; None if it is not a quantizer's."""
    suffix = next((s for s in QUANTIZER_STATE if isinstance(name, str) and name.endswith("." + s)), None)
    if suffix is None:
        return None
    path = str(name)[: -len(suffix) - 1]
    parts = path.split(".")
    last = parts[-2] if parts[-1].isdigit() and len(parts) > 1 else parts[-1]  # one of a SequentialQuantizer's
    return (path, suffix) if "quantizer" in last else None


def split_quantizers(
    state: Mapping[str, Any], described: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A state dict without the entries of its TensorQuantizers, and the quantizers, as `load_checkpoint` returns them.

    described: their attributes by path, where the file says more than their ranges (ModelOpt's `quantizer_state`).
    """
    weights: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {
        path: {key: value for key, value in settings.items() if key != "_amax"}
        for path, settings in described.items()
        if isinstance(path, str) and isinstance(settings, Mapping)
    }
    for name, value in state.items():
        part = _quantizer_part(name)
        if part is None:
            weights[name] = value
        else:
            found.setdefault(part[0], {})[part[1]] = value
    return weights, {path: quantizer_settings(settings) for path, settings in found.items()}


def _modelopt_settings(value: Mapping[str, Any]) -> dict[str, Any]:
    """Each quantizer's attributes in `modelopt_state`: {"modelopt_state_dict": [(mode, {"metadata": {"quantizer_state": {path:
    attributes}}}), …]}, of which the last mode's counts."""
    found: dict[str, Any] = {}
    state = value.get("modelopt_state")
    modes = state.get("modelopt_state_dict") if isinstance(state, Mapping) else None
    for mode in modes if isinstance(modes, list | tuple) else ():
        metadata = mode[1].get("metadata") if len(mode) == 2 and isinstance(mode[1], Mapping) else None
        described = metadata.get("quantizer_state") if isinstance(metadata, Mapping) else None
        found.update(described if isinstance(described, Mapping) else {})
    return found


def _plain_entries(entries: Mapping[Any, Any], limit: int = 1_000_000) -> dict[Any, Any]:
    """The entries that contain no `Record` at any depth."""
    plain = {}
    for key, value in entries.items():
        waiting, seen = [value], set()
        while waiting and limit > 0:
            one = waiting.pop()
            limit -= 1
            if isinstance(one, Record):
                break
            if isinstance(one, dict | list | tuple | set | frozenset) and id(one) not in seen:
                seen.add(id(one))
                limit -= len(one)
                waiting.extend([*one, *one.values()] if isinstance(one, dict) else one)
        else:
            if not waiting and not isinstance(key, Record):
                plain[key] = value
    return plain


def _from_pickled(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Reads a checkpoint that holds objects without running them; also returns the quantizers of a pickled network."""
    value = read_pickled(path)
    if is_module(value):
        value = {"model": value}
    if isinstance(value, dict):
        for key in STATE_KEYS:
            if is_module(value.get(key)):
                state, quantizers = module_state(value[key], str(path))
                rest = _plain_entries({k: v for k, v in value.items() if k not in (key, "quantizers")})
                for other in BESIDE:
                    if is_module(value.get(other)):
                        rest[other] = module_state(value[other], str(path))[0]
                return {**rest, "state_dict": state}, quantizers
            if has_tensors(value.get(key)):
                break
        # The objects are outside the state dict: a config, a training log.
        value = _plain_entries(value)
        if value:
            return value, {}
    what = f"a {value.module}.{value.name}" if isinstance(value, Record) else f"a {type(value).__name__}"
    raise UserError(
        f"{path}: found {what} (pickled objects are not run here), expected a network, a state dict or "
        "{'state_dict': …}; save model.state_dict() instead"
    )


def load_checkpoint(path: str | Path, ema: bool = False) -> dict[str, Any]:
    """Reads a checkpoint: `{"state_dict": …}`, possibly with `config` and `meta`; a bare state dict; a whole network that
    was pickled (`torch.save(model)`), at the top or under "model"; a file of NVIDIA ModelOpt.

    Nothing in the file is executed, and the packages of its classes need not be installed (`qat.checkpoints.pickled`).

    ema: take the averaged weights that the file holds in addition (`qat.checkpoints.weights`).

    Returns:
        the file's dict, with "state_dict": the tensors by their names in `nn.Module.state_dict`, without wrappers' prefixes;
        where the file has averaged weights too, "averaged": whether those were taken, and "note": a line for the user. Where the
        network was
        quantized by pytorch-quantization or ModelOpt, also "quantizers": {path of a TensorQuantizer: {"amax": tensor or None,
        "disabled": bool, "num_bits": int, "axis": tuple or None, "unsigned": bool, "special": str or None}}, whose tensors
        "state_dict" then does not hold (see `qat.calibrate.foreign`).

    Raises:
        UserError: the file is missing, damaged, or has no tensors; or `ema`, and it has no averaged weights.
    """
    path = Path(path)
    if not path.is_file():
        there = "found a folder, " if path.is_dir() else "no such file; "
        raise UserError(f"{path}: {there}expected a checkpoint written by torch.save; name its file")
    quantizers: dict[str, dict[str, Any]] = {}
    value: Any = None
    if is_plainly_saved(path):
        # The file holds objects, which this loader refuses, or it is damaged, which may raise anything.
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol: nothing to act on
            value = torch.load(path, map_location="cpu", weights_only=True)
    if value is None:
        try:
            value, quantizers = _from_pickled(path)
        except UserError:
            if (kind := kind_of_file(path)) is None:
                raise
            expected = "expected a checkpoint written by torch.save; name the network's .pth, or fetch it again"
            raise UserError(f"{path}: found {kind}, {expected}") from None
    if not isinstance(value, Mapping):
        raise UserError(
            f"{path}: found a {type(value).__name__}, expected a state dict or {{'state_dict': …}}; save "
            "model.state_dict() instead"
        )
    checkpoint = dict(value)
    if "state_dict" not in value and "format" not in value:
        key = next((key for key in STATE_KEYS if has_tensors(value.get(key))), None)
        if key is not None:
            checkpoint["state_dict"] = checkpoint.pop(key)
        elif not any(isinstance(value.get(other), Mapping) for other in BESIDE):
            checkpoint = {"state_dict": checkpoint}
    if "format" not in checkpoint:
        chosen = choose_weights(checkpoint, str(path), ema)
        checkpoint = {key: value for key, value in checkpoint.items() if key not in ("averaged", "note")}
        checkpoint["state_dict"] = chosen.state
        if chosen.note:
            checkpoint.update(averaged=chosen.averaged, note=chosen.note)
    elif ema:
        raise UserError(f"--ema: found {path}, a bevqat checkpoint, which has one set of weights; omit --ema")
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping) or not has_tensors(state):
        raise UserError(
            f"{path}: found no tensors under 'state_dict', expected a trained model's; save model.state_dict() there"
        )
    if "format" not in checkpoint:
        described = without_wrappers(_modelopt_settings(value), str(path))
        state, found = split_quantizers(state, described)
        quantizers = {**without_wrappers(quantizers, str(path)), **found}
        checkpoint.pop("quantizers", None)
        if quantizers:
            checkpoint.update(state_dict=state, quantizers=quantizers)
    return checkpoint


@contextmanager
def saving(path: str | Path) -> Iterator[IO[bytes]]:
    """A Python file object for torch to write to, so that a failure of the system is an OSError. torch raises a RuntimeError
    instead, without the cause if it opens the file itself.

    Raises:
        OSError: the disk is full, a quota or a limit is reached, or the system refuses for another reason.
    """
    with open(path, "wb") as stream:
        try:
            yield stream
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def save_plain(value: Any, path: str | Path) -> None:
    """`torch.save`, with errors as of `saving`."""
    with saving(path) as stream:
        torch.save(value, stream)


def float_weights(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The weights to load from a float checkpoint. Reports which they are if the file has others too.

    Args:
        checkpoint: `load_checkpoint`'s.

    Raises:
        UserError: another tool has quantized the network, and its weights are not the float network's.
    """
    quantizers = checkpoint.get("quantizers") or {}
    if smoothed := [name for name, q in quantizers.items() if q["special"] and "SmoothQuant" in q["special"]]:
        raise UserError(
            f"{path}: found {len(smoothed)} layers whose weights another tool has scaled for quantization ({smoothed[0]}: "
            "SmoothQuant), expected float weights; use the checkpoint from before that"
        )
    if quantizers:
        note(f"{path}: ignored the ranges of {len(quantizers)} quantizers of another tool; import-ptq uses them")
    if checkpoint.get("note"):
        note(checkpoint["note"])
    found: dict[str, Any] = checkpoint["state_dict"]
    return found
