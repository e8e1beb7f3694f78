"""mmcv's overlaps and suppression of boxes: on the host, whatever the device (boxes are few).

As mmcv's CUDA kernels have it: what overlaps by more than the threshold goes (mmcv's CPU kernel of nms_rotated: as much or more),
and nms_rotated's labels do not matter; mmcv's batched_nms moves the boxes of each class apart.
"""

from __future__ import annotations

import numpy as np
import torch

from qat.boxes import overlap
from qat.families.mmdet3d.ops.mmcv_ext.forms import untraced


def box_iou_rotated(
    boxes1: torch.Tensor, boxes2: torch.Tensor, ious: torch.Tensor, mode_flag: int = 0, aligned: bool = False
) -> None:
    """Writes into [N·M], or [N] where aligned: intersection over union, or over the first box's area where mode_flag is 1."""
    untraced("box_iou_rotated")
    found = overlap.box_iou_rotated(_host(boxes1), _host(boxes2), mode_flag == 1, aligned)
    ious.copy_(torch.from_numpy(found).reshape(ious.shape))


def nms_rotated(
    dets: torch.Tensor,
    scores: torch.Tensor,
    order: torch.Tensor,
    dets_sorted: torch.Tensor,
    labels: torch.Tensor,
    iou_threshold: float,
    multi_label: bool = False,
) -> torch.Tensor:
    """Kept indices of boxes [K,≥5], best first."""
    untraced("nms_rotated")
    return torch.from_numpy(overlap.nms_rotated(_host(dets), _host(scores), iou_threshold)).to(dets.device)


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int = 0) -> torch.Tensor:
    """Kept indices of upright boxes [K,4], best first."""
    untraced("nms")
    return torch.from_numpy(overlap.nms_upright(_host(boxes), _host(scores), iou_threshold, offset)).to(boxes.device)


def iou3d_nms3d_forward(
    boxes: torch.Tensor, keep: torch.Tensor, num_out: torch.Tensor, nms_overlap_thresh: float
) -> None:
    """Suppression seen from above: boxes [K,7] of x, y, z, dx, dy, dz, yaw, best first. Writes the kept indices and their number."""
    untraced("iou3d_nms3d_forward")
    _keep(overlap.nms_rotated(_host(boxes)[:, [0, 1, 3, 4, 6]], _falling(boxes), nms_overlap_thresh), keep, num_out)


def iou3d_nms3d_normal_forward(
    boxes: torch.Tensor, keep: torch.Tensor, num_out: torch.Tensor, nms_overlap_thresh: float
) -> None:
    """The same with every yaw taken as 0."""
    untraced("iou3d_nms3d_normal_forward")
    middle, half = _host(boxes)[:, :2], _host(boxes)[:, 3:5] / 2
    corners = np.concatenate([middle - half, middle + half], 1)
    _keep(overlap.nms_upright(corners, _falling(boxes), nms_overlap_thresh), keep, num_out)


def _host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _falling(boxes: torch.Tensor) -> np.ndarray:
    """Scores of boxes that come best first."""
    return -np.arange(len(boxes), dtype=np.float32)


def _keep(kept: np.ndarray, keep: torch.Tensor, num_out: torch.Tensor) -> None:
    keep[: len(kept)].copy_(torch.from_numpy(kept))
    num_out.fill_(len(kept))
