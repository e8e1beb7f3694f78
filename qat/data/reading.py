"""How the keyframes of a data set are read: cameras, classes, and the processing of pictures and points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qat.core.preprocess import ResizeCrop


@dataclass
class Sweeps:
    """LoadPointsFromMultiSweeps at test time: the newest `count` earlier revolutions."""

    count: int = 0
    pad_empty: bool = False
    remove_close: bool = False
    radius: float = 1.0  # metres; BEVFusion's default


@dataclass
class Pipeline:
    """Processing of pictures and points. `point_steps` keeps the order of the steps on points."""

    resize_crop: ResizeCrop
    mean: list[float]
    std: list[float]
    load_dim: int = 5
    sweeps: Sweeps = field(default_factory=Sweeps)
    point_steps: list[tuple[str, Any]] = field(default_factory=list)


@dataclass
class Reading:
    """How a family reads a data set. cameras: channels in the order of the inputs."""

    pipeline: Pipeline
    classes: list[str]
    cameras: tuple[str, ...]


def reading_for(config: Mapping[str, Any] | Reading) -> Reading:
    """The `Reading` of a config, by its family."""
    if isinstance(config, Reading):
        return config
    from qat.families import family_of

    return family_of(config, "config").reading(config)
