"""Reading float checkpoints: plain tensors and plain containers only."""

from __future__ import annotations

import pickle
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.core.errors import UserError
from qat.models.detector import CameraBEVDetector, build_model


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint: `{"state_dict": …}`, possibly with `config` and `meta`, or a bare state dict.

    Raises:
        UserError: no such file, damaged, a pickled module, or no tensors in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a checkpoint written by torch.save")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        if zipfile.is_zipfile(path):
            raise UserError(
                f"{path}: holds pickled objects, expected plain tensors: save model.state_dict() instead ({reason})"
            ) from None
        raise UserError(f"{path}: not a torch checkpoint, or damaged ({reason})") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a torch checkpoint, or damaged ({reason})") from None
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: found {type(value).__name__}, expected a state dict or {{'state_dict': …}}")
    checkpoint = dict(value) if "state_dict" in value or "format" in value else {"state_dict": dict(value)}
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping) or not any(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path}: found no tensors under 'state_dict', expected a trained model's")
    return checkpoint


def _grouped(names: list[str], words: int = 3) -> str:
    groups = Counter(".".join(name.split(".")[:words]) for name in names)
    return ", ".join(f"{group}.* ({count})" for group, count in sorted(groups.items()))


DERIVED = "relative_position_index"  # Swin's: fixed by the window's size, in the state dict by mmdet's habit alone
GEOMETRY = ("dx", "bx", "nx", "frustum")  # the view transform's fixed parameters


def _short(value: torch.Tensor) -> str:
    numbers = [f"{v:g}" for v in value.flatten()[:3].tolist()]
    return f"[{', '.join(numbers)}{', …' if value.numel() > 3 else ''}]"


BRANCH = "encoders.camera."


def _branch_prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes under which a camera branch lies: only that has a view transform (others too have a backbone)."""
    split = [name.split(".") for name in names]
    return list(dict.fromkeys(".".join(w[: w.index("vtransform")]) for w in split if "vtransform" in w[:-1]))


def _before(prefix: str) -> str:
    return f"{prefix.rstrip('.')}." if prefix else ""


def take_branch(state: Mapping[str, Any], prefix: str, source: str) -> tuple[dict[str, Any], int]:
    """The camera branch out of a state dict, by this package's names, and how many of its names were left out.

    Args:
        prefix: what stands before `.backbone`, `.neck` and `.vtransform` in the file: "encoders.camera" in a BEVFusion
            model, "module.encoders.camera" in one saved out of DistributedDataParallel, "" in a state dict of the
            branch alone.

    Raises:
        UserError: nothing of a camera branch lies there; the prefixes under which one does are named.
    """
    before = _before(prefix)
    inside = {f"{BRANCH}{name[len(before) :]}": value for name, value in state.items() if name.startswith(before)}
    if not any(name.startswith(f"{BRANCH}vtransform.") for name in inside):
        expected = " or ".join(map(repr, _branch_prefixes(state)))
        if not expected:
            expected = f"backbone, neck and vtransform under it; its names are {_grouped(list(state), 2)}"
        raise UserError(f"--prefix: found {prefix!r}, under which {source} has no camera branch, expected {expected}")
    return inside, len(state) - len(inside)


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor], source: str, prefix: str | None = None) -> int:
    """Loads a state dict by name; anything missing, unexpected or of another shape is a `UserError` that lists it.

    prefix: loads the camera branch that lies under it (`take_branch`) into a model of that branch alone; what is outside
    is left out.

    Returns:
        how many names were left out.
    """
    left_out = 0
    if prefix is not None:
        state, left_out = take_branch(state, prefix, source)

    def in_file(name: str) -> str:
        return name if prefix is None else f"{_before(prefix)}{name.removeprefix(BRANCH)}"

    own = model.state_dict()
    extra = [name for name in state if name not in own]
    # A classifier that the backbone does not use, and stages after its last output, do no harm.
    extra = [name for name in extra if not name.startswith(f"{BRANCH}backbone.")]
    missing = [name for name in own if name not in state and not name.endswith(DERIVED)]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{source}: {in_file(name)}: found shape {list(state[name].shape)}, the config makes {list(own[name].shape)} "
            f"({len(wrong)} such tensors); give the config that the checkpoint was trained with"
        )
    if missing or extra:
        parts = [f"missing {_grouped([*map(in_file, missing)])}"] if missing else []
        parts += [f"unexpected {_grouped([*map(in_file, extra)])}"] if extra else []
        whole = prefix is None and any(name.startswith(BRANCH) for name in state)
        if whole and not any(name.startswith(BRANCH) for name in (*missing, *extra)):
            parts += [
                "its camera branch fits: calibrate and export-camera take that alone with --prefix encoders.camera"
            ]
        raise UserError(f"{source}: does not fit the config: {'; '.join(parts)}")
    for name in own:  # a checkpoint's grid decides where features go: another one's shape may be the same
        if name.rpartition(".")[2] in GEOMETRY and not torch.allclose(
            state[name].double(), own[name].double(), atol=1e-3
        ):
            raise UserError(
                f"{source}: {in_file(name)}: found {_short(state[name])}, the config's bounds make {_short(own[name])}; give the "
                "config that the checkpoint was trained with"
            )
    try:
        model.load_state_dict({name: state[name].to(own[name].dtype) for name in own if name in state})
    except RuntimeError as error:  # what the checks above cannot see: Swin's windows in another order
        raise UserError(f"{source}: does not fit the config: {' '.join(str(error).split())}") from None
    return left_out


def load_float_model(config: Mapping[str, Any], path: str | Path) -> CameraBEVDetector:
    """The detector of `config` with a float checkpoint's weights, in eval mode."""
    return _load_float(config, path, None)[0]


def load_float_branch(config: Mapping[str, Any], path: str | Path, prefix: str) -> tuple[CameraBEVDetector, int]:
    """The camera branch alone out of a float checkpoint, in eval mode, and how many names of the file were left out.

    Args:
        config: the branch's (`qat.core.config.camera_branch`).
        prefix: where it lies in the file, as for `take_branch`.
    """
    return _load_float(config, path, prefix)


def _load_float(config: Mapping[str, Any], path: str | Path, prefix: str | None) -> tuple[CameraBEVDetector, int]:
    checkpoint = load_checkpoint(path)
    if checkpoint.get("format") == "bevqat-ptq":
        raise UserError(f"{path}: a quantized checkpoint, expected the float one that it was calibrated from")
    model = build_model(config)
    left_out = load_state(model, checkpoint["state_dict"], str(path), prefix)
    return model.eval(), left_out
