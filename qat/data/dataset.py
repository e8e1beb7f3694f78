"""Reads nuScenes-format data, real or generated, into a camera detector's inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.splits import create_splits_scenes, get_scenes_of_split, is_predefined_split
from pyquaternion import Quaternion

from qat.boxes.geometry import box_yaw
from qat.core.errors import UserError
from qat.core.files import data_path, read_json
from qat.core.geometry import within
from qat.core.preprocess import load_image
from qat.data.checks import (
    FETCH,
    TABLES,
    check_intrinsics,
    check_splits,
    check_tokens,
    diagnose,
    numbers_of,
    rotation_of,
)
from qat.data.points import read_points
from qat.data.reading import Reading, Sweeps, reading_for
from qat.data.sample import Keyframe, Sample, camera_matrices, prepare
from qat.data.t4 import FOLDER, T4Tables, find

MAX_SWEEPS = 10  # BEVFusion's info files keep ten earlier revolutions


def transform(record: Mapping[str, Any], where: str = "pose") -> np.ndarray:
    """A nuScenes pose record as a homogeneous matrix, float64[4,4]. where: names it in a message.

    Raises:
        UserError: rotation or translation is missing, has NaN, or is invalid.
    """
    matrix = np.eye(4)
    matrix[:3, :3] = Quaternion(rotation_of(record, where)).rotation_matrix
    matrix[:3, 3] = numbers_of(record, "translation", (3,), where)
    return matrix


class _Tables(NuScenes):
    """The devkit's class, which also accepts UTF-8 with a byte order mark, file names with Windows' backslashes, and a data set
    without map pictures, which are not used here."""

    _maps: list[dict[str, Any]]

    def __load_table__(self, table_name: str) -> Any:
        rows = json.loads((Path(self.table_root) / f"{table_name}.json").read_bytes())
        if table_name in ("sample_data", "map"):
            for row in rows:
                if isinstance(name := row.get("filename"), str):
                    row["filename"] = name.replace("\\", "/")
        if table_name == "map":
            self._maps = rows
            return [
                row for row in rows if (Path(self.dataroot) / row["filename"]).is_file()
            ]  # the devkit opens every map
        return rows

    def __make_reverse_index__(self, verbose: bool) -> None:
        self.map = self._maps  # each log needs its record, with a picture or without
        super().__make_reverse_index__(verbose)


class _T4(NuScenes):
    """The same over the tables of T4 data sets, which stay in memory."""

    def __init__(self, t4: T4Tables) -> None:
        self.t4 = t4
        super().__init__(version=".", dataroot=str(t4.root), verbose=False)

    def __load_table__(self, table_name: str) -> Any:
        return [] if table_name == "map" else self.t4.tables[table_name]

    def __make_reverse_index__(self, verbose: bool) -> None:
        self.map = self.t4.tables["map"]
        super().__make_reverse_index__(verbose)


def table_folders(nusc: NuScenes) -> list[Path]:
    """The folders that hold a data set's tables."""
    t4 = getattr(nusc, "t4", None)
    return [Path(nusc.dataroot) / nusc.version] if t4 is None else [folder / FOLDER for folder in t4.folders]


def open_nuscenes(root: str | Path, version: str | None = None) -> NuScenes:
    """Opens a data set with the devkit. Pictures of maps may be missing.

    Raises:
        UserError: no such folder, no tables in it, several versions, or a damaged table.
    """
    root = Path(root)
    if find(root):
        if version is not None:
            raise UserError(f"--version: found {version!r} with T4 data, expected none: name versions in a split YAML")
        t4 = T4Tables(root)
        try:
            return _T4(t4)
        except Exception as error:  # as below
            raise diagnose(t4.folders[0] / FOLDER, error) from None
    if not root.is_dir():
        there = "found a file" if root.exists() else "no such folder"
        raise UserError(f"{root}: {there}; expected the folder of a nuScenes-format data set; give it with --data")
    found = sorted(path.parent.name for path in root.glob("*/sample_data.json"))
    if version is None:
        if len(found) != 1:
            what = "no version folder with tables" if not found else "versions " + ", ".join(found)
            raise UserError(f"{root}: found {what}, expected one such as v1.0-mini; choose it with --version")
        version = found[0]
    elif version not in found:
        raise UserError(f"{root}: version {version!r} not found; there is {', '.join(found) or 'none'}")
    try:
        found_set = _Tables(version=version, dataroot=str(root), verbose=False)
    except Exception as error:  # anything its constructor raises on tables of another form
        raise diagnose(root / version, error) from None
    check_tokens({name: getattr(found_set, name) for name in TABLES}, root / version)
    return found_set


