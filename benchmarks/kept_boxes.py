"""Boxes of a PTQ checkpoint's simulations by frame, kept in files, so that a measurement that was stopped goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qat.boxes.detections import Detections
from qat.calibrate import load_ptq
from qat.calibrate.checkpoint import load_float_reference
from qat.core.progress import progress_bar


def simulated(name: str, ptq: Path) -> Any:
    """A PTQ checkpoint's network in PyTorch. name: "float"; a flavour; a flavour + parts that it leaves off, to round them too."""
    if name == "float":
        _, model = load_float_reference(ptq)
    else:
        flavour, *parts = name.split("+")
        model, _ = load_ptq(ptq)
        model.use(flavour, parts)
    return model.to(memory_format=torch.channels_last)


def kept_boxes(
    name: str, key: str, frames: Mapping[str, Callable[[], Detections]], cache: Path
) -> dict[str, Detections]:
    """Boxes of every frame, as `Detections.arrays` has them.

    Args:
        name: the row, shown beside the progress. key: what its boxes depend on. frames: what computes the boxes of each, by names that
            files can have.
    """
    folder = cache / hashlib.sha256(f"arrays {key}".encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    with progress_bar(name, len(frames)) as done, torch.inference_mode():
        for n, (frame, detect) in enumerate(frames.items()):
            path = folder / f"{frame}.npz"
            if not path.is_file():
                temporary = path.with_suffix(".part.npz")
                np.savez(temporary, **detect().arrays())
                temporary.rename(path)
            with np.load(path) as arrays:
                found[frame] = Detections.of(arrays)
            done(n + 1)
    return found
