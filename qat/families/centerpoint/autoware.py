"""CenterPoint's two files for Autoware's lidar_centerpoint: what it can load, its parameter files, and its own decoding.

It takes tensors by their place, and boxes in the convention of mmdet3d before 1.0: `dim` is log(width, length, height), `rot` is
(sin, cos) of −heading − π/2. Its node adds the turn back. Read in autoware_universe's lidar_centerpoint (centerpoint_config.hpp,
postprocess_kernel.cu, ros_utils.cpp, ml_package.schema.json) and autoware_core's NMS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qat.boxes.detections import Detections
from qat.boxes.overlap import box_iou_rotated
from qat.core.errors import UserError
from qat.families.mmdet3d.pillars import columns_of, grid_of

LAYOUT = "autoware"
VERSION = "v4.1"  # of its bundle of parameter files
WIDTH, POINTS = 32, 32  # of a pillar: encoder_out_feature_size_, max_point_in_voxel_size_
MAPS = ["heatmap", "reg", "height", "dim", "rot", "vel"]
COLUMNS = {9: [0, 1, 2, 4], 10: [0, 1, 2, 4], 11: [0, 1, 2, 3, 4]}  # features of a point → x, y, z, (intensity,) age
LABELS = ("UNKNOWN", "CAR", "TRUCK", "BUS", "TRAILER", "MOTORCYCLE", "BICYCLE", "PEDESTRIAN")
NAMES = {"MOTORCYCLE": "MOTORBIKE"}  # as its parameter file spells the labels
LIMITS = (50.0, 90.0, 121.0, 200.0)  # metres: upper bounds of the distances that have thresholds of their own
ANY_DIRECTION = "PEDESTRIAN"  # whose yaw is not asked to be sure
SURE = 0.3  # of (sin, cos): below it a box is dropped
TYPES = {("fp32", "tensorrt"): "fp32", ("fp16", "tensorrt"): "fp16"}  # precision, flavour → trt_precision
STRONG = "strongly-typed"


def older(maps: Mapping[str, Any]) -> dict[str, Any]:
    """`dim` and `rot` of mmdet3d's convention in that from before 1.0, and back: it is its own inverse. Maps [B,·,ny,nx], numpy's
    or torch's: length and width change places; sin(−y − π/2) = −cos y, cos(−y − π/2) = −sin y."""
    found = dict(maps)
    if "dim" in maps:
        found["dim"] = maps["dim"][:, [1, 0, 2]]
    if "rot" in maps:
        found["rot"] = -maps["rot"][:, [1, 0]]
    return found


def check(settings: Mapping[str, Any], options: Any) -> None:
    """Raises `UserError` where Autoware's runtime cannot load such a model, by name.

    settings: a manifest's `pipeline` section. options: `qat.export.options.ExportOptions`.
    """

    def need(what: str, found: object, expected: object) -> None:
        if found != expected:
            raise UserError(
                f"layout {LAYOUT}: {what}: found {found}, expected {expected}, which is what its runtime takes"
            )

    decoration, voxel, head = settings["decoration"], settings["voxel"], settings["head"]
    need("channels of the encoder", settings["channels"], WIDTH)
    need("max_num_points", voxel["max_points"], POINTS)
    need("tasks", len(head["tasks"]), 1)
    need("maps of the head", head["maps"], MAPS)
    need("legacy of the encoder", decoration["legacy"], False)
    need("with_distance", decoration["distance"], False)
    need("with_cluster_center", decoration["cluster"], True)
    features = columns_of(decoration)
    if features not in COLUMNS:
        raise UserError(f"layout {LAYOUT}: features of a point: found {features}, expected one of 9, 10, 11")
    need(f"columns of a point with {features} features", settings["columns"], COLUMNS[features])
    need("norm_bbox", head["norm_bbox"], True)
    low, high = np.float32(voxel["range"]).reshape(2, 3)
    cells = ((high - low) / np.float32(voxel["size"])).astype(int)  # as its C++ does, in float32
    ny, nx = grid_of(settings)
    need("grid (x, y, z)", [nx, ny, 1], cells.tolist())
    if options.flavour == "tensorrt-strong":
        need("io", options.io, "fp32")
    elif (options.precision, options.flavour) not in TYPES:
        raise UserError(
            f"layout {LAYOUT}: found {options.precision} in flavour {options.flavour}, expected fp32 or fp16 in tensorrt, or "
            "tensorrt-strong, which INT8 needs: its builder sets one precision flag"
        )
    need("batch", (options.batch, options.dynamic_batch), (1, False))


def class_names(classes: Sequence[str]) -> list[str]:
    """Class names as its parameter file spells them; it publishes one that it does not know as UNKNOWN."""
    return [NAMES.get(name.upper(), name.upper()) for name in classes]


