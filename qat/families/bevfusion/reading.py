"""How frames of a data set are read for a model: BEVFusion's test pipeline, out of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qat.core.errors import UserError
from qat.core.preprocess import ResizeCrop
from qat.data.reading import Pipeline, Reading, Sweeps
from qat.families.bevfusion.config import camera_names, test_pipeline

# Steps that load what a camera detector does not need, or only repack.
PASSED_OVER = {
    "LoadAnnotations3D",
    "LoadBEVSegmentation",
    "LoadRadarPointsMultiSweeps",
    "DefaultFormatBundle3D",
    "Collect3D",
    "GTDepth",
    "LoadMultiViewImageFromFiles",
    "LoadPointsFromFile",
}


def reading_of(config: Mapping[str, Any]) -> Reading:
    """The test pipeline, classes and cameras of a config; a camera branch's may have no classes."""
    return Reading(read_pipeline(config), list(config.get("object_classes") or ()), tuple(camera_names(config)))


def read_pipeline(config: Mapping[str, Any]) -> Pipeline:
    """Reads `data.test.pipeline`.

    Raises:
        UserError: a step is unknown, or augments test data.
    """
    resize_crop, mean, std = None, None, None
    load_dim = int(config.get("load_dim", 5))
    sweeps = Sweeps()
    points: list[tuple[str, Any]] = []
    for step in test_pipeline(config):
        kind = step.get("type")
        if (step.get("reduce_beams") or 32) < 32 or step.get("load_augmented"):
            raise UserError(
                f"config: data.test.pipeline: {kind}: found reduce_beams {step.get('reduce_beams')}, load_augmented "
                f"{step.get('load_augmented')}, expected 32 and null: fewer beams and painted points are not supported"
            )
        if kind == "ImageAug3D":
            if step.get("is_train") or np.any(step.get("rot_lim", 0)):
                raise UserError(
                    "config: data.test.pipeline: ImageAug3D: found augmentation, expected is_train: false and rot_lim [0, 0]"
                )
            height, width = step["final_dim"]
            resize_crop = ResizeCrop(
                (height, width),
                float(np.mean(step["resize_lim"])),
                float(np.mean(step["bot_pct_lim"])),
                tuple(config["native_size"]) if config.get("native_size") is not None else None,
            )
        elif kind == "ImageNormalize":
            mean, std = list(step["mean"]), list(step["std"])
        elif kind == "LoadPointsFromMultiSweeps":
            sweeps = Sweeps(int(step["sweeps_num"]), bool(step.get("pad_empty_sweeps")), bool(step.get("remove_close")))
            points.append(("sweeps", sweeps))
        elif kind == "PointsRangeFilter":
            points.append(("range", [float(v) for v in step["point_cloud_range"]]))
        elif kind == "GlobalRotScaleTrans":
            if (
                step.get("is_train")
                or np.any(step.get("rot_lim", 0))
                or np.any(np.asarray(step.get("resize_lim", 1)) != 1)
            ):
                raise UserError(
                    "config: data.test.pipeline: GlobalRotScaleTrans: found augmentation, expected none at test time"
                )
        elif kind not in PASSED_OVER:
            raise UserError(f"config: data.test.pipeline: found step {kind!r}, which is not known here")
        if kind == "LoadPointsFromFile":
            load_dim = int(step.get("load_dim", load_dim))
    if resize_crop is None or mean is None or std is None:
        raise UserError("config: data.test.pipeline: expected ImageAug3D and ImageNormalize, found neither or one")
    if list(resize_crop.final_dim) != list(config["image_size"]):
        raise UserError(
            f"config: ImageAug3D.final_dim: found {list(resize_crop.final_dim)}, expected image_size {config['image_size']}"
        )
    return Pipeline(resize_crop, mean, std, load_dim, sweeps, points)
