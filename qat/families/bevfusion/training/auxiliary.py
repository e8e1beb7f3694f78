"""Direct supervision of the image part: the object that each feature pixel shows.

The detector's losses reach the image part only through the BEV grid, and have little effect on it until depth is right.
Pixels that show an object learn its class, size and heading directly, as in FCOS3D (Wang et al., ICCVW 2021) and
BEVDepth's perspective supervision. The head is used only in training; no model or exported part has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from qat.boxes.geometry import box_corners, box_heading

IGNORED = -100  # cross_entropy's default
NEAR = 0.3  # metres in front of the camera, below which nothing is drawn
CODE = 5  # log width, log length, log height, sin and cos of the heading seen from the camera


@dataclass
class PixelTargets:
    """The object that each feature pixel of N cameras shows.

    label: int64[N,fH,fW], a class, the number of classes for background, or IGNORED. code: float32[N,5,fH,fW] of log width,
    log length, log height, sin and cos of the heading about the camera's vertical axis. weight: float32[N,fH,fW],
    1/√(pixels of the object), 0 on background: so that near objects do not outweigh small ones.
    """

    label: np.ndarray
    code: np.ndarray
    weight: np.ndarray


def _lattice(corners: np.ndarray) -> np.ndarray:
    """[K,8,3] corners → [K,125,3] points through each box, for boxes that reach behind a camera."""
    t = np.linspace(0, 1, 5)[:, None, None, None, None]
    bottom, top = corners[:, :4], corners[:, 4:]
    upright = bottom + (top - bottom) * t[:, 0]  # [5,K,4,3]
    front = upright[:, :, 0] + (upright[:, :, 1] - upright[:, :, 0]) * t[:, 0]  # [5,5,K,3]
    back = upright[:, :, 3] + (upright[:, :, 2] - upright[:, :, 3]) * t[:, 0]
    return np.moveaxis((front + (back - front) * t).reshape(125, len(corners), 3), 0, 1)


def pixel_targets(
    boxes: np.ndarray,
    labels: np.ndarray,
    seen_by_lidar: np.ndarray,
    lidar2image: np.ndarray,
    camera2lidar: np.ndarray,
    img_aug_matrix: np.ndarray,
    image_size: tuple[int, int],
    stride: int,
    classes: int,
) -> PixelTargets:
    """Draws each box's outline into each camera, far ones first.

    boxes [K,9] in the lidar frame, before any lidar augmentation; matrices float32[N,4,4]. A box without lidar points
    (bool[K]) may be hidden, so its pixels are ignored.
    """
    (height, width), cameras = image_size, len(lidar2image)
    fh, fw = height // stride, width // stride
    owner = np.full((cameras, fh, fw), -1, np.int64)
    code = np.zeros((cameras, CODE, fh, fw), np.float32)
    weight = np.zeros((cameras, fh, fw), np.float32)
    points = _lattice(box_corners(boxes))
    heading = box_heading(boxes[:, 6])
    for n in range(cameras):
        seen = points @ lidar2image[n, :3, :3].T + lidar2image[n, :3, 3]
        depth = seen[..., 2]
        front = np.flatnonzero((depth > NEAR).any(1))
        canvas = np.full((height, width), -1, np.float32)
        middle = {}
        for k in front[np.argsort(-depth[front].mean(1), kind="stable")]:
            ahead = depth[k] > NEAR
            uv = np.concatenate([seen[k, ahead, :2] / depth[k, ahead, None], np.ones((ahead.sum(), 1))], 1)
            uv = uv @ img_aug_matrix[n, :2, :3].T + img_aug_matrix[n, :2, 3]
            if (uv.max(0) < 0).any() or (uv.min(0) >= (width, height)).any():
                continue
            hull = cv2.convexHull(uv.clip(-4 * width, 4 * width).round().astype(np.int32))
            cv2.fillConvexPoly(canvas, hull, (float(k),))
            column, row = (uv.mean(0) // stride).astype(int)
            if ahead.all() and 0 <= column < fw and 0 <= row < fh:
                middle[k] = row, column
        owner[n] = canvas[stride // 2 :: stride, stride // 2 :: stride]
        for k, (row, column) in middle.items():  # an object that covers no pixel's centre gets one pixel
            if not (owner[n] == k).any():
                owner[n, row, column] = k
        shown = owner[n] >= 0
        k = owner[n][shown]
        axis = camera2lidar[n, :2, 2]  # the camera's direction, in the lidar frame
        turn = heading[k] - np.arctan2(axis[1], axis[0])
        mirrored = np.sign(np.linalg.det(img_aug_matrix[n, :2, :2]))
        size = np.log(boxes[k, 3:6])
        code[n][:, shown] = np.concatenate([size.T, [mirrored * np.sin(turn), np.cos(turn)]])
        weight[n][shown] = 1 / np.sqrt(np.bincount(k, minlength=len(boxes))[k]) if len(k) else 0
    weight[(owner >= 0) & ~np.append(seen_by_lidar, True)[owner]] = 0
    label = np.append(np.where(seen_by_lidar, labels, IGNORED), classes)[owner]
    return PixelTargets(label.astype(np.int64), code, weight)


class PixelHead(nn.Module):
    """One 1×1 convolution on the context that the view transform lifts: [N,C,fH,fW] → class logits (background
    last) [N,classes+1,fH,fW] and box code [N,5,fH,fW]."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.layer = nn.Conv2d(channels, classes + 1 + CODE, 1)

    def forward(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.layer(context)
        return out[:, : self.classes + 1], out[:, self.classes + 1 :]


def pixel_loss(
    predicted: tuple[torch.Tensor, torch.Tensor], targets: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Losses `class` (cross-entropy; objects and background weigh the same in all) and `shape` (L1 of the code).

    targets: label, code, weight as `PixelTargets`, of the same N.
    """
    logits, code = predicted
    label, weight = targets["label"], targets["weight"]
    total = weight.sum().clamp(min=1e-6)
    entropy = F.cross_entropy(logits, label, reduction="none")
    background = label == logits.shape[1] - 1
    # Hard background pixels cause false objects: weighted by squared confidence, as in focal loss.
    doubt = (1 - (-entropy.detach()).exp()) ** 2
    behind = (entropy * doubt)[background].sum() / weight.gt(0).sum().clamp(min=1)
    difference = (code - targets["code"]).abs().sum(1)
    return {"class": (entropy * weight).sum() / total + behind, "shape": (difference * weight).sum() / total}


def to_tensors(targets: list[PixelTargets], device: torch.device) -> dict[str, Any]:
    """A batch's targets, the samples' cameras one after the other."""
    return {
        name: torch.from_numpy(np.concatenate([getattr(t, name) for t in targets])).to(device)
        for name in ("label", "code", "weight")
    }
