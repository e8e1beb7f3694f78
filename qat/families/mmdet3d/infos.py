"""mmdet3d's info files (version 1.1, of mmdet3d 1.x) of nuScenes-format data, real or generated: what its NuScenesDataset reads.

    from qat.families.mmdet3d.infos import write_nuscenes_infos
    write_nuscenes_infos("example-data", "example-data")  # nuscenes_infos_calib.pkl, nuscenes_infos_eval.pkl

The fields are those that mmdet3d's own converter writes (tools/dataset_converters, mmdet3d 1.4); paths are file names, which the
config's data_prefix completes (pts='samples/LIDAR_TOP', sweeps='sweeps/LIDAR_TOP', CAM_FRONT='samples/CAM_FRONT', …). An info file is a
pickle of plain dicts, lists, strings and numbers. KITTI's form: `qat.families.mmdet3d.kitti_form`.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.nuscenes import NuScenes

from qat.boxes.conventions import convert
from qat.boxes.geometry import box_corners
from qat.core.errors import UserError
from qat.core.files import atomic_path, data_path, read_json
from qat.core.progress import progress_bar
from qat.data.checks import FETCH, check_splits
from qat.data.dataset import MAX_SWEEPS, boxes_of, open_nuscenes, poses_of, sensor_of, split_tokens
from qat.data.tables import LIDAR

# mmdet3d's order of the ten classes, which its labels count in.
CLASSES = (
    "car",
    "truck",
    "trailer",
    "bus",
    "construction_vehicle",
    "bicycle",
    "motorcycle",
    "pedestrian",
    "traffic_cone",
    "barrier",
)
# mmdet3d's order of the attributes; its attr_label counts in it.
ATTRIBUTES = (
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.moving",
    "pedestrian.standing",
    "pedestrian.sitting_lying_down",
    "vehicle.moving",
    "vehicle.parked",
    "vehicle.stopped",
    "None",
)
LOAD_DIM = 5  # values a point in nuScenes' lidar files
NEAR = 0.1  # metres: what is nearer to a camera is cut off before it is projected
EDGES = [(a, b) for a in range(8) for b in range(a) if (a ^ b) in (1, 2, 4)]  # of a box whose corners count in binary


def splits_of(nusc: NuScenes, named: Sequence[str] | None = None) -> list[str]:
    """The splits to write: `named`, or those of the data's splits.json, or "all" where it has none."""
    if named:
        return list(named)
    path = Path(nusc.dataroot) / nusc.version / "splits.json"
    if not path.exists():
        return ["all"]
    check_splits(found := read_json(path), path)
    return [name for name, scenes in found.items() if scenes] or ["all"]


def cameras_of(nusc: NuScenes, sample: Mapping[str, Any]) -> list[str]:
    """A keyframe's camera channels, in the data set's order."""
    return [
        name for name in sample["data"] if nusc.get("sample_data", sample["data"][name])["sensor_modality"] == "camera"
    ]


def silhouette(corners: np.ndarray, cam2img: np.ndarray) -> Any:
    """A box's outline in the image, unclipped, as a shapely polygon: of what of it is in front of the camera.

    corners: float[8,3] in the camera's frame, in the order of their binary numbers (x, y, z low or high). cam2img: float[3,3].
    """
    from shapely.geometry import MultiPoint

    ahead = corners[:, 2] > NEAR
    points = [corners[ahead]]
    for a, b in EDGES:
        if ahead[a] != ahead[b]:
            share = (NEAR - corners[a, 2]) / (corners[b, 2] - corners[a, 2])
            points.append(corners[a : a + 1] + share * (corners[b : b + 1] - corners[a : a + 1]))
    pixels = np.concatenate(points) @ cam2img.T
    return MultiPoint(pixels[:, :2] / pixels[:, 2:]).convex_hull


def image_box(outline: Any, width: int, height: int) -> tuple[list[float] | None, float]:
    """Bounds (left, top, right, bottom) of what of an outline is inside the image, None if nothing is, and the share that is outside."""
    from shapely.geometry import Polygon, box

    inside = outline.intersection(box(0, 0, width, height))
    if not isinstance(inside, Polygon) or inside.is_empty:
        return None, 1.0
    return list(inside.bounds), max(0.0, 1 - inside.area / outline.area)


def _floats(matrix: np.ndarray) -> list[list[float]]:
    rows: list[list[float]] = matrix.astype(np.float64).tolist()
    return rows


