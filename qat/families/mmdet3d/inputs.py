"""What a config's data pipeline makes of a file, of a sample of its data set, or of made-up data."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from qat.checkpoints.unpickle import Damaged, InertUnpickler
from qat.core.errors import UserError
from qat.data.points import likelier_width
from qat.families.mmdet3d.config import test_dataset

if TYPE_CHECKING:
    from mmengine.config import Config

RANDOM_POINTS = 20000
PICTURES = {".png", ".jpg", ".jpeg", ".bmp"}
CAMERAS = ("CAM_FRONT", "CAM2", "CAM0")
PICTURE_SIZE = 375, 1242  # height, width of a made-up picture, KITTI's
# Steps of test pipelines that read labels, which an export needs none of.
_LABELS = {"LoadAnnotations3D", "PointSegClassMapping"}


@dataclass
class Sample:
    """One preprocessed input. inputs: the nested dict that the model takes. samples: its Det3DDataSample objects. source: of
    what it was made."""

    inputs: dict[str, Any]
    samples: list[Any]
    source: str


def pipeline_of(config: Config) -> list[dict[str, Any]]:
    """The steps of the test pipeline."""
    dataset = test_dataset(config, "pipeline")
    steps: list[dict[str, Any]] = copy.deepcopy([dict(step) for step in dataset.get("pipeline", [])])
    if not steps:
        raise UserError(f"{config.source}: test_dataloader: found no pipeline, expected the steps that read its data")
    return [step for step in steps if step.get("type") not in _LABELS]


def flattened(steps: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Steps of a pipeline, those inside others too."""
    for step in steps:
        yield step
        yield from flattened(step.get("transforms") or ())


def _step(config: Config, prefix: str) -> Mapping[str, Any] | None:
    return next(
        (s for s in flattened(pipeline_of(config)) if str(s.get("type", "")).split(".")[-1].startswith(prefix)), None
    )


def takes(config: Config) -> tuple[bool, bool]:
    """Whether the pipeline reads points, and whether it reads pictures."""
    return _step(config, "LoadPointsFromFile") is not None, _step(config, "LoadImage") is not None or _step(
        config, "LoadMultiView"
    ) is not None


def read_points(path: str | Path, columns: int) -> np.ndarray:
    """float32[N,columns] of a .bin file.

    Raises:
        UserError: it is missing, empty, has other columns, or holds NaN.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, expected a file of float32 points") from error
    if not data:
        raise UserError(f"{path}: found an empty point cloud, expected one point or more")
    values = len(data) // 4
    if len(data) % 4 or values % columns:
        fits = [n for n in (3, 4, 5, 6) if len(data) % 4 == 0 and values % n == 0]
        hint = f"; as {' or '.join(map(str, fits))} columns it would fit: take the config of that data" if fits else ""
        raise UserError(
            f"{path}: found {len(data)} bytes, expected a multiple of {4 * columns}: points of {columns} float32 values (load_dim){hint}"
        )
    points = np.frombuffer(data, np.float32).reshape(-1, columns)
    if bad := int((~np.isfinite(points)).any(1).sum()):
        raise UserError(
            f"{path}: found NaN or infinity in {bad} of {len(points)} points, expected finite values; remove them"
        )
    if (other := likelier_width(points.ravel(), columns)) is not None:
        raise UserError(
            f"{path}: found points of {other} values each, as its columns say, expected {columns} (load_dim); take the config of "
            "that data"
        )
    return points


def read_pickle(path: str | Path, expected: str) -> Any:
    """The plain values of a pickle, read by this project's own unpickler: nothing in it runs.

    Raises:
        UserError: it is damaged. expected: what it should have been.
    """
    try:
        with open(path, "rb") as stream:
            unpickler = InertUnpickler(stream, lambda _: None)
            # nuScenes' infos have tens of millions of numbers; a file cannot ask for more than it is long.
            unpickler.counted.left = max(unpickler.counted.left, Path(path).stat().st_size)
            return unpickler.load()
    except (
        OSError, Damaged, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError, UnpicklingError,
    ) as error:  # fmt: skip
        raise UserError(f"{path}: found no readable pickle ({error}), expected {expected}") from error


def read_info_file(path: str | Path) -> dict[str, Any]:
    """An mmdet3d 1.x infos file: a dict with data_list, of one sample or more, and metainfo. Raises as `read_infos`."""
    infos = read_pickle(path, "mmdet3d 1.x infos")
    listed = infos.get("data_list") if isinstance(infos, dict) else None
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict):
        what = "a list, as 0.x wrote them" if isinstance(infos, list) else "no samples"
        raise UserError(
            f"{path}: found {what}, expected mmdet3d 1.x infos: a dict with a data_list; convert them (update_infos_to_v2.py)"
        )
    return dict(infos)


def read_infos(path: str | Path) -> list[dict[str, Any]]:
    """The samples of an mmdet3d 1.x infos file; nothing in it runs.

    Raises:
        UserError: it is damaged, or of another kind.
    """
    listed: list[dict[str, Any]] = read_info_file(path)["data_list"]
    return listed


def _beside(infos: Path, name: str, pattern: str) -> Path | None:
    """The file that an infos file names: relative to it, or by its name anywhere below; without a name, the first that fits."""
    folder = infos.parent
    return next((p for p in (folder / name, *sorted(folder.rglob(Path(name).name or pattern))) if p.is_file()), None)


def _one_camera(name: str, image: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline for a single picture reads: below `images`, and at the top as LoadImageFromFile wants it."""
    matrices = {key: np.array(image[key]) for key in ("lidar2img", "depth2img", "cam2img", "lidar2cam") if key in image}
    return {"images": {name: dict(image)}, "img_path": image["img_path"], **matrices}


