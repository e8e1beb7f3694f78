"""Pooling of points inside boxes, in numpy."""

from __future__ import annotations

import numpy as np

from qat.families.mmdet3d.ops.points import points_in_boxes


def points_of_cells(points: np.ndarray, rois: np.ndarray, cells: tuple[int, int, int], room: int) -> np.ndarray:
    """Which points each cell of each box holds: int32[R,X,Y,Z,room] of how many, then the first room − 1 indices.

    points: float[N,3]; rois: float[R,7] of x, y, z of the bottom's middle, sizes along the box's own x, y, z, and yaw.
    """
    from qat.families.mmdet3d.ops._rois_kernel import collect

    held = np.zeros((len(rois), *cells, room), np.int32)
    points, rois = np.ascontiguousarray(points, np.float32), np.ascontiguousarray(rois, np.float32)
    collect(points, rois, points_in_boxes(points, rois), held)
    return held


def pool_cells(features: np.ndarray, held: np.ndarray, mean: bool) -> tuple[np.ndarray, np.ndarray]:
    """Each cell's greatest features, or their mean, float32[R,X,Y,Z,C], and whose the greatest are, int32, −1 for nobody.

    features: float[N,C]; held: as `points_of_cells` gives it. A cell without points has 0.
    """
    from qat.families.mmdet3d.ops._rois_kernel import pool

    features = np.ascontiguousarray(features, np.float32)
    pooled = np.zeros((*held.shape[:-1], features.shape[1]), np.float32)
    argmax = np.empty(pooled.shape, np.int32)
    pool(features, held, mean, pooled, argmax)
    return pooled, argmax


def sample_in_boxes(points: np.ndarray, boxes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` points in each box, from the first again where there are fewer: int64[T,count], and bool[T], in which
    boxes there is none (0 stands for their points)."""
    inside = points_in_boxes(points, boxes)
    at = np.zeros((len(boxes), count), np.int64)
    for row, column in zip(at, inside.T, strict=True):
        found = np.flatnonzero(column)[:count]
        if len(found):
            row[:] = np.resize(found, count)
    return at, ~inside.any(0)
