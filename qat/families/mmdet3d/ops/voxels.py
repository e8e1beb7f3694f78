"""From points to voxels, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qat.core.errors import UserError


def grid_size(voxel_size: Sequence[float], point_range: Sequence[float]) -> np.ndarray:
    """Cells along x, y and z: int64[3]. point_range: x, y, z from, then to; halves are rounded up, as C's round does."""
    size, low, high = _checked(voxel_size, point_range)
    return np.floor((high - low) / size + np.float32(0.5)).astype(np.int64)


def voxelize(
    points: np.ndarray, voxel_size: Sequence[float], point_range: Sequence[float], max_points: int, max_voxels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups a cloud's points by the cell of a grid that they fall into, as mmcv's deterministic hard_voxelize.

    Args:
        points: float32[N,≥3]: x, y, z (metres) and features. What is NaN or outside the range is left out.
        voxel_size: metres along x, y, z. point_range: x, y, z from, then to (exclusive).
        max_points: a voxel keeps its first points, up to this many.
        max_voxels: the first cells that points fall into become voxels, up to this many.

    Returns:
        voxels float32[V,max_points,C], zero where there is no point; coordinates int32[V,3] of z, y, x; points in each int32[V].

    Raises:
        UserError: points of another shape, a size or range that gives no grid, or a limit below 1.
    """
    from qat.families.mmdet3d.ops._voxels_kernel import fill

    if max_points < 1 or max_voxels < 1:
        raise UserError(f"max_points {max_points} and max_voxels {max_voxels}: expected at least 1 of each")
    points = np.ascontiguousarray(points, np.float32)
    cells = point_cells(points, voxel_size, point_range)
    most = min(max_voxels, len(points))
    voxels = np.zeros((most, max_points, points.shape[1]), np.float32)
    coords, counts = np.zeros((most, 3), np.int32), np.zeros(most, np.int32)
    total = fill(points, cells, grid_size(voxel_size, point_range), voxels, coords, counts)
    return voxels[:total], coords[:total], counts[:total]


def point_cells(points: np.ndarray, voxel_size: Sequence[float], point_range: Sequence[float]) -> np.ndarray:
    """Each point's cell: int32[N,3] of z, y, x, −1 three times for what is NaN or outside the range. points: float32[N,≥3]."""
    from qat.families.mmdet3d.ops._voxels_kernel import cells_of

    if points.ndim != 2 or points.shape[1] < 3:
        raise UserError(f"points of shape {list(points.shape)}: expected [N, 3 or more] of x, y, z and features")
    size, low, _ = _checked(voxel_size, point_range)
    cells = np.empty((len(points), 3), np.int32)
    cells_of(np.ascontiguousarray(points, np.float32), size, low, grid_size(voxel_size, point_range), cells)
    return cells


def _checked(voxel_size: Sequence[float], point_range: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size, bounds = np.asarray(voxel_size, np.float32), np.asarray(point_range, np.float32)
    if size.shape != (3,) or bounds.shape != (6,) or not ((size > 0).all() and (bounds[3:] > bounds[:3]).all()):
        raise UserError(
            f"voxel size {list(voxel_size)} in range {list(point_range)}: expected three positive sizes and x, y, z from, "
            "then x, y, z to, each above from"
        )
    return size, bounds[:3], bounds[3:]
