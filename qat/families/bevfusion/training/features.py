"""Caches the frozen image part's outputs, so that the rest trains at a fraction of the cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qat.core.progress import counted
from qat.families.bevfusion.detector import CameraBEVDetector
from qat.families.bevfusion.training.augment import TrainSet


class FeatureCache:
    """Depth weights and context (half precision) of every keyframe under `variants` image augmentations.

    A draw chooses the rotation, scale and mirroring of the BEV grid, which do not affect the image part.
    """

    def __init__(
        self,
        model: CameraBEVDetector,
        sets: list[TrainSet],
        variants: int,
        seed: int,
        device: torch.device,
        log: Callable[[str], None],
    ) -> None:
        self.model, self.sets = model, sets
        self.entries: list[dict[str, Any]] = []
        todo = [(v, i, j) for v in range(variants) for i, dataset in enumerate(sets) for j in range(len(dataset))]
        started = time.monotonic()
        for count, (variant, i, j) in enumerate(counted("image features", todo, len(todo)), 1):
            sample = sets[i].draw(j, np.random.default_rng([seed, 3, variant, i, j]))
            with torch.inference_mode():
                img, depth = (torch.from_numpy(x)[None].to(device) for x in (sample.img, sample.depth))
                weights, context = (x.half().cpu() for x in model.lift(img, depth))
            matrices = (sample.camera_intrinsics, sample.camera2lidar, sample.img_aug_matrix)
            self.entries.append({"where": (i, j), "weights": weights, "context": context, "matrices": matrices})
            if count % 100 == 0 or count == len(todo):
                left = (time.monotonic() - started) / count * (len(todo) - count) / 60
                log(f"image features {count}/{len(todo)} | {left:.0f} min left")

    def __len__(self) -> int:
        return len(self.entries)

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The features, boxes, labels and pooling pattern of one entry under a random augmentation of the BEV grid."""
        entry = self.entries[index]
        i, j = entry["where"]
        boxes, labels, lidar_aug = self.sets[i].draw_boxes(j, rng)
        intrinsics, camera2lidar, img_aug = entry["matrices"]
        pattern = self.model.vtransform.pattern(intrinsics, camera2lidar, img_aug, lidar_aug)
        return {
            "weights": entry["weights"],
            "context": entry["context"],
            "boxes": boxes,
            "labels": labels,
            "pattern": pattern,
        }
