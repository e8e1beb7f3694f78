"""Whether a composed file computes what PyTorch does, and whether two sets of boxes are the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qat.boxes.detections import Detections
from qat.core.tensors import compare_tensors

EXACT = 1e-5  # of FP32: the largest difference of a tensor, divided by its largest value
GPU_EXACT = 1e-3  # on TensorRT, whose sums have another order
CLOSE, CLOSE_SCORE = 0.01, 1e-3  # metres, radians
FAR = 10.0  # metres: of a box that is further or larger, which random weights make, CLOSE grows in proportion


@dataclass(frozen=True)
class TensorCheck:
    """relative: the largest difference divided by the reference's largest value. sqnr_db: None for equal tensors."""

    name: str
    relative: float
    sqnr_db: float | None
    passed: bool


def compare(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], exact: float = EXACT
) -> list[TensorCheck]:
    """One check for each tensor of `expected`. exact: the largest relative difference.

    Raises:
        UserError: a value is not finite, or shapes differ.
    """
    checks = []
    for name, reference in expected.items():
        difference = compare_tensors(reference, found[name], name)
        largest = float(np.abs(reference.astype(np.float64)).max())
        apart = float(np.abs(found[name].astype(np.float64) - reference).max())
        relative = apart / largest if largest else apart
        db = None if not apart else float(difference["sqnr_db"])
        checks.append(TensorCheck(name, relative, db, relative <= exact))
    return checks


@dataclass(frozen=True)
class BoxCheck:
    """How boxes pair up with a reference's of the same class, the nearest first, within CLOSE and CLOSE_SCORE.

    found, expected: how many. alone: of either set, without a partner. max_box, max_score: the largest differences of partners.
    """

    found: int
    expected: int
    alone: int
    max_box: float
    max_score: float

    @property
    def same(self) -> bool:
        """Whether every box has its partner."""
        return self.alone == 0

    def described(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "same": self.same}


def compare_boxes(found: Detections, expected: Detections) -> BoxCheck:
    """Pairs two sets of boxes in the same convention, each box with one other."""
    free = np.ones(len(found), bool)
    boxes, scores, pairs = [0.0], [0.0], 0
    for n in range(len(expected)):
        apart = np.abs(found.boxes - expected.boxes[n])
        apart[:, 6] = np.abs((apart[:, 6] + np.pi) % (2 * np.pi) - np.pi)
        scale = max(1.0, float(np.abs(expected.boxes[n, :6]).max()) / FAR)
        far = np.maximum(np.delete(apart, 6, 1).max(1) / scale, apart[:, 6])
        score = np.abs(found.scores - expected.scores[n])
        fits = free & (found.labels == expected.labels[n]) & (far < CLOSE) & (score < CLOSE_SCORE)
        if not fits.any():
            continue
        place = int(np.where(fits, far, np.inf).argmin())
        free[place] = False
        pairs += 1
        boxes.append(float(far[place]))
        scores.append(float(score[place]))
    alone = len(found) + len(expected) - 2 * pairs
    return BoxCheck(len(found), len(expected), alone, max(boxes), max(scores))
