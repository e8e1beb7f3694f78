"""Reads BEVFusion's test pipeline from a config: how frames of a data set are read for a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qat.core.errors import UserError
from qat.core.preprocess import ResizeCrop
from qat.data.reading import Pipeline, Reading, Sweeps
from qat.families.bevfusion.config import camera_names, test_pipeline


def reading_of(config: Mapping[str, Any]) -> Reading:
    """The test pipeline, classes and cameras of a config; a camera branch's may have no classes."""
    return Reading(read_pipeline(config), list(config.get("object_classes") or ()), tuple(camera_names(config)))


def read_pipeline(config: Mapping[str, Any]) -> Pipeline:
    """Reads `data.test.pipeline`, whose steps and keys the schema checks.

    Raises:
        UserError: a step is unknown, has an option that is not honoured, or augments test data.
    """
    resize_crop, mean, std = None, None, None
    load_dim = int(config.get("load_dim", 5))
    sweeps = Sweeps()
    points: list[tuple[str, Any]] = []
    for step in test_pipeline(config):
        kind = step.get("type")
        if kind == "ImageAug3D":
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
            if (own := step.get("load_dim", load_dim)) != load_dim:
                raise UserError(
                    f"config: data.test.pipeline: {kind}.load_dim: found {own}, expected {load_dim} as LoadPointsFromFile's: a data "
                    "set's files have one format; fix it there"
                )
            sweeps = Sweeps(int(step["sweeps_num"]), bool(step.get("pad_empty_sweeps")), bool(step.get("remove_close")))
            points.append(("sweeps", sweeps))
        elif kind == "PointsRangeFilter":
            points.append(("range", [float(v) for v in step["point_cloud_range"]]))
        if kind == "LoadPointsFromFile":
            load_dim = int(step.get("load_dim", load_dim))
    if resize_crop is None or mean is None or std is None:
        raise UserError("config: data.test.pipeline: expected ImageAug3D and ImageNormalize, found neither or one")
    if list(resize_crop.final_dim) != list(config["image_size"]):
        raise UserError(
            f"config: ImageAug3D.final_dim: found {list(resize_crop.final_dim)}, expected image_size {config['image_size']}"
        )
    return Pipeline(resize_crop, mean, std, load_dim, sweeps, points)
