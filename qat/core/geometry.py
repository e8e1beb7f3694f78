"""Points in camera images, rings of cameras, points within bounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rasterize_depth(
    points: np.ndarray,
    lidar2image: np.ndarray,
    img_aug_matrix: np.ndarray,
    lidar_aug_matrix: np.ndarray,
    image_size: Sequence[int],
) -> np.ndarray:
    """Sparse depth maps: the depth of the lidar point that falls on each pixel; if several do, the last one.

    Args:
        points: float32[M,≥3] in the (augmented) lidar frame, metres.
        lidar2image, img_aug_matrix: float32[N,4,4]. lidar_aug_matrix: float32[4,4]. image_size: (H, W).

    Returns:
        float32[N,1,H,W] in metres along the camera's axis; 0 where no point falls.
    """
    height, width = image_size
    xyz = points[:, :3].astype(np.float32) - lidar_aug_matrix[:3, 3].astype(np.float32)
    xyz = xyz @ np.linalg.inv(lidar_aug_matrix[:3, :3]).astype(np.float32).T
    depth = np.zeros((len(lidar2image), 1, height, width), np.float32)
    for n in range(len(lidar2image)):
        seen = xyz @ lidar2image[n, :3, :3].astype(np.float32).T + lidar2image[n, :3, 3].astype(np.float32)
        distance = seen[:, 2].copy()
        seen[:, :2] /= np.clip(seen[:, 2:], 1e-5, 1e5)
        seen[:, 2] = np.clip(seen[:, 2], 1e-5, 1e5)
        uv = seen @ img_aug_matrix[n, :2, :3].astype(np.float32).T + img_aug_matrix[n, :2, 3].astype(np.float32)
        on = (uv[:, 0] >= 0) & (uv[:, 0] < width) & (uv[:, 1] >= 0) & (uv[:, 1] < height)
        column, row = uv[on].astype(np.int64).T
        depth[n, 0, row, column] = distance[on]
    return depth


def camera_ring(count: int, image_size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic cameras at the lidar's position, looking outwards at equal angles.

    Returns:
        camera_intrinsics and camera2lidar, float64[count,4,4].
    """
    height, width = image_size
    intrinsics, camera2lidar = (np.tile(np.eye(4), (count, 1, 1)) for _ in range(2))
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = 0.8 * width
    intrinsics[:, :2, 2] = width / 2, height / 2
    for n, angle in enumerate(np.arange(count) * 2 * np.pi / count):
        c, s = np.cos(angle), np.sin(angle)
        camera2lidar[n, :3, :3] = [[s, 0, c], [-c, 0, s], [0, -1, 0]]
    return intrinsics, camera2lidar


def within(points: np.ndarray, bounds: Sequence[float]) -> np.ndarray:
    """Which points [M,≥3] lie inside [x, y, z, x, y, z] bounds, like BEVFusion's PointsRangeFilter: bool[M]."""
    low, high = np.asarray(bounds[:3]), np.asarray(bounds[3:])
    return ((points[:, :3] > low) & (points[:, :3] < high)).all(1)
