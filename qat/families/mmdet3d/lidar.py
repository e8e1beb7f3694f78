"""What the flows of lidar detectors share: frames of points, and what is made up of them. No torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qat.core.checks import flag, holds, listed, number, section, text
from qat.core.console import note
from qat.core.errors import UserError
from qat.families.flow import Flow
from qat.families.mmdet3d.pillars import Canvas, batch_of_pillars, columns_of, grid_of, scatter
from qat.plan import BATCH, Axis, Op, Part, Plan, Tensor

BEAMS, AZIMUTHS = 32, 1000  # of a made-up revolution
GROUND = -1.6  # metres, of the made-up ground below the sensor
USUAL = 8000  # pillars
BEFORE_HEAD = ("points", "input_features", "coors", "pillar_features", "spatial_features")  # tensors of `pillar_plan`
COUNT = {"whole": True}
_NUMBERS = section(
    size=listed(number(1e-3, 100), 3, 3),
    range=listed(number(-1e4, 1e4), 6, 6),
    max_points=number(1, 10_000, whole=True),
    max_voxels=number(1, 10_000_000, whole=True),
)


@dataclass
class LidarFrame:
    """points: float32[M,C] in the lidar frame: x, y, z (metres) and what else the model takes. scene: its scene's token."""

    token: str
    points: np.ndarray
    scene: str = ""


@dataclass
class RawPoints:
    """A made-up or recorded input of a benchmark."""

    name: str
    points: np.ndarray
    sample: Any = None

    @property
    def raw(self) -> tuple[Any, ...]:
        """The arguments of `Flow.prepare`."""
        return (self.points,)

    def moved(self, place: int) -> RawPoints:
        """The sensor `place` millimetres elsewhere."""
        moved = self.points.copy()
        moved[:, 0] += np.float32(place * 1e-3)
        return replace(self, points=moved)


