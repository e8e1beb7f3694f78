"""Checks the `pipeline` section of a manifest for BEVFusion's flow: types, ranges, and sizes that fit each other.

A manifest may come from elsewhere. Without these checks, a wrong number in it ends in a traceback, or in an allocation of any
size, far from its cause. `qat.families.bevfusion.settings.Settings` writes the section.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.core.checks import either, fail, flag, holds, listed, null, number, section, text
from qat.families.bevfusion.grid import cells, depth_count

# Far above any real detector: a larger frustum, grid or image is a damaged number.
MOST_CAMERAS, MOST_PIXELS, MOST_CELLS, MOST_POINTS, MOST_BOXES = 64, 1 << 26, 1 << 24, 1 << 28, 1 << 20


def _bound(value: Any, where: str) -> None:
    listed(number(-1e6, 1e6), 3, 3)(value, where)
    low, high, step = value
    if not (step > 0 and 1 <= (high - low) / step + 1e-6 <= MOST_CELLS):
        fail(where, value, "[lower, upper, step] with at least one step")


_SIZE = listed(number(1, 1 << 16, whole=True), 2, 2)
_BOX = listed(number(), 6, 6)
_COUNT = number(1, MOST_BOXES, whole=True)
_HEAD = section(
    {"norm_bbox": flag},
    tasks=listed(listed(text, 1), 1),
    bbox_coder=section(
        {"score_threshold": number()},
        pc_range=listed(number(), 2, 6),
        post_center_range=_BOX,
        max_num=_COUNT,
        out_size_factor=number(0, 1e6),
        voxel_size=listed(number(), 2, 3),
    ),
    test_cfg=section(
        {
            "score_threshold": number(),
            "post_center_limit_range": _BOX,
            "nms_scale": either(number(), listed(either(number(), listed(number())))),
            "nms_thr": number(),
            "pre_max_size": _COUNT,
            "min_radius": either(number(), listed(number())),
        },
        nms_type=either(text, listed(text)),
        post_max_size=_COUNT,
    ),
)
PIPELINE = section(
    {"branch": text},
    cameras=listed(text, 1, MOST_CAMERAS),
    classes=listed(text),
    depth_input=flag,
    image=section(
        {"native": _SIZE},
        size=_SIZE,
        resize=number(1e-6, 1e3),
        bottom=number(),
        mean=listed(number(), 3, 3),
        std=listed(number(1e-12, 1e9), 3, 3),
    ),
    points=section({"range": _BOX}),
    vtransform=section(
        image_size=_SIZE,
        feature_size=_SIZE,
        xbound=_bound,
        ybound=_bound,
        zbound=_bound,
        dbound=_bound,
        downsample=number(1, 64, whole=True),
        out_channels=number(1, 1 << 16, whole=True),
    ),
    head=either(null, _HEAD),
    head_maps=listed(text),
)
_NEEDED = ("heatmap", "height", "dim", "rot")  # `qat.boxes.centerhead.decode`
_OPTIONAL = ("reg", "vel")


def _check_sizes(pipeline: Mapping[str, Any], where: str) -> None:
    transform = pipeline["vtransform"]
    height, width = pipeline["image"]["size"]
    if transform["image_size"] != [height, width]:
        fail(f"{where}: vtransform: image_size", transform["image_size"], f"image: size, {[height, width]}")
    rows, columns = transform["feature_size"]
    if len(pipeline["cameras"]) * height * width > MOST_PIXELS:
        fail(f"{where}: image: size", [height, width], f"at most {MOST_PIXELS:,} pixels of all cameras")
    if (bins := depth_count(transform["dbound"])) * rows * columns * len(pipeline["cameras"]) > MOST_POINTS:
        fail(f"{where}: vtransform: dbound", transform["dbound"], f"at most {MOST_POINTS:,} points, not {bins} a pixel")
    if math.prod(cells(transform[name]) for name in ("xbound", "ybound", "zbound")) > MOST_CELLS:
        fail(f"{where}: vtransform: xbound", transform["xbound"], f"at most {MOST_CELLS:,} cells of the grid")


def _check_head(pipeline: Mapping[str, Any], where: str) -> None:
    head = pipeline["head"]
    if head is None:
        if pipeline.get("branch") is None:
            fail(f"{where}: head", None, "a section: only a camera branch alone has no head")
        return
    tasks, test = head["tasks"], head["test_cfg"]
    if (classes := [name for task in tasks for name in task]) != pipeline["classes"]:
        fail(f"{where}: head: tasks", classes, "the classes in their order")
    for key in ("nms_type", "nms_scale", "min_radius"):
        if isinstance(test.get(key), list) and len(test[key]) != len(tasks):
            fail(f"{where}: head: test_cfg: {key}", test[key], f"one for each of {len(tasks)} tasks")
    scales = test.get("nms_scale")
    for task, scale in zip(tasks, scales if isinstance(scales, list) else [], strict=False):
        if not isinstance(scale, list) or len(scale) != len(task):
            fail(f"{where}: head: test_cfg: nms_scale", scale, f"a factor for each of {len(task)} classes")
    kinds = test["nms_type"] if isinstance(test["nms_type"], list) else [test["nms_type"]] * len(tasks)
    for kind in kinds:
        if kind not in ("circle", "rotate"):
            fail(f"{where}: head: test_cfg: nms_type", kind, "circle or rotate")
        for key in ("min_radius",) if kind == "circle" else ("nms_thr", "pre_max_size"):
            if test.get(key) is None:
                fail(f"{where}: head: test_cfg: {key}", None, f"a number: nms_type {kind} needs it")
        if kind == "circle" and not isinstance(test["min_radius"], list):
            fail(f"{where}: head: test_cfg: min_radius", test["min_radius"], f"one for each of {len(tasks)} tasks")
    maps = pipeline["head_maps"]
    allowed = [f"{name}_{task}" for task in range(len(tasks)) for name in (*_NEEDED, *_OPTIONAL)]
    needed = [f"{name}_{task}" for task in range(len(tasks)) for name in _NEEDED]
    if len(set(maps)) != len(maps) or not set(needed) <= set(maps) <= set(allowed):
        fail(f"{where}: head_maps", maps, f"{', '.join(needed[:4])}, … and only maps of the head")


def check_pipeline(path: str | Path, pipeline: object, fix: str) -> None:
    """Raises `UserError` if a manifest's `pipeline` section does not fit `qat.families.bevfusion.flow`."""

    def check() -> None:
        PIPELINE(pipeline, "pipeline")
        assert isinstance(pipeline, dict)
        _check_sizes(pipeline, "pipeline")
        _check_head(pipeline, "pipeline")

    holds(path, check, fix)
