"""nuScenes detection metrics of boxes in the lidar frame, computed by the official devkit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from nuscenes.eval.common import loaders
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.common.loaders import add_center_dist, filter_eval_boxes, load_gt_of_sample_tokens
from nuscenes.eval.detection.data_classes import DetectionBox
from nuscenes.eval.detection.evaluate import DetectionEval

from qat.boxes.detections import Detections
from qat.boxes.geometry import box_heading
from qat.core.errors import UserError

# The devkit draws a progress bar on stderr even with verbose=False, and even if stderr is not a terminal.
loaders.tqdm = SimpleNamespace(tqdm=lambda items, **_: items)

MOVING = 0.2  # m/s: the speed above which mmdet3d's evaluation calls an object moving
DEFAULT_ATTRIBUTE = {
    "car": "vehicle.parked",
    "pedestrian": "pedestrian.moving",
    "trailer": "vehicle.parked",
    "truck": "vehicle.parked",
    "bus": "vehicle.moving",
    "motorcycle": "cycle.without_rider",
    "construction_vehicle": "vehicle.parked",
    "bicycle": "cycle.without_rider",
    "barrier": "",
    "traffic_cone": "",
}


def attribute_of(name: str, speed: float) -> str:
    """The attribute that mmdet3d's nuScenes evaluation assigns to a class at a speed in m/s."""
    if speed > MOVING:
        if name in ("car", "construction_vehicle", "bus", "truck", "trailer"):
            return "vehicle.moving"
        if name in ("bicycle", "motorcycle"):
            return "cycle.with_rider"
        return DEFAULT_ATTRIBUTE[name]
    if name == "pedestrian":
        return "pedestrian.standing"
    if name == "bus":
        return "vehicle.stopped"
    return DEFAULT_ATTRIBUTE[name]


def ranges_of(nusc: Any) -> dict[str, float]:
    """Metres within which each class is scored: nuScenes', or those that T4 data names."""
    t4 = getattr(nusc, "t4", None)
    return {**config_factory("detection_cvpr_2019").class_range, **(t4.ranges if t4 is not None else {})}


class SampleEval(DetectionEval):
    """The devkit's DetectionEval over any set of samples.

    The devkit's constructor requires one of its splits and a result file; this one accepts samples and boxes and uses the
    same loading and filtering functions. `evaluate` is inherited.
    """

    def __init__(
        self, nusc: Any, predictions: EvalBoxes, tokens: list[str], classes: Sequence[str] | None = None
    ) -> None:
        self.nusc = nusc
        self.cfg = config_factory("detection_cvpr_2019")
        if classes is not None:
            self.cfg.class_names = list(classes)
        self.cfg.class_range = ranges_of(nusc)
        self.verbose = False
        truth = load_gt_of_sample_tokens(nusc, tokens, DetectionBox, verbose=False)
        predictions = add_center_dist(nusc, predictions)
        # The devkit reads the boxes' type from the first box; without boxes there is nothing to filter.
        self.pred_boxes = filter_eval_boxes(nusc, predictions, self.cfg.class_range) if predictions.all else predictions
        if not truth.all:
            raise UserError(
                f"{nusc.dataroot}: found no annotated objects of the ten classes in {len(tokens)} keyframes; "
                "choose an annotated split"
            )
        self.gt_boxes = filter_eval_boxes(nusc, add_center_dist(nusc, truth), self.cfg.class_range)
        self.sample_tokens = self.gt_boxes.sample_tokens


def to_global(
    token: str,
    detections: Detections,
    lidar2ego: np.ndarray,
    ego2global: np.ndarray,
    classes: list[str],
    limit: int = 500,
    ranges: Mapping[str, float] | None = None,
) -> list[DetectionBox]:
    """The devkit's boxes of one sample: in the global frame, within each class's range of the ego vehicle (as mmdet3d
    drops them before the devkit does), of these the best `limit` by score.

    lidar2ego, ego2global: float[4,4] at the keyframe's lidar time.
    """
    detections = detections.converted()
    lidar2global = ego2global.astype(np.float64) @ lidar2ego.astype(np.float64)
    rotation = lidar2global[:3, :3]
    headings = box_heading(detections.boxes[:, 6].astype(np.float64))
    boxes = []
    in_ego = detections.boxes[:, :3] @ lidar2ego[:3, :3].T + lidar2ego[:3, 3]
    ranges = config_factory("detection_cvpr_2019").class_range if ranges is None else ranges
    limits = np.array([ranges.get(name, np.inf) for name in classes])[detections.labels]
    near = np.flatnonzero(np.hypot(in_ego[:, 0], in_ego[:, 1]) < limits)
    for i in near[np.argsort(-detections.scores[near], kind="stable")][:limit]:
        x, y, z, width, length, height, _, vx, vy = detections.boxes[i].astype(np.float64)
        centre = rotation @ [x, y, z] + lidar2global[:3, 3]
        forward = rotation @ [np.cos(headings[i]), np.sin(headings[i]), 0.0]
        yaw = np.arctan2(forward[1], forward[0])
        velocity = rotation @ [vx, vy, 0.0]
        name = classes[int(detections.labels[i])]
        boxes.append(
            DetectionBox(
                sample_token=token,
                translation=tuple(centre),
                size=(width, length, height),
                rotation=(float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))),
                velocity=(velocity[0], velocity[1]),
                detection_name=name,
                detection_score=float(detections.scores[i]),
                attribute_name=attribute_of(name, float(np.hypot(vx, vy))),
            )
        )
    return boxes


