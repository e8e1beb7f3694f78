"""Detections of one frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qat.boxes.conventions import OURS, convert


@dataclass
class Detections:
    """Boxes in the lidar frame.

    boxes: float32[K,9] of x, y, z (metres), three sizes (metres), yaw (radians), vx, vy (m/s), or [K,7] of a model without
    velocities; as `convention` has them (`qat.boxes.conventions`). BEVFusion's: z is the box's middle, then width, length, height;
    at yaw 0 the length lies along y, and the heading, anticlockwise from x, is −yaw − π/2.
    BEVFusion calls z the bottom but passes the annotated centre as z, so its head learns centre + h/2
    and its decode subtracts h/2 again: the result, there and here, is the middle.
    scores: float32[K] in (0, 1). labels: int64[K] into the model's classes.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    convention: str = OURS

    def __len__(self) -> int:
        return len(self.scores)

    def chosen(self, rows: np.ndarray) -> Detections:
        """Some of the boxes. rows: bool[K], or indices."""
        return Detections(self.boxes[rows], self.scores[rows], self.labels[rows], self.convention)

    def converted(self, convention: str = OURS) -> Detections:
        """The same boxes in another convention, with velocities of 0 where there were none."""
        boxes = convert(self.boxes, self.convention, convention)
        if boxes.shape[1] < 9:
            boxes = np.pad(boxes, ((0, 0), (0, 9 - boxes.shape[1])))
        return Detections(boxes, self.scores, self.labels, convention)

    def arrays(self, suffix: str = "") -> dict[str, np.ndarray]:
        """Arrays for a cache, in the convention `OURS`: boxes, scores and labels, with `suffix` appended to each name."""
        own = self.converted()
        return {f"boxes{suffix}": own.boxes, f"scores{suffix}": own.scores, f"labels{suffix}": own.labels}

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray], suffix: str = "") -> Detections:
        """Detections from the result of `arrays`."""
        return Detections(arrays[f"boxes{suffix}"], arrays[f"scores{suffix}"], arrays[f"labels{suffix}"])

    @staticmethod
    def empty() -> Detections:
        """No boxes."""
        return Detections(np.zeros((0, 9), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
