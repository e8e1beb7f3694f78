"""Writes nuScenes-format data, real or generated, in KITTI's form with mmdet3d's info files: what its KittiDataset reads.

    from qat.families.mmdet3d.kitti_form import write_kitti
    write_kitti("example-data", "data/kitti")

    training/velodyne          float32 x, y, z, reflectance of the whole revolution
    training/velodyne_reduced  the same, of what the camera sees (what mmdet3d's configs read)
    training/image_2, calib, label_2; ImageSets/{split}.txt; kitti_infos_{split}.pkl; recipe.json of generated data

KITTI's velodyne has x forward, nuScenes' lidar to the right: points are turned about z until x points where the camera looks, so that
mmdet3d's yaw = −rotation_y − π/2 holds. One camera stands for all four. Formats: KITTI's object development kit, readme.txt, and
mmdet3d 1.4's tools/dataset_converters.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nuscenes.nuscenes import NuScenes
from PIL import Image

from qat.boxes.conventions import convert
from qat.core.errors import UserError
from qat.core.files import atomic_directory, data_path, read_json, write_json
from qat.core.preprocess import load_image
from qat.core.progress import progress_bar
from qat.data.checks import check_intrinsics
from qat.data.dataset import boxes_of, open_nuscenes, sensor_of, split_tokens
from qat.data.points import read_points
from qat.data.synth import SynthOptions, generate
from qat.data.tables import LIDAR
from qat.families.mmdet3d.infos import CLASSES, LOAD_DIM, image_box, silhouette, splits_of, write_pickle
from qat.families.mmdet3d.metrics.kitti import ABOVE_HEIGHT, DONT_CARE, MOST_OCCLUDED, MOST_TRUNCATED, NO_ALPHA
from qat.families.mmdet3d.metrics.kitti_annos import CAMERA, camera_corners, lidar_to_camera
from qat.families.mmdet3d.ops.points import points_in_boxes

CATEGORIES = ("Pedestrian", "Cyclist", "Car", "Van", "Truck", "Person_sitting", "Tram", "Misc")  # in mmdet3d's order
# nuScenes' classes in KITTI's words; KITTI annotates neither cones nor barriers.
NAMES = {
    "car": "Car",
    "truck": "Truck",
    "bus": "Misc",
    "trailer": "Misc",
    "construction_vehicle": "Misc",
    "bicycle": "Cyclist",
    "motorcycle": "Cyclist",
    "pedestrian": "Pedestrian",
}
OCCLUDED = {
    "1": 2,
    "2": 2,
    "3": 1,
    "4": 0,
}  # nuScenes' visibility (0–40 %, –60, –80, –100) as KITTI's degree of occlusion
DIGITS = 4  # of a label's numbers behind the point: KITTI has 2
RECIPE = "recipe.json"
INTENSITY = 255.0  # nuScenes' largest; KITTI's reflectance is 0 to 1


def _turn(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.eye(4)
    matrix[:2, :2] = [[cos, -sin], [sin, cos]]
    return matrix


def difficulty(height: float, occluded: int, truncated: float) -> int:
    """KITTI's: 0 easy, 1 moderate, 2 hard, −1 none of them. height: the image box's, in pixels."""
    for level, limits in enumerate(zip(ABOVE_HEIGHT, MOST_OCCLUDED, MOST_TRUNCATED, strict=True)):
        if height > limits[0] and occluded <= limits[1] and truncated <= limits[2]:
            return level
    return -1


class _Frame:
    """One keyframe in KITTI's form."""

    def __init__(self, nusc: NuScenes, token: str, camera: str) -> None:
        sample = nusc.get("sample", token)
        lidar, lidar2ego, ego2global, _ = sensor_of(nusc, sample, LIDAR)
        record, camera2ego, camera_ego2global, intrinsic = sensor_of(nusc, sample, camera)
        global2lidar = np.linalg.inv(ego2global @ lidar2ego)
        camera2lidar = global2lidar @ camera_ego2global @ camera2ego
        lidar2velodyne = _turn(-np.arctan2(camera2lidar[1, 2], camera2lidar[0, 2]))
        self.lidar2cam = np.linalg.inv(lidar2velodyne @ camera2lidar)
        self.imu2velodyne = lidar2velodyne @ np.linalg.inv(lidar2ego)
        self.cam2img = np.eye(4)
        self.cam2img[:3, :3] = intrinsic
        picture = data_path(nusc.dataroot, record["filename"], "sample_data.json")
        self.image = load_image(picture)
        self.height, self.width = self.image.shape[:2]
        check_intrinsics(intrinsic, self.width, self.height, f"{picture}: calibrated_sensor.json")
        points = read_points(data_path(nusc.dataroot, lidar["filename"], "sample_data.json"), LOAD_DIM)
        turned = points[:, :3] @ lidar2velodyne[:3, :3].T.astype(np.float32)
        self.points = np.concatenate([turned, points[:, 3:4] / np.float32(INTENSITY)], 1)
        self.seen = self._in_image(self.points)
        boxes, labels, annotations = boxes_of(nusc, sample, lidar2velodyne @ global2lidar, CLASSES)
        boxes = convert(boxes, "bevfusion", "mmdet3d")[:, :7]
        kept = np.array([CLASSES[label] in NAMES for label in labels], bool)
        names = [NAMES[CLASSES[label]] for label in labels[kept]]
        self.objects = self._labelled(boxes[kept], names, [annotations[i] for i in np.flatnonzero(kept)])

    def _in_image(self, points: np.ndarray) -> np.ndarray:
        local = points[:, :3] @ self.lidar2cam[:3, :3].T + self.lidar2cam[:3, 3]
        pixels = local @ self.cam2img[:3, :3].T
        ahead = local[:, 2] > 0
        pixels = pixels[:, :2] / np.where(ahead, pixels[:, 2], 1)[:, None]
        return ahead & ((pixels >= 0) & (pixels < [self.width, self.height])).all(1)

    def _labelled(
        self, boxes: np.ndarray, names: Sequence[str], annotations: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Objects in the image, those without a lidar point in it as DontCare regions behind the others; numbers rounded as the label
        file has them."""
        in_camera = lidar_to_camera(boxes, self.lidar2cam)
        counts = points_in_boxes(self.points[self.seen], boxes).sum(0) if len(boxes) else []
        objects, regions = [], []
        corners = camera_corners(in_camera)
        for i, name in enumerate(names):
            x, y, z, length, height, width, turn = (round(float(v), DIGITS) for v in in_camera[i])
            if z <= 0:
                continue
            bounds, outside = image_box(silhouette(corners[i], self.cam2img[:3, :3]), self.width, self.height)
            if bounds is None:
                continue
            bbox = [round(v, DIGITS) for v in bounds]
            if not counts[i]:
                nowhere = [-1000.0, -1000.0, -1000.0, -1.0, -1.0, -1.0, -10.0]
                regions.append(_object(DONT_CARE, bbox, nowhere, -1.0, -1, float(NO_ALPHA), -1))
                continue
            occluded = OCCLUDED.get(str(annotations[i].get("visibility_token")), 3)
            alpha = round(float(turn - np.arctan2(x, z) + np.pi) % (2 * np.pi) - np.pi, DIGITS)
            box = [x, y, z, length, height, width, turn]
            objects.append(_object(name, bbox, box, round(outside, DIGITS), occluded, alpha, int(counts[i])))
        for index, found in enumerate(objects):
            found["index"] = index
        for group, found in enumerate([*objects, *regions]):
            found["group_id"] = group
        return [*objects, *regions]

    def info(self, index: int) -> dict[str, Any]:
        """The frame's record in mmdet3d's info file."""
        projection, lidar2cam = self.cam2img.tolist(), self.lidar2cam.tolist()
        lidar2img = (self.cam2img @ self.lidar2cam).tolist()
        images: dict[str, Any] = {f"CAM{i}": {"cam2img": projection, "lidar2img": lidar2img} for i in range(4)}
        images[CAMERA] |= {
            "img_path": f"{index:06d}.png",
            "height": self.height,
            "width": self.width,
            "lidar2cam": lidar2cam,
        }
        images["R0_rect"] = np.eye(4).tolist()
        instances, seen = [], []
        for found in self.objects:
            x, y, z, _, height, _, _ = found["bbox_3d"]
            pixel = self.cam2img @ [x, y - height / 2, z, 1.0]
            own = {key: value for key, value in found.items() if key != "name"}
            own |= {"center_2d": [float(pixel[0] / pixel[2]), float(pixel[1] / pixel[2])], "depth": float(pixel[2])}
            instances.append(own)
            if found["name"] != DONT_CARE:
                keys = ("bbox", "bbox_label", "bbox_label_3d", "bbox_3d", "center_2d", "depth")
                seen.append({key: own[key] for key in keys} | {"bbox_3d_isvalid": True, "velocity": -1})
        return {
            "sample_idx": index,
            "images": images,
            "lidar_points": {
                "num_pts_feats": 4,
                "lidar_path": f"{index:06d}.bin",
                "Tr_velo_to_cam": lidar2cam,
                "Tr_imu_to_velo": self.imu2velodyne.tolist(),
            },
            "instances": instances,
            "cam_instances": {CAMERA: seen},
        }

    def label(self) -> str:
        """The label file."""
        lines = []
        for found in self.objects:
            x, y, z, length, height, width, turn = found["bbox_3d"]
            numbers = [found["alpha"], *found["bbox"], height, width, length, x, y, z, turn]
            text = " ".join(f"{number:.{DIGITS}f}" for number in numbers)
            lines.append(f"{found['name']} {found['truncated']:.{DIGITS}f} {found['occluded']} {text}\n")
        return "".join(lines)

    def calibration(self) -> str:
        """The calib file."""
        rows: dict[str, np.ndarray] = {f"P{i}": self.cam2img[:3] for i in range(4)}
        rows |= {"R0_rect": np.eye(3), "Tr_velo_to_cam": self.lidar2cam[:3], "Tr_imu_to_velo": self.imu2velodyne[:3]}
        return "".join(f"{name}: {' '.join(f'{v:.12e}' for v in matrix.ravel())}\n" for name, matrix in rows.items())

    def write(self, folder: Path, index: int) -> None:
        """Writes the frame's files below training/."""
        picture = io.BytesIO()
        Image.fromarray(self.image).save(picture, "PNG")
        for name, content in (
            (f"velodyne/{index:06d}.bin", self.points.astype("<f4").tobytes()),
            (f"velodyne_reduced/{index:06d}.bin", self.points[self.seen].astype("<f4").tobytes()),
            (f"image_2/{index:06d}.png", picture.getvalue()),
            (f"calib/{index:06d}.txt", self.calibration().encode()),
            (f"label_2/{index:06d}.txt", self.label().encode()),
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def _object(
    name: str, bbox: list[float], box: list[float], truncated: float, occluded: int, alpha: float, points: int
) -> dict[str, Any]:
    label = CATEGORIES.index(name) if name in CATEGORIES else -1
    return {
        "name": name,
        "bbox": bbox,
        "bbox_label": label,
        "bbox_3d": box,
        "bbox_label_3d": label,
        "truncated": truncated,
        "occluded": occluded,
        "alpha": alpha,
        "num_lidar_pts": points,
        "difficulty": difficulty(bbox[3] - bbox[1], occluded, truncated) if label >= 0 else -1,
        "score": 0.0,
        "index": -1,
    }


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: found something there, expected no such folder; remove it or choose another --out")


def write_kitti(
    root: str | Path,
    out: str | Path,
    splits: Sequence[str] | None = None,
    version: str | None = None,
    camera: str = "CAM_FRONT",
    quiet: bool = True,
    recipe: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Writes the folder `out` in KITTI's form, whole or not at all, and returns its info files, one for each split.

    Keyframes are numbered from 0 on in the order of the splits. Objects that the camera sees are labelled; those that no lidar point
    in the image falls on are DontCare regions.

    Args:
        root: a nuScenes-format folder.
        out: it must not be there, or be empty.
        splits: None for those of root's splits.json.
        version: needed only where root holds several.
        camera: the channel that becomes image_2.
        recipe: how the data was made; recipe.json.

    Raises:
        UserError: no such data, split or camera; damaged tables or files; something in `out`.
    """
    out = Path(out)
    _check_new(out)
    nusc = open_nuscenes(root, version)
    tokens = {split: split_tokens(nusc, split) for split in splits_of(nusc, splits)}
    numbers: dict[str, int] = {}
    for token in (token for members in tokens.values() for token in members):
        numbers.setdefault(token, len(numbers))
    records = {}
    with atomic_directory(out) as folder, progress_bar("keyframes", len(numbers), show=not quiet) as done:
        for token, index in numbers.items():
            frame = _Frame(nusc, token, camera)
            frame.write(folder / "training", index)
            records[token] = frame.info(index)
            done(index + 1)
        (folder / "ImageSets").mkdir()
        categories = {name: label for label, name in enumerate(CATEGORIES)} | {DONT_CARE: -1}
        meta = {"categories": categories, "dataset": "kitti", "info_version": "1.1"}
        for split, members in tokens.items():
            (folder / "ImageSets" / f"{split}.txt").write_text("".join(f"{numbers[token]:06d}\n" for token in members))
            write_pickle(
                folder / f"kitti_infos_{split}.pkl", {"metainfo": meta, "data_list": [records[t] for t in members]}
            )
        if recipe is not None:
            write_json(folder / RECIPE, recipe)
    return [out / f"kitti_infos_{split}.pkl" for split in tokens]


def generate_kitti(out: str | Path, options: SynthOptions, workers: int = 1, quiet: bool = False) -> list[Path]:
    """Generates scenes with KITTI's rig (`options.rig` "kitti") and writes them as `write_kitti` does; returns the info files.

    The same options write the same bytes; if they have done so already, nothing is written. Meanwhile the scenes lie beside `out`, in
    .NAME.scenes, from where the same call goes on after an interruption.

    Raises:
        UserError: invalid options, or something else in `out`.
    """
    out, options = Path(out), options.checked()
    if (out / RECIPE).is_file() and read_json(out / RECIPE) == options.recipe():
        return [out / f"kitti_infos_{split}.pkl" for split, scenes in options.splits.items() if scenes]
    _check_new(out)
    scenes = generate(out.with_name(f".{out.name}.scenes"), options, workers, quiet)
    infos = write_kitti(scenes, out, quiet=quiet, recipe=options.recipe())
    shutil.rmtree(scenes)
    return infos