def split_tokens(nusc: NuScenes, split: str) -> list[str]:
    """Tokens of the split's keyframes, in the data set's order.

    Raises:
        UserError: the split does not exist.
    """
    own = Path(nusc.dataroot) / nusc.version / "splits.json"
    t4 = getattr(nusc, "t4", None)
    splits: dict[str, list[str]] = {} if t4 is None else t4.splits
    known = list(splits)
    if t4 is None and own.exists():
        check_splits(splits := read_json(own), own)
        known = list(splits)
    if split in known:
        names = set(splits[split])
    elif t4 is None and is_predefined_split(split):
        names = set(get_scenes_of_split(split, nusc))
    elif split == "all":
        names = {scene["name"] for scene in nusc.scene}
    else:
        known += [] if known or t4 is not None else list(create_splits_scenes())
        raise UserError(f"{nusc.dataroot}: split {split!r} not found; there is {', '.join([*known, 'all'])}")
    tokens: dict[str, None] = {}
    folder = Path(nusc.dataroot) / nusc.version
    for scene in nusc.scene:
        if scene["name"] in names:
            token = scene["first_sample_token"]
            while token:
                if token in tokens:
                    raise UserError(f"{folder / 'sample.json'}: found {token!r} in a cycle of `next`; {FETCH}")
                tokens[token] = None
                token = record_of(nusc, "sample", token).get("next")
    if t4 is not None:
        tokens = {token: None for token in tokens if token not in t4.skipped}
    if not tokens:
        raise UserError(
            f"{nusc.dataroot}: split {split!r} has no keyframes in version {nusc.version}, expected scenes of "
            f"{folder / 'scene.json'} in it; choose another split"
        )
    return list(tokens)


def record_of(nusc: NuScenes, table: str, token: str) -> dict[str, Any]:
    """A record by its token.

    Raises:
        UserError: the table has no such record.
    """
    try:
        found: dict[str, Any] = nusc.get(table, token)
    except KeyError:
        folder = Path(nusc.dataroot) / nusc.version
        raise UserError(
            f"{folder / table}.json: found no record {token!r}, to which another table refers; {FETCH}"
        ) from None
    return found


def _record_name(nusc: NuScenes, table: str, record: Mapping[str, Any]) -> str:
    """A record's name in messages."""
    return f"{Path(nusc.dataroot) / nusc.version / table}.json: {record.get('token')}"


def sensor_of(
    nusc: NuScenes, sample: Mapping[str, Any], channel: str
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]:
    """A sensor's record in a keyframe, sensor2ego, ego2global, float64[4,4], and its intrinsics [3,3] (or an empty array).

    Raises:
        UserError: the keyframe has no such channel, or a table lacks a required key.
    """
    if channel not in sample["data"]:
        has = ", ".join(sorted(sample["data"]))
        raise UserError(
            f"{nusc.dataroot}: sample {sample['token']} has no {channel}, but {has}; the data set is incomplete, or "
            "its cameras have other names: list them in the config's `cameras`"
        )
    record = nusc.get("sample_data", sample["data"][channel])
    for key, kind in (("filename", str), ("calibrated_sensor_token", str), ("ego_pose_token", str)):
        if not isinstance(record.get(key), kind):
            raise UserError(f"{_record_name(nusc, 'sample_data', record)}: found no {key}, expected one; {FETCH}")
    return record, *poses_of(nusc, record)


