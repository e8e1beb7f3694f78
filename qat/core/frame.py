"""One preprocessed keyframe, as detectors, pipelines and verification read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class SampleTensors(Protocol):
    """One preprocessed keyframe of N cameras, float32 (`qat.data.Sample` is one).

    img [N,3,H,W] normalised; depth [N,1,H,W] metres, 0 where no point falls; matrices [N,4,4], lidar_aug_matrix [4,4].
    """

    img: np.ndarray
    depth: np.ndarray
    camera_intrinsics: np.ndarray
    camera2lidar: np.ndarray
    img_aug_matrix: np.ndarray
    lidar_aug_matrix: np.ndarray


class Frame(SampleTensors, Protocol):
    """`SampleTensors` with a name."""

    token: str


@dataclass
class FrameArrays:
    """A `Frame` of arrays that no data set gave."""

    token: str
    img: np.ndarray
    depth: np.ndarray
    camera_intrinsics: np.ndarray
    camera2lidar: np.ndarray
    img_aug_matrix: np.ndarray
    lidar_aug_matrix: np.ndarray
