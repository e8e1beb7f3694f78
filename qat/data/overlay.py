"""Draws boxes and lidar points over the network's input images: check this first if a result looks wrong."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from qat.boxes.geometry import box_corners
from qat.data.sample import Sample

NEAR = 0.1  # metres in front of the camera; edges are cut there
EDGES = [(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7)]
PALETTE = [
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
    (140, 86, 75), (227, 119, 194), (188, 189, 34), (23, 190, 207), (255, 187, 120),
]  # fmt: skip
GRID = (("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"), ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"))


def project(points: np.ndarray, lidar2image: np.ndarray, img_aug_matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lidar-frame points [M,3] to network pixels [M,2] and their depth [M] in metres. Matrices [4,4]."""
    seen = points @ lidar2image[:3, :3].T + lidar2image[:3, 3]
    depth = seen[:, 2]
    flat = np.concatenate([seen[:, :2] / np.where(depth == 0, 1e-9, depth)[:, None], np.ones((len(seen), 1))], 1)
    return flat @ img_aug_matrix[:2, :3].T + img_aug_matrix[:2, 3], depth


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    lidar2image: np.ndarray,
    img_aug_matrix: np.ndarray,
    palette: Sequence[tuple[int, int, int]] = PALETTE,
) -> None:
    """Draws boxes [K,≥7] (as `qat.boxes.detections.Detections`) into uint8[H,W,3] RGB, the front face's edge thicker."""
    for corners, label in zip(box_corners(boxes), labels, strict=True):
        seen = corners @ lidar2image[:3, :3].T + lidar2image[:3, 3]
        for k, (a, b) in enumerate(EDGES):
            p, q = seen[a], seen[b]
            if p[2] < NEAR and q[2] < NEAR:
                continue
            if p[2] < NEAR or q[2] < NEAR:  # cut the edge at the near plane
                t = (NEAR - p[2]) / (q[2] - p[2])
                cut = p + t * (q - p)
                p, q = (cut, q) if p[2] < NEAR else (p, cut)
            ends = np.stack([p, q])
            uv = np.concatenate([ends[:, :2] / ends[:, 2:], [[1.0], [1.0]]], 1) @ img_aug_matrix[:2, :3].T
            uv = np.clip(uv + img_aug_matrix[:2, 3], -4000, 4000)
            (u0, v0), (u1, v1) = np.round(uv).astype(int)
            colour = palette[int(label) % len(palette)]
            cv2.line(image, (int(u0), int(v0)), (int(u1), int(v1)), colour, 2 if k == 0 else 1, cv2.LINE_AA)


def draw_points(image: np.ndarray, points: np.ndarray, lidar2image: np.ndarray, img_aug_matrix: np.ndarray) -> None:
    """Draws lidar points [M,≥3] into uint8[H,W,3] RGB: red near, blue from 50 m."""
    uv, depth = project(points[:, :3], lidar2image, img_aug_matrix)
    height, width = image.shape[:2]
    on = (depth > NEAR) & (uv[:, 0] >= 0) & (uv[:, 0] < width) & (uv[:, 1] >= 0) & (uv[:, 1] < height)
    if not on.any():
        return
    hue = np.clip(depth[on] / 50.0, 0, 1) * 120
    hsv = np.stack([hue, np.full_like(hue, 255), np.full_like(hue, 255)], 1).astype(np.uint8)[None]
    image[uv[on, 1].astype(int), uv[on, 0].astype(int)] = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]


def draw_sample(sample: Sample) -> np.ndarray:
    """A sheet of the sample's images with its points and boxes, uint8[R·H,C·W,3] RGB: nuScenes' six (or some of them) in
    two rows as they look around the car, others in their order, in rows of three, of two where there are two or four."""
    height, width = sample.images.shape[1:3]
    grid: Sequence[Sequence[str]] = GRID
    if not set(sample.cameras) <= {name for row in GRID for name in row}:
        columns = min(2 if len(sample.cameras) == 4 else 3, len(sample.cameras))
        grid = [sample.cameras[i : i + columns] for i in range(0, len(sample.cameras), columns)]
    sheet = np.zeros((len(grid) * height, len(grid[0]) * width, 3), np.uint8)
    for r, row in enumerate(grid):
        for c, name in enumerate(row):
            if name not in sample.cameras:
                continue
            k = sample.cameras.index(name)
            image = sample.images[k].copy()
            draw_points(image, sample.points, sample.lidar2image[k], sample.img_aug_matrix[k])
            draw_boxes(image, sample.gt_boxes, sample.gt_labels, sample.lidar2image[k], sample.img_aug_matrix[k])
            sheet[r * height : (r + 1) * height, c * width : (c + 1) * width] = image
    return sheet
