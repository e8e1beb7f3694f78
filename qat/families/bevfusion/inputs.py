"""Inputs for latency measurements: generated frames, or keyframes of a data set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qat.core.errors import UserError
from qat.core.frame import Calibration, SampleTensors
from qat.core.geometry import camera_ring
from qat.core.preprocess import ResizeCrop
from qat.families.bevfusion.frames import random_frame

POINTS = 30_000  # points in one revolution of a 32-beam lidar, about
_STEP = 1e-3  # metres


@dataclass(frozen=True)
class Inputs:
    """One frame of a robot's sensor data.

    images: uint8[h,w,3] RGB of each camera, native size. points: float32[M,5]. sample: the same frame preprocessed, the input
    of a camera branch.
    """

    name: str
    images: list[np.ndarray]
    points: np.ndarray
    calibration: Calibration
    sample: SampleTensors | None = None

    @property
    def raw(self) -> tuple[Any, ...]:
        """The arguments of `Pipeline.__call__`."""
        return self.images, self.points, self.calibration

    def moved(self, place: int) -> Inputs:
        """The same frame with the cameras `place` millimetres ahead of the lidar: another valid geometry.

        On nuScenes, and whenever cameras and lidar do not fire at the same time, every frame has a different geometry.
        """
        shift = np.zeros((4, 4), np.float32)
        shift[0, 3] = place * _STEP
        calibration = replace(self.calibration, camera2lidar=self.calibration.camera2lidar + shift)
        sample: Any = self.sample
        if sample is not None:
            sample = replace(sample, camera2lidar=sample.camera2lidar + shift)
        return replace(self, calibration=calibration, sample=sample)


def native_size(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the pictures that the model was made for. If the manifest lacks them, a size that fits the settings'
    resize and crop, 16:9 like nuScenes' if the crop allows."""
    if native := settings["image"].get("native"):
        return native[0], native[1]
    height, width = settings["image"]["size"]
    resize, bottom = settings["image"]["resize"], settings["image"]["bottom"]
    w = math.ceil(width / resize)
    return max(math.ceil(height / resize / (1 - bottom)), round(w * 9 / 16)), w


def made_up(settings: Mapping[str, Any], count: int, seed: int = 0) -> list[Inputs]:
    """Frames as expensive as real ones: pictures with large and small structure, points on the ground and on objects around
    the car, a ring of cameras. The same seed gives the same frames.

    Args:
        settings: a manifest's `pipeline` section.
    """
    cameras = len(settings["cameras"])
    height, width = native_size(settings)
    intrinsics, camera2lidar = (m.astype(np.float32) for m in camera_ring(cameras, (height, width)))
    frames = []
    for n in range(count):
        random = np.random.default_rng([seed, n])
        images = []
        for _ in range(cameras):
            coarse = random.integers(0, 256, (max(height // 16, 2), max(width // 16, 2), 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
            noise = random.integers(-12, 13, smooth.shape, dtype=np.int16)
            images.append(np.clip(smooth + noise, 0, 255).astype(np.uint8))
        azimuth = random.uniform(0, 2 * np.pi, POINTS)
        distance = 2 + random.gamma(2.0, 8.0, POINTS)
        ground = random.random(POINTS) < 0.6
        z = np.where(ground, -1.8, random.uniform(-1.8, 1.5, POINTS))
        points = np.stack(
            [
                distance * np.cos(azimuth),
                distance * np.sin(azimuth),
                z,
                random.uniform(0, 255, POINTS),
                np.zeros(POINTS),
            ],
            1,
        ).astype(np.float32)
        sample = random_frame(settings, seed + n) if settings.get("branch") is not None else None
        frames.append(Inputs(f"random:{seed}:{n}", images, points, Calibration(intrinsics, camera2lidar), sample))
    return frames


def _reading(settings: Mapping[str, Any]) -> Any:
    """The `Reading` of frames from a manifest, which holds no config."""
    from qat.data.reading import Pipeline, Reading

    image, limits = settings["image"], settings["points"]["range"]
    native = tuple(image["native"]) if image.get("native") else None
    crop = ResizeCrop(tuple(image["size"]), image["resize"], image["bottom"], native)
    points = [("range", limits)] if limits else []
    return Reading(
        Pipeline(crop, image["mean"], image["std"], point_steps=points), settings["classes"], tuple(settings["cameras"])
    )


def recorded(
    settings: Mapping[str, Any], root: Path, split: str, version: str | None, count: int | None
) -> list[Inputs]:
    """Keyframes of a nuScenes-format data set, spread over the split. Only the keyframe's lidar points are used, because a
    manifest does not record the number of sweeps that a model was trained with.

    Raises:
        UserError: the devkit is not installed, or the data cannot be read or has fewer frames.
    """
    try:
        from qat.data.dataset import NuScenesDataset
        from qat.data.sample import prepare
    except ModuleNotFoundError as error:
        raise UserError(
            f"--data: the package {error.name} is not installed, expected nuscenes-devkit's; fix by: pip install "
            "nuscenes-devkit, or omit --data for generated frames"
        ) from None
    dataset = NuScenesDataset(root, split, _reading(settings), version, count)
    frames = []
    for token in dataset.tokens:
        frame = dataset.read(token)
        calibration = Calibration(frame.camera_intrinsics, frame.camera2lidar)
        sample = prepare(frame, dataset.pipeline) if settings.get("branch") is not None else None
        frames.append(Inputs(token, list(frame.images), frame.points, calibration, sample))
    return frames
