"""Indoor mean average precision (SUN RGB-D, ScanNet) on the CPU, with mmdet3d 1.4's keys and values (indoor_eval).

Average precision is the area under the precision-recall curve (PASCAL VOC from 2010 on), as VoteNet evaluates it: Qi et al., "Deep
Hough Voting for 3D Object Detection in Point Clouds", ICCV 2019.

Boxes float[N,7] are as mmdet3d has them in depth coordinates (z up): x, y, z of the bottom's middle, sizes along their own x, y, z,
and yaw, anticlockwise. ScanNet's are axis-aligned, float[N,6] or with yaw 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qat.boxes.conventions import convert
from qat.boxes.overlap import common_areas
from qat.core.errors import UserError

THRESHOLDS = (0.25, 0.5)
LEAST_SIZE = 1e-4  # metres: smaller sizes seen from above count as this, as in mmdet3d


@dataclass(frozen=True)
class Boxes:
    """One scene's. boxes float[N,6 or 7], labels int[N], scores float[N] of detections."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None


def box_overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every box [N,6 or 7] with every box [M,6 or 7], float64[N,M]."""
    a, b = _with_yaw(a), _with_yaw(b)
    common = common_areas(_from_above(a), _from_above(b))
    tops = np.minimum((a[:, 2] + a[:, 5])[:, None], (b[:, 2] + b[:, 5])[None])
    common = common * (tops - np.maximum(a[:, None, 2], b[None, :, 2])).clip(0)
    whole = a[:, None, 3:6].prod(-1) + b[None, :, 3:6].prod(-1) - common
    return common / np.maximum(whole, 1e-8)


def _with_yaw(boxes: np.ndarray) -> np.ndarray:
    boxes = np.asarray(boxes, np.float64)
    return np.pad(boxes, ((0, 0), (0, 1))) if boxes.shape[1] == 6 else boxes[:, :7]


def _from_above(boxes: np.ndarray) -> np.ndarray:
    above = boxes[:, [0, 1, 3, 4, 6]]
    above[:, 2:4] = np.maximum(above[:, 2:4], LEAST_SIZE)
    return above


def truth_boxes(infos: Mapping[str, Any]) -> list[Boxes]:
    """The annotated objects of mmdet3d's SUN RGB-D or ScanNet infos, whose z is the middle's, one a record of its data_list.

    Raises:
        UserError: no data_list or instances in them, as in infos of another version.
    """
    try:
        found = []
        for record in infos["data_list"]:
            instances = record["instances"]
            width = len(instances[0]["bbox_3d"]) if instances else 7
            boxes = np.array([instance["bbox_3d"] for instance in instances], np.float32).reshape(-1, width)
            labels = np.array([instance["bbox_label_3d"] for instance in instances], np.int64)
            found.append(Boxes(convert(boxes, "autoware", "mmdet3d"), labels))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"infos: found no {error}, expected data_list[…].instances, as mmdet3d's infos of version 1.x have"
        ) from None
    return found


def average_precision(recall: np.ndarray, precision: np.ndarray) -> np.float32:
    """Area under the curve, each precision replaced by the best at its recall or a higher one. NaN in, NaN out."""
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1])
    return np.float32(((recall[steps + 1] - recall[steps]) * precision[steps + 1]).sum())


def _curves(
    truth: Mapping[int, np.ndarray], found: Mapping[int, tuple[np.ndarray, np.ndarray]], thresholds: Sequence[float]
) -> list[tuple[np.ndarray, np.floating]]:
    """For each threshold recalls, best score first, and AP, of one class. truth: boxes by scene; found: boxes and scores by scene."""
    scores, scenes, overlaps = [], [], []
    for scene, (boxes, own) in found.items():
        scores.append(own)
        scenes += [scene] * len(own)
        overlaps += list(box_overlaps(boxes, truth[scene]))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    objects = sum(len(boxes) for boxes in truth.values())
    results: list[tuple[np.ndarray, np.floating]] = []
    for least in thresholds:
        taken: set[tuple[int, int]] = set()
        right = np.zeros(len(order))
        for rank, i in enumerate(order):
            if not len(overlaps[i]):
                continue
            best = int(overlaps[i].argmax())
            if overlaps[i][best] > least and (scenes[i], best) not in taken:
                taken.add((scenes[i], best))
                right[rank] = 1
        hits = right.cumsum()
        with np.errstate(invalid="ignore"):  # a class that is never annotated has no recall: NaN, as mmdet3d has it
            recall = hits / np.float64(objects)
        results.append((recall, average_precision(recall, hits / np.arange(1, len(order) + 1))))
    return results


def indoor_eval(
    truth: Sequence[Boxes], found: Sequence[Boxes], classes: Sequence[str], thresholds: Sequence[float] = THRESHOLDS
) -> dict[str, float]:
    """mmdet3d's indoor_eval: `{class}_AP_0.25`, `{class}_rec_0.25`, `mAP_0.25`, `mAR_0.25` and so on for each threshold, 0 to 1.

    A class that is neither annotated nor found is left out, of one that is not found AP and recall are 0; one that is found and
    nowhere annotated is NaN, and the means with it. Equal scores keep their order (mmdet3d's order among them is arbitrary).

    Args:
        truth, found: of each scene, in the same order.
        classes: names of the labels.
        thresholds: of intersection over union, which a true positive exceeds.

    Raises:
        UserError: no scenes, or not as many on both sides; arrays that do not fit each other; NaN or infinity; labels beyond classes.
    """
    _check(truth, found, classes)
    annotated: dict[int, dict[int, np.ndarray]] = {}
    detected: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for scene, (real, own) in enumerate(zip(truth, found, strict=True)):
        assert own.scores is not None
        for label in dict.fromkeys(map(int, [*own.labels, *real.labels])):
            annotated.setdefault(label, {})[scene] = real.boxes[real.labels == label]
            if (mine := own.labels == label).any():
                detected.setdefault(label, {})[scene] = own.boxes[mine], own.scores[mine]
    nothing: list[tuple[np.ndarray, np.floating]] = [(np.zeros(1), np.float64(0))] * len(thresholds)
    curves = {
        label: _curves(boxes, detected[label], thresholds) if label in detected else nothing
        for label, boxes in annotated.items()
    }
    result = {}
    for i, least in enumerate(thresholds):
        for label, of_class in curves.items():
            result[f"{classes[label]}_AP_{least:.2f}"] = float(of_class[i][1])
            result[f"{classes[label]}_rec_{least:.2f}"] = float(of_class[i][0][-1])
        for key, values in (
            ("mAP", [c[i][1] for c in curves.values()]),
            ("mAR", [c[i][0][-1] for c in curves.values()]),
        ):
            result[f"{key}_{least:.2f}"] = float(np.mean(values)) if values else float("nan")
    return result


def _check(truth: Sequence[Boxes], found: Sequence[Boxes], classes: Sequence[str]) -> None:
    if not truth or len(truth) != len(found):
        raise UserError(
            f"indoor mAP: found {len(found)} scenes of detections for {len(truth)} of ground truth, expected one for each; give empty "
            "arrays for a scene without detections"
        )
    for side, all_boxes in (("ground truth", truth), ("detections", found)):
        for i, own in enumerate(all_boxes):
            where = f"indoor mAP: {side} of scene {i}"
            scores = own.scores if side == "detections" else np.zeros(len(own.labels))
            if own.boxes.ndim != 2 or own.boxes.shape[1] not in (6, 7):
                raise UserError(
                    f"{where}: found boxes of shape {list(own.boxes.shape)}, expected [N,7], or [N,6] without yaw"
                )
            if scores is None or not len(own.boxes) == len(own.labels) == len(scores):
                counts = f"{len(own.boxes)} boxes, {len(own.labels)} labels, {'no' if scores is None else len(scores)} scores"
                raise UserError(f"{where}: found {counts}, expected as many of each")
            if not (np.isfinite(own.boxes).all() and np.isfinite(scores).all()):
                raise UserError(
                    f"{where}: found NaN or infinity, expected finite boxes and scores; look at the detector's outputs"
                )
            if len(own.labels) and not (own.labels.min() >= 0 and own.labels.max() < len(classes)):
                raise UserError(
                    f"{where}: found labels {own.labels.min()} to {own.labels.max()}, expected 0 to {len(classes) - 1}: {len(classes)} classes"
                )
