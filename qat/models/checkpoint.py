"""Reading float checkpoints: plain tensors and plain containers only."""

from __future__ import annotations

import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping
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


def _grouped(names: list[str]) -> str:
    groups = Counter(".".join(name.split(".")[:3]) for name in names)
    return ", ".join(f"{group}.* ({count})" for group, count in sorted(groups.items()))


DERIVED = "relative_position_index"  # Swin's: fixed by the window's size, in the state dict by mmdet's habit alone
GEOMETRY = ("dx", "bx", "nx", "frustum")  # the view transform's fixed parameters


def _short(value: torch.Tensor) -> str:
    numbers = [f"{v:g}" for v in value.flatten()[:3].tolist()]
    return f"[{', '.join(numbers)}{', …' if value.numel() > 3 else ''}]"


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Loads a state dict by name; anything missing, unexpected or of another shape is a `UserError` that lists it."""
    own = model.state_dict()
    extra = [name for name in state if name not in own]
    # A classifier that the backbone does not use, and stages after its last output, do no harm.
    extra = [name for name in extra if not name.startswith("encoders.camera.backbone.")]
    missing = [name for name in own if name not in state and not name.endswith(DERIVED)]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{source}: {name}: found shape {list(state[name].shape)}, the config makes {list(own[name].shape)} "
            f"({len(wrong)} such tensors); give the config that the checkpoint was trained with"
        )
    if missing or extra:
        parts = [f"missing {_grouped(missing)}"] if missing else []
        parts += [f"unexpected {_grouped(extra)}"] if extra else []
        raise UserError(f"{source}: does not fit the config: {'; '.join(parts)}")
    for name in own:  # a checkpoint's grid decides where features go: another one's shape may be the same
        if name.rpartition(".")[2] in GEOMETRY and not torch.allclose(
            state[name].double(), own[name].double(), atol=1e-3
        ):
            raise UserError(
                f"{source}: {name}: found {_short(state[name])}, the config's bounds make {_short(own[name])}; give the "
                "config that the checkpoint was trained with"
            )
    try:
        model.load_state_dict({name: state[name].to(own[name].dtype) for name in own if name in state})
    except RuntimeError as error:  # what the checks above cannot see: Swin's windows in another order
        raise UserError(f"{source}: does not fit the config: {' '.join(str(error).split())}") from None


def load_float_model(config: Mapping[str, Any], path: str | Path) -> CameraBEVDetector:
    """The detector of `config` with a float checkpoint's weights, in eval mode."""
    checkpoint = load_checkpoint(path)
    if checkpoint.get("format") == "bevqat-ptq":
        raise UserError(f"{path}: a quantized checkpoint, expected the float one that it was calibrated from")
    model = build_model(config)
    load_state(model, checkpoint["state_dict"], str(path))
    return model.eval()