def parameter_files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """ml_package.param.yaml and detection_class_remapper.param.yaml of a folder's manifest. The remapper maps nothing."""
    import yaml

    settings = manifest["pipeline"]
    voxel, head = settings["voxel"], settings["head"]
    names = class_names(settings["classes"])
    thresholds = Thresholds.of(settings)
    strong = manifest["flavour"] == "tensorrt-strong"
    encoder, dense = "pts_voxel_encoder", "pts_backbone_neck_head"
    package = {
        "version": VERSION,
        "encoder_onnx_path": f"{encoder}.onnx",
        "encoder_engine_path": f"{encoder}.engine",
        "head_onnx_path": f"{dense}.onnx",
        "head_engine_path": f"{dense}.engine",
        "class_remapper_param_path": "detection_class_remapper.param.yaml",
        "trt_precision": STRONG if strong else TYPES[manifest["precision"], manifest["flavour"]],
        "model_params": {
            "class_names": names,
            "point_feature_size": len(settings["columns"]),
            "max_voxel_size": voxel["max_voxels"],
            "point_cloud_range": [float(value) for value in voxel["range"]],
            "voxel_size": [float(value) for value in voxel["size"]],
            "downsample_factor": head["stride"],
            "encoder_in_feature_size": columns_of(settings["decoration"]),
            "has_variance": False,
            "has_twist": True,
            "yaw_norm_thresholds": thresholds.yaw_norms.tolist(),
            "detection_score_thresholds": {
                "distance_bin_upper_limits": list(LIMITS),
                "min_confidence_scores": {name: thresholds.scores[:, n].tolist() for n, name in enumerate(names)},
            },
        },
    }
    nothing = len(LABELS) ** 2
    remapper = {
        "allow_remapping_by_area_matrix": [0] * nothing,
        "min_area_matrix": [0.0] * nothing,
        "max_area_matrix": [0.0] * nothing,
    }
    found = {"ml_package.param.yaml": package, "detection_class_remapper.param.yaml": remapper}
    return {
        name: yaml.safe_dump({"/**": {"ros__parameters": values}}, sort_keys=False, default_flow_style=None, width=100)
        for name, values in found.items()
    }


@dataclass(frozen=True)
class Thresholds:
    """Of Autoware's decoding: its centerpoint_common.param.yaml, and what a bundle's ml_package.param.yaml says of each class.

    circle: metres within which a better box removes another of any class. overlap, reach: then a box goes whose overlap seen from above
    with a better one within `reach` metres is larger. scores: float[len(limits), classes]. yaw_norms: float[classes], the least
    length of the (sin, cos) vector.
    """

    scores: np.ndarray
    yaw_norms: np.ndarray
    limits: Sequence[float] = LIMITS
    circle: float = 0.5
    overlap: float = 0.1
    reach: float = 10.0

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Thresholds:
        """Those that `parameter_files` writes."""
        names = class_names(settings["classes"])
        least = float(settings["head"]["bbox_coder"].get("score_threshold") or 0.0)
        norms = np.array([0.0 if name == ANY_DIRECTION else SURE for name in names])
        return Thresholds(np.full((len(LIMITS), len(names)), least), norms)


def decode(maps: Mapping[str, np.ndarray], settings: Mapping[str, Any], thresholds: Thresholds) -> Detections:
    """Boxes as Autoware's node publishes them: each cell's best class, no comparison with neighbouring cells.

    Args:
        maps: of one sample [1,·,ny,nx], in the older convention.
    """
    voxel, head = settings["voxel"], settings["head"]
    heat = maps["heatmap"][0]
    scores = 1.0 / (1.0 + np.exp(-heat.astype(np.float32)))
    label, score = scores.argmax(0), scores.max(0)
    ny, nx = label.shape
    yi, xi = np.mgrid[:ny, :nx]
    cell = np.float32(voxel["size"][:2]) * head["stride"]
    x = cell[0] * (xi + maps["reg"][0, 0]) + np.float32(voxel["range"][0])
    y = cell[1] * (yi + maps["reg"][0, 1]) + np.float32(voxel["range"][1])
    place = np.searchsorted(np.asarray(thresholds.limits), np.hypot(x, y), side="right")
    inside = place < len(thresholds.limits)
    least = thresholds.scores[np.minimum(place, len(thresholds.limits) - 1), label]
    rot, dim = maps["rot"][0], np.exp(maps["dim"][0])
    sure = np.hypot(rot[0], rot[1]) >= thresholds.yaw_norms[label]
    kept = inside & (score >= least) & (score > 0) & sure
    turn = -np.arctan2(rot[0], rot[1]) - np.pi / 2
    yaw = np.pi - np.mod(np.pi - turn, 2 * np.pi)
    columns = [x, y, maps["height"][0, 0], dim[1], dim[0], dim[2], yaw, maps["vel"][0, 0], maps["vel"][0, 1]]
    boxes = np.stack([column[kept] for column in columns], 1).astype(np.float32)
    score, label = score[kept], label[kept]
    order = np.argsort(-score, kind="stable")
    order = order[_circle(boxes[order, :2], thresholds.circle)]
    order = order[_overlap(boxes[order], thresholds.overlap, thresholds.reach)]
    return Detections(boxes[order], score[order].astype(np.float32), label[order].astype(np.int64), "autoware")


def _circle(centres: np.ndarray, distance: float) -> np.ndarray:
    """Which of float[K,2], best first, no better one that stays is nearer to than `distance`."""
    alive = np.ones(len(centres), bool)
    for n in range(len(centres)):
        if alive[n]:
            behind = slice(n + 1, None)
            alive[behind] &= ((centres[behind] - centres[n]) ** 2).sum(1) >= distance**2
    return np.flatnonzero(alive)


def _overlap(boxes: np.ndarray, threshold: float, reach: float) -> np.ndarray:
    """Which of the boxes, best first, overlap no better one by more than the threshold; one that was removed itself counts too."""
    seen = boxes[:, [0, 1, 3, 4, 6]]
    common = box_iou_rotated(seen, seen)
    near = ((boxes[:, None, :2] - boxes[None, :, :2]) ** 2).sum(2) <= reach**2
    better = np.tri(len(boxes), k=-1, dtype=bool)
    return np.flatnonzero(~((common > threshold) & near & better).any(1))
