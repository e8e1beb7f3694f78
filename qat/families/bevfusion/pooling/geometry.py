"""Geometry of lift-splat, in numpy and float32, with BEVFusion's conventions.

Conventions (mmdet3d/models/vtransforms/base.py of mit-han-lab/bevfusion):

- The frustum's pixel grid spans the image from its first to its last pixel: linspace(0, W - 1, fW).
- A point falls into cell trunc((p - (bx - dx/2)) / dx), where bx is the first cell's centre: trunc, not floor, so
  points up to one cell below the lower bound land in cell 0, as they do in BEVFusion.
- A BEV grid is [C, nx, ny], x first. With nz > 1 the z cells are stacked along the channels: channel z·C + c.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qat.families.bevfusion.grid import Bound, cells, depth_count


def grid_size(xbound: Bound, ybound: Bound, zbound: Bound) -> tuple[int, int, int]:
    """Number of cells (nx, ny, nz). A bound is [lower, upper, step] in metres."""
    return cells(xbound), cells(ybound), cells(zbound)


def depth_bins(dbound: Bound) -> np.ndarray:
    """The D depths of `dbound` = [first, end, step] in metres, float32[D]."""
    return (dbound[0] + np.arange(depth_count(dbound)) * dbound[2]).astype(np.float32)


def create_frustum(image_size: Sequence[int], feature_size: Sequence[int], dbound: Bound) -> np.ndarray:
    """Pixel coordinates and depth of every frustum point: float32[D,fH,fW,3] as (u, v, metres)."""
    (height, width), (fh, fw) = image_size, feature_size
    depth = depth_bins(dbound)
    frustum = np.empty((len(depth), fh, fw, 3), np.float32)
    frustum[..., 0] = np.linspace(0, width - 1, fw, dtype=np.float32)
    frustum[..., 1] = np.linspace(0, height - 1, fh, dtype=np.float32)[:, None]
    frustum[..., 2] = depth[:, None, None]
    return frustum


def frustum_to_lidar(
    frustum: np.ndarray,
    camera_intrinsics: np.ndarray,
    camera2lidar: np.ndarray,
    img_aug_matrix: np.ndarray,
    lidar_aug_matrix: np.ndarray,
) -> np.ndarray:
    """Frustum points in the (augmented) lidar frame.

    Args:
        frustum: float32[D,fH,fW,3] of (u, v, depth) in the augmented image.
        camera_intrinsics, camera2lidar, img_aug_matrix: float32[N,4,4].
        lidar_aug_matrix: float32[4,4].

    Returns:
        float32[N,D,fH,fW,3] in metres.
    """
    # Imported here: code that needs no frustum should not load the compiled kernel.
    from qat.families.bevfusion.pooling._pattern_kernel import lift_points

    undo = np.linalg.inv(img_aug_matrix[:, :3, :3]).astype(np.float32)
    combine = camera2lidar[:, :3, :3] @ np.linalg.inv(camera_intrinsics[:, :3, :3])
    combine = (lidar_aug_matrix[:3, :3] @ combine).astype(np.float32)
    shift = (camera2lidar[:, :3, 3] @ lidar_aug_matrix[:3, :3].T + lidar_aug_matrix[:3, 3]).astype(np.float32)
    origin = np.ascontiguousarray(img_aug_matrix[:, :3, 3], np.float32)
    flat = np.ascontiguousarray(frustum, np.float32).reshape(-1, 3)
    out = np.empty((len(camera2lidar), *frustum.shape), np.float32)
    for n in range(len(camera2lidar)):
        lift_points(flat, origin[n], undo[n], combine[n], shift[n], out[n].reshape(-1, 3))
    return out


@dataclass(frozen=True)
class PoolPattern:
    """The fixed pattern of BEV pooling: which pixel and depth bin feed which cell, in order of cell.

    cell: int32[P], (z·nx + x)·ny + y, ascending. pixel: int32[P] into [N·fH·fW]. depth: int32[P] into the flat
    [N,D,fH,fW] depth weights. row_ptr: int32[nz·nx·ny + 1], where each cell's entries begin. shape: (nz, nx, ny).
    pixels: N·fH·fW. bins: D.
    """

    cell: np.ndarray
    pixel: np.ndarray
    depth: np.ndarray
    row_ptr: np.ndarray
    shape: tuple[int, int, int]
    pixels: int
    bins: int

    @cached_property
    def by_pixel(self) -> tuple[np.ndarray, np.ndarray]:
        """The transposed pattern, for gradients: row_ptr int32[pixels + 1] and the order int64[P] of entries."""
        order = np.argsort(self.pixel, kind="stable")
        return _row_pointers(np.bincount(self.pixel, minlength=self.pixels)), order


def _row_pointers(counts: np.ndarray) -> np.ndarray:
    pointers = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=pointers[1:])
    return pointers


def pooling_pattern(points: np.ndarray, xbound: Bound, ybound: Bound, zbound: Bound) -> PoolPattern:
    """Sorts frustum points into BEV cells; points outside the grid are dropped.

    Args:
        points: float32[N,D,fH,fW,3] in metres in the lidar frame.
    """
    from qat.families.bevfusion.pooling._pattern_kernel import cells_of_points, sort_by_cell

    n, d, fh, fw, _ = points.shape
    nx, ny, nz = grid_size(xbound, ybound, zbound)
    step = np.array([row[2] for row in (xbound, ybound, zbound)], np.float32)
    centre = np.array([row[0] + row[2] / 2.0 for row in (xbound, ybound, zbound)], np.float32)
    flat = np.ascontiguousarray(points, np.float32).reshape(-1, 3)
    # Allocated by numpy, not by the kernels: numpy requests large pages, which saves most of the page faults.
    cells, counts = np.empty(len(flat), np.int32), np.zeros(nx * ny * nz, np.int32)
    cells_of_points(flat, centre - step / np.float32(2.0), step, (nz, nx, ny), cells, counts)
    row_ptr = _row_pointers(counts)
    cell, pixel, depth = (np.empty(row_ptr[-1], np.int32) for _ in range(3))
    sort_by_cell(cells, row_ptr, (n, d, fh * fw), cell, pixel, depth)
    return PoolPattern(cell, pixel, depth, row_ptr, (nz, nx, ny), n * fh * fw, d)


def geometry_hash(*arrays: np.ndarray) -> str:
    """The cache key of everything that `pooling_pattern` depends on."""
    digest = hashlib.sha1(usedforsecurity=False)
    for array in arrays:
        digest.update(np.ascontiguousarray(array, np.float32).tobytes())
    return digest.hexdigest()
