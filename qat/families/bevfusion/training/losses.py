"""CenterHead's losses, and depth supervision from the lidar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from qat.families.bevfusion.training.targets import TaskTargets

BOX_MAPS = ("reg", "height", "dim", "rot", "vel")


def gaussian_focal_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """CornerNet's focal loss (Law & Deng, ECCV 2018; α 2, γ 4), summed and divided by the number of centres."""
    positive = target.eq(1).float()
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    p = logits.sigmoid()
    loss = -log_p * (1 - p) ** 2 * positive - log_not_p * p**2 * (1 - target) ** 4 * (1 - positive)
    return loss.sum() / positive.sum().clamp(min=1)


def head_loss(
    maps: Sequence[Mapping[str, torch.Tensor]], targets: Sequence[Sequence[TaskTargets]], head: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Losses `heat` and `box`, summed over tasks. maps: for each task {map: [B,c,nx,ny]}; targets: [B][task]."""
    device = maps[0]["heatmap"].device
    weights = torch.tensor(head["train_cfg"]["code_weights"], device=device)
    scale = head["loss_bbox"].get("loss_weight", 1.0)
    heat = torch.zeros((), device=device)
    box = torch.zeros((), device=device)
    for task, task_maps in enumerate(maps):
        wanted = [sample[task] for sample in targets]
        heatmap = torch.stack([torch.from_numpy(t.heatmap) for t in wanted]).to(device)
        heat = heat + gaussian_focal_loss(task_maps["heatmap"], heatmap)
        predicted = torch.cat([task_maps[name] for name in BOX_MAPS], 1).flatten(2)
        rows = [predicted[b][:, torch.from_numpy(t.index).to(device)].T for b, t in enumerate(wanted)]
        truth = torch.cat([torch.from_numpy(t.boxes) for t in wanted]).to(device)
        difference = (torch.cat(rows) - truth).abs() * weights
        box = box + scale * difference.sum() / max(len(truth), 1)
    return {"heat": heat, "box": box}


def depth_loss(depth_weights: torch.Tensor, depth: torch.Tensor, dbound: Sequence[float]) -> torch.Tensor:
    """Cross-entropy of the predicted depth distribution with the nearest lidar point in each feature cell.

    (BEVDepth's supervision, Li et al., AAAI 2023.) depth_weights [N,D,fH,fW]; depth [N,1,H,W] metres, 0 = none.
    """
    bins, fh = depth_weights.shape[1], depth_weights.shape[2]
    stride = depth.shape[2] // fh
    far = torch.where(depth > 0, depth, torch.full_like(depth, 1e4))
    nearest = -F.max_pool2d(-far, stride)[:, 0]
    index = ((nearest - dbound[0]) / dbound[2]).round().long()
    known = (index >= 0) & (index < bins)
    probability = depth_weights.gather(1, index.clamp(0, bins - 1)[:, None])[:, 0]
    return -(probability[known] + 1e-6).log().mean() if bool(known.any()) else depth_weights.sum() * 0
