"""Figures beside the devkit's, of the same boxes: mAP by overlap, and by distance from the car."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from nuscenes.eval.common.data_classes import EvalBoxes
from pyquaternion import Quaternion

from qat.boxes.overlap import common_areas
from qat.evaluate.detection import SampleEval

RINGS = (0.0, 20.0, 40.0, np.inf)  # metres from the car; classes are scored up to their own range
OVERLAP = 0.5


def overlap_figures(evaluation: SampleEval) -> dict[str, Any]:
    """Of an evaluation with its boxes loaded and filtered:

    map_iou50: the mean over classes that occur of the area under the precision-recall curve (PASCAL VOC from 2010 on), where a box is
    right if its intersection over union in 3D with an object is 0.5 or more. boxes_per_frame: after the filtering by range.
    """
    found = [_average_precision(evaluation, name) for name in evaluation.cfg.class_names]
    present = [value for value in found if value is not None]
    return {
        "map_iou50": float(np.mean(present)) if present else None,
        "boxes_per_frame": len(evaluation.pred_boxes.all) / max(len(evaluation.sample_tokens), 1),
    }


def distance_figures(evaluation: SampleEval) -> dict[str, float | None]:
    """mAP of objects and boxes within each of RINGS, None where no object is; classes without objects there are not counted."""
    found: dict[str, float | None] = {}
    for low, high in pairwise(RINGS):
        ring = copy.copy(evaluation)
        ring.gt_boxes, ring.pred_boxes = (
            _within(boxes, low, high) for boxes in (evaluation.gt_boxes, evaluation.pred_boxes)
        )
        there = {box.detection_name for box in ring.gt_boxes.all}
        name = f"{low:.0f}–{high:.0f} m" if np.isfinite(high) else f"over {low:.0f} m"
        found[name] = None
        if there:
            ring.cfg = copy.copy(evaluation.cfg)
            ring.cfg.class_names = [own for own in evaluation.cfg.class_names if own in there]
            found[name] = min(float(ring.evaluate()[0].mean_ap), 1.0)
    return found


def _within(boxes: EvalBoxes, low: float, high: float) -> EvalBoxes:
    kept = EvalBoxes()
    for token in boxes.sample_tokens:
        kept.add_boxes(token, [box for box in boxes[token] if low <= box.ego_dist < high])
    return kept


def _rows(boxes: Any) -> np.ndarray:
    """x, y, z of the middle, length, width, height, yaw: float64[K,7]."""
    rows = []
    for box in boxes:
        width, length, height = box.size
        forward = Quaternion(box.rotation).rotation_matrix[:, 0]
        rows.append([*box.translation, length, width, height, np.arctan2(forward[1], forward[0])])
    return np.array(rows, np.float64).reshape(-1, 7)


def iou_3d(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of upright boxes [N,7] and [M,7] of x, y, z (of the middle), sizes along their own axes and yaw."""
    common = common_areas(a[:, [0, 1, 3, 4, 6]], b[:, [0, 1, 3, 4, 6]])
    tops = np.minimum((a[:, 2] + a[:, 5] / 2)[:, None], (b[:, 2] + b[:, 5] / 2)[None])
    bottoms = np.maximum((a[:, 2] - a[:, 5] / 2)[:, None], (b[:, 2] - b[:, 5] / 2)[None])
    volume = common * (tops - bottoms).clip(0)
    whole = a[:, None, 3:6].prod(-1) + b[None, :, 3:6].prod(-1) - volume
    return volume / np.maximum(whole, 1e-9)


def _average_precision(evaluation: SampleEval, name: str) -> float | None:
    scores: list[float] = []
    right: list[bool] = []
    objects = 0
    for token in evaluation.sample_tokens:
        truth = _rows([box for box in evaluation.gt_boxes[token] if box.detection_name == name])
        own = [box for box in evaluation.pred_boxes[token] if box.detection_name == name]
        own.sort(key=lambda box: -box.detection_score)
        objects += len(truth)
        overlaps = iou_3d(_rows(own), truth)
        for row, box in zip(overlaps, own, strict=True):
            best = int(row.argmax()) if len(row) else -1
            hit = best >= 0 and row[best] >= OVERLAP
            if hit:
                overlaps[:, best] = 0  # an object is found once
            scores.append(box.detection_score)
            right.append(hit)
    if not objects:
        return None
    order = np.argsort(-np.array(scores), kind="stable")
    hits = np.cumsum(np.array(right, bool)[order])
    recall = np.concatenate([[0.0], hits / objects])
    precision = np.concatenate([[0.0], hits / np.arange(1, len(hits) + 1)])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(((recall[1:] - recall[:-1]) * envelope[1:]).sum())


def more_figures(evaluation: SampleEval) -> Mapping[str, Any]:
    """`overlap_figures`, and "by_distance"."""
    return {**overlap_figures(evaluation), "by_distance": distance_figures(evaluation)}
