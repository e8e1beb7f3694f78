"""Boxes from CenterHead's maps: decoding and non-maximum suppression, in numpy.

Follows CenterPoint (Yin et al., CVPR 2021) as BEVFusion has it: a head's maps are [1, c, nx, ny] with x first;
the box centre is (ix + reg_x, iy + reg_y) cells from the point-cloud range's lower corner; `height` is the z
of the box's middle plus half its height (see `Detections`); `dim` is log(width, length, height) when `norm_bbox`; `rot` is (sin yaw, cos yaw).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qat.boxes.conventions import OURS
from qat.boxes.detections import Detections
from qat.boxes.geometry import box_corners_bev

MAP_NAMES = ("reg", "height", "dim", "rot", "vel", "heatmap")


def maps_from_tensors(tensors: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Groups head outputs named `{map}_{task}` into one dict per task."""
    tasks: dict[int, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        stem, _, task = name.rpartition("_")
        tasks.setdefault(int(task), {})[stem] = value
    return [tasks[i] for i in sorted(tasks)]


def _descending(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest, largest first; equal scores in order of index."""
    if k < len(scores):
        top = np.argpartition(-scores, k - 1)[:k]
        floor = scores[top].min()
        top = np.flatnonzero(scores >= floor)
    else:
        top = np.arange(len(scores))
    return top[np.argsort(-scores[top], kind="stable")][:k]


def circle_nms(centres: np.ndarray, scores: np.ndarray, threshold: float, post_max_size: int) -> np.ndarray:
    """Keeps the best box of those whose squared centre distance is at most `threshold` m².

    (BEVFusion's `min_radius` is compared with the squared distance, as in CenterPoint's own code.)
    Returns the kept indices, best first.
    """
    order = np.argsort(-scores, kind="stable")
    alive = np.ones(len(order), bool)
    keep = []
    for i in range(len(order)):
        if not alive[i]:
            continue
        keep.append(order[i])
        distance = ((centres[order] - centres[order[i]]) ** 2).sum(1)
        alive &= distance > threshold
    return np.array(keep[:post_max_size], np.int64)


def rotated_nms(
    boxes: np.ndarray, scores: np.ndarray, threshold: float, pre_max_size: int, post_max_size: int
) -> np.ndarray:
    """Greedy suppression by BEV intersection over union above `threshold`; returns kept indices, best first.

    boxes: float[K,≥7].
    """
    from qat.boxes._nms_kernel import suppress

    order = np.argsort(-scores, kind="stable")[:pre_max_size]
    corners = box_corners_bev(boxes[order])
    areas = np.abs(boxes[order, 3].astype(np.float64) * boxes[order, 4])
    return order[suppress(corners, areas, threshold, post_max_size)]


def _decode_task(maps: Mapping[str, np.ndarray], head: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    coder = head["bbox_coder"]
    heat = maps["heatmap"][0]
    classes, _, ny = heat.shape
    scores = (1.0 / (1.0 + np.exp(-heat.astype(np.float32)))).reshape(classes, -1)
    count = int(coder["max_num"])
    candidates = [_descending(row, count) for row in scores]
    label = np.concatenate([np.full(len(c), i) for i, c in enumerate(candidates)])
    index = np.concatenate(candidates)
    score = scores[label, index]
    top = _descending(score, count)
    label, index, score = label[top], index[top], score[top]
    kept = score > (coder.get("score_threshold") or 0.0)  # null or 0: no threshold
    label, index, score = label[kept], index[kept], score[kept]

    def at(name: str) -> np.ndarray:
        value = maps[name][0]
        return value.reshape(len(value), -1)[:, index].T.astype(np.float32)

    cell = np.asarray(coder["voxel_size"][:2], np.float32) * coder["out_size_factor"]
    low = np.asarray(coder["pc_range"][:2], np.float32)
    grid = np.stack([index // ny, index % ny], 1).astype(np.float32)
    offset = at("reg") if "reg" in maps else np.float32(0.5)
    dim = np.exp(at("dim")) if head.get("norm_bbox", True) else at("dim")
    rot = at("rot")
    parts = [(grid + offset) * cell + low, at("height"), dim, np.arctan2(rot[:, 0], rot[:, 1])[:, None]]
    parts.append(at("vel") if "vel" in maps else np.zeros((len(index), 2), np.float32))
    boxes = np.concatenate(parts, 1).astype(np.float32)
    limits = np.asarray(coder["post_center_range"], np.float32)
    inside = (boxes[:, :3] >= limits[:3]).all(1) & (boxes[:, :3] <= limits[3:]).all(1)
    return boxes[inside], score[inside], label[inside].astype(np.int64)


Suppress = Callable[[np.ndarray, np.ndarray, float, int, int], np.ndarray]


def decode(
    maps: Sequence[Mapping[str, np.ndarray]],
    head: Mapping[str, Any],
    suppress: Suppress = rotated_nms,
    convention: str = OURS,
) -> Detections:
    """Boxes of one sample.

    Args:
        maps: a dict for each task: heatmap (logits) [1,classes,nx,ny], reg [1,2,…], height [1,1,…], dim [1,3,…],
            rot [1,2,…], vel [1,2,…].
        head: the config's `model.heads.object`.
        suppress: rotated suppression as `rotated_nms`, of boxes in the head's own convention. convention: that one.
    """
    test = head["test_cfg"]
    tasks = head["tasks"]
    nms_types = test["nms_type"] if isinstance(test["nms_type"], list) else [test["nms_type"]] * len(tasks)
    scales = test.get("nms_scale", 1.0)
    results = []
    first_label = 0
    for task, task_maps in enumerate(maps):
        boxes, scores, labels = _decode_task(task_maps, head)
        if nms_types[task] == "circle":
            keep = circle_nms(boxes[:, :2], scores, test["min_radius"][task], test["post_max_size"])
        else:  # BEVFusion's head applies test_cfg's threshold and limits only here, in addition to the coder's
            sure = np.flatnonzero(scores >= (test.get("score_threshold") or 0.0))
            scaled = boxes[sure].copy()
            scale = scales[task] if isinstance(scales, list) else [scales] * len(tasks[task])
            scaled[:, 3:5] *= np.asarray(scale, np.float32)[labels[sure]][:, None]
            keep = sure[suppress(scaled, scores[sure], test["nms_thr"], test["pre_max_size"], test["post_max_size"])]
            if limits := test.get("post_center_limit_range"):
                low, high = np.asarray(limits[:3], np.float32), np.asarray(limits[3:], np.float32)
                keep = keep[((boxes[keep, :3] >= low) & (boxes[keep, :3] <= high)).all(1)]
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep] + first_label
        boxes[:, 2] -= boxes[:, 5] * 0.5
        results.append((boxes, scores, labels))
        first_label += len(tasks[task])
    found, confidence, classes = (np.concatenate(part) for part in zip(*results, strict=True))
    return Detections(found, confidence, classes, convention)
