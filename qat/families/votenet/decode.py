"""Boxes from the head's predictions, in numpy: mmdet3d's `PartialBinBasedBBoxCoder` and `VoteHead.predict_by_feat`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qat.boxes.detections import Detections
from qat.families.mmdet3d.ops.points import points_in_boxes

CONVENTION = "depth"
LEAST_POINTS = 5  # a box with at most this many points is empty


def split(
    cls_preds: np.ndarray, reg_preds: np.ndarray, base: np.ndarray, coder: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The predictions by mmdet3d's names.

    Args:
        cls_preds: float32[B,2+classes,P]. reg_preds: float32[B,3+2·bins+4·sizes,P]. base: float32[B,P,3], the proposals' places.
        coder: {bins, mean_sizes, rotated}.

    Returns:
        float32[B,P,…]: obj_scores, sem_scores (logits); center (metres); dir_class, dir_res_norm, dir_res (radians); size_class,
        size_res_norm, size_res (metres).
    """
    bins, sizes = coder["bins"], np.asarray(coder["mean_sizes"], np.float32)
    count = len(sizes)
    scores, values = (np.ascontiguousarray(x.swapaxes(1, 2), np.float32) for x in (cls_preds, reg_preds))
    ends = np.cumsum([3, bins, bins, count])
    offset, dir_class, dir_res, size_class, size_res = np.split(values, ends, axis=-1)
    size_res = size_res.reshape(*size_res.shape[:2], count, 3)
    return {
        "obj_scores": scores[..., :2],
        "sem_scores": scores[..., 2:],
        "center": base + offset,
        "dir_class": dir_class,
        "dir_res_norm": dir_res,
        "dir_res": dir_res * np.float32(np.pi / bins),
        "size_class": size_class,
        "size_res_norm": size_res,
        "size_res": size_res * sizes,
    }


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last dimension."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def boxes_of(found: Mapping[str, np.ndarray], coder: Mapping[str, Any]) -> np.ndarray:
    """Boxes of one sample's `split` predictions (without the batch): float32[P,7] of x, y, z of the bottom's middle, three sizes, yaw."""
    rows = np.arange(len(found["center"]))
    yaw = np.zeros(len(rows), np.float32)
    if coder["rotated"]:
        bin_ = found["dir_class"].argmax(-1)
        yaw = bin_.astype(np.float32) * np.float32(2 * np.pi / coder["bins"]) + found["dir_res"][rows, bin_]
        yaw = np.where(yaw > np.float32(np.pi), yaw - np.float32(2 * np.pi), yaw)
    kind = found["size_class"].argmax(-1)
    size = np.asarray(coder["mean_sizes"], np.float32)[kind] + found["size_res"][rows, kind]
    boxes = np.concatenate([found["center"], size, yaw[:, None]], 1, dtype=np.float32)
    boxes[:, 2] -= boxes[:, 5] * np.float32(0.5)
    return boxes


def upright_hulls(boxes: np.ndarray) -> np.ndarray:
    """The smallest axis-aligned boxes around boxes float32[P,7]: float32[P,6], least x, y, z, then greatest."""
    signs = np.array([[-0.5, -0.5], [-0.5, 0.5], [0.5, 0.5], [0.5, -0.5]], np.float32)
    corners = boxes[:, None, 3:5] * signs
    cos, sin = np.cos(boxes[:, 6:7]), np.sin(boxes[:, 6:7])
    x = corners[..., 0] * cos - corners[..., 1] * sin + boxes[:, 0:1]
    y = corners[..., 0] * sin + corners[..., 1] * cos + boxes[:, 1:2]
    z = np.stack([boxes[:, 2], boxes[:, 2] + boxes[:, 5]], 1)
    axes = (x, y, z)
    return np.stack([a.min(1) for a in axes] + [a.max(1) for a in axes], 1)


def aligned_nms(hulls: np.ndarray, scores: np.ndarray, classes: np.ndarray, threshold: float) -> np.ndarray:
    """Greedy suppression of axis-aligned boxes float32[K,6] within each class: kept indices, best first.

    For equal scores the first wins. Any other box of its class suppresses a box without volume, as in mmdet3d's
    `aligned_3d_nms`.
    """
    low, high = hulls[:, :3], hulls[:, 3:]
    volume = (high - low).prod(1)
    order = np.argsort(-scores, kind="stable")
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        common = np.clip(np.minimum(high[best], high[rest]) - np.maximum(low[best], low[rest]), 0, None).prod(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            overlap = common / (volume[best] + volume[rest] - common) * (classes[rest] == classes[best])
        order = rest[overlap <= threshold]
    return np.array(kept, np.int64)


def detections(
    cls_preds: np.ndarray, reg_preds: np.ndarray, base: np.ndarray, cloud: np.ndarray, head: Mapping[str, Any]
) -> Detections:
    """Boxes of one sample in mmdet3d's order: with `per_class` every kept box is there once for each class.

    Args:
        cls_preds, reg_preds, base: as `split`, B = 1. cloud: float32[1,N,≥3]: a box with few points in it is dropped.
        head: {coder, nms_thr, score_thr, per_class}.
    """
    found = {name: value[0] for name, value in split(cls_preds, reg_preds, base, head["coder"]).items()}
    sure, classes = softmax(found["obj_scores"])[:, -1], softmax(found["sem_scores"])
    boxes, label = boxes_of(found, head["coder"]), classes.argmax(-1)
    full = np.flatnonzero(points_in_boxes(cloud[0], boxes).sum(0) > LEAST_POINTS)
    best = full[aligned_nms(upright_hulls(boxes[full]), sure[full], label[full], head["nms_thr"])]
    chosen = np.sort(best[sure[best] > head["score_thr"]])
    if not head["per_class"]:
        return Detections(boxes[chosen], sure[chosen], label[chosen].astype(np.int64), CONVENTION)
    count = classes.shape[-1]
    scores = (sure[chosen, None] * classes[chosen]).T
    labels = np.repeat(np.arange(count, dtype=np.int64), len(chosen))
    return Detections(np.tile(boxes[chosen], (count, 1)), scores.reshape(-1), labels, CONVENTION)