def poses_of(nusc: NuScenes, record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """sensor2ego, ego2global and intrinsics of a sensor's record, like `sensor_of`."""
    calibrated = record_of(nusc, "calibrated_sensor", record["calibrated_sensor_token"])
    pose = record_of(nusc, "ego_pose", record["ego_pose_token"])
    where = _record_name(nusc, "calibrated_sensor", calibrated)
    intrinsic = np.zeros(0)
    if record.get("sensor_modality") == "camera":
        intrinsic = numbers_of(calibrated, "camera_intrinsic", (3, 3), where)
        if any(calibrated.get("camera_distortion") or ()):  # of T4 data
            raise UserError(f"{where}: found camera_distortion, expected rectified pictures; undistort them")
    return transform(calibrated, where), transform(pose, _record_name(nusc, "ego_pose", pose)), intrinsic


def boxes_of(
    nusc: NuScenes, sample: Mapping[str, Any], global2lidar: np.ndarray, classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Annotated objects of these classes in a keyframe: boxes float64[K,9] in the lidar's frame, in BEVFusion's convention (unknown
    velocities 0), labels int64[K], and their records.

    global2lidar: float64[4,4], to any frame whose z points up.
    """
    boxes, labels, records = [], [], []
    rotation = global2lidar[:3, :3]
    turn = np.arctan2(rotation[1, 0], rotation[0, 0])
    for annotation_token in sample["anns"]:
        annotation = record_of(nusc, "sample_annotation", annotation_token)
        where = _record_name(nusc, "sample_annotation", annotation)
        name = category_to_detection_name(annotation["category_name"])
        if name not in classes:
            continue
        centre = rotation @ numbers_of(annotation, "translation", (3,), where) + global2lidar[:3, 3]
        width, length, height = numbers_of(annotation, "size", (3,), where)
        forward = Quaternion(rotation_of(annotation, where)).rotation_matrix[:, 0]
        heading = np.arctan2(forward[1], forward[0]) + turn
        velocity = rotation @ np.nan_to_num(nusc.box_velocity(annotation_token))
        boxes.append([*centre, width, length, height, box_yaw(heading), *velocity[:2]])
        labels.append(classes.index(name))
        records.append(annotation)
    return np.asarray(boxes, np.float64).reshape(-1, 9), np.asarray(labels, np.int64), records


def check_annotated(dataset: NuScenesDataset) -> None:
    """Raises `UserError` if no keyframe has an annotated object of the detector's classes: nothing could be
    scored."""
    nusc, others = dataset.nusc, set()
    for token in dataset.tokens:
        for annotation in nusc.get("sample", token)["anns"]:
            name = record_of(nusc, "sample_annotation", annotation).get("category_name")
            if category_to_detection_name(name) in dataset.classes:
                return
            others.add(str(name))
    what = f"objects of {', '.join(sorted(others)[:3])} alone" if others else "no annotated objects"
    raise UserError(
        f"{nusc.dataroot}: split {dataset.split!r} has {what} in {len(dataset)} keyframes, expected some of "
        f"{', '.join(dataset.classes[:3])}, …; choose an annotated split"
    )


def version_in(root: str | Path, version: str | None) -> str | None:
    """`version` if this root has it, else None: one of several roots may hold a single version with another name."""
    return version if version is not None and (Path(root) / version).is_dir() else None


class NuScenesDataset(Sequence[Sample]):
    """The keyframes of one split, preprocessed as the config's test pipeline says.

    Args:
        root: folder that holds `<version>/`, `samples/` and `sweeps/`.
        split: a split of `<version>/splits.json`, one of nuScenes' splits, or "all".
        config: of a model, whose family decides how its frames are read; or a `Reading`.
        version: needed only if root holds several.
        frames: keep only this many keyframes, spread evenly over the split.
        whole_scenes: with `frames`, keep the first ones and the rest of their scenes, in time order, for a model with
            state.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        config: Mapping[str, Any] | Reading,
        version: str | None = None,
        frames: int | None = None,
        whole_scenes: bool = False,
    ) -> None:
        reading = reading_for(config)
        self.pipeline, self.classes = reading.pipeline, reading.classes
        self.cameras = reading.cameras
        self.nusc = open_nuscenes(root, version)
        self.split = split
        self.tokens = split_tokens(self.nusc, split)
        if frames is not None:
            if not 1 <= frames <= len(self.tokens):
                raise UserError(
                    f"--frames: found {frames}, split {split!r} of {root} has {len(self.tokens)} keyframes, expected 1 to "
                    f"{len(self.tokens)}"
                )
            if whole_scenes:
                scenes = {self.scene_of(token) for token in self.tokens[:frames]}
                self.tokens = [token for token in self.tokens if self.scene_of(token) in scenes]
            else:
                self.tokens = [self.tokens[i] for i in np.linspace(0, len(self.tokens) - 1, frames).round().astype(int)]

    def __len__(self) -> int:
        return len(self.tokens)

    def check_annotated(self) -> None:
        """See the function `check_annotated`."""
        check_annotated(self)

    def share(self, rank: int, processes: int, whole_scenes: bool = False) -> list[str]:
        """The tokens of one of several processes: every `processes`-th frame, or scene."""
        scenes = list(dict.fromkeys(self.scene_of(token) for token in self.tokens))[rank::processes]
        return [t for t in self.tokens if self.scene_of(t) in scenes] if whole_scenes else self.tokens[rank::processes]

    def scene_of(self, token: str) -> str:
        """The token of a frame's scene."""
        return str(self.nusc.get("sample", token)["scene_token"])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.load(self.tokens[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self.load(token) for token in self.tokens)

    def load(self, token: str) -> Sample:
        """One keyframe by its token, as the network's input."""
        return prepare(self.read(token), self.pipeline)

    def read(self, token: str) -> Keyframe:
        """One keyframe by its token, before resizing, cropping and normalisation."""
        sample = self.nusc.get("sample", token)
        lidar_record, lidar2ego, ego2global = sensor_of(self.nusc, sample, "LIDAR_TOP")[:3]
        global2lidar = np.linalg.inv(ego2global @ lidar2ego)
        images, intrinsics, camera2lidar = [], [], []
        for name in self.cameras:
            record, camera2ego, camera_ego2global, intrinsic = sensor_of(self.nusc, sample, name)
            path = data_path(self.nusc.dataroot, record["filename"], "sample_data.json")
            image = load_image(path)
            height, width = image.shape[:2]
            if (said := (record.get("width"), record.get("height"))) != (width, height):
                raise UserError(
                    f"{path}: found {width}×{height} pixels, expected {said[0]}×{said[1]} as sample_data.json says; fetch the "
                    "picture again, or fix the table and the camera's intrinsics"
                )
            check_intrinsics(intrinsic, width, height, f"{path}: calibrated_sensor.json")
            images.append(image)
            intrinsics.append(intrinsic)
            camera2lidar.append(global2lidar @ camera_ego2global @ camera2ego)  # through both ego poses
        boxes, labels, counts = self._boxes(sample, global2lidar)
        return Keyframe(
            token=token,
            scene=str(sample["scene_token"]),
            cameras=self.cameras,
            images=images,
            **camera_matrices(intrinsics, camera2lidar),
            points=self._points(lidar_record, global2lidar),
            lidar2ego=lidar2ego.astype(np.float32),
            ego2global=ego2global,
            gt_boxes=boxes,
            gt_labels=labels,
            gt_points=counts,
        )

    def _read_points(self, record: Mapping[str, Any]) -> np.ndarray:
        path = data_path(self.nusc.dataroot, record["filename"], "sample_data.json")
        points = read_points(path, record.get("num_pts_feats") or self.pipeline.load_dim)
        return points if points.shape[1] == 5 else np.pad(points, ((0, 0), (0, 5 - points.shape[1])))

    def _points(self, record: Mapping[str, Any], global2lidar: np.ndarray) -> np.ndarray:
        """Points of the keyframe after the pipeline's sweeps and filters, float32[M,5] in the keyframe's lidar frame."""
        points = self._read_points(record)
        points[:, 4] = 0
        for step, argument in self.pipeline.point_steps:
            if step == "sweeps":
                points = np.concatenate([points, *self._sweeps(record, points, argument, global2lidar)])
            else:
                points = points[within(points, argument)]
        return points

    def _sweeps(
        self, keyframe: Mapping[str, Any], points: np.ndarray, sweeps: Sweeps, global2lidar: np.ndarray
    ) -> Iterator[np.ndarray]:
        def without_close(cloud: np.ndarray) -> np.ndarray:
            return cloud[~(np.abs(cloud[:, :2]) < sweeps.radius).all(1)] if sweeps.remove_close else cloud

        record = keyframe
        earlier: list[Mapping[str, Any]] = []
        while record["prev"] and len(earlier) < min(sweeps.count, MAX_SWEEPS):
            record = self.nusc.get("sample_data", record["prev"])
            earlier.append(record)
        if not earlier and sweeps.pad_empty:
            for _ in range(sweeps.count):
                yield without_close(points)
        for record in earlier:
            cloud = without_close(self._read_points(record))
            sensor2ego, ego2global, _ = poses_of(self.nusc, record)
            move = (global2lidar @ ego2global @ sensor2ego).astype(np.float32)
            cloud[:, :3] = cloud[:, :3] @ move[:3, :3].T + move[:3, 3]
            cloud[:, 4] = (keyframe["timestamp"] - record["timestamp"]) / 1e6
            yield cloud

    def _boxes(self, sample: Mapping[str, Any], global2lidar: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        boxes, labels, records = boxes_of(self.nusc, sample, global2lidar, self.classes)
        counts = np.asarray([record["num_lidar_pts"] for record in records], np.int64)
        return boxes.astype(np.float32), labels, counts


def images_digest(datasets: Sequence[NuScenesDataset]) -> str:
    """SHA-256 of the names and sizes of all images, in hexadecimal. It differs for another data set of the same keyframes,
    such as one generated again in another size. The images are not read."""
    digest = hashlib.sha256()
    for dataset in datasets:
        root = Path(dataset.nusc.dataroot)
        for token in dataset.tokens:
            channels = dataset.nusc.get("sample", token)["data"]
            for camera in dataset.cameras:
                name = dataset.nusc.get("sample_data", channels[camera])["filename"] if camera in channels else ""
                try:
                    size = (root / name).stat().st_size if name else 0
                except OSError:  # reported when it is read
                    size = -1
                digest.update(f"{name} {size}\n".encode())
    return digest.hexdigest()