class Reader:
    """Makes samples for a model by its config's pipeline and its data preprocessor."""

    def __init__(self, config: Config, model: nn.Module, seed: int = 0) -> None:
        from mmdet3d.structures import get_box_type

        self.config, self.model, self.seed = config, model, seed
        self.points, self.pictures = takes(config)
        dataset = config.test_dataloader.dataset
        # Of a segmentor the data set names no boxes.
        self.box_type, self.box_mode = get_box_type(dataset.get("box_type_3d", "LiDAR"))
        loads = _step(config, "LoadPointsFromFile")
        self.columns = int(loads["load_dim"]) if loads is not None and "load_dim" in loads else 6
        self._transform: Any = None

    def packed(self, info: dict[str, Any], source: str) -> dict[str, Any]:
        """What the pipeline makes of one sample's info: "inputs" and "data_samples".

        Raises:
            UserError: a step refuses it.
        """
        from mmengine.dataset import Compose

        np.random.seed(self.seed)  # PointSample draws points
        torch.manual_seed(self.seed)
        try:
            if self._transform is None:
                self._transform = Compose(pipeline_of(self.config))
            packed = self._transform(
                {
                    "box_type_3d": self.box_type,
                    "box_mode_3d": self.box_mode,
                    "timestamp": 1.0,
                    "axis_align_matrix": np.eye(4),
                    **info,
                }
            )
        except UserError:
            raise
        except Exception as error:  # whatever a transform raises about data that it was not made for
            what = str(error).strip().splitlines()
            raise UserError(
                f"{source}: the config's test pipeline raised {type(error).__name__}: {what[-1][:200] if what else ''}; expected data "
                f"of {self.config.source}, or --use-random-data"
            ) from error
        if packed is None:
            raise UserError(f"{source}: the config's test pipeline left nothing of it, expected a sample")
        if isinstance(packed, list):
            raise UserError(
                f"{self.config.source}: test_dataloader: pipeline: found test-time augmentation, expected one sample of a frame; set flip=False"
            )
        return dict(packed)

    def run(self, info: dict[str, Any], source: str) -> Sample:
        """The pipeline and the preprocessor on one sample's info.

        Raises:
            UserError: a step refuses it.
        """
        from mmengine.dataset import pseudo_collate

        packed = self.packed(info, source)
        with torch.no_grad():
            batch = self.model.data_preprocessor(pseudo_collate([packed]), False)  # type: ignore[operator]
        inputs = batch["inputs"]
        voxels = inputs.get("voxels", {}) if isinstance(inputs, dict) else {}
        if "coors" in voxels and len(voxels["coors"]) == 0:
            raise UserError(
                f"{source}: found no point in the config's point_cloud_range, expected some; take another file"
            )
        return Sample(inputs, list(batch["data_samples"]), source)

    def of_points(self, points: np.ndarray, source: str, extra: Mapping[str, Any] | None = None) -> Sample:
        """A sample of float32[N,columns]."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "points.bin"
            file.write_bytes(np.ascontiguousarray(points, np.float32).tobytes())
            return self.run({"lidar_points": {"lidar_path": str(file)}, **(extra or {})}, source)

    def read(self, path: str | Path, share: float = 1.0) -> Sample:
        """A sample of a file: points (.bin), or an infos file (.pkl) whose first sample is taken, files beside it included.

        share: of the points, to see which sizes vary.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: found no such file, expected points (.bin) or mmdet3d infos (.pkl)")
        if path.suffix == ".pkl":
            return self._of_infos(path, share)
        if path.suffix in PICTURES or self.pictures:
            raise UserError(
                f"{path}: found a file, expected infos (.pkl) with the camera's matrices: this config reads pictures"
            )
        if not self.points:
            raise UserError(
                f"{path}: found a file, but the config's pipeline reads none by LoadPointsFromFile; use --use-random-data"
            )
        return self.of_points(self._some(read_points(path, self.columns), share), str(path))

    def _some(self, points: np.ndarray, share: float) -> np.ndarray:
        if share >= 1:
            return points
        chosen = np.random.default_rng(self.seed).random(len(points)) < share
        chosen[0] = True
        return points[chosen]

    def _of_infos(self, path: Path, share: float) -> Sample:
        info = read_infos(path)[0]
        extra: dict[str, Any] = {}
        if self.pictures:
            extra = self._cameras(info, path)
        if not self.points:
            return self.run(extra, str(path))
        name = str(info.get("lidar_points", {}).get("lidar_path", ""))
        file = _beside(path, name, "*.bin")
        if file is None:
            raise UserError(f"{path}: found no file {name} beside it, expected the points that it names")
        return self.of_points(self._some(read_points(file, self.columns), share), str(path), extra)

    def _cameras(self, info: Mapping[str, Any], path: Path) -> dict[str, Any]:
        images = {name: dict(image) for name, image in info.get("images", {}).items() if isinstance(image, Mapping)}
        for image in images.values():
            found = _beside(path, str(image.get("img_path", "")), "*.png")
            if found is not None:
                image["img_path"] = str(found)
        if _step(self.config, "LoadMultiView") is None:
            there = {name: image for name, image in images.items() if Path(str(image.get("img_path", ""))).is_file()}
            camera = next((name for name in (*CAMERAS, *there) if name in there), None)
            if camera is None:
                raise UserError(f"{path}: found none of its pictures beside it, expected the file of one camera")
            return _one_camera(camera, images[camera])
        missing = [name for name, image in images.items() if not Path(str(image.get("img_path", ""))).is_file()]
        if missing or not images:
            raise UserError(f"{path}: found no picture of {', '.join(missing) or 'any camera'} beside it, expected all")
        return {"images": images}

    def first_of_dataset(self, share: float = 1.0) -> Sample:
        """The first sample of the config's own test set.

        Raises:
            UserError: it is not on this disk.
        """
        dataset = test_dataset(self.config, "data_root")
        root = Path(str(dataset.get("data_root", "")))
        file = root / str(dataset.get("ann_file", ""))
        if not file.is_file():
            raise UserError(
                f"{self.config.source}: its data set's {file} is not on this disk; name a file with --data, or take --use-random-data"
            )
        prefix = dict(dataset.get("data_prefix", {}))
        info = read_infos(file)[0]
        extra = {}
        for camera, image in info.get("images", {}).items():
            below = str(prefix.get(camera, prefix.get("img", "")))
            if isinstance(image, dict) and "img_path" in image:
                image["img_path"] = str(root / below / image["img_path"])
        if self.pictures:
            extra = self._cameras(info, file)
        if not self.points:
            return self.run(extra, str(file))
        points = root / prefix.get("pts", "") / str(info["lidar_points"]["lidar_path"])
        return self.of_points(self._some(read_points(points, self.columns), share), str(points), extra)

    def random(self, share: float = 1.0) -> Sample:
        """Made-up data, the same for a seed: points in the model's range, a picture of noise with KITTI's camera."""
        source = f"random data, seed {self.seed}"
        rng = np.random.default_rng(self.seed)
        with tempfile.TemporaryDirectory() as folder:
            extra = self._made_cameras(Path(folder), rng) if self.pictures else {}
            if not self.points:
                return self.run(extra, source)
            low, high = self._range()
            points = rng.random((RANDOM_POINTS, self.columns), np.float32)
            points[:, :3] = low + points[:, :3] * (high - low)
            if self.columns > 4:
                points[:, 4:] = 0 if self.columns == 5 else points[:, 4:] * 255
            return self.of_points(self._some(points, share), source, extra)

    def _range(self) -> tuple[np.ndarray, np.ndarray]:
        found = self.config.get("point_cloud_range")
        if found is None:
            step = _step(self.config, "PointsRangeFilter")
            found = step["point_cloud_range"] if step is not None else (-3.0, 0.0, -1.0, 3.0, 6.0, 2.0)
        values = np.asarray(found, np.float32)
        return values[:3], values[3:]

    def _made_cameras(self, folder: Path, rng: np.random.Generator) -> dict[str, Any]:
        from PIL import Image

        height, width = PICTURE_SIZE
        cam2img = np.array([[721.5, 0, 609.6, 0], [0, 721.5, 172.9, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)
        lidar2cam = np.array([[0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27], [0, 0, 0, 1]], np.float32)
        names = ["CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT"]
        images = {}
        for name in names if _step(self.config, "LoadMultiView") is not None else names[:1]:
            file = folder / f"{name}.png"
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
            images[name] = {
                "img_path": str(file),
                "cam2img": cam2img.tolist(),
                "lidar2cam": lidar2cam.tolist(),
                "lidar2img": (cam2img @ lidar2cam).tolist(),
                "depth2img": (cam2img @ lidar2cam).tolist(),
                "height": height,
                "width": width,
            }
        if len(images) > 1:
            return {"images": images}
        return _one_camera(names[0], images[names[0]])
