"""Boxes from an anchor head's maps, in numpy: mmdet3d's `Anchor3DHead.predict_by_feat`.

Anchors as `Anchor3DRangeGenerator` and `AlignedAnchor3DRangeGenerator` place them, offsets as `DeltaXYZWLHRBBoxCoder` (SECOND, Yan
et al., 2018), then non-maximum suppression for each class.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from qat.boxes.detections import Detections
from qat.boxes.overlap import nms_rotated, nms_upright

CONVENTION = "mmdet3d"


def _centres(low: float, high: float, cells: int, aligned: bool, corner: bool) -> np.ndarray:
    if not aligned:
        return np.linspace(low, high, cells, dtype=np.float32)
    edges = np.linspace(low, high, cells + 1, dtype=np.float32)
    return edges[:cells] + (np.float32(0) if corner else (edges[1] - edges[0]) / 2)


def anchors_of(generator: Mapping[str, Any], rows: int, columns: int) -> np.ndarray:
    """float32[rows·columns·sizes·rotations, 7 or more]: x, y, z of the bottom's middle, three sizes, yaw, and zeros for
    `custom_values`. generator: {ranges, sizes, rotations, scale, custom_values, size_per_range, aligned, align_corner}."""
    sizes = np.asarray(generator["sizes"], np.float32).reshape(-1, 3) * np.float32(generator["scale"])
    rotations = np.asarray(generator["rotations"], np.float32)
    ranges = generator["ranges"] * (len(sizes) if len(generator["ranges"]) == 1 and generator["size_per_range"] else 1)
    groups = [sizes[n : n + 1] for n in range(len(ranges))] if generator["size_per_range"] else [sizes]
    aligned, corner = generator["aligned"], generator["align_corner"]
    found = []
    for low_high, group in zip(ranges, groups, strict=True):
        x, y, z = (
            _centres(low_high[n], low_high[n + 3], cells, aligned, corner) for n, cells in enumerate((columns, rows, 1))
        )
        boxes = np.zeros((rows, columns, len(group), len(rotations), 7 + len(generator["custom_values"])), np.float32)
        boxes[..., 0] = x[None, :, None, None]
        boxes[..., 1] = y[:, None, None, None]
        boxes[..., 2] = z[0]
        boxes[..., 3:6] = group[None, None, :, None]
        boxes[..., 6] = rotations
        found.append(boxes)
    return np.concatenate(found, axis=2).reshape(-1, found[0].shape[-1])


def decode_offsets(anchors: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Boxes from anchors and the head's offsets, both float32[K,7 or more], like `DeltaXYZWLHRBBoxCoder`."""
    diagonal = np.sqrt(anchors[:, 3] ** 2 + anchors[:, 4] ** 2)[:, None]
    boxes = anchors + offsets  # yaw and velocities
    boxes[:, :2] = offsets[:, :2] * diagonal + anchors[:, :2]
    boxes[:, 3:6] = np.exp(offsets[:, 3:6]) * anchors[:, 3:6]
    middle = offsets[:, 2] * anchors[:, 5] + anchors[:, 2] + anchors[:, 5] / 2
    boxes[:, 2] = middle - boxes[:, 5] / 2
    return boxes


def _chosen_rows(values: np.ndarray, width: int, chosen: np.ndarray) -> np.ndarray:
    """Of a map [1,anchors·width,rows,columns] the rows of some anchors, float32[K,width]. chosen: places · anchors, the anchor last."""
    anchors = values.shape[1] // width
    found: np.ndarray = values[0].reshape(anchors, width, -1)[chosen % anchors, :, chosen // anchors]
    return found.astype(np.float32)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    found: np.ndarray = 1 / (1 + np.exp(-logits))
    return found


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Without the last column, the background's."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    found: np.ndarray = (powers / powers.sum(1, keepdims=True))[:, :-1]
    return found


def _best(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the largest values, the largest first, equal ones in their order."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -count)[-count]
    candidates = np.flatnonzero(values >= least)
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


class AnchorDecoder:
    """Decodes one detector's maps. head: the settings' `head` section."""

    def __init__(self, head: Mapping[str, Any]) -> None:
        self.head = head
        self.anchors = lru_cache(maxsize=4)(lambda rows, columns: anchors_of(head["anchors"], rows, columns))

    def __call__(self, cls_score: np.ndarray, bbox_pred: np.ndarray, dir_cls_pred: np.ndarray | None) -> Detections:
        """Boxes of one sample's maps: cls_score [1,anchors·classes,rows,columns], bbox_pred, dir_cls_pred (may be None)."""
        head, classes, code = self.head, self.head["classes"], 7 + len(self.head["anchors"]["custom_values"])
        anchors = cls_score.shape[1] // classes
        places = np.arange(anchors * cls_score[0, 0].size)
        if head["sigmoid"]:
            # Of each anchor's classes the best decides whether it is chosen: the others' scores are not needed before.
            ranks = _sigmoid(cls_score[0].reshape(anchors, classes, -1).max(1).T.ravel().astype(np.float32))
            chosen = _best(ranks, head["nms_pre"]) if 0 < head["nms_pre"] < len(places) else places
            scores = _sigmoid(_chosen_rows(cls_score, classes, chosen))
        else:
            scores = _softmax(_chosen_rows(cls_score, classes, places))
            chosen = _best(scores.max(1), head["nms_pre"]) if 0 < head["nms_pre"] < len(places) else places
            scores = scores[chosen]
        offsets = _chosen_rows(bbox_pred, code, chosen)
        direction = None if dir_cls_pred is None else _chosen_rows(dir_cls_pred, 2, chosen).argmax(1)
        boxes = decode_offsets(self.anchors(*cls_score.shape[-2:])[chosen], offsets)
        kept, labels = self._suppressed(boxes, scores)
        result, score = boxes[kept], scores[kept, labels]
        if len(kept) > head["max_num"]:
            best = np.argsort(-score, kind="stable")[: head["max_num"]]
            kept, labels, result, score = kept[best], labels[best], result[best], score[best]
        if direction is not None and len(kept):
            turned = result[:, 6] - np.float32(head["dir_offset"])
            half = turned - np.floor(turned / np.pi + head["dir_limit_offset"]) * np.pi
            result[:, 6] = half + head["dir_offset"] + np.pi * direction[kept]
        return Detections(result.astype(np.float32), score.astype(np.float32), labels, CONVENTION)

    def _suppressed(self, boxes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The kept boxes and their classes, class after class."""
        kept, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        flat = boxes[:, [0, 1, 3, 4, 6]]
        for label in range(scores.shape[1]):
            sure = np.flatnonzero(scores[:, label] > self.head["score_thr"])
            if self.head["rotate"]:
                best = nms_rotated(flat[sure], scores[sure, label], self.head["nms_thr"])
            else:
                half = flat[sure, 2:4] / 2
                upright = np.concatenate([flat[sure, :2] - half, flat[sure, :2] + half], 1)
                best = nms_upright(upright, scores[sure, label], self.head["nms_thr"])
            kept.append(sure[best])
            labels.append(np.full(len(best), label))
        return np.concatenate(kept), np.concatenate(labels)
