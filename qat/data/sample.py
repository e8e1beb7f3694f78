"""One keyframe: as it is read, and as the network's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qat.core.errors import PictureSizeError
from qat.core.geometry import rasterize_depth
from qat.core.preprocess import normalize
from qat.data.reading import Pipeline


@dataclass(kw_only=True)
class Keyframe:
    """A recorded keyframe. N cameras; float32 unless stated otherwise; metres, native pixels.

    images: N of uint8[h,w,3] RGB, native size. camera_intrinsics, camera2lidar, lidar2image: [N,4,4]. lidar2ego,
    ego2global: [4,4]. points [M,5]: x, y, z, intensity, seconds before the keyframe, in the lidar frame, gathered and
    filtered as the pipeline says. gt_boxes [K,9] and gt_labels int64[K]: in the convention of
    `qat.boxes.detections.Detections`, the annotated objects of the config's classes; gt_points int64[K]: lidar points
    in each, −1 if not counted. scene: the token of its scene.
    """

    token: str
    cameras: tuple[str, ...]
    images: Sequence[np.ndarray]
    camera_intrinsics: np.ndarray
    camera2lidar: np.ndarray
    lidar2image: np.ndarray
    points: np.ndarray
    lidar2ego: np.ndarray
    ego2global: np.ndarray
    gt_boxes: np.ndarray
    gt_labels: np.ndarray
    gt_points: np.ndarray
    scene: str = ""


@dataclass(kw_only=True)
class Sample(Keyframe):
    """A keyframe ready for the network.

    img [N,3,H,W]: normalised. depth [N,1,H,W]: metres, 0 = no point. images uint8[N,H,W,3]: before normalisation.
    native_sizes: (h, w) of each picture as it was read. img_aug_matrix [N,4,4]: native pixels to the network's. lidar_aug_matrix [4,4]: the identity.
    """

    native_sizes: tuple[tuple[int, int], ...]
    images: np.ndarray  # type: ignore[assignment]  # one array: they have one size now
    img: np.ndarray
    depth: np.ndarray
    img_aug_matrix: np.ndarray
    lidar_aug_matrix: np.ndarray


def camera_matrices(intrinsics: Sequence[np.ndarray], camera2lidar: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """N matrices [3,3] and N [4,4] → camera_intrinsics, camera2lidar and lidar2image, float32[N,4,4]. N may be 0."""
    moved = np.asarray(camera2lidar, np.float64).reshape(-1, 4, 4)
    full = np.tile(np.eye(4), (len(moved), 1, 1))
    full[:, :3, :3] = np.asarray(intrinsics).reshape(-1, 3, 3)
    matrices = {"camera_intrinsics": full, "camera2lidar": moved, "lidar2image": full @ np.linalg.inv(moved)}
    return {name: matrix.astype(np.float32) for name, matrix in matrices.items()}


def check_sizes(keyframe: Keyframe, pipeline: Pipeline) -> None:
    """Raises `PictureSizeError` where a picture does not have the model's size (`ResizeCrop.factor`)."""
    for camera, image in zip(keyframe.cameras, keyframe.images, strict=True):
        try:
            pipeline.resize_crop.factor(image.shape[1], image.shape[0])
        except PictureSizeError as error:
            raise PictureSizeError(f"frame {keyframe.token}: {camera}: {error}") from None


def prepare(keyframe: Keyframe, pipeline: Pipeline) -> Sample:
    """Resizes, crops and normalises the images and draws the depth maps, as the test pipeline says.

    Raises:
        PictureSizeError: a picture does not have the model's size.
    """
    steps = pipeline.resize_crop
    check_sizes(keyframe, pipeline)
    images = [steps.apply(image) for image in keyframe.images]
    img_aug = np.stack([steps.matrix(image.shape[1], image.shape[0]) for image in keyframe.images])
    eye = np.eye(4, dtype=np.float32)
    return Sample(
        **{**vars(keyframe), "images": np.stack(images)},
        native_sizes=tuple((image.shape[0], image.shape[1]) for image in keyframe.images),
        img=np.stack([normalize(image, pipeline.mean, pipeline.std) for image in images]),
        depth=rasterize_depth(keyframe.points, keyframe.lidar2image, img_aug, eye, steps.final_dim),
        img_aug_matrix=img_aug,
        lidar_aug_matrix=eye,
    )
