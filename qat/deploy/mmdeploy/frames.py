"""The frames of the data set that a model config's test_dataloader names: points by its own pipeline, and a camera for pictures."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from qat.core.errors import UserError
from qat.families.mmdet3d.config import test_dataset
from qat.families.mmdet3d.description import classes_of
from qat.families.mmdet3d.inputs import CAMERAS, Reader, read_info_file, read_points

if TYPE_CHECKING:
    from mmengine.config import Config


@dataclass
class View:
    """A picture that shows a frame. image: uint8[H,W,3] RGB. lidar2img: float64[4,4], to pixels times depth."""

    image: np.ndarray
    lidar2img: np.ndarray


class TestFrames:
    """The frames of a config's test set, in its order.

    infos: what the annotation file holds, with the frames that are tested. classes: the model's, of the data set's metainfo. names: one
    for each frame, of which files are named: the token, or the frame's number.

    The annotation file is read by this project's unpickler: nothing in it runs. The pipeline is mmdet3d's own.
    """

    __test__ = False  # it is no test, whatever pytest makes of its name

    def __init__(self, config: Config) -> None:
        """config: as `qat.families.mmdet3d.config.read` returns it.

        Raises:
            UserError: the data set is not on this disk, is of another form, or its pipeline reads no points.
        """
        self._config, self.source = config, str(config.source)
        dataset = test_dataset(config, "ann_file")
        self.kind = str(dataset.get("type", "")).split(".")[-1]
        self.root = Path(str(dataset.get("data_root") or ""))
        self._prefix = {key: str(value) for key, value in dict(dataset.get("data_prefix") or {}).items()}
        self.file = self.root / str(dataset.get("ann_file") or "")
        if not self.file.is_file():
            raise self._fail(
                "ann_file", f"{self.file}, which is not on this disk", "mmdet3d infos (.pkl)",
                "set --cfg-options test_dataloader.dataset.data_root=DIR/",
            )  # fmt: skip
        self._reader = Reader(config, nn.Identity())
        if not self._reader.points:
            raise self._fail(
                "pipeline", "no LoadPointsFromFile", "one that reads points", "take a lidar detector's config"
            )
        self.infos = read_info_file(self.file)
        self.infos["data_list"] = self._chosen(dataset.get("indices"))
        self.classes = classes_of(config)
        self._camera = dataset.get("default_cam_key")
        self.names = [_name(info, n) for n, info in enumerate(self.records)]

    def _fail(self, key: str, found: str, expected: str, fix: str) -> UserError:
        return UserError(f"{self.source}: test_dataloader.dataset: {key}: found {found}, expected {expected}; {fix}")

    def _chosen(self, indices: Any) -> list[dict[str, Any]]:
        """mmengine's `indices`: so many of the first frames, or these."""
        listed: list[dict[str, Any]] = self.infos["data_list"]
        if indices is None:
            return listed
        wanted = range(indices) if isinstance(indices, int) else list(indices)
        if not len(wanted) or not all(isinstance(n, int) and 0 <= n < len(listed) for n in wanted):
            raise self._fail("indices", str(indices), f"numbers of its {len(listed)} frames", "choose fewer")
        return [listed[n] for n in wanted]

    @property
    def records(self) -> list[dict[str, Any]]:
        """Each frame's record in the annotation file."""
        listed: list[dict[str, Any]] = self.infos["data_list"]
        return listed

    def __len__(self) -> int:
        return len(self.records)

    def points(self, index: int) -> np.ndarray:
        """A frame's points as the config's pipeline makes them, sweeps merged: float32[M,C].

        Raises:
            UserError: a file is missing or damaged.
        """
        info = copy.deepcopy({key: value for key, value in self.records[index].items() if key not in _LABELS})
        where = f"{self.file}: {self.names[index]}"
        lidar = info.get("lidar_points")
        if not isinstance(lidar, dict) or "lidar_path" not in lidar:
            raise UserError(f"{where}: found no lidar_points.lidar_path, expected the file of its points")
        path = self.root / self._prefix.get("pts", "") / str(lidar["lidar_path"])
        read_points(path, self._reader.columns)
        lidar["lidar_path"] = info["lidar_path"] = str(path)
        info["num_pts_feats"] = lidar.get("num_pts_feats", self._reader.columns)
        for sweep in info.get("lidar_sweeps", ()):
            own = sweep["lidar_points"]
            name = str(own["lidar_path"])
            prefix = self._prefix.get("pts" if "samples" in name else "sweeps")
            own["lidar_path"] = str(self.root / name if prefix is None else self.root / prefix / Path(name).name)
        points = self._reader.packed(info, str(path))["inputs"]["points"]
        return np.ascontiguousarray(points.numpy(), np.float32)

    def view(self, index: int, camera: str | None = None) -> View | None:
        """The picture of one camera, with what projects onto it; None where the infos or the disk do not have it.

        camera: None for the data set's default, or the front.
        """
        from PIL import Image

        images = {
            key: one for key, one in dict(self.records[index].get("images") or {}).items() if isinstance(one, dict)
        }
        order = [name for name in (camera, self._camera, *CAMERAS, *images) if name in images]
        for name in order:
            path = self._picture(name, str(images[name].get("img_path") or ""))
            matrix = _projection(images[name])
            if path is not None and matrix is not None:
                with Image.open(path) as picture:
                    return View(np.asarray(picture.convert("RGB")), matrix)
        return None

    def _picture(self, camera: str, name: str) -> Path | None:
        """Where the config's prefix says, or where KITTI and nuScenes have their pictures: a lidar detector's config names no prefix."""
        if not name:
            return None
        prefix = self._prefix.get(camera, self._prefix.get("img", ""))
        folders = (prefix, f"samples/{camera}", "training/image_2", "testing/image_2")
        return next((path for path in (self.root / folder / name for folder in folders) if path.is_file()), None)


_LABELS = ("instances", "cam_instances")  # a test pipeline reads none


def _name(info: Mapping[str, Any], index: int) -> str:
    """Its token, or its number with six digits; of letters and digits alone, because files have it."""
    for value in (info.get("token"), info.get("sample_idx")):
        if isinstance(value, int):
            return f"{value:06d}"
        if isinstance(value, str) and value.replace("-", "").isalnum():
            return value
    return f"{index:06d}"


def _projection(image: Mapping[str, Any]) -> np.ndarray | None:
    """lidar2img, or cam2img · lidar2cam; float64[4,4]."""

    def square(rows: Sequence[Sequence[float]]) -> np.ndarray:
        given, matrix = np.asarray(rows, np.float64), np.eye(4)
        matrix[: given.shape[0], : given.shape[1]] = given
        return matrix

    if "lidar2img" in image:
        return square(image["lidar2img"])
    if "cam2img" in image and "lidar2cam" in image:
        return square(image["cam2img"]) @ square(image["lidar2cam"])
    return None
