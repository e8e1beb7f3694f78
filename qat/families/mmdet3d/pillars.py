"""From points to pillars to a bird's-eye grid, in numpy: what the host computes around a pillar detector's two graphs.

Follows PointPillars (Lang et al., CVPR 2019) as mmdet3d has it: hard voxelization, `PillarFeatureNet`'s features,
`PointPillarsScatter`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qat.families.mmdet3d.ops.voxels import grid_size, point_cells, voxelize

NOWHERE = -1  # the y and x of a row that stands for a cloud without points


def columns_of(decoration: Mapping[str, Any]) -> int:
    """How many features a point has after `decorate`."""
    own, cluster, centre, distance = (decoration[name] for name in ("columns", "cluster", "centre", "distance"))
    return int(own) + 3 * bool(cluster) + int(centre) + bool(distance)


def decorate(voxels: np.ndarray, counts: np.ndarray, cells: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """Features of the points of each pillar, as mmdet3d's `PillarFeatureNet` makes them; 0 where there is no point.

    Args:
        voxels: float32[N,P,C], 0 beyond the points. counts: int32[N], at least 1. cells: int32[N,3] of z, y, x.
        settings: "voxel" {size, range} in metres, and "decoration": columns C; cluster: the offset to the points' mean; centre: how
            many of x, y, z of the offset to the pillar's centre; distance: to the sensor; legacy: the offset to the centre stands in the place of x, y, z too.

    Returns:
        float32[N,P,`columns_of`].
    """
    how, size, low = settings["decoration"], settings["voxel"]["size"], settings["voxel"]["range"][:3]
    xyz = voxels[:, :, :3]
    parts = [voxels]
    if how["cluster"]:
        parts.append(xyz - xyz.sum(1, keepdims=True) / counts[:, None, None].astype(np.float32))
    if shown := how["centre"]:
        # Python's floats, as in mmdet3d: only the products are float32.
        offsets = [np.float32(s / 2 + start) for s, start in zip(size, low, strict=True)]
        middle = [
            cells[:, 2 - axis].astype(np.float32) * np.float32(size[axis]) + offsets[axis] for axis in range(shown)
        ]
        centred = xyz[:, :, :shown] - np.stack(middle, -1)[:, None]
        if how["legacy"]:
            parts[0] = np.concatenate([centred, voxels[:, :, shown:]], -1)
            xyz = parts[0][:, :, :3]
        parts.append(centred)
    if how["distance"]:
        parts.append(np.linalg.norm(xyz, axis=2, keepdims=True))
    features = np.concatenate(parts, -1, dtype=np.float32)
    features *= (np.arange(voxels.shape[1]) < counts[:, None])[:, :, None]
    return features


def voxels_of(points: np.ndarray, settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Voxels of one cloud, as mmdet3d's hard voxelization makes them.

    Args:
        points: float32[M,C]. settings: "voxel" {size, range, max_points, max_voxels} and "decoration".

    Returns:
        voxels float32[N,max_points,C], 0 beyond the points; cells int32[N,3] of z, y, x; points in each int32[N]; how many cells with
        points were left out, beyond max_voxels.
    """
    voxel = settings["voxel"]
    most = voxel["max_voxels"]
    if not len(points):
        empty = np.zeros((0, voxel["max_points"], settings["decoration"]["columns"]), np.float32)
        return empty, np.zeros((0, 3), np.int32), np.zeros(0, np.int32), 0
    voxels, cells, counts = voxelize(points, voxel["size"], voxel["range"], voxel["max_points"], most)
    left_out = 0
    if len(voxels) == most:
        there = point_cells(points, voxel["size"], voxel["range"])
        left_out = len(np.unique(there[there[:, 0] >= 0], axis=0)) - most
    return voxels, cells, counts, left_out


def pillars_of(points: np.ndarray, settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, int]:
    """Pillars of one cloud.

    Args:
        points: float32[M,C]. settings: as for `voxels_of` and `decorate`.

    Returns:
        features float32[N,P,·]; cells int32[N,3] of z, y, x; how many cells with points were left out, beyond max_voxels. A cloud
        without a point in the range gives one row of zeros whose cell is NOWHERE. P is one more than the fullest pillar's points, at
        most max_points: the encoder's maximum takes in an empty place of every pillar that is not full, and one is enough.
    """
    voxels, cells, counts, left_out = voxels_of(points, settings)
    if not len(voxels):
        shape = (1, 1, columns_of(settings["decoration"]))
        return np.zeros(shape, np.float32), np.full((1, 3), NOWHERE, np.int32), 0
    width = min(settings["voxel"]["max_points"], int(counts.max()) + 1)
    return decorate(voxels[:, :width], counts, cells, settings), cells, left_out


def batch_of_pillars(points: np.ndarray, settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, int]:
    """Pillars of several clouds. points: float32[M,1+C], the number of its cloud first; every number from 0 on occurs.

    Returns:
        as `pillars_of`, the cells int32[N,4] with the cloud's number first.
    """
    number = points[:, 0].astype(np.int64)
    features, cells, left_out = [], [], 0
    for n in range(int(number.max(initial=0)) + 1):
        found, at, more = pillars_of(points[number == n, 1:], settings)
        features.append(found)
        cells.append(np.concatenate([np.full((len(at), 1), n, np.int32), at], 1))
        left_out += more
    if len(features) == 1:
        return features[0], cells[0], left_out
    width = max(found.shape[1] for found in features)
    padded = [np.pad(found, ((0, 0), (0, width - found.shape[1]), (0, 0))) for found in features]
    return np.concatenate(padded), np.concatenate(cells), left_out


def grid_of(settings: Mapping[str, Any]) -> tuple[int, int]:
    """(ny, nx) of the bird's-eye grid."""
    nx, ny, _ = grid_size(settings["voxel"]["size"], settings["voxel"]["range"])
    return int(ny), int(nx)


def places(cells: Any, grid: Sequence[int]) -> tuple[Any, Any, int]:
    """Which rows of int[N,4] cells are somewhere, their place in the flattened grids of all clouds, and how many clouds there are;
    of numpy arrays or torch tensors."""
    inside = cells[:, 3] != NOWHERE
    there = cells[inside]
    flat = (there[:, 0] * grid[0] + there[:, 2]) * grid[1] + there[:, 3]
    return inside, flat, int(cells[-1, 0]) + 1


class Canvas:
    """A grid that is written again for every cloud: only where the last one had pillars is it emptied."""

    def __init__(self) -> None:
        self.values = np.zeros((0, 0), np.float32)
        self.filled = np.zeros(0, np.int64)

    def empty(self, shape: tuple[int, int], flat: np.ndarray) -> np.ndarray:
        """Zeros of a shape, of which the caller fills the columns `flat`."""
        if self.values.shape != shape:
            self.values = np.zeros(shape, np.float32)
        else:
            self.values[:, self.filled] = 0
        self.filled = flat
        return self.values


def scatter(features: np.ndarray, cells: np.ndarray, grid: Sequence[int], canvas: Canvas | None = None) -> np.ndarray:
    """Pillars on their grid. features: float32[N,1,C]; cells: int32[N,4]; grid: (ny, nx). Returns float32[B,C,ny,nx].

    canvas: its memory is what is returned, until the next call with it.
    """
    inside, flat, clouds = places(cells, grid)
    channels = features.shape[2]
    filled = (canvas or Canvas()).empty((channels, clouds * grid[0] * grid[1]), flat)
    filled[:, flat] = features[inside, 0].T
    return np.ascontiguousarray(filled.reshape(channels, clouds, *grid).swapaxes(0, 1))
