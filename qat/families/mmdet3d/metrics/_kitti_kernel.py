"""The compiled inner loops of KITTI's AP. Imported on first use: importing numba takes half a second.

A box's state: COUNTED takes part, IGNORED may be matched but counts neither as right nor as wrong, OTHER (a box of another class)
is not there. Rules: KITTI's object development kit, evaluate_object.cpp, as mmdet3d 1.4's kitti_utils/eval.py has them.
"""

from __future__ import annotations

import numba
import numpy as np

COUNTED, IGNORED, OTHER = 0, 1, -1


@numba.njit(cache=True, nogil=True)
def match(
    overlaps: np.ndarray,
    start: int,
    truth: np.ndarray,
    found: np.ndarray,
    scores: np.ndarray,
    least: float,
    threshold: float,
    by_score: bool,
) -> np.ndarray:
    """The detection of each of a frame's G objects, int64[G], −1 for none. Objects choose in their order; each detection is given once.

    Of the detections that score `threshold` or more and overlap it by more than `least`, an object takes the best by score, or else
    the counted one that overlaps it most, or where there is none the first that is ignored.

    overlaps: float64, from `start` on the frame's [D,G], row by row. truth int64[G], found int64[D]: states. scores: float64[D].
    """
    matched = np.empty(len(truth), np.int64)
    taken = np.zeros(len(found), np.int64)
    for g in range(len(truth)):
        best, most = -1, 0.0
        if truth[g] != OTHER:
            for d in range(len(found)):
                overlap = overlaps[start + d * len(truth) + g]
                if found[d] == OTHER or taken[d] == 1 or scores[d] < threshold or not overlap > least:
                    continue
                if by_score:
                    better = best < 0 or scores[d] > scores[best]
                else:
                    better = best < 0 or (found[d] == COUNTED and (found[best] == IGNORED or overlap > most))
                if better:
                    best, most = d, overlap
        matched[g] = best
        if best >= 0:
            taken[best] = 1
    return matched


@numba.njit(cache=True, nogil=True)
def true_scores(
    overlaps: np.ndarray,
    areas: np.ndarray,
    truth: np.ndarray,
    objects: np.ndarray,
    found: np.ndarray,
    detections: np.ndarray,
    scores: np.ndarray,
    least: float,
) -> np.ndarray:
    """Scores of the true positives when every detection counts.

    overlaps: float64, each frame's [D,G] flattened, one behind another; areas, objects, detections: where each frame's overlaps,
    objects and detections begin, int64[frames + 1]. truth, found, scores: as in `match`, of all frames.
    """
    kept = np.empty(len(truth))
    count = 0
    for i in range(len(objects) - 1):
        first, before = objects[i], detections[i]
        own = found[before : detections[i + 1]]
        with_scores = scores[before : detections[i + 1]]
        matched = match(overlaps, areas[i], truth[first : objects[i + 1]], own, with_scores, least, -np.inf, True)
        for k in range(len(matched)):
            if matched[k] >= 0 and truth[first + k] == COUNTED and own[matched[k]] == COUNTED:
                kept[count] = with_scores[matched[k]]
                count += 1
    return kept[:count]


@numba.njit(cache=True, nogil=True)
def count(
    overlaps: np.ndarray,
    areas: np.ndarray,
    truth: np.ndarray,
    objects: np.ndarray,
    found: np.ndarray,
    detections: np.ndarray,
    scores: np.ndarray,
    covered: np.ndarray,
    turns: np.ndarray,
    headings: np.ndarray,
    least: float,
    thresholds: np.ndarray,
) -> np.ndarray:
    """True positives, false positives and the true positives' similarity of orientation, float64[thresholds,3].

    Args: those of `true_scores`, and covered: float64[D], the share of each detection's image box inside a DontCare region, of
    which more than `least` makes it no false positive. turns, headings: alphas of objects and detections.
    """
    result = np.zeros((len(thresholds), 3))
    free = np.empty(len(found), np.int64)
    for i in range(len(objects) - 1):
        first, before, after = objects[i], detections[i], detections[i + 1]
        for t in range(len(thresholds)):
            own = truth[first : objects[i + 1]]
            matched = match(
                overlaps, areas[i], own, found[before:after], scores[before:after], least, thresholds[t], False
            )
            for d in range(before, after):
                free[d] = 1
            for k in range(len(matched)):
                d = before + matched[k]
                if matched[k] >= 0:
                    free[d] = 0
                    if own[k] == COUNTED and found[d] == COUNTED:
                        result[t, 0] += 1
                        result[t, 2] += (1 + np.cos(turns[first + k] - headings[d])) / 2
            for d in range(before, after):
                if free[d] == 1 and found[d] == COUNTED and scores[d] >= thresholds[t] and not covered[d] > least:
                    result[t, 1] += 1
    return result
