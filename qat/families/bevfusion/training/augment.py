"""Augmented training samples, with the object that each feature pixel shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qat.data import NuScenesDataset
from qat.families.bevfusion.augment import AugmentedSample, AugmentedSet
from qat.families.bevfusion.training.auxiliary import PixelTargets, pixel_targets


@dataclass
class TrainSample(AugmentedSample):
    """An augmented sample, with the object that each feature pixel shows."""

    pixels: PixelTargets


class TrainSet(AugmentedSet):
    """Augmented samples of a data set, with targets for the image part."""

    def __init__(self, dataset: NuScenesDataset, config: Mapping[str, Any]) -> None:
        super().__init__(dataset, config)
        feature_size = config["model"]["encoders"]["camera"]["vtransform"]["feature_size"]
        self.stride = self.image_size[0] // feature_size[0]

    def draw(self, index: int, rng: np.random.Generator) -> TrainSample:
        """The sample under a random augmentation."""
        keyframe = self._keyframe(index)
        sample = self._augmented(keyframe, rng)
        pixels = pixel_targets(
            keyframe.gt_boxes,
            keyframe.gt_labels,
            keyframe.gt_points > 0,
            keyframe.lidar2image,
            keyframe.camera2lidar,
            sample.img_aug_matrix,
            self.image_size,
            self.stride,
            len(self.dataset.classes),
        )
        return TrainSample(**vars(sample), pixels=pixels)