def _camera_instances(
    boxes: np.ndarray,
    labels: np.ndarray,
    attributes: Sequence[int],
    lidar2cam: np.ndarray,
    cam2img: np.ndarray,
    size: tuple[int, int],
) -> list[dict[str, Any]]:
    """The objects that a camera sees, in its frame: x right, y down, z forward; boxes x, y, z of the middle, length, height, width, yaw.

    boxes: [K,9] in BEVFusion's convention.
    """
    found = []
    corners = box_corners(boxes)[
        :, [6, 7, 5, 4, 2, 3, 1, 0]
    ]  # front or rear, and so on, in the order of binary numbers
    corners = corners @ lidar2cam[:3, :3].T + lidar2cam[:3, 3]
    heading = convert(boxes, "bevfusion", "nuscenes")[:, 6]
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        centre = lidar2cam[:3, :3] @ box[:3] + lidar2cam[:3, 3]
        if centre[2] <= 0:
            continue
        bounds, _ = image_box(silhouette(corners[i], cam2img), *size)
        if bounds is None:
            continue
        forward = lidar2cam[:3, :3] @ [np.cos(heading[i]), np.sin(heading[i]), 0.0]
        velocity = lidar2cam[:3, :3] @ [*box[7:9], 0.0]
        pixel = cam2img @ centre
        found.append(
            {
                "bbox_label": int(label),
                "bbox_label_3d": int(label),
                "bbox": bounds,
                "bbox_3d_isvalid": True,
                "bbox_3d": [*map(float, [*centre, box[4], box[5], box[3], np.arctan2(-forward[2], forward[0])])],
                "velocity": [float(velocity[0]), float(velocity[2])],
                "center_2d": [float(pixel[0] / pixel[2]), float(pixel[1] / pixel[2])],
                "depth": float(centre[2]),
                "attr_label": int(attributes[i]),
            }
        )
    return found


def _attribute(nusc: NuScenes, annotation: Mapping[str, Any]) -> int:
    tokens = annotation.get("attribute_tokens")
    name = nusc.get("attribute", tokens[0])["name"] if tokens else "None"
    return ATTRIBUTES.index(name) if name in ATTRIBUTES else ATTRIBUTES.index("None")


def _size(record: Mapping[str, Any], where: str) -> tuple[int, int]:
    """A picture's width and height, as the table says."""
    found = record.get("width"), record.get("height")
    if not all(isinstance(value, int) and value > 0 for value in found):
        raise UserError(f"{where}: found width and height {found}, expected the picture's in pixels; {FETCH}")
    return int(record["width"]), int(record["height"])


def _sweeps(nusc: NuScenes, keyframe: Mapping[str, Any], global2lidar: np.ndarray) -> Iterator[dict[str, Any]]:
    record = keyframe
    for _ in range(MAX_SWEEPS):
        if not record["prev"]:
            return
        record = nusc.get("sample_data", record["prev"])
        lidar2ego, ego2global, _ = poses_of(nusc, record)
        data_path(nusc.dataroot, record["filename"], "sample_data.json")
        yield {
            "timestamp": record["timestamp"] / 1e6,
            "sample_data_token": record["token"],
            "ego2global": _floats(ego2global),
            "lidar_points": {
                "lidar_path": record["filename"],
                "lidar2ego": _floats(lidar2ego),
                "lidar2sensor": _floats(np.linalg.inv(global2lidar @ ego2global @ lidar2ego)),
            },
        }


