"""CenterHead's training targets, as in BEVFusion (CenterPoint, Yin et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class TaskTargets:
    """One task's targets: heatmap float32[classes,nx,ny]; index int64[K], flat x·ny + y of each object's cell; boxes
    float32[K,10]: dx, dy (cells), z of the middle plus h/2 (as BEVFusion's head learns it), log w, log l, log h, sin yaw, cos yaw, vx, vy."""

    heatmap: np.ndarray
    index: np.ndarray
    boxes: np.ndarray


def gaussian_radius(length: float, width: float, overlap: float) -> float:
    """Radius in cells within which a corner pair still overlaps by `overlap` (CornerNet's, with its known halving
    slip, as CenterPoint and BEVFusion use it)."""
    total, area = length + width, length * width
    r1 = (total + np.sqrt(total**2 - 4 * area * (1 - overlap) / (1 + overlap))) / 2
    r2 = (2 * total + np.sqrt(4 * total**2 - 16 * (1 - overlap) * area)) / 2
    b3 = -2 * overlap * total
    r3 = (b3 + np.sqrt(b3**2 - 16 * overlap * (overlap - 1) * area)) / 2
    return float(min(r1, r2, r3))


def draw_gaussian(heatmap: np.ndarray, x: int, y: int, radius: int) -> None:
    """Raises `heatmap` [nx,ny] to a Gaussian of σ = (2·radius + 1)/6 around (x, y), in place."""
    nx, ny = heatmap.shape
    x0, x1, y0, y1 = max(0, x - radius), min(nx, x + radius + 1), max(0, y - radius), min(ny, y + radius + 1)
    dx, dy = np.arange(x0, x1) - x, np.arange(y0, y1) - y
    sigma = (2 * radius + 1) / 6
    patch = np.exp(-(dx[:, None] ** 2 + dy[None] ** 2) / (2 * sigma**2))
    np.maximum(heatmap[x0:x1, y0:y1], patch, out=heatmap[x0:x1, y0:y1])


def make_targets(boxes: np.ndarray, labels: np.ndarray, head: Mapping[str, Any]) -> list[TaskTargets]:
    """Targets of one sample for each task. boxes float32[K,9], labels int64[K]: as `qat.boxes.detections.Detections`."""
    cfg = head["train_cfg"]
    factor = cfg["out_size_factor"]
    nx, ny = (int(v) // factor for v in cfg["grid_size"][:2])
    cell = np.asarray(cfg["voxel_size"][:2]) * factor
    low = np.asarray(cfg["point_cloud_range"][:2])
    out, first = [], 0
    for task in head["tasks"]:
        heatmap = np.zeros((len(task), nx, ny), np.float32)
        index, values = [], []
        for k in np.flatnonzero((labels >= first) & (labels < first + len(task)))[: cfg["max_objs"]]:
            x, y, z, width, length, height, yaw, vx, vy = boxes[k]
            centre = (np.array([x, y]) - low) / cell
            ix, iy = centre.astype(int)
            if not (0 <= ix < nx and 0 <= iy < ny) or (centre < 0).any():
                continue
            radius = gaussian_radius(length / cell[1], width / cell[0], cfg["gaussian_overlap"])
            draw_gaussian(heatmap[labels[k] - first], ix, iy, max(cfg["min_radius"], int(radius)))
            index.append(ix * ny + iy)
            size = np.log([width, length, height])
            values.append([*(centre - [ix, iy]), z + height / 2, *size, np.sin(yaw), np.cos(yaw), vx, vy])
        out.append(TaskTargets(heatmap, np.asarray(index, np.int64), np.asarray(values, np.float32).reshape(-1, 10)))
        first += len(task)
    return out
