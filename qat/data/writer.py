"""Writes your own recordings as nuScenes-format data: docs/own-data.md, and a whole converter in examples/own_data.

    with NuScenesWriter("data/robot", cameras=["front", "rear"], classes={"Sedan": "car", "Person": "pedestrian"}) as writer:
        scene = writer.add_scene("drive-1", split="calib", calibration={"front": …, "rear": …}, lidar2ego=…)
        scene.add_keyframe(timestamp, images={"front": "0001.jpg", "rear": array}, points=…, ego2global=…, boxes=[…])

Frames are right-handed, metres. Ego: the vehicle's. Camera: x right, y down, z forward; pixel (u, v) has its centre at
(u, v). Lidar: what the network's BEV grid lies in; one trained on nuScenes expects x to the vehicle's right, y forward,
z up. `a2b` takes coordinates in a to coordinates in b: a pose of sensor a in frame b.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from qat.core.errors import UserError
from qat.core.files import atomic_directory
from qat.core.preprocess import load_image
from qat.data.tables import ATTRIBUTES, CATEGORIES, LIDAR, SceneTables, write_tables

JPEG_QUALITY = 95
APART = 500_000  # most microseconds between a keyframe and one of its images; in nuScenes they are within 50 ms
LATEST = 10**16  # microseconds: the year 2286; nanoseconds since 1970 exceed it
MAP = "maps/blank.png"  # the devkit opens a map for every log; detection does not use it
NEAR = 0.1  # metres in front of a camera


@dataclass(frozen=True)
class Calibration:
    """One camera of a scene.

    intrinsic: [3,3] in pixels of the stored image; this format has no lens distortion, so rectify first.
    camera2ego or camera2lidar: [4,4], one of them.
    """

    intrinsic: Any
    camera2ego: Any = None
    camera2lidar: Any = None


@dataclass(frozen=True)
class Picture:
    """An image that was not taken at its keyframe's time: a path or uint8[h,w,3] RGB; microseconds; float[4,4] then."""

    image: Any
    timestamp: int
    ego2global: Any


@dataclass(frozen=True)
class Box:
    """One annotated object.

    name: of `NuScenesWriter`'s classes. centre: x, y, z of the box's middle (bottom z + height / 2). size: length, width,
    height. yaw: the heading in radians, anticlockwise from x. Centre and yaw are in the writer's `boxes_in` frame.
    track: the object's number or name; nuScenes has no velocities, its devkit takes them from an object's boxes in keyframes
    at most 1.5 s apart, so without a track there is none. attribute: one of `qat.data.tables.ATTRIBUTES`, or None.
    lidar_points: points inside, None to count them; the devkit does not score boxes without any. visibility: 1 (least)
    to 4.
    """

    name: str
    centre: Sequence[float]
    size: Sequence[float]
    yaw: float
    track: Hashable = None
    attribute: str | None = None
    lidar_points: int | None = None
    visibility: int = 4


def _array(value: Any, shape: tuple[int, ...], where: str, what: str = "finite numbers") -> np.ndarray:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{where}: found {type(value).__name__}, expected {list(shape)} {what}") from None
    if array.shape != shape:
        raise UserError(f"{where}: found shape {list(array.shape)}, expected {list(shape)}")
    if not np.isfinite(array).all():
        raise UserError(f"{where}: found NaN or infinity, expected {what}")
    return array


def _pose(value: Any, where: str) -> np.ndarray:
    """A checked rigid transform, float64[4,4], with its rotation made exactly orthonormal."""
    matrix = _array(value, (4, 4), where)
    if not np.allclose(matrix[3], [0, 0, 0, 1]):
        raise UserError(f"{where}: found last row {matrix[3].tolist()}, expected 0 0 0 1; is it transposed?")
    rotation = matrix[:3, :3]
    error = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
    if error > 1e-3:
        raise UserError(f"{where}: found a 3×3 part that is {error:.2g} off a rotation, expected orthonormal rows")
    if np.linalg.det(rotation) < 0:
        raise UserError(f"{where}: found a mirrored frame (determinant -1), expected a rotation; one axis is flipped")
    u, _, v = np.linalg.svd(rotation)
    matrix = matrix.copy()
    matrix[:3, :3] = u @ v
    return matrix


