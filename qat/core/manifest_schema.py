"""What the sections of a manifest must hold for those who read them: kinds, lengths, ranges, and sizes that fit each other.

A manifest may come from elsewhere: without these checks a wrong number in it ends in a traceback, or in an allocation of any
size, far from where it stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qat.core.errors import UserError
from qat.families.bevfusion.grid import cells, depth_count

# Far above any detector's: a frustum, a grid or an image beyond these is a damaged number.
MOST_CAMERAS, MOST_PIXELS, MOST_CELLS, MOST_POINTS, MOST_BOXES = 64, 1 << 26, 1 << 24, 1 << 28, 1 << 20
TEXT = 1000

Check = Callable[[Any, str], None]


class _Wrong(Exception):
    """where, what was found there, what was expected."""


def _fail(where: str, found: Any, expected: str) -> None:
    shown = "none" if found is None else f"{type(found).__name__} {found!r:.40}"
    raise _Wrong(f"{where}: found {shown}, expected {expected}")


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str) or len(value) > TEXT:
        _fail(where, value, "a text")


def _flag(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        _fail(where, value, "true or false")


def _number(low: float = -1e9, high: float = 1e9, whole: bool = False) -> Check:
    def check(value: Any, where: str) -> None:
        known = type(value) is int or (type(value) is float and not whole)
        if not known or not low <= value <= high:
            _fail(where, value, f"a {'whole ' if whole else ''}number from {low:g} to {high:g}")

    return check


def _list(each: Check, least: int = 0, most: int = 10_000) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            size = str(least) if least == most else f"{least} or more" if least else "any number"
            _fail(where, value, f"a list of {size}")
        for index, item in enumerate(value):
            each(item, f"{where}[{index}]")

    return check


def _map(each: Check) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _fail(where, value, "a section")
        for name, item in value.items():
            each(item, f"{where}: {name}")

    return check


def _section(optional: Mapping[str, Check] | None = None, **keys: Check) -> Check:
    """A section with these keys, and with those that are optional perhaps; others are free."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _fail(where, value, "a section")
        for name, each in keys.items():
            each(value.get(name), f"{where}: {name}")
        for name, each in (optional or {}).items():
            if value.get(name) is not None:
                each(value[name], f"{where}: {name}")

    return check


def _or(*checks: Check) -> Check:
    """What the last check takes, or one of those before it."""

    def check(value: Any, where: str) -> None:
        for one in checks[:-1]:
            try:
                return one(value, where)
            except _Wrong:
                continue
        return checks[-1](value, where)

    return check


def _null(value: Any, where: str) -> None:
    if value is not None:
        _fail(where, value, "null")


def _bound(value: Any, where: str) -> None:
    _list(_number(-1e6, 1e6), 3, 3)(value, where)
    low, high, step = value
    if not (step > 0 and 1 <= (high - low) / step + 1e-6 <= MOST_CELLS):
        _fail(where, value, "[lower, upper, step] with one step or more between")


_SIZE = _list(_number(1, 1 << 16, whole=True), 2, 2)
_BOX = _list(_number(), 6, 6)
_COUNT = _number(1, MOST_BOXES, whole=True)
_HEAD = _section(
    {"norm_bbox": _flag},
    tasks=_list(_list(_text, 1), 1),
    bbox_coder=_section(
        {"score_threshold": _number()},
        pc_range=_list(_number(), 2, 6),
        post_center_range=_BOX,
        max_num=_COUNT,
        out_size_factor=_number(0, 1e6),
        voxel_size=_list(_number(), 2, 3),
    ),
    test_cfg=_section(
        {
            "score_threshold": _number(),
            "post_center_limit_range": _BOX,
            "nms_scale": _or(_number(), _list(_or(_number(), _list(_number())))),
            "nms_thr": _number(),
            "pre_max_size": _COUNT,
            "min_radius": _or(_number(), _list(_number())),
        },
        nms_type=_or(_text, _list(_text)),
        post_max_size=_COUNT,
    ),
)
_PIPELINE = _section(
    {"branch": _text},
    cameras=_list(_text, 1, MOST_CAMERAS),
    classes=_list(_text),
    depth_input=_flag,
    image=_section(
        {"native": _SIZE},
        size=_SIZE,
        resize=_number(1e-6, 1e3),
        bottom=_number(),
        mean=_list(_number(), 3, 3),
        std=_list(_number(1e-12, 1e9), 3, 3),
    ),
    points=_section({"range": _BOX}),
    vtransform=_section(
        image_size=_SIZE, feature_size=_SIZE, xbound=_bound, ybound=_bound, zbound=_bound, dbound=_bound
    ),
    head=_or(_null, _HEAD),
    head_maps=_list(_text),
)
_NEEDED = ("heatmap", "height", "dim", "rot")  # `qat.boxes.centerhead.decode`
_OPTIONAL = ("reg", "vel")


def _check_sizes(pipeline: Mapping[str, Any], where: str) -> None:
    transform = pipeline["vtransform"]
    height, width = pipeline["image"]["size"]
    if transform["image_size"] != [height, width]:
        _fail(f"{where}: vtransform: image_size", transform["image_size"], f"image: size, {[height, width]}")
    rows, columns = transform["feature_size"]
    if len(pipeline["cameras"]) * height * width > MOST_PIXELS:
        _fail(f"{where}: image: size", [height, width], f"at most {MOST_PIXELS:,} pixels of all cameras")
    if (bins := depth_count(transform["dbound"])) * rows * columns * len(pipeline["cameras"]) > MOST_POINTS:
        _fail(
            f"{where}: vtransform: dbound", transform["dbound"], f"at most {MOST_POINTS:,} points, not {bins} a pixel"
        )
    if math.prod(cells(transform[name]) for name in ("xbound", "ybound", "zbound")) > MOST_CELLS:
        _fail(f"{where}: vtransform: xbound", transform["xbound"], f"at most {MOST_CELLS:,} cells of the grid")


