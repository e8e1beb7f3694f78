"""What a quantized network (the student) is to have of the float one (the teacher), frame by frame.

No annotation is read. Every loss is one number for each frame, without a unit: what the average over frames is does not
depend on how many processes share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from qat.families.bevfusion.config import is_camera_branch
from qat.families.bevfusion.pooling.geometry import PoolPattern
from qat.lean import QuantizedDetector

# Weight of an empty cell beside one where an object is. Most cells are empty and far: what serves them need not serve the
# objects (`--method auto` of calibrate is the same finding), but an object that is nowhere must not appear.
EMPTY = 1e-3
BOX_WEIGHTS = {"vel": 0.2}  # CenterPoint's and BEVFusion's code weights; 1 for the other maps


@dataclass
class Outputs:
    """What the losses compare, of B frames with N cameras: depth_weights [B·N,D,fH,fW], context [B·N,C,fH,fW], the
    decoder's map bev [B,C,nx,ny] and the head's maps of each task. Of a camera branch alone bev is what its downsampling
    gives, and there are no maps. float32."""

    depth_weights: torch.Tensor
    context: torch.Tensor
    bev: torch.Tensor
    maps: list[dict[str, torch.Tensor]]


def run_network(
    model: QuantizedDetector,
    img: torch.Tensor,
    depth: torch.Tensor,
    patterns: Sequence[PoolPattern],
    precision: AbstractContextManager[None],
) -> Outputs:
    """img [B,N,3,H,W], depth [B,N,1,H,W] → what the losses compare.

    precision: a context that may be entered again, such as autocast, for the layers; softmax and pooling are float32.
    """
    with precision:
        logits = model.camera_logits(img.flatten(0, -4), depth.flatten(0, -4))
    depth_weights, context = model.vtransform.split(logits.float())
    pooled = model.pool(depth_weights, context, patterns)
    with precision:
        bev, maps = model.downsample(pooled), []
        if not is_camera_branch(model.config):
            bev = model.decode_bev(bev)
            maps = model.head(bev)
    return Outputs(
        depth_weights, context, bev.float(), [{name: x.float() for name, x in task.items()} for task in maps]
    )


def relative_error(found: torch.Tensor, wanted: torch.Tensor, frames: int) -> torch.Tensor:
    """‖found − wanted‖² / ‖wanted‖² of each frame, [frames]: an SQNR of 20 dB is 0.01."""
    difference, reference = ((x.reshape(frames, -1)) for x in (found - wanted, wanted))
    return difference.square().sum(1) / reference.square().sum(1).clamp(min=1e-12)


def heat_loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the heat in each cell, [B]; both [B,classes,nx,ny] logits.

    A cell counts as much as the higher of the two heats, so that an object which one of them does not see counts
    wherever it is; the sum is divided by the teacher's heat, as a focal loss by the number of objects.
    """
    heat = wanted.sigmoid()
    divergence = heat * (F.logsigmoid(wanted) - F.logsigmoid(logits)) + (1 - heat) * (
        F.logsigmoid(-wanted) - F.logsigmoid(-logits)
    )
    weight = torch.maximum(heat, logits.detach().sigmoid()) + EMPTY
    return (weight * divergence).flatten(1).sum(1) / (heat + EMPTY).flatten(1).sum(1)


def box_loss(maps: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Absolute difference of one task's box maps, averaged with the teacher's heat as the weight, [B].

    In the head's own units (cells, metres, log metres, sine and cosine, m/s), as CenterPoint's L1 loss.
    """
    heat = wanted["heatmap"].sigmoid().amax(1, keepdim=True)
    total = torch.zeros(len(heat), device=heat.device)
    for name, values in maps.items():
        if name != "heatmap":
            difference = (heat * (values - wanted[name]).abs()).flatten(1).sum(1)
            total = total + BOX_WEIGHTS.get(name, 1.0) * difference
    return total / heat.flatten(1).sum(1)


def distillation_losses(student: Outputs, teacher: Outputs) -> dict[str, torch.Tensor]:
    """The mean over frames of each loss, not weighted: `image`, `bev`, and where there are maps `heat` and `box` (means over
    tasks)."""
    frames = len(teacher.bev)
    image = relative_error(student.depth_weights, teacher.depth_weights, frames) + relative_error(
        student.context, teacher.context, frames
    )
    losses = {"image": image.mean(), "bev": relative_error(student.bev, teacher.bev, frames).mean()}
    pairs = list(zip(student.maps, teacher.maps, strict=True))
    if not pairs:
        return losses
    heat = torch.stack([heat_loss(own["heatmap"], wanted["heatmap"]) for own, wanted in pairs])
    box = torch.stack([box_loss(own, wanted) for own, wanted in pairs])
    return {**losses, "heat": heat.mean(), "box": box.mean()}
