"""Losses between a quantized network (the student) and the float one (the teacher), frame by frame.

No annotation is read. Every loss is one number for each frame, without a unit, so the average over frames does not
depend on how many processes share them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

# Weight of an empty cell relative to a cell with an object. Most cells are empty and far: what is best for them may not be best
# for the objects (`--method auto` of calibrate has the same reason), but false objects must not appear.
EMPTY = 1e-3
BOX_WEIGHTS = {"vel": 0.2}  # CenterPoint's and BEVFusion's code weights; 1 for the other maps


WEIGHTS = {"image": 1.0, "bev": 1.0, "heat": 50.0, "box": 0.3}  # of the losses


def relative_error(found: torch.Tensor, wanted: torch.Tensor, frames: int) -> torch.Tensor:
    """‖found − wanted‖² / ‖wanted‖² of each frame, [frames]: an SQNR of 20 dB is 0.01."""
    difference, reference = ((x.reshape(frames, -1)) for x in (found - wanted, wanted))
    return difference.square().sum(1) / reference.square().sum(1).clamp(min=1e-12)


def heat_loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the heat in each cell, [B]; both [B,classes,nx,ny] logits.

    A cell is weighted by the higher of the two heats, so that an object which only one network detects counts too; the sum
    is divided by the teacher's heat, like a focal loss by the number of objects.
    """
    heat = wanted.sigmoid()
    divergence = heat * (F.logsigmoid(wanted) - F.logsigmoid(logits)) + (1 - heat) * (
        F.logsigmoid(-wanted) - F.logsigmoid(-logits)
    )
    weight = torch.maximum(heat, logits.detach().sigmoid()) + EMPTY
    return (weight * divergence).flatten(1).sum(1) / (heat + EMPTY).flatten(1).sum(1)


def box_loss(maps: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Absolute difference of one task's box maps, averaged with the teacher's heat as the weight, [B].

    In the head's units (cells, metres, log metres, sine and cosine, m/s), like CenterPoint's L1 loss.
    """
    heat = wanted["heatmap"].sigmoid().amax(1, keepdim=True)
    total = torch.zeros(len(heat), device=heat.device)
    for name, values in maps.items():
        if name != "heatmap":
            difference = (heat * (values - wanted[name]).abs()).flatten(1).sum(1)
            total = total + BOX_WEIGHTS.get(name, 1.0) * difference
    return total / heat.flatten(1).sum(1)


def _tasks(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The head's maps `{map}_{task}`, a dict for each task."""
    count = sum(name.startswith("heatmap_") for name in tensors)
    return [
        {name.rpartition("_")[0]: value for name, value in tensors.items() if name.rpartition("_")[2] == str(task)}
        for task in range(count)
    ]


def distillation_losses(
    student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], frames: int
) -> dict[str, torch.Tensor]:
    """The mean over frames of each loss, not weighted.

    Args:
        student, teacher: the plan's tensors, float32, of as many frames.

    Returns:
        `image` (depth weights and context), `bev` (the decoder's map; of a camera branch the result of its downsampling), and
        where there are maps `heat` and `box` (means over tasks).
    """
    bev = next(name for name in ("middle", "feat_out", "feat_in") if name in teacher)
    image = sum(
        relative_error(student[name], teacher[name], frames) for name in ("camera_depth_weights", "camera_feature")
    )
    assert isinstance(image, torch.Tensor)
    losses = {"image": image.mean(), "bev": relative_error(student[bev], teacher[bev], frames).mean()}
    pairs = list(zip(_tasks(student), _tasks(teacher), strict=True))
    if not pairs:
        return losses
    heat = torch.stack([heat_loss(own["heatmap"], wanted["heatmap"]) for own, wanted in pairs])
    box = torch.stack([box_loss(own, wanted) for own, wanted in pairs])
    return {**losses, "heat": heat.mean(), "box": box.mean()}
