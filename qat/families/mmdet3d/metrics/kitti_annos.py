"""Boxes as KITTI's metric takes them (annos, `qat.families.mmdet3d.metrics.kitti`): from detections, and from mmdet3d's infos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qat.boxes.detections import Detections
from qat.core.errors import UserError
from qat.families.mmdet3d.metrics.kitti import DONT_CARE, TYPES, kitti_eval

LIMITS = (
    0.0,
    -40.0,
    -3.0,
    70.4,
    40.0,
    0.0,
)  # KittiMetric's pcd_limit_range: boxes whose bottom's middle is outside are left out
CAMERA = "CAM2"


def within_turn(angle: np.ndarray) -> np.ndarray:
    """Angles in [−π, π), of the same dtype."""
    turn = angle.dtype.type(2 * np.pi)
    return angle - np.floor(angle / turn + angle.dtype.type(0.5)) * turn


def lidar_to_camera(boxes: np.ndarray, lidar2cam: np.ndarray) -> np.ndarray:
    """mmdet3d's lidar boxes [K,≥7] as its camera boxes [K,7]: x, y, z of the bottom's middle, length, height, width, rotation_y.

    As mmdet3d (and KITTI's tools before it) has it, the yaw becomes −yaw − π/2 whatever the rotation in lidar2cam is: of a camera
    that does not look along the lidar's x, rotation_y is off by as much, and so it is for the boxes that a detector learned from.
    """
    centre = boxes[:, :3] @ lidar2cam[:3, :3].T + lidar2cam[:3, 3]
    yaw = within_turn(-boxes[:, 6:7] - boxes.dtype.type(np.pi / 2))
    return np.concatenate([centre, boxes[:, [3, 5, 4]], yaw], 1).astype(boxes.dtype, copy=False)


def camera_to_lidar(boxes: np.ndarray, lidar2cam: np.ndarray) -> np.ndarray:
    """The inverse of `lidar_to_camera`, yaws in [−π, π)."""
    back = np.linalg.inv(lidar2cam.astype(np.float64)).astype(boxes.dtype)
    return lidar_to_camera(boxes, back)  # both ways the middle sizes change places and the yaw is −yaw − π/2


def camera_corners(boxes: np.ndarray) -> np.ndarray:
    """The eight corners [K,8,3] of camera boxes [K,7]: x right, y down, z forward; rotation_y turns x away from z."""
    unit = np.array([(x, y, z) for x in (-0.5, 0.5) for y in (-1.0, 0.0) for z in (-0.5, 0.5)], boxes.dtype)
    x, y, z = np.moveaxis(unit[None] * boxes[:, None, 3:6], -1, 0)
    cos, sin = np.cos(boxes[:, 6:7]), np.sin(boxes[:, 6:7])
    return np.stack([cos * x + sin * z, y, cos * z - sin * x], -1) + boxes[:, None, :3]


def project(points: np.ndarray, cam2img: np.ndarray) -> np.ndarray:
    """Pixels [...,2] of points [...,3] in the camera's frame; those behind the camera are mirrored, as in mmdet3d.

    cam2img: [3,3], [3,4] or [4,4].
    """
    matrix = np.eye(4, dtype=points.dtype)
    matrix[: cam2img.shape[0], : cam2img.shape[1]] = cam2img
    seen = points @ matrix[:3, :3].T + matrix[:3, 3]
    return seen[..., :2] / seen[..., 2:]


def empty_anno() -> dict[str, np.ndarray]:
    """Of a frame without boxes."""
    anno = {key: np.zeros(0) for key in ("truncated", "occluded", "alpha", "rotation_y", "score")}
    return {
        "name": np.zeros(0, "<U1"),
        **anno,
        **{key: np.zeros((0, n)) for key, n in (("bbox", 4), ("dimensions", 3), ("location", 3))},
    }


def detection_anno(
    found: Detections,
    info: Mapping[str, Any],
    classes: Sequence[str],
    camera: str = CAMERA,
    limits: Sequence[float] = LIMITS,
) -> dict[str, np.ndarray]:
    """A frame's detections as an anno, as mmdet3d's KittiMetric (bbox2result_kitti) converts them, in float32.

    Boxes that project outside the image, or lie outside `limits`, are left out; image boxes are the corners' bounds, clipped.

    Args:
        found: boxes in the lidar's frame, labels into `classes`.
        info: the frame's record in mmdet3d's infos; images[camera]'s lidar2cam, cam2img, height and width are used.
        classes: KITTI's names of the labels.
        limits: lowest and highest x, y, z in the lidar's frame, of the middle of a box's bottom.

    Raises:
        UserError: the info has no such camera or calibration.
    """
    try:
        image = info["images"][camera]
        lidar2cam, cam2img = (np.asarray(image[key], np.float32) for key in ("lidar2cam", "cam2img"))
        width, height = int(image["width"]), int(image["height"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"infos: sample {info.get('sample_idx')}: found no {error} of {camera}, expected lidar2cam, cam2img, height and width, as "
            "mmdet3d's KITTI infos have"
        ) from None
    lidar = found.converted("mmdet3d").boxes[:, :7].astype(np.float32)
    lidar[:, 6] = within_turn(lidar[:, 6])
    boxes = lidar_to_camera(lidar, lidar2cam)
    pixels = project(camera_corners(boxes), cam2img)
    bbox = np.concatenate([pixels.min(1), pixels.max(1)], 1)
    low, high = np.asarray(limits[:3], np.float32), np.asarray(limits[3:], np.float32)
    seen = (bbox[:, 0] < width) & (bbox[:, 1] < height) & (bbox[:, 2:] > 0).all(1)
    kept = seen & ((lidar[:, :3] > low) & (lidar[:, :3] < high)).all(1)
    if not kept.any():
        return empty_anno()
    lidar, boxes, bbox = lidar[kept], boxes[kept], bbox[kept]
    bbox = np.concatenate([np.maximum(bbox[:, :2], 0), np.minimum(bbox[:, 2:], [width, height])], 1).astype(np.float32)
    return {
        "name": np.array([classes[label] for label in found.labels[kept]]),
        "truncated": np.zeros(len(boxes)),
        "occluded": np.zeros(len(boxes), np.int64),
        "alpha": boxes[:, 6] - np.arctan2(-lidar[:, 1], lidar[:, 0]),
        "bbox": bbox,
        "dimensions": boxes[:, 3:6],
        "location": boxes[:, :3],
        "rotation_y": boxes[:, 6],
        "score": found.scores[kept].astype(np.float32),
    }


def truth_annos(infos: Mapping[str, Any]) -> list[dict[str, np.ndarray]]:
    """The annotated objects of mmdet3d's KITTI infos (version 2, of 1.x) as annos, one a record of its data_list.

    Raises:
        UserError: no metainfo.categories or no instances, as in infos of another version, of a test split or of a demo.
    """
    try:
        names = {label: name for name, label in infos["metainfo"]["categories"].items()}
        frames = [record["instances"] for record in infos["data_list"]]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"infos: found no {error}, expected metainfo.categories and data_list[…].instances, as mmdet3d's KITTI infos of version 1.x have"
        ) from None
    annos = []
    for instances in frames:
        anno = empty_anno()
        if instances:
            boxes = np.array([instance["bbox_3d"] for instance in instances], np.float64)
            anno = {
                "name": np.array([names.get(instance["bbox_label"], DONT_CARE) for instance in instances]),
                **{
                    key: np.array([i[key] for i in instances])
                    for key in ("truncated", "occluded", "alpha", "bbox", "score")
                },
                "location": boxes[:, :3],
                "dimensions": boxes[:, 3:6],
                "rotation_y": boxes[:, 6],
            }
        annos.append(anno)
    return annos


def kitti_metric(
    infos: Mapping[str, Any],
    found: Sequence[Detections],
    classes: Sequence[str],
    types: Sequence[str] = tuple(TYPES),
    camera: str = CAMERA,
    limits: Sequence[float] = LIMITS,
) -> tuple[str, dict[str, float]]:
    """mmdet3d's KittiMetric of lidar detections: `kitti_eval`'s text, and its values with that metric's keys
    (`pred_instances_3d/KITTI/Car_3D_AP40_moderate_strict`) and rounding (four digits).

    Args:
        found: of every frame of `infos`, in their order. classes: the detector's, of KITTI's three.

    Raises:
        UserError: as `truth_annos`, `detection_anno` and `average_precision`.
    """
    truth = truth_annos(infos)
    if len(found) != len(truth):
        raise UserError(
            f"KITTI AP: found detections of {len(found)} frames, the infos have {len(truth)}; give one for each"
        )
    annos = [
        detection_anno(own, record, classes, camera, limits)
        for own, record in zip(found, infos["data_list"], strict=True)
    ]
    text, values = kitti_eval(truth, annos, classes, types)
    return text, {f"pred_instances_3d/{key}": round(value, 4) for key, value in values.items()}
