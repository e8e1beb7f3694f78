"""What a detector finds in one frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Detections:
    """Boxes in the lidar frame.

    boxes: float32[K,9] of x, y, z (metres; the box's middle), width, length, height (metres), yaw
    (radians), vx, vy (m/s). At yaw 0 the length lies along y; the box's heading, anticlockwise from x, is
    −yaw − π/2 (BEVFusion's LiDARInstance3DBoxes, that is mmdet3d before 1.0).
    BEVFusion calls z the bottom's and hands its boxes the annotated centre as such, so its head learns centre + h/2
    and its decode takes h/2 off again: what comes out, there and here, is the middle.
    scores: float32[K] in (0, 1). labels: int64[K] into the config's object_classes.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    @staticmethod
    def empty() -> Detections:
        """No boxes."""
        return Detections(np.zeros((0, 9), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
