"""Finds the network's tensors in a checkpoint: removes wrappers' prefixes, and finds averaged copies (EMA) of the weights.

Places of averaged weights (an exponential moving average over training steps):

    {"state_dict": …, "state_dict_ema": …}    timm; also "model_ema", "ema"
    {"state_dict": …, "ema_state_dict": …}    mmengine, which swaps the two on saving: state_dict holds the average
    ema_backbone_conv1_weight                 mmcv and mmdet 2: a buffer for each weight, in the state dict. Saved at the end of an
                                              epoch the two are swapped; saved in the middle of one they are not

mmdet's hook does not average a buffer that counts batches (num_batches_tracked): the larger count belongs to the trained
weights, and shows whether the two were swapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qat.core.errors import UserError
from qat.families import state_names

OUTER = ("module.", "model.")  # DataParallel and averaged models; Lightning
ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile, FSDP
COUNTERS = ("n_averaged", "steps")  # the number of models in an average
BESIDE = ("state_dict_ema", "ema_state_dict", "model_ema", "ema")
BEFORE = "ema_"
TRACKED = "num_batches_tracked"


LONGEST = 1000  # characters of a network's name; damaged files have endless names


def has_tensors(value: Any) -> bool:
    """Whether it is a state dict."""
    return isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values())


def without_wrappers(state: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A state dict by the network's names, without the prefixes of DataParallel, torch.compile, Lightning, FSDP and averaged
    models. If only some names have a prefix, the others stay unchanged.

    Raises:
        UserError: two names are equal without prefixes.
    """
    if not any(isinstance(name, str) for name in state):
        return dict(state)
    # Pairs instead of repeatedly built dictionaries: a damaged file's names may all have the same hash.
    found = [(name, value) for name, value in state.items()]
    for prefix in ANYWHERE:
        found = [
            (name.replace(prefix, "") if isinstance(name, str) and len(name) < LONGEST else name, value)
            for name, value in found
        ]
    while True:
        names = [name for name, _ in found if isinstance(name, str) and name not in COUNTERS]
        prefix = next((p for p in OUTER if _is_wrapped(names, p)), "")
        if not prefix:
            break
        found = [
            (name.removeprefix(prefix) if isinstance(name, str) else name, value)
            for name, value in found
            if name not in COUNTERS
        ]
    result = dict(found)
    if len(result) < len(found):
        seen: set[Any] = set()
        twice = next(name for name, _ in found if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise UserError(
            f"{source}: found {twice} with and without a wrapper's prefix, expected it once; save one network's state_dict()"
        )
    return result


def _is_wrapped(names: list[str], prefix: str) -> bool:
    if not names:
        return False
    network = state_names()
    inside = tuple(prefix + name for name in network) + tuple(prefix + outer for outer in OUTER)
    some = any(name.startswith(inside) for name in names) and not any(name.startswith(network) for name in names)
    return some or all(name.startswith(prefix) for name in names)


@dataclass
class Chosen:
    """The selected weights. averaged: whether the file says that they are averaged. note: a line for the user
    of a file with two sets, or ""."""

    state: dict[str, Any]
    averaged: bool = False
    note: str = ""


def _nested(value: Any) -> Any:
    """{"module": state dict, "updates": …} → the state dict."""
    if isinstance(value, Mapping) and not has_tensors(value):
        return next((value[key] for key in ("module", "state_dict") if has_tensors(value.get(key))), value)
    return value


def _beside(checkpoint: Mapping[str, Any], source: str) -> tuple[str, dict[str, Any], bool] | None:
    """An averaged copy next to the state dict: its key, the tensors, and whether it was swapped with the state dict."""
    for key in BESIDE:
        value = _nested(checkpoint.get(key))
        if has_tensors(value):
            swapped = key == "ema_state_dict" and "steps" in value
            return key, without_wrappers(value, source), swapped
    return None


def _tracked(state: Mapping[str, Any]) -> int:
    counts = (
        int(v) for n, v in state.items() if n.endswith(TRACKED) and isinstance(v, torch.Tensor) and v.numel() == 1
    )
    return max(counts, default=0)


def choose_weights(checkpoint: Mapping[str, Any], source: str, ema: bool) -> Chosen:
    """The state dict of a checkpoint by the network's names, or the averaged weights that the file holds in addition.

    Args:
        checkpoint: with "state_dict", if it has one.
        ema: take the averaged ones.

    Raises:
        UserError: `ema`, but the file has no averaged weights.
    """
    given = checkpoint.get("state_dict")
    state = without_wrappers(given, source) if isinstance(given, Mapping) else {}
    names = {BEFORE + name.replace(".", "_"): name for name in state if isinstance(name, str)}
    inside = {names[name]: value for name, value in state.items() if name in names}
    beside = _beside(checkpoint, source)
    if inside:
        state = {name: value for name, value in state.items() if name not in names}
        average, where = inside, f"{BEFORE}*"
        counted = _tracked(state), _tracked(inside)
        swapped: bool | None = counted[1] > counted[0] if counted[0] != counted[1] else None
    elif beside is not None:
        where, average, swapped = beside
    elif ema:
        raise UserError(
            f"--ema: found no averaged weights in {source}, expected them under {', '.join(BESIDE)} or as {BEFORE}*; omit --ema"
        )
    else:
        return Chosen(state)
    copy = f"{where} ({len(average)} tensors)"
    if swapped:
        return Chosen(
            state,
            True,
            f"{source}: used state_dict, which has the averaged weights here; {copy} has those before averaging",
        )
    if ema:
        return Chosen({**state, **average}, True, f"{source}: used the averaged weights, {copy}")
    if not state:
        raise UserError(f"{source}: found only averaged weights, {copy}, expected a state_dict too; use --ema for them")
    often = "; mmcv swaps the two at the end of an epoch: evaluate both" if swapped is None else ""
    return Chosen(
        state,
        False,
        f"{source}: used state_dict, not the averaged weights, {copy}; --ema uses those{often}",
    )
