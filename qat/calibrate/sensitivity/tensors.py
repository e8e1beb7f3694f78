"""The tensors that are compared: the float network's, and those with some units on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from qat.boxes.detections import Detections
from qat.lean.modes import quantizers_off
from qat.lean.observe import counting_macs
from qat.model.quantized import QuantizedModel
from qat.model.runners import to_numpy, torch_feeds
from qat.plan import Plan, Runner, run


def float_tensors(
    model: QuantizedModel,
    runners: Mapping[str, Runner],
    feeds: Mapping[str, np.ndarray],
    macs: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Every tensor of the plan in the float network."""
    with quantizers_off(model), nullcontext() if macs is None else counting_macs(model.parts, macs):
        return run(model.plan, runners, torch_feeds(model, feeds))


def judged(plan: Plan, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """For each label, all its tensors in one row, float64."""
    return {
        label: torch.cat([tensors[name].flatten() for name in names]).double().cpu().numpy()
        for label, names in plan.judged.items()
    }


def energy(reference: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Sums of squares: of the reference, and of the difference."""
    noise = reference - found
    return float(reference @ reference), float(noise @ noise)


def boxes_of(model: QuantizedModel, tensors: Mapping[str, Any]) -> Detections:
    """The boxes of the plan's outputs among `tensors`."""
    return model.flow.decode(to_numpy(tensors, model.plan.outputs))


def objects_of(model: QuantizedModel, tensors: Mapping[str, Any]) -> np.ndarray | None:
    """Which values of the last label's row belong to objects; None without boxes."""
    names = list(model.plan.judged.values())[-1]
    masks = model.flow.objects(to_numpy(tensors, names)) if model.plan.boxes else None
    return None if masks is None else np.concatenate([masks[name].ravel() for name in names])
