"""The sensor rigs: six cameras and a 32-beam lidar as on the nuScenes cars, or one camera and a 64-beam lidar as on KITTI's.

Frames are right-handed. Ego: x forward, y left, z up, origin on the ground under the rear axle. Camera: x right,
y down, z forward. LIDAR_TOP: x to the vehicle's right, y forward, z up (nuScenes' mounting).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# name: (x, y, z) in metres and yaw in degrees in the ego frame, focal length over image width, seconds before the lidar
# Positions and yaws are nuScenes' nominal rig (https://www.nuscenes.org/nuscenes#data-collection).
CAMERAS: dict[str, tuple[tuple[float, float, float], float, float, float]] = {
    "CAM_FRONT": ((1.70, 0.00, 1.51), 0.0, 1266 / 1600, 0.035),
    "CAM_FRONT_RIGHT": ((1.55, -0.49, 1.50), -56.0, 1266 / 1600, 0.027),
    "CAM_FRONT_LEFT": ((1.55, 0.49, 1.51), 56.0, 1266 / 1600, 0.043),
    "CAM_BACK": ((0.03, 0.00, 1.57), 180.0, 809 / 1600, 0.010),
    "CAM_BACK_LEFT": ((1.04, 0.48, 1.56), 109.0, 1266 / 1600, 0.001),
    "CAM_BACK_RIGHT": ((1.01, -0.48, 1.56), -110.0, 1266 / 1600, 0.019),
}
LIDAR_MAX_RANGE = 70.0


@dataclass(frozen=True)
class Mounting:
    """A car's nominal sensors. cameras: as CAMERAS. centre: the principal point's row over the image's height. lidar: x, y, z in metres
    and yaw in degrees in the ego frame. elevations: degrees of the lowest and the highest of `beams`."""

    cameras: Mapping[str, tuple[tuple[float, float, float], float, float, float]]
    centre: float
    lidar: tuple[float, float, float]
    lidar_yaw: float
    beams: int
    elevations: tuple[float, float]


NUSCENES = Mounting(CAMERAS, 491 / 900, (0.94, 0.0, 1.84), -90.0, 32, (-30.67, 10.67))  # Velodyne HDL-32E
# Camera 2 (P2 of sequences of 2011-09-26) and the Velodyne HDL-64E, http://www.cvlibs.net/datasets/kitti/setup.php. The camera is triggered
# when the lidar looks forward.
KITTI = Mounting(
    {"CAM_FRONT": ((1.03, 0.06, 1.65), 0.0, 721.54 / 1242, 0.0)}, 172.85 / 375, (0.76, 0.0, 1.73), 0.0, 64, (-24.9, 2.0)
)
MOUNTINGS = {"nuscenes": NUSCENES, "kitti": KITTI}


def rotation_z(yaw: float) -> np.ndarray:
    """Rotation about z by `yaw` radians, float64[3,3]."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def pose(rotation: np.ndarray, translation: np.ndarray | tuple[float, float, float]) -> np.ndarray:
    """A homogeneous transform, float64[4,4]."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = translation
    return matrix


@dataclass(frozen=True)
class Camera:
    """One camera: `sensor2ego` float64[4,4], `intrinsic` float64[3,3] in pixels of the native image."""

    name: str
    sensor2ego: np.ndarray
    intrinsic: np.ndarray
    delay: float

    def rays(self, width: int, height: int) -> np.ndarray:
        """Unit directions through pixel centres in the camera frame, float32[height*width,3].

        Pixel (u, v) has its centre at (u, v), as in nuScenes' projection.
        """
        u, v = np.meshgrid(np.arange(width), np.arange(height))
        x = (u - self.intrinsic[0, 2]) / self.intrinsic[0, 0]
        y = (v - self.intrinsic[1, 2]) / self.intrinsic[1, 1]
        directions = np.stack([x, y, np.ones_like(x)], -1).reshape(-1, 3)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        return directions.astype(np.float32)


@dataclass(frozen=True)
class Rig:
    """The sensors of one log: every log's mounting differs a little, as real cars' do."""

    cameras: tuple[Camera, ...]
    lidar2ego: np.ndarray

    @staticmethod
    def sample(rng: np.random.Generator, width: int, height: int, mounting: Mounting = NUSCENES) -> Rig:
        """Draws a mounting: yaw within 0.5°, pitch and roll within 0.3°, position within 2 cm of nominal."""
        cameras = []
        for name, (translation, yaw, focal, delay) in mounting.cameras.items():
            f = focal * width * (1 + rng.normal(0, 0.004))
            cx = width * (0.5 + rng.normal(0, 0.004)) - 0.5
            cy = height * (mounting.centre + rng.normal(0, 0.006)) - 0.5
            intrinsic = np.array([[f, 0, cx], [0, f, cy], [0, 0, 1.0]])
            psi = np.deg2rad(yaw + rng.uniform(-0.5, 0.5))
            forward = np.array([np.cos(psi), np.sin(psi), 0.0])
            right = np.array([np.sin(psi), -np.cos(psi), 0.0])
            axes = np.stack([right, [0.0, 0.0, -1.0], forward], 1)
            pitch, roll = np.deg2rad(rng.uniform(-0.3, 0.3, 2))
            tilt_x = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
            rotation = axes @ tilt_x @ rotation_z(roll)
            position = np.asarray(translation) + rng.uniform(-0.02, 0.02, 3)
            cameras.append(Camera(name, pose(rotation, position), intrinsic, delay))
        yaw = np.deg2rad(mounting.lidar_yaw + rng.uniform(-0.4, 0.4))
        return Rig(tuple(cameras), pose(rotation_z(yaw), np.asarray(mounting.lidar) + rng.uniform(-0.02, 0.02, 3)))


def lidar_rays(azimuths: int, phase: float, mounting: Mounting = NUSCENES) -> tuple[np.ndarray, np.ndarray]:
    """Directions of one revolution in the lidar frame, float32[azimuths*beams,3], and each ray's ring, int[azimuths*beams].

    `phase` in [0, 1) shifts the first azimuth by that part of the spacing, as successive revolutions do.
    """
    azimuth = (np.arange(azimuths) + phase) * (2 * np.pi / azimuths)
    elevation = np.deg2rad(np.linspace(*mounting.elevations, mounting.beams))
    a, e = np.meshgrid(azimuth, elevation, indexing="ij")
    directions = np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], -1).reshape(-1, 3)
    rings = np.tile(np.arange(mounting.beams), azimuths)
    return directions.astype(np.float32), rings