def _timestamp(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < LATEST:
        raise UserError(f"{where}: timestamp: found {value!r}, expected whole microseconds (nanoseconds // 1000)")
    return int(value)


def _points(value: Any, where: str) -> np.ndarray:
    """float32[M,5]: x, y, z, intensity, ring; missing columns are 0."""
    try:
        points = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise UserError(f"{where}: points: found {type(value).__name__}, expected float32[M,3 to 5]") from None
    if points.ndim != 2 or not 3 <= points.shape[1] <= 5 or not len(points):
        raise UserError(
            f"{where}: points: found shape {list(points.shape)}, expected [M,3 to 5] with at least one point: x, y, z, "
            "intensity, ring"
        )
    if bad := int((~np.isfinite(points).all(1)).sum()):
        raise UserError(
            f"{where}: points: {bad} of {len(points)} are NaN or infinite, expected none; drop them: "
            "points[np.isfinite(points).all(1)]"
        )
    full = np.zeros((len(points), 5), np.float32)
    full[:, : points.shape[1]] = points
    return full


def _check_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not name or any(c in name for c in '/\\\0:*?"<>|') or name.startswith("."):
        raise UserError(f"{where}: found {name!r}, expected a name that can be part of a file's")
    return name


@dataclass
class _Camera:
    intrinsic: np.ndarray
    camera2ego: np.ndarray
    hits: int = 0  # lidar points seen in its images so far


class SceneWriter:
    """One scene: an uninterrupted drive with one calibration. `NuScenesWriter.add_scene` makes it."""

    def __init__(
        self,
        writer: NuScenesWriter,
        folder: Path,
        name: str,
        calibration: Mapping[str, Calibration],
        lidar2ego: Any,
        log: Mapping[str, str],
        description: str,
    ) -> None:
        self.name, self.description = name, description
        self._writer, self._folder, self._log = writer, folder, dict(log)
        self._lidar2ego = _pose(lidar2ego, f"{name}: lidar2ego")
        if set(calibration) != set(writer.cameras):
            raise UserError(f"{name}: calibration: found {sorted(calibration)}, expected {sorted(writer.cameras)}")
        self._cameras = {camera: self._calibrated(camera, calibration[camera]) for camera in writer.cameras}
        self._tables = SceneTables((writer.version, name), name, writer.cameras)
        self._sweeps: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._classes: dict[Hashable, str] = {}
        self._latest: dict[str, int] = {}
        self.keyframes = 0

    def _calibrated(self, camera: str, given: Calibration) -> _Camera:
        where = f"{self.name}: {camera}"
        intrinsic = _array(given.intrinsic, (3, 3), f"{where}: intrinsic")
        if not np.allclose(intrinsic[2], [0, 0, 1]) or intrinsic[0, 0] <= 0 or intrinsic[1, 1] <= 0:
            raise UserError(
                f"{where}: intrinsic: found {intrinsic.tolist()}, expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels"
            )
        if (given.camera2ego is None) == (given.camera2lidar is None):
            raise UserError(f"{where}: expected one of camera2ego and camera2lidar, found both or neither")
        if given.camera2ego is not None:
            return _Camera(intrinsic, _pose(given.camera2ego, f"{where}: camera2ego"))
        return _Camera(intrinsic, self._lidar2ego @ _pose(given.camera2lidar, f"{where}: camera2lidar"))

    def _in_order(self, channel: str, timestamp: int, where: str) -> None:
        before = self._latest.get(channel)
        if before is not None and timestamp <= before:
            raise UserError(f"{where}: {channel}: found timestamp {timestamp} after {before}, expected growing ones")
        self._latest[channel] = timestamp

    def add_sweep(self, timestamp: int, points: Any, ego2global: Any) -> None:
        """A lidar revolution between two keyframes, for networks that take several (LoadPointsFromMultiSweeps).

        Args: as in `add_keyframe`. Sweeps after the last keyframe are not used and not written.

        Raises:
            UserError: like `add_keyframe`.
        """
        where = f"{self.name}: sweep {timestamp}"
        time = _timestamp(timestamp, where)
        self._in_order(LIDAR, time, where)
        self._sweeps.append((time, _points(points, where), _pose(ego2global, f"{where}: ego2global")))

    def add_keyframe(
        self,
        timestamp: int,
        images: Mapping[str, Any],
        points: Any,
        ego2global: Any,
        boxes: Sequence[Box] = (),
    ) -> None:
        """One annotated moment.

        Args:
            timestamp: the lidar's, whole microseconds, later than the previous keyframe's.
            images: of every camera, a path (copied as it is), uint8[h,w,3] RGB (written as JPEG), or a `Picture`, which has a
                time and ego pose.
            points: float32[M,3 to 5] in the lidar's frame: x, y, z, intensity (0 to 255), ring.
            ego2global: float[4,4], the ego pose at `timestamp`; any fixed frame, z up.
            boxes: what was annotated.

        Raises:
            UserError: one of these is invalid.
        """
        where = f"{self.name}: keyframe {timestamp}"
        time = _timestamp(timestamp, where)
        pose = _pose(ego2global, f"{where}: ego2global")
        cloud = _points(points, where)
        if set(images) != set(self._cameras):
            raise UserError(f"{where}: images: found {sorted(images)}, expected {sorted(self._cameras)}")
        self._in_order(LIDAR, time, where)
        frame = self.keyframes
        for at, swept, sweep_pose in self._sweeps:
            self._add_points(at, swept, sweep_pose, frame, False)
        self._sweeps.clear()
        self._tables.add_sample(frame, time)
        self._add_points(time, cloud, pose, frame, True)
        seen = cloud[:, :3].astype(np.float64) @ self._lidar2ego[:3, :3].T + self._lidar2ego[:3, 3]
        for name in self._cameras:
            self._add_image(name, images[name], time, pose, frame, f"{where}: {name}", seen)
        self._add_boxes(boxes, frame, pose, cloud, where)
        self.keyframes += 1

    def _file(self, channel: str, timestamp: int, key: bool, suffix: str) -> tuple[str, Path]:
        name = f"{'samples' if key else 'sweeps'}/{channel}/{self.name}__{channel}__{timestamp}{suffix}"
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return name, path

    def _add_points(self, time: int, points: np.ndarray, pose: np.ndarray, frame: int, key: bool) -> None:
        name, path = self._file(LIDAR, time, key, ".pcd.bin")
        path.write_bytes(points.tobytes())  # tofile's error on a full disk lacks the system's message
        self._tables.add_data(LIDAR, time, frame, name, pose, is_key=key)

    def _add_image(
        self, camera: str, given: Any, time: int, pose: np.ndarray, frame: int, where: str, seen: np.ndarray
    ) -> None:
        if isinstance(given, Picture):
            at, keyframe = _timestamp(given.timestamp, where), time
            if abs(at - keyframe) > APART:
                raise UserError(
                    f"{where}: found an image {abs(at - keyframe) / 1e6:.2f} s from its keyframe, expected {APART / 1e6} s at "
                    "most; check that both clocks agree and that it is the nearest image"
                )
            time, pose, given = at, _pose(given.ego2global, f"{where}: ego2global"), given.image
        self._in_order(camera, time, where)
        if isinstance(given, str | Path):
            source = Path(given)
            suffix = source.suffix.lower()
            if suffix not in (".jpg", ".jpeg", ".png"):
                raise UserError(f"{where}: found {source}, expected a .jpg or .png file or an array")
            height, width = load_image(source).shape[:2]
            name, path = self._file(camera, time, True, suffix)
            shutil.copyfile(source, path)
        else:
            array = np.asarray(given)
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
                raise UserError(
                    f"{where}: found {array.dtype}{list(array.shape)}, expected a path or uint8[h,w,3] in the order R, G, B"
                )
            height, width = array.shape[:2]
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, "JPEG", quality=JPEG_QUALITY)
            name, path = self._file(camera, time, True, ".jpg")
            path.write_bytes(buffer.getvalue())
        calibrated = self._cameras[camera]
        cx, cy = calibrated.intrinsic[:2, 2]
        if not (0 <= cx <= width and 0 <= cy <= height):
            raise UserError(
                f"{where}: found an image of {width}×{height} with its principal point at ({cx:.0f}, {cy:.0f}), expected one "
                "inside; the intrinsic matrix may be for another resolution"
            )
        self._tables.add_data(camera, time, frame, name, pose, (height, width))
        ego2camera = np.linalg.inv(calibrated.camera2ego)
        local = seen @ ego2camera[:3, :3].T + ego2camera[:3, 3]
        pixels = local[local[:, 2] > NEAR] @ calibrated.intrinsic.T
        pixels = pixels[:, :2] / pixels[:, 2:]
        calibrated.hits += int(((pixels >= 0) & (pixels < [width, height])).all(1).sum())

    def _add_boxes(self, boxes: Sequence[Box], frame: int, pose: np.ndarray, points: np.ndarray, where: str) -> None:
        lidar2global = pose @ self._lidar2ego
        given2global = {"global": np.eye(4), "ego": pose, "lidar": lidar2global}[self._writer.boxes_in]
        cloud = points[:, :3].astype(np.float64) @ lidar2global[:3, :3].T + lidar2global[:3, 3]
        tracks: set[Hashable] = set()
        for i, box in enumerate(boxes):
            at = f"{where}: boxes[{i}] ({box.name})"
            if box.name not in self._writer.classes:
                known = ", ".join(map(str, self._writer.classes))
                raise UserError(
                    f"{at}: unknown class, expected one of {known}; map it to one of nuScenes' ten classes, or to None "
                    "to drop its boxes"
                )
            name = self._writer.classes[box.name]
            if name is None:
                continue
            centre = given2global[:3, :3] @ _array(box.centre, (3,), f"{at}: centre") + given2global[:3, 3]
            size = _array(box.size, (3,), f"{at}: size")
            if (size <= 0).any():
                raise UserError(f"{at}: size: found {size.tolist()}, expected length, width and height above 0")
            local = float(_array(box.yaw, (), f"{at}: yaw"))
            forward = given2global[:3, :3] @ [np.cos(local), np.sin(local), 0.0]
            yaw = float(np.arctan2(forward[1], forward[0]))
            if box.attribute is not None and box.attribute not in ATTRIBUTES:
                raise UserError(f"{at}: attribute: found {box.attribute!r}, expected one of {', '.join(ATTRIBUTES)}")
            if box.visibility not in (1, 2, 3, 4):
                raise UserError(f"{at}: visibility: found {box.visibility!r}, expected 1 to 4")
            track: Hashable = ("box", frame, i) if box.track is None else ("track", box.track)
            if track in tracks or self._classes.get(track, name) != name:
                raise UserError(
                    f"{at}: found track {box.track!r} twice in the keyframe or with another class before, expected one object"
                )
            tracks.add(track)
            self._classes[track] = name
            count = box.lidar_points
            if count is None:
                c, s = np.cos(yaw), np.sin(yaw)
                inside = np.abs((cloud - centre) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])) <= size / 2
                count = int(inside.all(1).sum())
            self._tables.add_annotation(
                track, frame, centre, size.tolist(), yaw, box.visibility, box.attribute, int(count)
            )

    def _finish(self, check_overlap: bool) -> dict[str, list[dict[str, Any]]]:
        if not self.keyframes:
            raise UserError(f"{self.name}: found no keyframes, expected at least one")
        for name, camera in self._cameras.items():
            if check_overlap and not camera.hits:
                raise UserError(
                    f"{self.name}: {name}: found no lidar point in its images, expected some: camera2ego may be "
                    "its inverse, or the camera's axes not x right, y down, z forward (check_overlap=False if it is right)"
                )
        calibration: list[tuple[str, np.ndarray, list[list[float]]]] = [(LIDAR, self._lidar2ego, [])]
        calibration += [(name, c.camera2ego, c.intrinsic.tolist()) for name, c in self._cameras.items()]
        return self._tables.finish(self.description, self._log, MAP, self._classes, calibration)