def pillar_plan(settings: Mapping[str, Any], maps: Mapping[str, int | None], strides: Mapping[str, int]) -> Plan:
    """points ─► (voxelize) ─► input_features ─► pts_voxel_encoder ─► pillar_features ─► (scatter) ─► spatial_features ─►
    pts_backbone_neck_head ─► maps.

    maps: each output's channels. strides: cells of the grid to one of the map.
    """
    voxel, channels = settings["voxel"], settings["channels"]
    ny, nx = grid_of(settings)
    most = voxel["max_voxels"]
    outputs = tuple(maps)
    return Plan(
        inputs=("points",),
        steps=(
            Op("voxelize", ("points",), ("input_features", "coors")),
            Part("pts_voxel_encoder", {"input_features": "input_features"}, ("pillar_features",), scope="encoder"),
            Op("scatter", ("pillar_features", "coors"), ("spatial_features",)),
            Part("pts_backbone_neck_head", {"spatial_features": "spatial_features"}, outputs, scope="detector"),
        ),
        outputs=outputs,
        tensors={
            "points": Tensor(("points", 1 + settings["decoration"]["columns"])),
            "input_features": Tensor(("voxels", "points_a_voxel", columns_of(settings["decoration"]))),
            "coors": Tensor(("voxels", 4), "int32"),
            "pillar_features": Tensor(("voxels", 1, channels)),
            "spatial_features": Tensor((BATCH, channels, ny, nx)),
            **{name: Tensor((BATCH, maps[name], ny // strides[name], nx // strides[name])) for name in outputs},
        },
        reported={"pillar_features": ("pillar_features",), "spatial_features": ("spatial_features",), "heads": outputs},
        judged={"heads": outputs},
        axes={
            "points": Axis(1, 4 * USUAL),
            "voxels": Axis(1, min(USUAL, most), most),
            "points_a_voxel": Axis(1, voxel["max_points"], voxel["max_points"]),
        },
    )


def pillar_settings(**more: Any) -> Any:
    """A check of a manifest's `pipeline` section: what every pillar detector has, and `more`."""
    return section(
        family=text,
        classes=listed(text, 1, 1000),
        load_dim=number(3, 32, **COUNT),
        columns=listed(number(0, 31, **COUNT), 3, 32),
        channels=number(1, 65536, **COUNT),
        voxel=_NUMBERS,
        decoration=section(
            columns=number(3, 32, **COUNT), cluster=flag, centre=number(0, 3, **COUNT), distance=flag, legacy=flag
        ),
        **more,
    )


class PointsFlow(Flow):
    """The host's side of a detector that takes points. A subclass has its plan, `section`, the check of its settings, and made-up
    frames. fewest: points that a cloud must have."""

    section: Any
    fewest = 0

    def __init__(self, settings: Mapping[str, Any], threads: int = 0, source: str = "pipeline") -> None:
        super().__init__(settings, threads, source)
        self.plan = self.plan_of(settings)
        self.classes = list(settings["classes"])
        self.columns = self.columns_in(settings)

    @classmethod
    @abstractmethod
    def plan_of(cls, settings: Mapping[str, Any]) -> Plan:
        """The plan of a manifest's `pipeline` section."""

    @classmethod
    def columns_in(cls, settings: Mapping[str, Any]) -> int:
        """How many values of a point the model takes."""
        found: int = settings["columns"]
        return found

    @abstractmethod
    def clouds(self, root: Path, split: str, version: str | None, count: int | None) -> Any:
        """The frames of a folder."""

    @classmethod
    def check(cls, path: str | Path, settings: object, fix: str) -> None:
        """As `Flow.check`."""
        holds(path, lambda: cls.section(settings, "pipeline"), fix)

    def feeds(self, frames: Sequence[Any]) -> dict[str, np.ndarray]:
        """As `Flow.feeds`: the clouds one after another, each point with its cloud's number before it."""
        rows = [
            np.concatenate([np.full((len(frame.points), 1), n, np.float32), frame.points[:, : self.columns]], 1)
            for n, frame in enumerate(frames)
        ]
        return {"points": np.concatenate(rows)}

    def prepare(self, *raw: Any) -> LidarFrame:
        """One cloud. raw: points, float32[M,≥C]: x, y, z in metres and what else the model takes, sweeps merged. Those that are not
        finite are left out.

        Raises:
            UserError: another dtype, fewer columns, fewer points than the model takes.
        """
        (points,) = raw
        if points.ndim != 2 or points.shape[1] < self.columns or points.dtype != np.float32:
            shape = ",".join(map(str, points.shape))
            raise UserError(
                f"pipeline: points: found {points.dtype}[{shape}], expected float32[M,{self.columns} or more]"
            )
        finite = np.isfinite(points[:, : self.columns]).all(1)
        frame = LidarFrame("points", points[finite][:, : self.columns])
        self.check_frame(frame, "points")
        return frame

    def check_frame(self, frame: Any, token: str) -> None:
        """As `Flow.check_frame`."""
        points = getattr(frame, "points", None)
        if points is None or points.ndim != 2 or points.shape[1] < self.columns or len(points) < self.fewest:
            found = "none" if points is None else list(points.shape)
            with_some = " with a point in it" if self.fewest else ""
            raise UserError(
                f"frame {token}: points: found {found}, expected float32[M,{self.columns} or more]{with_some}"
            )

    def raw_frames(self, count: int, seed: int = 0) -> list[Any]:
        """As `Flow.raw_frames`."""
        return [RawPoints(f"made-up:{n}", self.made_frame(seed * 1000 + n).points) for n in range(count)]

    def recorded(self, root: Path, split: str, version: str | None, count: int | None) -> list[Any]:
        """The clouds of a data set's frames."""
        return [RawPoints(frame.token, frame.points) for frame in self.clouds(root, split, version, count)]


class PillarFlow(PointsFlow):
    """The host's side of a detector that scatters pillars. A subclass has the plan, the decoding, and `section`."""

    words = {"pillar_features": "pillars", "spatial_features": "BEV, scattered"}  # noqa: RUF012
    _told = False

    @classmethod
    def columns_in(cls, settings: Mapping[str, Any]) -> int:
        """As `PointsFlow.columns_in`."""
        found: int = settings["decoration"]["columns"]
        return found

    def clouds(self, root: Path, split: str, version: str | None, count: int | None) -> Any:
        """As `PointsFlow.clouds`: keyframes, or .bin files."""
        from qat.families.mmdet3d.frames import lidar_frames

        return lidar_frames(root, split, self.settings, version, count)

    def ops(self) -> Mapping[str, Any]:
        """Voxelization with decoration, and the scatter."""

        canvas, grid = Canvas(), grid_of(self.settings)

        def placed(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            memory = canvas if self.keep_buffers else None
            return {"spatial_features": scatter(given["pillar_features"], given["coors"], grid, memory)}

        return {"voxelize": self.voxelize, "scatter": placed}

    def voxelize(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """points float32[M,1+C] → input_features, coors."""
        features, cells, left_out = batch_of_pillars(given["points"], self.settings)
        self.note_left_out(left_out)
        return {"input_features": features, "coors": cells}

    def note_left_out(self, count: int) -> None:
        """Says once where a cloud has more cells than the model takes. count: how many more."""
        if count and not self._told:
            self._told = True
            most = self.settings["voxel"]["max_voxels"]
            note(
                f"voxels: found {most + count:,}, expected at most max_voxels {most:,}: the last {count:,} are left out, as mmdet3d does"
            )

    def feeds(self, frames: Sequence[Any]) -> dict[str, np.ndarray]:
        """As `PointsFlow.feeds`; an empty cloud is a point that is out of every range."""
        nowhere = np.full((1, self.columns), 1e9, np.float32)
        return super().feeds([frame if len(frame.points) else replace(frame, points=nowhere) for frame in frames])

    def made_frame(self, seed: int, noise: bool = False) -> LidarFrame:
        """As `Flow.made_frame`: rings on a ground with boxes standing on it, or points anywhere in the range."""
        random = np.random.default_rng(seed)
        low, high = np.asarray(self.settings["voxel"]["range"], np.float64).reshape(2, 3)
        points = np.zeros((BEAMS * AZIMUTHS, self.columns), np.float32)
        if noise:
            points[:, :3] = low + random.random((len(points), 3)) * (high - low)
        else:
            points[:, :3] = _revolution(random, float(np.abs([low[:2], high[:2]]).max()))
        if self.columns > 3:
            points[:, 3] = random.random(len(points))
        return LidarFrame(f"made-up:{seed}", points)


def _revolution(random: np.random.Generator, farthest: float) -> np.ndarray:
    """float64[BEAMS·AZIMUTHS,3]: where the beams of a lidar meet a flat ground, or an upright box in front of it."""
    down = np.deg2rad(np.linspace(1, 25, BEAMS))[:, None]
    azimuth = np.linspace(-np.pi, np.pi, AZIMUTHS, endpoint=False)[None]
    reach = np.minimum(-GROUND / np.tan(down), farthest) * np.ones_like(azimuth)
    for _ in range(12):
        at, far, wide = random.uniform(-np.pi, np.pi), random.uniform(5, farthest * 0.8), random.uniform(0.5, 3)
        hit = np.abs((azimuth - at + np.pi) % (2 * np.pi) - np.pi) < np.arctan2(wide, far)
        reach = np.where(hit & (reach > far), far, reach)
    reach = reach + random.normal(scale=0.02, size=reach.shape)
    xyz = [reach * np.cos(azimuth), reach * np.sin(azimuth), -reach * np.tan(down)]
    return np.stack(xyz, -1).reshape(-1, 3)
