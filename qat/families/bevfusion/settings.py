"""A detector's settings for the torch-free Pipeline, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qat.core.errors import UserError
from qat.families.bevfusion.config import camera_names, is_camera_branch, needs_depth, test_pipeline

VTRANSFORM_KEYS = (
    "type", "in_channels", "out_channels", "image_size", "feature_size", "xbound", "ybound", "zbound", "dbound",
)  # fmt: skip
HEAD_KEYS = ("type", "tasks", "bbox_coder", "test_cfg")


def head_maps(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the head's outputs, `{map}_{task}`: each task's heatmap, then `common_heads` in the config's order."""
    head = config["model"]["heads"]["object"]
    return tuple(f"{name}_{task}" for task in range(len(head["tasks"])) for name in ("heatmap", *head["common_heads"]))


def pipeline_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's `pipeline` section, plain JSON values.

    Of a camera branch, `branch` is "camera", `head` null, and there are no classes and no head maps.

    Raises:
        UserError: the config's test pipeline lacks ImageAug3D or ImageNormalize.
    """
    steps: dict[str, Mapping[str, Any]] = {}
    limits: list[float] | None = None
    for step in test_pipeline(config):
        steps[step["type"]] = step
        if step["type"] == "PointsRangeFilter":
            limits = [float(v) for v in step["point_cloud_range"]]
    for name in ("ImageAug3D", "ImageNormalize"):
        if name not in steps:
            raise UserError(f"config: data.test.pipeline: found {', '.join(steps)}, expected {name} among them")
    augment, normalize = steps["ImageAug3D"], steps["ImageNormalize"]
    transform = config["model"]["encoders"]["camera"]["vtransform"]
    alone = is_camera_branch(config)
    head = {} if alone else config["model"]["heads"]["object"]
    return {
        "family": "bevfusion",
        "branch": "camera" if alone else None,
        "cameras": list(camera_names(config)),
        "classes": [] if alone else list(config["object_classes"]),
        "depth_input": needs_depth(config),
        "image": {
            "size": list(config["image_size"]),
            "resize": float(np.mean(augment["resize_lim"])),
            "bottom": float(np.mean(augment["bot_pct_lim"])),
            "mean": list(normalize["mean"]),
            "std": list(normalize["std"]),
            **({"native": list(config["native_size"])} if config.get("native_size") is not None else {}),
        },
        "points": {"range": limits},
        "vtransform": {
            **{key: transform[key] for key in VTRANSFORM_KEYS},
            "downsample": transform.get("downsample", 1),
        },
        "head": None if alone else {**{key: head[key] for key in HEAD_KEYS}, "norm_bbox": head.get("norm_bbox", True)},
        "head_maps": [] if alone else list(head_maps(config)),
    }
