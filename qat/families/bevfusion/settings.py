"""A detector's settings for the torch-free Pipeline, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field

from qat.core.errors import UserError
from qat.core.validation import Expected, Section, number, validated, whole, wrong
from qat.families.bevfusion.config import camera_names, is_camera_branch, needs_depth, test_pipeline
from qat.families.bevfusion.manifest import MOST_BOXES, MOST_CAMERAS, MOST_CELLS

VTRANSFORM_KEYS = (
    "type", "in_channels", "out_channels", "image_size", "feature_size", "xbound", "ybound", "zbound", "dbound",
)  # fmt: skip
HEAD_KEYS = ("type", "tasks", "bbox_coder", "test_cfg")

Text = Annotated[str, Field(max_length=1000), Expected("a text")]
Number = Annotated[float, number("a number", -1e9, 1e9)]
Pixels = Annotated[list[Annotated[int, whole(1, 1 << 16)]], Field(min_length=2, max_length=2)]
Box = Annotated[list[Number], Field(min_length=6, max_length=6)]
Count = Annotated[int, whole(1, MOST_BOXES)]
Divisor = Annotated[float, number("a number from 1e-12 to 1e9", 1e-12, 1e9)]


def _has_steps(bound: list[float]) -> list[float]:
    low, high, step = bound
    if not (step > 0 and 1 <= (high - low) / step + 1e-6 <= MOST_CELLS):
        raise wrong("", "[lower, upper, step] with at least one step")
    return bound


Coordinate = Annotated[float, number("a number from -1e6 to 1e6", -1e6, 1e6)]
Bound = Annotated[list[Coordinate], Field(min_length=3, max_length=3), AfterValidator(_has_steps)]


class Image(Section):
    size: Pixels
    native: Pixels | None = None
    resize: Annotated[float, number("a number from 1e-6 to 1000", 1e-6, 1e3)]
    bottom: Number
    mean: Annotated[list[Number], Field(min_length=3, max_length=3)]
    std: Annotated[list[Divisor], Field(min_length=3, max_length=3)]


class Points(Section):
    range: Box | None = None


class Transform(Section):
    image_size: Pixels
    feature_size: Pixels
    xbound: Bound
    ybound: Bound
    zbound: Bound
    dbound: Bound
    downsample: Annotated[int, whole(1, 64)]
    out_channels: Annotated[int, whole(1, 1 << 16)]


class Coder(Section):
    pc_range: Annotated[list[Number], Field(min_length=2, max_length=6)]
    post_center_range: Box
    max_num: Count
    out_size_factor: Annotated[float, number("a number from 0 to 1e6", 0, 1e6)]
    voxel_size: Annotated[list[Number], Field(min_length=2, max_length=3)]
    score_threshold: Number | None = None


class Test(Section):
    nms_type: Annotated[Text | list[Text], Expected("a text, or a list of them")]
    post_max_size: Count
    pre_max_size: Count | None = None
    nms_thr: Number | None = None
    nms_scale: Annotated[Number | list[Number | list[Number]] | None, Expected("numbers")] = None
    min_radius: Annotated[Number | list[Number] | None, Expected("numbers")] = None
    score_threshold: Number | None = None
    post_center_limit_range: Box | None = None


class Head(Section):
    tasks: Annotated[list[Annotated[list[Text], Field(min_length=1)]], Field(min_length=1)]
    bbox_coder: Coder
    test_cfg: Test
    norm_bbox: bool | None = None


class Settings(Section):
    """The manifest's `pipeline` section for writing. `qat.families.bevfusion.manifest` reads it."""

    branch: Text | None = None
    cameras: Annotated[list[Text], Field(min_length=1, max_length=MOST_CAMERAS)]
    classes: list[Text]
    depth_input: bool
    image: Image
    points: Points
    vtransform: Transform
    head: Head | None = None
    head_maps: list[Text]


def head_maps(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the head's outputs, `{map}_{task}`: each task's heatmap, then `common_heads` in the config's order."""
    head = config["model"]["heads"]["object"]
    return tuple(f"{name}_{task}" for task in range(len(head["tasks"])) for name in ("heatmap", *head["common_heads"]))


def pipeline_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's `pipeline` section, plain JSON values.

    For a camera branch, `branch` is "camera", `head` is null, and there are no classes and no head maps.

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
    settings: dict[str, Any] = {
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
    validated(Settings, settings, "config", under="pipeline")
    return settings
