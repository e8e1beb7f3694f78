"""One preprocessed keyframe, as detectors, pipelines and verification read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

# The order of nuScenes' cameras in BEVFusion's info files, and so of every [N, …] input, unless a config has `cameras`.
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")


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
    """A `Frame` of arrays that do not come from a data set."""

    token: str
    img: np.ndarray
    depth: np.ndarray
    camera_intrinsics: np.ndarray
    camera2lidar: np.ndarray
    img_aug_matrix: np.ndarray
    lidar_aug_matrix: np.ndarray


@dataclass(frozen=True)
class Calibration:
    """Where the cameras are: float[N,4,4] each, in the order of the manifest's cameras.

    camera_intrinsics: camera frame to native pixels. camera2lidar: camera frame to the lidar frame at the moment of
    the points, in metres (on nuScenes: through both ego poses).
    """

    camera_intrinsics: np.ndarray
    camera2lidar: np.ndarray

    @property
    def lidar2image(self) -> np.ndarray:
        """Lidar frame to native pixels, float32[N,4,4]."""
        inverse = np.linalg.inv(self.camera2lidar.astype(np.float64))
        return (self.camera_intrinsics.astype(np.float64) @ inverse).astype(np.float32)
