"""Box conventions, and conversion between them.

All have x, y, z in metres, three sizes and a yaw, in the frame of the points; columns behind the seventh (velocities) are the same everywhere.

    name        sizes                   z       yaw
    bevfusion   width, length, height   middle  −heading − π/2, clockwise (BEVFusion's boxes: mmdet3d's before 1.0)
    mmdet3d     length, width, height   bottom  the heading, anticlockwise from x (LiDARInstance3DBoxes from 1.0 on)
    nuscenes    width, length, height   middle  the heading (the devkit's size and rotation)
    autoware    length, width, height   middle  the heading (x, y and z of a ROS object's dimensions)
    depth       along x, y, z at yaw 0  bottom  from x towards y (mmdet3d's DepthInstance3DBoxes, of indoor data)

"depth" and "mmdet3d" have the same columns in different frames: "depth" has x to the right and y forwards, "mmdet3d" x forwards
and y to the left. `convert` does not change the frame, so boxes stay where their points are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Convention:
    """length_first: sizes are length, width, height. bottom: z is that of the bottom. clockwise: yaw is −heading − π/2."""

    length_first: bool = False
    bottom: bool = False
    clockwise: bool = False


CONVENTIONS = {
    "bevfusion": Convention(clockwise=True),
    "mmdet3d": Convention(length_first=True, bottom=True),
    "nuscenes": Convention(),
    "autoware": Convention(length_first=True),
    "depth": Convention(length_first=True, bottom=True),
}
OURS = "bevfusion"  # the convention in which stages compare, score and draw


def convert(boxes: np.ndarray, source: str, target: str) -> np.ndarray:
    """Converts boxes [K,≥7] from one convention to another; keeps the dtype. Yaws that change are within (−π, π].

    Raises:
        KeyError: the convention does not exist.
    """
    a, b = CONVENTIONS[source], CONVENTIONS[target]
    found = boxes.copy()
    if a.length_first != b.length_first:
        found[:, [3, 4]] = boxes[:, [4, 3]]
    if a.bottom != b.bottom:
        found[:, 2] += boxes[:, 5] * (0.5 if a.bottom else -0.5)
    if a.clockwise != b.clockwise:  # its own inverse
        turned = -boxes[:, 6].astype(np.float64) - np.pi / 2
        found[:, 6] = np.pi - np.mod(np.pi - turned, 2 * np.pi)
    return found
