"""Samples for training: decoded once, augmented each time, as BEVFusion augments (ImageAug3D, GlobalRotScaleTrans,
RandomFlip3D)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from qat.boxes.geometry import box_heading, box_yaw
from qat.core.errors import UserError
from qat.core.geometry import rasterize_depth
from qat.core.preprocess import normalize
from qat.data.dataset import NuScenesDataset
from qat.data.sample import Keyframe, check_sizes


@dataclass
class AugmentedSample:
    """One augmented sample: img float32[N,3,H,W], depth float32[N,1,H,W], boxes float32[K,9], labels int64[K], and the
    matrices that `CameraBEVDetector.patterns` takes."""

    token: str
    img: np.ndarray
    depth: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    camera_intrinsics: np.ndarray
    camera2lidar: np.ndarray
    img_aug_matrix: np.ndarray
    lidar_aug_matrix: np.ndarray


ROOM = 6 << 30  # bytes of native images that a data set keeps in memory


class AugmentedSet:
    """A data set's keyframes as read (native images as uint8), kept in memory up to `ROOM` bytes.

    Raises:
        UserError: the config has no augmentation.
    """

    def __init__(self, dataset: NuScenesDataset, config: Mapping[str, Any]) -> None:
        for name in ("augment2d", "augment3d", "point_cloud_range"):
            if name not in config:
                raise UserError(
                    f"config: found no {name}, expected its ranges, as BEVFusion's configs have; or use `finetune "
                    "--no-augment`"
                )
        self.dataset = dataset
        self.image_size = tuple(config["image_size"])
        self.resize = config["augment2d"]["resize"][0]
        self.rotate = config["augment2d"]["rotate"]
        self.scale = config["augment3d"]["scale"]
        self.turn = config["augment3d"]["rotate"]
        self.translate = float(config["augment3d"].get("translate", 0.0))
        self.range = config["point_cloud_range"]
        self._kept: dict[int, Keyframe] = {}
        self._room = ROOM

    def __len__(self) -> int:
        return len(self.dataset)

    def _keyframe(self, index: int) -> Keyframe:
        if index in self._kept:
            return self._kept[index]
        keyframe = self.dataset.read(self.dataset.tokens[index])
        check_sizes(keyframe, self.dataset.pipeline)
        self._room -= sum(image.nbytes for image in keyframe.images)
        if self._room > 0:
            self._kept[index] = keyframe
        return keyframe

    def draw(self, index: int, rng: np.random.Generator) -> AugmentedSample:
        """The sample under a random augmentation."""
        return self._augmented(self._keyframe(index), rng)

    def _augmented(self, sample: Keyframe, rng: np.random.Generator) -> AugmentedSample:
        height, width = self.image_size
        images, matrices = [], []
        for native in sample.images:
            matrix = self._image_matrix(native.shape[1], native.shape[0], rng)
            flat = np.array([[matrix[0, 0], matrix[0, 1], matrix[0, 3]], [matrix[1, 0], matrix[1, 1], matrix[1, 3]]])
            warped = cv2.warpAffine(native, flat, (width, height), flags=cv2.INTER_LINEAR)
            images.append(_photometric(warped, rng))
            matrices.append(matrix)
        pipeline = self.dataset.pipeline
        img_aug = np.stack(matrices)
        depth = rasterize_depth(
            sample.points, sample.lidar2image, img_aug, np.eye(4, dtype=np.float32), self.image_size
        )
        boxes, labels, lidar_aug = self._boxes(sample, rng)
        return AugmentedSample(
            token=sample.token,
            img=np.stack([normalize(image, pipeline.mean, pipeline.std) for image in images]),
            depth=depth,
            boxes=boxes,
            labels=labels,
            camera_intrinsics=sample.camera_intrinsics,
            camera2lidar=sample.camera2lidar,
            img_aug_matrix=img_aug,
            lidar_aug_matrix=lidar_aug,
        )

    def draw_boxes(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The sample's boxes and labels after a random transform, and its lidar_aug_matrix."""
        return self._boxes(self._keyframe(index), rng)

    def _boxes(self, sample: Keyframe, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        turn = rng.uniform(*self.turn)
        scale = rng.uniform(*self.scale)
        flip = np.where(rng.random(2) < 0.5, -1.0, 1.0)
        shift = rng.normal(0.0, self.translate, 3)
        kept = sample.gt_points > 0  # BEVFusion trains on what the lidar sees
        boxes, lidar_aug = augment_boxes(sample.gt_boxes[kept], turn, scale, flip, shift)
        inside = (np.abs(boxes[:, :2]) < min(abs(v) for v in self.range[:2])).all(1)
        return boxes[inside], sample.gt_labels[kept][inside], lidar_aug

    def _image_matrix(self, native_width: int, native_height: int, rng: np.random.Generator) -> np.ndarray:
        """Native pixels to network pixels, float32[4,4]: resize, crop, flip, rotation about the centre."""
        height, width = self.image_size
        resize = rng.uniform(*self.resize)
        steps = self.dataset.pipeline.resize_crop
        resize *= steps.factor(native_width, native_height) / steps.resize  # 1 for pictures of the native size
        new_width, new_height = int(native_width * resize), int(native_height * resize)
        left, top = int(rng.uniform(min(0, new_width - width), max(0, new_width - width))), new_height - height
        matrix = np.diag([resize, resize, 1.0])
        matrix[:2, 2] = -left, -top
        if rng.random() < 0.5:
            matrix = np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]]) @ matrix
        theta = np.deg2rad(rng.uniform(*self.rotate))
        c, s = np.cos(theta), np.sin(theta)
        turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1.0]])
        centre = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1.0]])
        matrix = centre @ turn @ np.linalg.inv(centre) @ matrix
        out = np.eye(4, dtype=np.float32)
        out[:2, :2], out[:2, 3] = matrix[:2, :2], matrix[:2, 2]
        return out


def _photometric(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    gain = rng.uniform(0.8, 1.2) * rng.uniform(0.94, 1.06, 3)
    return np.clip(image * gain.astype(np.float32) + np.float32(rng.uniform(-12, 12)), 0, 255)


def augment_boxes(
    boxes: np.ndarray, turn: float, scale: float, flip: np.ndarray, shift: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rotates (radians, anticlockwise), shifts (metres), scales, then mirrors boxes about the lidar's origin, in the
    order of BEVFusion's GlobalRotScaleTrans and RandomFlip3D.

    flip: (±1, ±1), the factors of x and y. shift: (x, y, z), none if left out. Returns the boxes and the lidar_aug_matrix float32[4,4] that does the
    same to points.
    """
    c, s = np.cos(turn), np.sin(turn)
    linear = np.diag([flip[0], flip[1], 1.0]) @ (scale * np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]]))
    out = boxes.copy()
    moved = np.zeros(3) if shift is None else scale * np.array([*flip, 1.0]) * shift
    out[:, :3] = boxes[:, :3] @ linear.T + moved
    out[:, 3:6] = boxes[:, 3:6] * scale
    heading = box_heading(boxes[:, 6]) + turn
    forward = np.stack([np.cos(heading) * flip[0], np.sin(heading) * flip[1]], 1)
    out[:, 6] = box_yaw(np.arctan2(forward[:, 1], forward[:, 0]))
    out[:, 7:9] = boxes[:, 7:9] @ linear[:2, :2].T
    matrix = np.eye(4, dtype=np.float32)
    matrix[:3, :3], matrix[:3, 3] = linear, moved
    return out, matrix