def global_boxes(dataset: Any, detections: Mapping[str, Detections]) -> EvalBoxes:
    """The devkit's boxes of each sample (`to_global`), as they are submitted: before its own filtering.

    Args:
        dataset: a `qat.data.NuScenesDataset`, of which nusc and classes are used.
        detections: for each sample token, boxes in the keyframe's lidar frame.

    Raises:
        UserError: classes that nuScenes' metric does not define.
    """
    from qat.data.dataset import transform

    if others := [name for name in dataset.classes if name not in DEFAULT_ATTRIBUTE]:
        raise UserError(
            f"object_classes: found {', '.join(others)}, expected nuScenes' ten detection classes "
            f"({', '.join(DEFAULT_ATTRIBUTE)}), the only ones its metric defines; rename them in the config"
        )
    nusc = dataset.nusc
    predictions, ranges = EvalBoxes(), ranges_of(nusc)
    for token, found in detections.items():
        record = nusc.get("sample_data", nusc.get("sample", token)["data"]["LIDAR_TOP"])
        lidar2ego = transform(nusc.get("calibrated_sensor", record["calibrated_sensor_token"]))
        ego2global = transform(nusc.get("ego_pose", record["ego_pose_token"]))
        predictions.add_boxes(token, to_global(token, found, lidar2ego, ego2global, dataset.classes, ranges=ranges))
    return predictions


def sample_eval(dataset: Any, detections: Mapping[str, Detections]) -> SampleEval:
    """The devkit's evaluation of exactly the samples in `detections`, with both sides' boxes loaded and filtered.

    Args and errors: as `global_boxes`; a `UserError` too where nothing is annotated.
    """
    predictions, nusc = global_boxes(dataset, detections), dataset.nusc
    # nuScenes' score is of its ten classes whatever the model has; of T4 data it is of the model's.
    own = dataset.classes if getattr(nusc, "t4", None) is not None else None
    return SampleEval(nusc, predictions, list(detections), own)


def evaluate_detections(dataset: Any, detections: Mapping[str, Detections], more: bool = False) -> dict[str, Any]:
    """nuScenes metrics over exactly the samples in `detections`.

    Args:
        dataset: a `qat.data.NuScenesDataset`.
        detections: for each sample token, boxes in the keyframe's lidar frame.
        more: also the figures of `qat.evaluate.regions`.

    Returns:
        map, nds (0 to 1); per_class_ap {class: AP averaged over 0.5, 1, 2, 4 m}; tp_errors {ATE, ASE, AOE, AVE, AAE
        means}; per_class_tp_errors; samples.
    """
    from qat.evaluate.regions import more_figures  # which needs SampleEval

    evaluation = sample_eval(dataset, detections)
    metrics, _ = evaluation.evaluate()

    def finite(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    return {
        "map": min(float(metrics.mean_ap), 1.0),
        "nds": min(float(metrics.nd_score), 1.0),
        # The devkit's sums of recalls may exceed 1 by a rounding.
        "per_class_ap": {name: min(float(ap), 1.0) for name, ap in metrics.mean_dist_aps.items()},
        "tp_errors": {name: finite(value) for name, value in metrics.tp_errors.items()},
        "per_class_tp_errors": {
            name: {error: finite(metrics.get_label_tp(name, error)) for error in metrics.tp_errors}
            for name in metrics.mean_dist_aps
        },
        "samples": len(detections),
        **(more_figures(evaluation) if more else {}),
    }


def devkit_metric(dataset: Any) -> Callable[[Mapping[str, Detections]], dict[str, float]]:
    """A function that returns {"map", "nds"} of boxes by sample token: the calibration stage's metric."""

    def metric(detections: Mapping[str, Detections]) -> dict[str, float]:
        figures = evaluate_detections(dataset, detections)
        return {name: figures[name] for name in ("map", "nds")}

    return metric
