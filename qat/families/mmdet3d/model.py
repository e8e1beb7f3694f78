"""A config's model: with a checkpoint's weights, or with random ones."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from qat.checkpoints.reading import load_checkpoint
from qat.core.console import note
from qat.core.errors import UserError
from qat.families.mmdet3d.description import OLDER, boxes_of

if TYPE_CHECKING:
    from mmengine.config import Config

CLASS_BIAS = -2.0  # of random weights: some scores pass the threshold, so that decoding and NMS have work
_CLASS_LAYERS = ("conv_cls", "heatmap", "cls_conv", "conv_pred.conv_cls")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the block nothing is printed or logged: mmengine lists every layer that it initializes, torch's exporter the whole
    graph where it stops, and both partly from C++. Exceptions come through."""
    sys.stdout.flush()
    sys.stderr.flush()
    disabled = logging.root.manager.disable
    kept = {number: os.dup(number) for number in (1, 2)}
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere:
            for number in kept:
                os.dup2(nowhere.fileno(), number)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
        logging.disable(disabled)


def build(config: Config) -> nn.Module:
    """The network of a config, in eval mode.

    Raises:
        UserError: a module of it is unknown, or an argument does not fit.
    """
    from mmdet3d.registry import MODELS
    from mmengine.config import ConfigDict
    from mmengine.model import revert_sync_batchnorm

    settings = ConfigDict(config.model.to_dict() if hasattr(config.model, "to_dict") else config.model)
    settings["train_cfg"] = None
    settings.pop("pretrained", None)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = revert_sync_batchnorm(MODELS.build(settings))
    except Exception as error:  # mmengine wraps whatever a module raised
        what = str(error).strip().splitlines()
        raise UserError(
            f"{config.source}: model: found {type(error).__name__}: {what[-1][:300] if what else ''}, expected a model that "
            "mmdet3d 1.4 can build; fix the config, or install what it imports (custom_imports)"
        ) from error
    model.eval()  # whose result is None where a model has a train() of its own
    return model


def draw(model: nn.Module, seed: int) -> None:
    """Random weights, the same ones for a seed: mmdet3d's own initialization, and class biases of `CLASS_BIAS`."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for module in model.modules():
        own = getattr(module, "init_cfg", None)
        if isinstance(own, dict) and own.get("type") == "Pretrained":
            setattr(module, "init_cfg", None)  # noqa: B010  # nothing is downloaded
    with quiet():
        for module in model.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:  # what mmdet3d's initialization leaves as it was built
                reset()
        for module in [model] if hasattr(model, "init_weights") else model.children():
            if hasattr(module, "init_weights"):
                module.init_weights()  # type: ignore[operator]
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                module.reset_running_stats()
    for name, module in model.named_modules():
        last = module[-1] if isinstance(module, nn.Sequential) and len(module) else module
        bias = getattr(last, "bias", None)
        if name.endswith(_CLASS_LAYERS) and isinstance(bias, torch.Tensor):
            nn.init.constant_(bias, CLASS_BIAS)


def fitted(model: nn.Module, state: Mapping[str, Any], source: str, finite: bool = True) -> int:
    """Loads a checkpoint's weights into a model; returns how many names were left out.

    finite: False takes NaN and infinity, to look at what they do.

    Raises:
        UserError: they are another model's, or not finite.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    other = [name for name in own if name in state and tuple(state[name].shape) != tuple(own[name].shape)]
    if missing or other:
        name = (missing or other)[0]
        found = f"no {name}" if missing else f"{name} of shape {list(state[name].shape)}"
        raise UserError(
            f"{source}: found {found} ({len(missing)} missing, {len(other)} of other shapes), expected the {len(own)} tensors of a "
            f"{type(model).__name__}; name the checkpoint of this config"
        )
    taken = {name: state[name] for name in own if name in state}
    if finite and (bad := next((n for n, value in taken.items() if not torch.isfinite(value.float()).all()), None)):
        raise UserError(
            f"{source}: {bad}: found NaN or infinity, expected finite weights; `bevqat health` shows what they do"
        )
    model.load_state_dict(taken, strict=False)
    return len(state) - len(taken)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a checkpoint, read by this project's own reader, which runs nothing in it.

    Raises:
        UserError: it does not load, or is of another model.
    """
    checkpoint = load_checkpoint(path)
    fitted(model, checkpoint["state_dict"], str(path))
    note_older(checkpoint.get("meta") or {}, str(path))


def note_older(meta: Mapping[str, Any], source: str) -> None:
    """Warns of a checkpoint whose boxes are OLDER."""
    if boxes_of(meta) == OLDER:
        note(
            f"{source}: trained with mmdet3d {meta['mmdet3d_version']}: before 1.0 boxes were w, l, h with another yaw; its boxes come "
            "out turned unless it was converted (tools/model_converters of mmdet3d)"
        )
