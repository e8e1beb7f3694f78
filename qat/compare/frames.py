"""Data to draw the keyframes in which two rows agree least: pictures, and boxes projected into them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from qat.boxes.detections import Detections
from qat.boxes.geometry import box_corners, box_corners_bev
from qat.data import Sample

SCORES = 0.1, 0.4  # range of the boxes that are drawn and compared
NEAR = 2.0  # metres between the centres of one object's boxes
RANGE = 51.2  # metres, size of the bird's-eye view
QUALITY = 80  # JPEG
_CLOSEST = 0.3  # metres in front of the camera where edges are cut
_EDGES = (
    [(i, (i + 1) % 4) for i in range(4)] + [(4 + i, 4 + (i + 1) % 4) for i in range(4)] + [(i, i + 4) for i in range(4)]
)


@dataclass(frozen=True)
class Disagreement:
    """total: summed scores of unmatched boxes and summed differences of score of matched ones."""

    total: float
    only_reference: int
    only_candidate: int


def _above(found: Detections, least: float) -> Detections:
    return found.chosen(found.scores >= least)


def drawn_from(detections: Iterable[Detections], annotated: int) -> float:
    """The lowest score of boxes that are drawn, chosen so that there are as many boxes as annotated objects: pictures are
    neither empty nor crowded, whatever the detector's scores mean. Two digits, between 0.1 and 0.4."""
    scores = np.sort(np.concatenate([found.scores for found in detections]))[::-1]
    score = float(scores[annotated - 1]) if 0 < annotated <= len(scores) else 0.0
    return round(min(max(score, SCORES[0]), SCORES[1]), 2)


def disagreement(reference: Detections, candidate: Detections, least: float) -> Disagreement:
    """Matches boxes of one class within 2 m, best score first, and sums the scores of unmatched boxes and the differences of
    score of matched ones."""
    a, b = _above(reference, least), _above(candidate, least)
    free = np.ones(len(b), bool)
    total, unmatched = 0.0, 0
    for i in np.argsort(-a.scores, kind="stable"):
        distance = np.hypot(*(b.boxes[:, :2] - a.boxes[i, :2]).T)
        distance[~free | (b.labels != a.labels[i])] = np.inf
        if len(b) and distance.min() <= NEAR:
            match = int(distance.argmin())
            free[match] = False
            total += abs(float(a.scores[i] - b.scores[match]))
        else:
            unmatched += 1
            total += float(a.scores[i])
    return Disagreement(total + float(b.scores[free].sum()), unmatched, int(free.sum()))


def _cut(a: np.ndarray, b: np.ndarray, width: float, height: float) -> list[float] | None:
    """The part of a line inside the picture (Liang–Barsky), or None."""
    begin, end = 0.0, 1.0
    step = b - a
    for p, q in ((-step[0], a[0]), (step[0], width - a[0]), (-step[1], a[1]), (step[1], height - a[1])):
        if p == 0:
            if q < 0:
                return None
        elif p < 0:
            begin = max(begin, q / p)
        else:
            end = min(end, q / p)
    if begin >= end:
        return None
    return [round(float(v), 1) for v in (*(a + begin * step), *(a + end * step))]


def outlines(
    boxes: np.ndarray, lidar2image: np.ndarray, img_aug_matrix: np.ndarray, size: tuple[int, int]
) -> list[list[list[float]]]:
    """Each box's twelve edges in one picture.

    Args:
        boxes: float32[K,≥7] as in `Detections`.
        lidar2image, img_aug_matrix: float32[4,4], to native pixels and from there to the network's.
        size: width and height.

    Returns:
        for each box, [x1, y1, x2, y2] of the visible parts of edges.
    """
    corners = box_corners(boxes) @ lidar2image[:3, :3].T.astype(np.float64) + lidar2image[:3, 3]
    result = []
    for box in corners:
        lines = []
        for i, j in _EDGES:
            a, b = box[i], box[j]
            if max(a[2], b[2]) <= _CLOSEST:
                continue
            if min(a[2], b[2]) < _CLOSEST:
                t = (_CLOSEST - a[2]) / (b[2] - a[2])
                crossing = a + t * (b - a)
                a, b = (crossing, b) if a[2] < _CLOSEST else (a, crossing)
            ends = [img_aug_matrix[:2, :2] @ (point[:2] / point[2]) + img_aug_matrix[:2, 3] for point in (a, b)]
            if (piece := _cut(ends[0], ends[1], *size)) is not None:
                lines.append(piece)
        result.append(lines)
    return result


def picture_size(sample: Any) -> tuple[int, int]:
    """(width, height) of a sample's pictures, before normalisation; 0 without pictures."""
    return (sample.images.shape[2], sample.images.shape[1]) if len(sample.images) else (0, 0)


def _drawn(sample: Sample, found: Detections, classes: list[str], scored: bool) -> list[dict[str, Any]]:
    width, height = picture_size(sample)
    boxes: list[dict[str, Any]] = [
        {
            "label": classes[int(label)],
            "score": round(float(score), 3) if scored else None,
            "corners": np.round(corners, 2).tolist(),
            "outlines": {},
        }
        for label, score, corners in zip(found.labels, found.scores, box_corners_bev(found.boxes), strict=True)
    ]
    for n, camera in enumerate(sample.cameras):
        lines = outlines(found.boxes, sample.lidar2image[n], sample.img_aug_matrix[n], (width, height))
        for box, own in zip(boxes, lines, strict=True):
            if own:
                box["outlines"][camera] = own
    return boxes


def _jpeg(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def describe_frame(
    sample: Sample,
    reference: Detections,
    candidate: Detections,
    places: tuple[int, int],
    classes: list[str],
    least: float,
) -> dict[str, Any]:
    """results.json's entry of `frames` for one keyframe.

    Args:
        places: the two rows' indices in `rows`.
        classes: names by label.
        least: lowest score of boxes that are drawn.
    """
    width, height = picture_size(sample)
    differs = disagreement(reference, candidate, least)
    truth = Detections(sample.gt_boxes, np.ones(len(sample.gt_boxes), np.float32), sample.gt_labels)
    return {
        "token": sample.token,
        "reference": places[0],
        "candidate": places[1],
        "difference": round(differs.total, 4),
        "only_reference": differs.only_reference,
        "only_candidate": differs.only_candidate,
        "min_score": least,
        "range": RANGE,
        "image_size": [width, height],
        "cameras": [
            {"name": name, "jpeg": _jpeg(image)} for name, image in zip(sample.cameras, sample.images, strict=True)
        ],
        "boxes": {
            "truth": _drawn(sample, truth, classes, scored=False),
            "reference": _drawn(sample, _above(reference, least), classes, scored=True),
            "candidate": _drawn(sample, _above(candidate, least), classes, scored=True),
        },
    }
