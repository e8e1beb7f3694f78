"""Sampling, neighbours and containment of points, in numpy. Everything is computed in float32; of equals the first index wins."""

from __future__ import annotations

import numpy as np

from qat.core.errors import UserError


def furthest_point_sample(points: np.ndarray, count: int) -> np.ndarray:
    """Indices int32[count] of points spread over a cloud: point 0, then each time the one furthest from those picked.

    points: float[N,≥3], of which x, y, z count. Where count > N, points repeat. Raises UserError for an empty cloud.
    """
    from qat.families.mmdet3d.ops._points_kernel import furthest

    x, y, z = _columns(points)
    if len(x) == 0:
        raise UserError(f"an empty cloud: expected at least one point to sample {count} from")
    picked = np.empty(count, np.int32)
    furthest(x, y, z, picked)
    return picked


def furthest_point_sample_of_distances(distances: np.ndarray, count: int) -> np.ndarray:
    """The same by a table of distances: float[N,N]."""
    from qat.families.mmdet3d.ops._points_kernel import furthest_of_distances

    if distances.ndim != 2 or distances.shape[0] != distances.shape[1] or len(distances) == 0:
        raise UserError(f"distances of shape {list(distances.shape)}: expected [N, N] with at least one point")
    picked = np.empty(count, np.int32)
    furthest_of_distances(np.ascontiguousarray(distances, np.float32), picked)
    return picked


def ball_query(
    points: np.ndarray, centres: np.ndarray, max_radius: float, count: int, min_radius: float = 0.0
) -> np.ndarray:
    """Indices int32[M,count] of each centre's first points at a distance d with min_radius ≤ d < max_radius, or d = 0.

    points: float[N,≥3], centres: float[M,≥3], radii in metres. Fewer points: the first is repeated; none: 0.
    """
    from qat.families.mmdet3d.ops._points_kernel import balls

    low, high = squared_radii(min_radius, max_radius)
    near = np.zeros((len(centres), count), np.int32)
    x, y, z = _columns(points)
    balls(_coordinates(centres), x, y, z, low, high, near)
    return near


def squared_radii(min_radius: float, max_radius: float) -> tuple[np.float32, np.float32]:
    """Both squared in float32, as mmcv's kernels do."""
    low, high = np.float32(min_radius), np.float32(max_radius)
    return low * low, high * high


def nearest_points(points: np.ndarray, centres: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances float32[M,count] and indices int32[M,count] of the points nearest to each centre, nearest first.

    points: float[N,≥3], centres: float[M,≥3]. Where N < count the rest is 1e10 and index 0.
    """
    from qat.families.mmdet3d.ops._points_kernel import nearest

    distances, indices = np.empty((len(centres), count), np.float32), np.empty((len(centres), count), np.int32)
    nearest(_coordinates(centres), _coordinates(points), distances, indices)
    return distances, indices


def points_in_boxes(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Which points lie in which boxes: bool[M,T].

    points: float[M,≥3]. boxes: float[T,≥7] of x, y, z of the bottom's middle, sizes along the box's own x, y, z, and yaw
    (radians, from x towards y). A side face counts as outside, the bottom and the top as inside, as in mmcv.
    """
    from qat.families.mmdet3d.ops._points_kernel import inside

    out = np.empty((len(points), len(boxes)), np.bool_)
    inside(_coordinates(points), np.ascontiguousarray(boxes[:, :7], np.float32), out)
    return out


def _coordinates(points: np.ndarray) -> np.ndarray:
    if points.ndim != 2 or points.shape[1] < 3:
        raise UserError(f"points of shape {list(points.shape)}: expected [N, 3 or more] of x, y, z")
    return np.ascontiguousarray(points[:, :3], np.float32)


def _columns(points: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(_coordinates(points).T)