def _check_head(pipeline: Mapping[str, Any], where: str) -> None:
    head = pipeline["head"]
    if head is None:
        if pipeline.get("branch") is None:
            _fail(f"{where}: head", None, "a section: only of a camera branch alone there is none")
        return
    tasks, test = head["tasks"], head["test_cfg"]
    if (classes := [name for task in tasks for name in task]) != pipeline["classes"]:
        _fail(f"{where}: head: tasks", classes, "the classes in their order")
    for key in ("nms_type", "nms_scale", "min_radius"):
        if isinstance(test.get(key), list) and len(test[key]) != len(tasks):
            _fail(f"{where}: head: test_cfg: {key}", test[key], f"one for each of {len(tasks)} tasks")
    scales = test.get("nms_scale")
    for task, scale in zip(tasks, scales if isinstance(scales, list) else [], strict=False):
        if not isinstance(scale, list) or len(scale) != len(task):
            _fail(f"{where}: head: test_cfg: nms_scale", scale, f"a factor for each of {len(task)} classes")
    kinds = test["nms_type"] if isinstance(test["nms_type"], list) else [test["nms_type"]] * len(tasks)
    for kind in kinds:
        if kind not in ("circle", "rotate"):
            _fail(f"{where}: head: test_cfg: nms_type", kind, "circle or rotate")
        for key in ("min_radius",) if kind == "circle" else ("nms_thr", "pre_max_size"):
            if test.get(key) is None:
                _fail(f"{where}: head: test_cfg: {key}", None, f"a number: nms_type {kind} needs it")
        if kind == "circle" and not isinstance(test["min_radius"], list):
            _fail(f"{where}: head: test_cfg: min_radius", test["min_radius"], f"one for each of {len(tasks)} tasks")
    maps = pipeline["head_maps"]
    allowed = [f"{name}_{task}" for task in range(len(tasks)) for name in (*_NEEDED, *_OPTIONAL)]
    needed = [f"{name}_{task}" for task in range(len(tasks)) for name in _NEEDED]
    if len(set(maps)) != len(maps) or not set(needed) <= set(maps) <= set(allowed):
        _fail(f"{where}: head_maps", maps, f"{', '.join(needed[:4])}, … and none that are not the head's")


def check_pipeline(path: str | Path, pipeline: object, mend: str) -> None:
    """Raises `UserError` where a manifest's `pipeline` section is not what `qat.runtime.Pipeline` needs."""
    where = "pipeline"
    try:
        _PIPELINE(pipeline, where)
        assert isinstance(pipeline, dict)
        _check_sizes(pipeline, where)
        _check_head(pipeline, where)
    except _Wrong as wrong:
        raise UserError(f"{path}: {wrong}: damaged; {mend}") from None


_SHAPE = _list(_or(_text, _number(-1, 1 << 40, whole=True)), 0, 32)
_TENSORS = _map(_section(dtype=_text, shape=_SHAPE))
_VERIFICATION = _section(
    frames=_list(_text),
    seed=_number(0, 1 << 62, whole=True),
    batch=_number(1, 1024, whole=True),
    file=_text,
    sha256=_text,
    stored=_map(_list(_number(0, 1 << 30, whole=True))),
    made_sha256=_text,
)
_DECIBELS = _list(_or(_null, _number(-1e9, 1e9)))
_PAIR = _section(
    tensor=_text,
    node=_text,
    module=_text,
    dtype=_text,
    scale=_list(_number(0, 1e30), 1, 1 << 20),
    zero_point=_list(_number(-128, 255, whole=True), 1, 1 << 20),
)
_SITES = _section(
    frame=_number(0, 1 << 30, whole=True), pairs=_list(_PAIR), outputs=_list(_text), problems=_list(_text)
)
_VERIFIED_PART = _section(
    {"sites": _SITES},
    opset=_number(1, 1000, whole=True),
    inputs=_TENSORS,
    outputs=_TENSORS,
    verification=_map(
        _section(frames=_section({"float_tolerance_db": _DECIBELS}, tolerance_db=_list(_number(-1e9, 1e9))))
    ),
)


def check_verification(path: str | Path, manifest: Mapping[str, Any], mend: str) -> None:
    """Raises `UserError` where what `bevqat verify` reads of a manifest is missing or does not fit together."""
    try:
        about = manifest.get("verification")
        _VERIFICATION(about, "verification")
        assert isinstance(about, dict)
        for name, part in manifest["parts"].items():
            _VERIFIED_PART(part, name)
            if (unknown := set(part["verification"]) - set(part["outputs"])) or not part["verification"]:
                _fail(f"{name}: verification", sorted(unknown), "the part's outputs")
            stored = about["stored"].get(name)
            if not stored or max(stored) >= len(about["frames"]):
                _fail(f"verification: stored: {name}", stored, "numbers of the frames")
            for output, row in part["verification"].items():
                for key in ("tolerance_db", "float_tolerance_db"):
                    if key in row["frames"] and len(row["frames"][key]) <= max(stored):
                        _fail(f"{name}: verification: {output}", row["frames"], "a tolerance for each frame")
            if "sites" in part and part["sites"]["frame"] not in stored:
                _fail(f"{name}: sites: frame", part["sites"]["frame"], "one of the stored frames")
    except _Wrong as wrong:
        raise UserError(f"{path}: {wrong}: damaged; {mend}") from None