class NuScenesWriter:
    """Writes a data set: the complete folder appears when the `with` block ends without an error.

    Args:
        root: the folder; it must not exist, or be empty.
        version: the folder of tables in it.
        cameras: the channels' names, any number of them; the config's `cameras` lists the same (docs/own-data.md).
        classes: your names → nuScenes' ten detection classes, or None for boxes to leave out. None: the ten.
        boxes_in: the frame of the boxes' centres and yaws, "global", "ego" or "lidar" (the last two at the keyframe).
        check_overlap: refuse a camera if no lidar point falls into its images.

    Raises:
        UserError: an invalid name, or a folder that exists.
    """

    def __init__(
        self,
        root: str | Path,
        version: str = "v1.0-own",
        *,
        cameras: Sequence[str],
        classes: Mapping[str, str | None] | None = None,
        boxes_in: str = "global",
        check_overlap: bool = True,
    ) -> None:
        self.root, self.version = Path(root), _check_name(version, "version")
        self.cameras = tuple(_check_name(name, "cameras") for name in cameras)
        if not self.cameras or len(set(self.cameras)) < len(self.cameras) or LIDAR in self.cameras:
            raise UserError(f"cameras: found {list(self.cameras)}, expected names, each once, none of them {LIDAR}")
        self.classes: dict[str, str | None] = (
            dict(classes) if classes is not None else {name: name for name in CATEGORIES}
        )
        for own, name in self.classes.items():
            if name is not None and name not in CATEGORIES:
                raise UserError(
                    f"classes: {own}: found {name!r}, expected one of {', '.join(CATEGORIES)}, the classes of "
                    "nuScenes' metric, or None to drop such boxes"
                )
        if boxes_in not in ("global", "ego", "lidar"):
            raise UserError(f"boxes_in: found {boxes_in!r}, expected global, ego or lidar")
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise UserError(
                f"{self.root}: found an existing folder or file, expected none; remove it or choose another"
            )
        self.boxes_in, self.check_overlap = boxes_in, check_overlap
        self._scenes: list[tuple[SceneWriter, str]] = []
        self._stack = ExitStack()
        self._folder: Path | None = None

    def __enter__(self) -> NuScenesWriter:
        self._folder = self._stack.enter_context(atomic_directory(self.root))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is None:
            try:
                self._finish()
            except BaseException:
                self._stack.__exit__(*sys.exc_info())
                raise
        return self._stack.__exit__(kind, error, trace)

    def add_scene(
        self,
        name: str,
        *,
        split: str,
        calibration: Mapping[str, Calibration],
        lidar2ego: Any,
        vehicle: str = "",
        date: str = "",
        location: str = "",
        description: str = "",
    ) -> SceneWriter:
        """Begins a scene.

        Args:
            name: no other scene's.
            split: the scene's split, such as calib or eval. Use separate scenes to calibrate or train on and to evaluate on.
            calibration: of every camera.
            lidar2ego: float[4,4].

        Raises:
            UserError: an invalid name or matrix.
        """
        from nuscenes.utils.splits import is_predefined_split

        if self._folder is None:
            raise UserError("NuScenesWriter: expected `with NuScenesWriter(…) as writer:` around its use")
        if _check_name(name, "scene") in [scene.name for scene, _ in self._scenes]:
            raise UserError(f"{name}: found an earlier scene with this name, expected another name")
        if is_predefined_split(_check_name(split, f"{name}: split")):
            raise UserError(
                f"{name}: split: found {split!r}, one of nuScenes' splits, tied to its scenes by the devkit; expected another "
                "name"
            )
        log = {"vehicle": vehicle, "date_captured": date, "location": location}
        scene = SceneWriter(self, self._folder, name, calibration, lidar2ego, log, description)
        self._scenes.append((scene, split))
        return scene

    def _finish(self) -> None:
        assert self._folder is not None
        if not self._scenes:
            raise UserError(f"{self.root}: found no scenes, expected at least one")
        splits: dict[str, list[str]] = {}
        for scene, split in self._scenes:
            splits.setdefault(split, []).append(scene.name)
        finished = [scene._finish(self.check_overlap) for scene, _ in self._scenes]
        (self._folder / MAP).parent.mkdir()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(self._folder / MAP)
        write_tables(self._folder / self.version, self.cameras, finished, splits)
