"""The interval of a difference in KITTI's AP: a paired bootstrap over blocks of frames.

Frames that follow each other show the same objects, so blocks of them are drawn, not frames (Koehn, "Statistical Significance Tests for
Machine Translation Evaluation", EMNLP 2004, has the paired bootstrap). Which detection finds which object is settled within a frame and at
a score, so each frame is counted once at every score at which a draw may read precision; a draw adds up its frames' counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qat.core.errors import UserError
from qat.families.mmdet3d.metrics.kitti import (
    DIFFICULTIES,
    LEAST,
    POINTS,
    Anno,
    AveragePrecision,
    detection_states,
    overlaps_of,
    score_thresholds,
    truth_states,
)

MIN_BLOCKS = 2  # with one block every draw is that block, so the bounds would claim certainty


class Counted:
    """One class's true and false positives in each frame, of 3D boxes or of boxes from above, by the strict overlap.

    kind: "3d" or "bev".
    """

    def __init__(
        self, truth: Sequence[Anno], found: Sequence[Anno], name: str, kind: str = "3d", difficulty: str = "moderate"
    ) -> None:
        from qat.families.mmdet3d.metrics._kitti_kernel import count, true_scores

        level, least = DIFFICULTIES.index(difficulty), LEAST[name][kind][0]
        frames = []
        for own, boxes in zip(truth, found, strict=True):
            overlaps = np.asarray(overlaps_of(kind, boxes, own), np.float64).ravel()
            states = (
                truth_states(own, name, level).astype(np.int64),
                detection_states(boxes, name, level).astype(np.int64),
            )
            whole = [np.array([0, len(part)], np.int64) for part in (overlaps, *states)]
            score = np.asarray(boxes["score"], np.float64)
            frames.append((overlaps, whole[0], states[0], whole[1], states[1], whole[2], score))
        self.objects = np.array([int((frame[2] == 0).sum()) for frame in frames])
        scores = [true_scores(*frame, least) for frame in frames]
        self.order = np.argsort(-np.concatenate(scores), kind="stable")
        self.scores = np.concatenate(scores)[self.order]
        self.frame = np.repeat(np.arange(len(frames)), [len(own) for own in scores])[self.order]
        self.at = np.unique(self.scores)
        self.counts = np.zeros((len(self.at), len(frames), 2))
        for i, (frame, own, boxes) in enumerate(zip(frames, truth, found, strict=True)):
            none = np.zeros(len(frame[6]))
            angles = np.asarray(own["alpha"], np.float64), np.asarray(boxes["alpha"], np.float64)
            self.counts[:, i] = count(*frame, none, *angles, least, self.at)[:, :2]

    def ap40(self, times: np.ndarray) -> float:
        """AP40 in percent, with each frame taken times[frame] times. int[frames]."""
        objects = int(self.objects @ times)
        scores = np.repeat(self.scores, times[self.frame])
        if not objects or not len(scores):
            return 0.0
        thresholds = score_thresholds(scores, objects)
        right, wrong = np.einsum("tfc,f->ct", self.counts[np.searchsorted(self.at, thresholds)], times.astype(float))
        curve = np.zeros(POINTS)
        curve[: len(thresholds)] = np.maximum.accumulate((right / (right + wrong))[::-1])[::-1]
        return float(AveragePrecision.of(curve).ap40)


def resample(rows: Mapping[str, Counted], block: int, resamples: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    """AP40 of each row on all frames, then on each draw, with replacement, of as many blocks of `block` frames as there are; the same
    draws for all: {row: float64[1 + resamples]}.

    Raises:
        UserError: fewer than two blocks.
    """
    frames = len(next(iter(rows.values())).objects)
    blocks = -(-frames // block)
    if blocks < MIN_BLOCKS:
        raise UserError(
            f"found {blocks} block of {block} frames, expected at least {MIN_BLOCKS} to resample; take more frames"
        )
    draws = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=resamples)
    times = np.repeat(np.concatenate([np.ones((1, blocks), draws.dtype), draws]), block, axis=1)[:, :frames]
    return {name: np.array([row.ap40(own) for own in times]) for name, row in rows.items()}


def interval(candidate: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """The difference of two of `resample`'s rows and the bounds of 95 % of its draws."""
    change = candidate - reference
    low, high = np.percentile(change[1:], [2.5, 97.5])
    return float(change[0]), float(low), float(high)
