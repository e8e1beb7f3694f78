"""Frames of points: keyframes of nuScenes-format data, or .bin files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qat.core.errors import UserError
from qat.families.mmdet3d.inputs import read_points
from qat.families.mmdet3d.lidar import LidarFrame

if TYPE_CHECKING:
    from qat.data.dataset import NuScenesDataset


@dataclass
class LidarSample(LidarFrame):
    """A keyframe with what was annotated in it. gt_boxes float32[K,9], gt_labels int64[K], gt_points int64[K]: as
    `qat.data.sample.Keyframe`. There are no pictures."""

    gt_boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 9), np.float32))
    gt_labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    gt_points: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    cameras: tuple[str, ...] = ()
    images: Sequence[np.ndarray] = ()


class PointFiles(Sequence[LidarFrame]):
    """.bin files as frames: a folder's, in the order of their names, or one. There is nothing to score them by.

    columns: those of a point that are kept, of load_dim. timed: the fifth is a time, which is 0 in a single revolution; in files of
    nuScenes it is the number of the beam.
    """

    def __init__(
        self, root: Path, columns: Sequence[int], load_dim: int, frames: int | None = None, timed: bool = False
    ) -> None:
        self.files = sorted(root.rglob("*.bin")) if root.is_dir() else [root]
        if not self.files or not self.files[0].is_file():
            raise UserError(f"{root}: found no .bin file, expected files of float32 points, or nuScenes-format data")
        self.columns, self.load_dim, self.timed, self.split = list(columns), load_dim, timed, "all"
        if frames is not None:
            if not 1 <= frames <= len(self.files):
                raise UserError(
                    f"--frames: found {frames}, {root} has {len(self.files)} files, expected 1 to {len(self.files)}"
                )
            self.files = [self.files[i] for i in np.linspace(0, len(self.files) - 1, frames).round().astype(int)]
        self.tokens = [str(file) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def load(self, token: str) -> LidarFrame:
        """One file's points."""
        points = read_points(token, self.load_dim).copy()
        if self.timed:
            points[:, 4:5] = 0
        return LidarFrame(token, np.ascontiguousarray(points[:, self.columns]))

    def __getitem__(self, index: Any) -> Any:
        return (
            [self[i] for i in range(*index.indices(len(self)))]
            if isinstance(index, slice)
            else self.load(self.tokens[index])
        )

    def __iter__(self) -> Iterator[LidarFrame]:
        return (self.load(token) for token in self.tokens)

    def share(self, rank: int, processes: int, whole_scenes: bool = False) -> list[str]:
        """The tokens of one process of several."""
        return self.tokens[rank::processes]

    def scene_of(self, token: str) -> str:
        """Each file is a scene."""
        return token

    @property
    def nusc(self) -> Any:
        """Raises `UserError`: there are no tables."""
        raise UserError(
            f"{self.files[0].parent}: found .bin files, expected nuScenes-format data: this verb reads its tables"
        )

    def check_annotated(self) -> None:
        """Raises `UserError`."""
        raise UserError(
            f"{self.files[0].parent}: found points without boxes, expected annotated data in nuScenes' format"
        )


def keyframes(
    root: Path, split: str, settings: Mapping[str, Any], version: str | None, frames: int | None
) -> NuScenesDataset:
    """The keyframes of a nuScenes-format split, each a `LidarSample`. settings: a manifest's `pipeline` section."""
    from qat.core.preprocess import ResizeCrop
    from qat.data.dataset import NuScenesDataset
    from qat.data.reading import Pipeline, Reading, Sweeps

    sweeps = Sweeps(**settings["sweeps"])
    limits = [float(value) for value in settings["voxel"]["range"]]
    steps: list[tuple[str, Any]] = [("sweeps", sweeps)] if sweeps.count else []
    nothing = ResizeCrop((1, 1), 1.0, 0.0, None)
    pipeline = Pipeline(nothing, [], [], settings["load_dim"], sweeps, [*steps, ("range", limits)])
    columns = settings["columns"]

    class Keyframes(NuScenesDataset):
        def load(self, token: str) -> Any:
            frame = self.read(token)
            points = np.ascontiguousarray(frame.points[:, columns])
            return LidarSample(token, points, frame.scene, frame.gt_boxes, frame.gt_labels, frame.gt_points)

    return Keyframes(root, split, Reading(pipeline, list(settings["classes"]), ()), version, frames)


def lidar_frames(root: Path, split: str, settings: Mapping[str, Any], version: str | None, frames: int | None) -> Any:
    """The frames of a folder: keyframes where it has nuScenes' tables, else its .bin files."""
    from qat.data.t4 import find

    if (root.is_dir() and next(root.glob("*/sample_data.json"), None) is not None) or find(root):
        return keyframes(root, split, settings, version, frames)
    return PointFiles(root, settings["columns"], settings["load_dim"], frames, bool(settings["sweeps"]))