def nuscenes_info(nusc: NuScenes, token: str, index: int) -> dict[str, Any]:
    """One keyframe's record. Reads tables alone, no pictures and no points.

    bbox_3d: x, y, z of the middle, length, width, height, yaw, in the lidar's frame. Objects of other than the ten classes are left
    out, velocities that nobody knows are 0 (NaN in mmdet3d's own files, whose reader makes them 0).

    Raises:
        UserError: the tables are incomplete or damaged.
    """
    sample = nusc.get("sample", token)
    lidar, lidar2ego, ego2global, _ = sensor_of(nusc, sample, LIDAR)
    data_path(nusc.dataroot, lidar["filename"], "sample_data.json")
    global2lidar = np.linalg.inv(ego2global @ lidar2ego)
    boxes, labels, annotations = boxes_of(nusc, sample, global2lidar, CLASSES)
    attributes = [_attribute(nusc, annotation) for annotation in annotations]
    images, camera_instances = {}, {}
    for name in cameras_of(nusc, sample):
        record, camera2ego, camera_ego2global, cam2img = sensor_of(nusc, sample, name)
        data_path(nusc.dataroot, record["filename"], "sample_data.json")
        lidar2cam = np.linalg.inv(global2lidar @ camera_ego2global @ camera2ego)  # through both ego poses
        images[name] = {
            "img_path": PurePosixPath(record["filename"]).name,
            "cam2img": _floats(cam2img),
            "cam2ego": _floats(camera2ego),
            "sample_data_token": record["token"],
            "timestamp": record["timestamp"] / 1e6,
            "lidar2cam": _floats(lidar2cam),
        }
        size = _size(record, f"{Path(nusc.dataroot) / nusc.version}/sample_data.json: {record['token']}")
        camera_instances[name] = _camera_instances(boxes, labels, attributes, lidar2cam, cam2img, size)
    written = convert(boxes, "bevfusion", "autoware")
    sweeps = list(_sweeps(nusc, lidar, global2lidar))
    return {
        "sample_idx": index,
        "token": token,
        "timestamp": sample["timestamp"] / 1e6,
        "ego2global": _floats(ego2global),
        "images": images,
        "lidar_points": {
            "num_pts_feats": LOAD_DIM,
            "lidar_path": PurePosixPath(lidar["filename"]).name,
            "lidar2ego": _floats(lidar2ego),
        },
        **({"lidar_sweeps": sweeps} if sweeps else {}),  # where the key is missing, mmdet3d pads with the keyframe
        "instances": [
            {
                "bbox_label": int(label),
                "bbox_label_3d": int(label),
                "bbox_3d": box[:7].tolist(),
                "velocity": box[7:9].tolist(),
                "num_lidar_pts": int(annotation["num_lidar_pts"]),
                "num_radar_pts": int(annotation.get("num_radar_pts", 0)),
                "bbox_3d_isvalid": annotation["num_lidar_pts"] + annotation.get("num_radar_pts", 0) > 0,
            }
            for box, label, annotation in zip(written, labels, annotations, strict=True)
        ],
        "cam_instances": camera_instances,
    }


def nuscenes_infos(nusc: NuScenes, split: str, quiet: bool = True) -> dict[str, Any]:
    """What the info file of a split holds: metainfo and data_list.

    Raises:
        UserError: as `nuscenes_info`, or there is no such split.
    """
    tokens = split_tokens(nusc, split)
    with progress_bar(f"infos of {split}", len(tokens), show=not quiet) as done:
        frames = []
        for index, token in enumerate(tokens):
            frames.append(nuscenes_info(nusc, token, index))
            done(index + 1)
    categories = {name: label for label, name in enumerate(CLASSES)}
    meta = {"categories": categories, "dataset": "nuscenes", "version": nusc.version, "info_version": "1.1"}
    return {"metainfo": meta, "data_list": frames}


def write_pickle(path: Path, value: Any) -> None:
    """Writes a pickle, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(pickle.dumps(value, protocol=4))


def write_nuscenes_infos(
    root: str | Path,
    out: str | Path,
    splits: Sequence[str] | None = None,
    version: str | None = None,
    quiet: bool = True,
) -> list[Path]:
    """Writes `nuscenes_infos_{split}.pkl` of each split into `out`: the data's own folder, or any other, whose files a config then
    names with their whole paths.

    Args:
        root: a nuScenes-format folder, which holds `<version>/`, `samples/` and `sweeps/`.
        splits: None for those of its splits.json.
        version: needed only where root holds several.

    Raises:
        UserError: no such data, version or split; damaged tables.
    """
    nusc = open_nuscenes(root, version)
    _check_known(nusc)
    paths = []
    for split in splits_of(nusc, splits):
        paths.append(Path(out) / f"nuscenes_infos_{split}.pkl")
        write_pickle(paths[-1], nuscenes_infos(nusc, split, quiet))
    return paths


def _check_known(nusc: NuScenes) -> None:
    if not any(category_to_detection_name(record["name"]) for record in nusc.category):
        raise UserError(
            f"{nusc.dataroot}: found no category of nuScenes' ten detection classes, expected some of {', '.join(CLASSES)}; name the "
            "classes so when you write the data (docs/own-data.md)"
        )
