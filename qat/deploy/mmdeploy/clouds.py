"""The point clouds that a deployment is tried on, and those that INT8 is calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qat.core.errors import UserError
from qat.families.mmdet3d.config import test_dataset
from qat.families.mmdet3d.frames import PointFiles
from qat.families.mmdet3d.lidar import LidarFrame

CALIB_FRAMES = 32
OTHERWISE = "another config, or .bin files, with --calib-dataset-cfg"


@dataclass
class Cloud:
    """points: float32[M,C] in the model's columns. image: uint8[H,W,3] RGB of a camera that sees it, and lidar2img, where there is one."""

    name: str
    points: np.ndarray
    image: np.ndarray | None = None
    lidar2img: np.ndarray | None = None


def read_cloud(path: str | Path, described: dict[str, Any], prefix: str = "") -> Cloud:
    """One cloud of a file: points (.bin), or mmdet3d infos (.pkl), whose first sample is taken, with the files beside it. Infos of the
    same name beside a .bin file say which picture shows it.

    described: the model's description (`qat.families.mmdet3d.description`). prefix: the folder of points in its data set (`points_prefix`).

    Raises:
        UserError: it cannot be read, or has other columns.
    """
    from qat.families.mmdet3d.inputs import read_infos

    path = Path(path)
    if path.suffix not in (".bin", ".pkl"):
        raise UserError(f"{path}: found the ending {path.suffix!r}, expected points (.bin) or mmdet3d infos (.pkl)")
    infos = path.with_suffix(".pkl")
    info = read_infos(infos)[0] if path.suffix == ".pkl" or infos.is_file() else {}
    if path.suffix == ".pkl":
        name = str(dict(info.get("lidar_points") or {}).get("lidar_path", ""))
        found = _beside(path, name, prefix)
        if found is None:
            raise UserError(f"{path}: found no file {name or 'of points'} beside it, expected the points that it names")
        path = found
    files = PointFiles(path, described["columns"], described["load_dim"], None, bool(described["sweeps"]))
    return Cloud(str(path), files.load(str(path)).points, *_picture(info, infos))


def points_prefix(config: Any) -> str:
    """The folder of the points in the data set of an mmdet3d config (`qat.families.mmdet3d.config.read`)."""
    return str(dict(test_dataset(config, "data_prefix").get("data_prefix") or {}).get("pts", ""))


def _beside(infos: Path, name: str, prefix: str = "") -> Path | None:
    """The file that infos name: relative to them, in the data set's folder, or by its name anywhere below."""
    folder = infos.parent
    places = (folder / name, folder / prefix / name, folder / Path(name).name)
    found = next((place for place in places if name and place.is_file()), None)
    return found or next(iter(sorted(folder.rglob(Path(name).name))), None) if name else None


def _picture(info: dict[str, Any], infos: Path) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The picture of the first camera whose file is there, and what projects points onto it."""
    from PIL import Image

    for camera in dict(info.get("images") or {}).values():
        if not isinstance(camera, dict) or "lidar2img" not in camera:
            continue
        file = _beside(infos, str(camera.get("img_path", "")))
        if file is not None:
            with Image.open(file) as picture:
                return np.asarray(picture.convert("RGB")), np.asarray(camera["lidar2img"], np.float64)
    return None, None


class CalibrationFrames(Sequence[LidarFrame]):
    """Frames of the data set of an mmdet3d config, points by its own pipeline, as a calibration takes them."""

    def __init__(self, model_cfg: str | Path, kind: str = "val", count: int | None = None) -> None:
        """model_cfg: a config with a {kind}_dataloader. count: frames, evenly spaced over the set; None for `CALIB_FRAMES`, or as many as there are.

        Raises:
            UserError: the data set is not on this disk, or has fewer frames.
        """
        from qat.deploy.mmdeploy.frames import TestFrames
        from qat.families.mmdet3d.config import read

        config = read(model_cfg)
        if f"{kind}_dataloader" not in config:
            raise UserError(
                f"{config.source}: found no {kind}_dataloader, expected the data set that INT8 is calibrated on; or name {OTHERWISE}"
            )
        config.test_dataloader = config[f"{kind}_dataloader"]
        try:
            self._frames = TestFrames(config)
        except UserError as error:
            raise UserError(f"INT8: {error}; or name {OTHERWISE}") from error
        total = len(self._frames)
        count = min(CALIB_FRAMES, total) if count is None else count
        if not 1 <= count <= total:
            raise UserError(f"--calib-frames: found {count}, expected 1 to {total}, the frames of {config.source}")
        self.tokens = [str(n) for n in np.linspace(0, total - 1, count).round().astype(int)]

    def __len__(self) -> int:
        return len(self.tokens)

    def load(self, token: str) -> LidarFrame:
        """One frame's points."""
        return LidarFrame(self._frames.names[int(token)], self._frames.points(int(token)), token)

    def __getitem__(self, index: Any) -> Any:
        return [self.load(t) for t in self.tokens[index]] if isinstance(index, slice) else self.load(self.tokens[index])

    def share(self, rank: int, processes: int, whole_scenes: bool = False) -> list[str]:
        """The tokens of one process of several."""
        return self.tokens[rank::processes]


def calibration_frames(
    given: str | Path | None, model_cfg: str | Path, described: dict[str, Any], count: int | None
) -> Any:
    """What INT8 is calibrated on.

    Args:
        given: an mmdet3d config, whose val set is taken; a folder of .bin files, or one file; None for `model_cfg`'s val set. count:
            frames, None for `CALIB_FRAMES`, or as many as there are.

    Raises:
        UserError: there is nothing, or less.
    """
    if given is None or str(given).endswith(".py"):
        return CalibrationFrames(given or model_cfg, count=count)
    columns, load_dim, timed = described["columns"], described["load_dim"], bool(described["sweeps"])
    total = len(PointFiles(Path(given), columns, load_dim, None, timed))
    wanted = min(CALIB_FRAMES, total) if count is None else count
    if not 1 <= wanted <= total:
        raise UserError(f"--calib-frames: found {wanted}, expected 1 to {total}, the files of {given}")
    return PointFiles(Path(given), columns, load_dim, wanted, timed)
