"""Generates keyframes for exports and latency without data, and checks whether a frame fits a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qat.core.errors import UserError
from qat.core.frame import FrameArrays
from qat.core.geometry import camera_ring
from qat.core.noise import words
from qat.core.preprocess import normalize

_IMAGES, _DEPTH = range(2, 4)  # streams
_PATCHES = 100  # and one for each size of patch


def random_frame(settings: Mapping[str, Any], seed: int) -> FrameArrays:
    """A generated keyframe: noise for images, one pixel in twenty with a depth, the cameras in a ring.

    img and depth have the same bits on every machine; the noise is the sum of four 16-bit numbers, made to mean 0 and
    variance 1.

    Args:
        settings: a manifest's `pipeline` section.
    """
    count = len(settings["cameras"])
    height, width = settings["image"]["size"]
    low, high, _ = settings["vtransform"]["dbound"]
    quarters = words(_IMAGES, count * 3 * height * width, seed).view("<u2").reshape(-1, 4)
    noise = (quarters.sum(axis=1, dtype=np.int64) - 2 * 65535) / math.sqrt((65536**2 - 1) / 3)
    places = words(_DEPTH, count * height * width, seed)
    metres = low + (high - low) * ((places >> np.uint64(32)) / 2.0**32)
    depth = np.where((places & np.uint64(0xFFFFFFFF)) < 2**32 // 20, metres, 0.0)
    intrinsics, camera2lidar = camera_ring(count, (height, width))
    unmoved = np.tile(np.eye(4), (count, 1, 1))
    arrays = (
        noise.reshape(count, 3, height, width),
        depth.reshape(count, 1, height, width),
        intrinsics,
        camera2lidar,
        unmoved,
        np.eye(4),
    )
    return FrameArrays(f"random:{seed}", *(array.astype(np.float32) for array in arrays))


def made_frame(settings: Mapping[str, Any], seed: int) -> FrameArrays:
    """A generated keyframe with the statistics of real ones, for exports without data; the same bits on every machine.

    img: nested patches of 32, 8 and 2 pixels, dark and bright. depth: a lidar's lines, every fourth row below a horizon at two
    fifths of the height, one pixel in eight, on a plane with objects on it. The cameras form a ring, as in `random_frame`.

    Args:
        settings: a manifest's `pipeline` section.
    """
    frame = random_frame(settings, seed)
    count, (height, width) = len(settings["cameras"]), settings["image"]["size"]

    def patches(size: int, channels: int) -> np.ndarray:
        rows, columns = -(-height // size), -(-width // size)
        drawn = words(_PATCHES + size, count * rows * columns * channels, seed) & np.uint64(255)
        made = drawn.astype(np.int64).reshape(count, rows, columns, channels)
        return made.repeat(size, 1).repeat(size, 2)[:, :height, :width]

    pixels = ((4 * patches(32, 3) + 2 * patches(8, 3) + patches(2, 3)) // 7).astype(np.uint8)
    image = settings["image"]
    frame.img = np.stack([normalize(one, image["mean"], image["std"]) for one in pixels])
    low, high, _ = settings["vtransform"]["dbound"]
    rows = np.arange(height, dtype=np.float64)
    plane = low + (high - low) * 0.04 * height / np.maximum(rows - 0.4 * height, 0.04 * height)
    nearer = 1 - patches(16, 1)[..., 0] / 512.0
    metres = np.maximum(plane[None, :, None] * nearer, low)
    hits = (words(_DEPTH, count * height * width, seed) & np.uint64(7)).reshape(count, height, width) == 0
    hits &= ((rows >= 0.4 * height) & (rows % 4 == 0))[None, :, None]
    frame.depth = np.where(hits, metres, 0.0).astype(np.float32)[:, None]
    frame.token = f"made-up:{seed}"
    return frame


def check_frame(settings: Mapping[str, Any], frame: Any, token: str) -> None:
    """Raises `UserError` if a frame's arrays do not fit the parts: number of cameras, image size, dtype."""
    cameras = settings["cameras"]
    count, size = len(cameras), list(settings["image"]["size"])
    if len(frame.img) != count:
        raise UserError(
            f"frame {token}: found {len(frame.img)} cameras, expected {count} ({', '.join(cameras)}); use frames "
            "of the model's cameras"
        )
    shapes = {
        "img": [count, 3, *size],
        "depth": [count, 1, *size],
        "camera_intrinsics": [count, 4, 4],
        "camera2lidar": [count, 4, 4],
        "img_aug_matrix": [count, 4, 4],
        "lidar_aug_matrix": [4, 4],
    }
    for name, shape in shapes.items():
        array = getattr(frame, name)
        if list(array.shape) != shape or array.dtype != np.float32:
            raise UserError(
                f"frame {token}: {name}: found {array.dtype}{list(array.shape)}, expected float32{shape}; preprocess the "
                "frame with this model's config"
            )
        if not np.isfinite(array).all():
            raise UserError(f"frame {token}: {name}: found NaN or infinite values, expected finite ones")
