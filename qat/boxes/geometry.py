"""Boxes in the lidar frame: headings and corners."""

from __future__ import annotations

from typing import Any

import numpy as np


def box_heading(yaw: np.ndarray) -> np.ndarray:
    """Heading in the lidar frame (radians, anticlockwise from x) of a box with BEVFusion's yaw: ψ = −yaw − π/2.

    BEVFusion's boxes (mmdet3d before 1.0) have their width along x and their length along y at yaw 0, and turn
    clockwise.
    """
    return -yaw - np.pi / 2


def box_yaw(heading: Any) -> Any:
    """BEVFusion's yaw of a box that faces `heading`: the inverse of `box_heading`, which is the same function."""
    return -heading - np.pi / 2


def box_corners_bev(boxes: np.ndarray) -> np.ndarray:
    """Corners of boxes seen from above, in order around the rectangle: float64[K,4,2].

    boxes: float[K,≥7] of (x, y, z, width, length, height, yaw).
    """
    heading = box_heading(boxes[:, 6].astype(np.float64))
    along = np.stack([np.cos(heading), np.sin(heading)], -1) * boxes[:, 4:5] / 2
    across = np.stack([-np.sin(heading), np.cos(heading)], -1) * boxes[:, 3:4] / 2
    centre = boxes[:, :2].astype(np.float64)
    return np.stack(
        [centre + along + across, centre + along - across, centre - along - across, centre - along + across], 1
    )


def box_corners(boxes: np.ndarray) -> np.ndarray:
    """All eight corners, float64[K,8,3]: the bottom face's four in order, front edge first, then the top face's."""
    bev = box_corners_bev(boxes)
    middle = np.concatenate([bev, np.broadcast_to(boxes[:, None, 2:3], (len(boxes), 4, 1))], -1)
    half = np.array([0, 0, 0.5]) * boxes[:, None, 5:6]
    bottom, top = middle - half, middle + half
    return np.concatenate([bottom, top], 1)
