"""Reading and checking configs in BEVFusion's schema."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml

from qat.core.errors import UserError
from qat.core.frame import CAMERAS
from qat.families.bevfusion.config_tree import defaults_above, has_expressions, inherit, resolve
from qat.families.bevfusion.config_values import (
    LARGEST,
    check_sections,
    check_sizes,
    check_steps,
    check_training,
    check_values,
)
from qat.families.bevfusion.grid import CLOSE, cells, depth_count
from qat.families.bevfusion.schema import MAPS, problems

Config = dict[str, Any]
Branch = Literal["camera"]

# Far above any config's; what is beyond them is damaged, or meant to fill the memory.
MOST_BYTES, MOST_VALUES, MOST_NESTED = 1 << 20, 100_000, 100
MOST_POINTS = 1 << 28

WHOLE = ("model", "image_size", "object_classes")  # a config that is no part of a tree has them

TYPES = {
    "model.encoders.camera.backbone": ("ResNet", "SwinTransformer", "timm"),
    "model.encoders.camera.neck": ("GeneralizedLSSFPN", "SECONDFPN"),
    "model.encoders.camera.vtransform": ("LSSTransform", "DepthLSSTransform"),
    "model.decoder.backbone": ("GeneralizedResNet", "SECOND"),
    "model.decoder.neck": ("LSSFPN", "SECONDFPN"),
    "model.heads.object": ("CenterHead",),
}
CAMERA_BRANCH = "model.encoders.camera"
# Of a whole model's config, what the camera branch, its data and its training read besides the branch and the test pipeline.
_KEPT = (
    "image_size",
    "point_cloud_range",
    "object_classes",
    "load_dim",
    "augment2d",
    "augment3d",
    "cameras",
    "native_size",
)
_TAKE_OUT = (
    "calibrate and export-camera take the camera branch out of a camera+lidar model with --prefix encoders.camera"
)


class _Checker:
    """Looks values up by dotted path and words what is wrong with them."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config, self.source = config, source

    def fail(self, path: str, found: object, expected: str) -> UserError:
        text = repr(found)
        text = text if len(text) <= 120 else text[:119] + "…"
        found_text = "missing" if found is None else f"found {text}"
        return UserError(f"{self.source}: {path}: {found_text}, expected {expected}; fix it there")

    def get(self, path: str) -> Any:
        value: Any = self.config
        for key in path.split("."):
            if not isinstance(value, Mapping) or value.get(key) is None:
                raise UserError(f"{self.source}: {path}: missing; a dumped BEVFusion configs.yaml has it")
            value = value[key]
        return value

    def numbers(self, path: str, count: int) -> list[float]:
        value = self.get(path)
        good = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == count
        if not good or not all(_is_number(v) for v in value):
            raise self.fail(path, value, f"{count} numbers")
        return list(value)

    def size(self, path: str) -> tuple[int, int]:
        height, width = self.numbers(path, 2)
        if not (1 <= height == int(height) and 1 <= width == int(width)):
            raise self.fail(path, [height, width], "[height, width], whole numbers of pixels or cells")
        return int(height), int(width)

    def section(self, path: str) -> Mapping[str, Any]:
        value = self.get(path)
        if not isinstance(value, Mapping):
            raise self.fail(path, value, "a section")
        return value

    def options(self, path: str, kind: str) -> None:
        """Every option under `path` is one that a `kind` here understands."""
        for name, found, expected in problems(kind, self.get(path)):
            raise self.fail(f"{path}.{name}", found, expected)

    def one_a_task(self, path: str, tasks: int) -> None:
        value = self.get(path)
        if not isinstance(value, list) or len(value) != tasks:
            raise self.fail(path, value, f"a list of {tasks}, one for each task")

    def bound(self, path: str) -> int:
        low, high, step = self.numbers(path, 3)
        steps = (high - low) / step if step > 0 else 0
        if not 1 - CLOSE <= steps <= LARGEST or abs(steps - round(steps)) > CLOSE:
            raise self.fail(path, [low, high, step], "[lower, upper, step] with a whole number of steps between")
        return (depth_count if path.endswith(".dbound") else cells)([low, high, step])


def _is_number(value: Any) -> bool:
    """Whether it is a finite number of a size that configs have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _find_interpolation(value: Any, path: str = "") -> tuple[str, str] | None:
    if isinstance(value, str) and "${" in value:
        return path, value
    items: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list):
        items = [(str(i), v) for i, v in enumerate(value)]
    for key, item in items:
        if found := _find_interpolation(item, f"{path}.{key}" if path else key):
            return found
    return None


def check_config(config: Mapping[str, Any], source: str = "config", branch: Branch | None = None) -> None:
    """Raises `UserError` naming the key, what was found and what was expected, for a config we cannot build.

    branch: "camera" checks what `camera_branch` takes out of a whole model's config and nothing else: another encoder,
    a fuser, decoder or heads may be anything, or absent. A config that is a camera branch alone needs no telling.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"{source}: found {type(config).__name__}, expected a mapping with BEVFusion's keys")
    check = _Checker(config, source)
    alone = branch == "camera" or is_camera_branch(config)
    if has_steps(config, source) or alone:
        _check_resolved(check, "data.test.pipeline", test_pipeline(config, source))
    _check_resolved(check, CAMERA_BRANCH if alone else "model", _branch_of(config) if alone else config.get("model"))
    check_sections(config, check.fail, alone)
    if branch == "camera" or is_camera_branch(config):
        check.get(CAMERA_BRANCH)
        check_values(config, check.fail, camera_alone=True)
        _check_camera(check)
        check_sizes(config, check.fail, camera_alone=True)
        return
    check.numbers("image_size", 2)
    check.numbers("point_cloud_range", 6)
    model = check.section("model")
    encoders = check.section("model.encoders")
    for sensor, encoder in encoders.items():
        if sensor != "camera" and encoder is not None:
            expected = f"null: only the camera branch is supported; {_TAKE_OUT}"
            raise check.fail(f"model.encoders.{sensor}", "an encoder", expected)
    for head, value in check.section("model.heads").items():
        if head != "object" and value is not None:
            raise check.fail(f"model.heads.{head}", "a head", "null: only object detection is supported")
    if model.get("fuser") is not None:
        raise check.fail("model.fuser", "a fuser", f"null: a camera-only detector has none; {_TAKE_OUT}")
    check_values(config, check.fail, camera_alone=False)
    _check_camera(check)
    _check_types(check, [path for path in TYPES if not path.startswith(CAMERA_BRANCH)])
    _check_head(check)
    check_sizes(config, check.fail, camera_alone=False)


def _branch_of(config: Mapping[str, Any]) -> Any:
    value: Any = config
    for key in CAMERA_BRANCH.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _check_resolved(check: _Checker, path: str, value: Any) -> None:
    if found := _find_interpolation(value, path):
        raise check.fail(found[0], found[1], "a resolved value: give the run's dumped configs.yaml")


def _check_types(check: _Checker, paths: Sequence[str]) -> None:
    for path in paths:
        kind = check.get(f"{path}.type")
        if kind not in TYPES[path]:
            raise check.fail(f"{path}.type", kind, "one of " + ", ".join(TYPES[path]))
        check.options(path, kind)


def _check_camera(check: _Checker) -> None:
    """The camera branch: its networks' options, and that the sizes fit each other."""
    names = check.config.get("cameras")
    if names is not None:
        good = isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)
        if not good or len(set(names)) != len(names):
            raise check.fail("cameras", names, "a list of the cameras' channels, each once, such as [front, rear]")
    height, width = check.size("image_size")
    _check_types(check, [path for path in TYPES if path.startswith(CAMERA_BRANCH)])
    vt = f"{CAMERA_BRANCH}.vtransform"
    transform = check.section(vt)
    for key in ("in_channels", "out_channels"):
        check.get(f"{vt}.{key}")
    size = list(check.size(f"{vt}.image_size"))
    if size != [height, width]:
        raise check.fail(f"{vt}.image_size", size, f"the same as image_size, {[height, width]}")
    fh, fw = check.size(f"{vt}.feature_size")
    if height % fh or width % fw or height // fh != width // fw:
        raise check.fail(f"{vt}.feature_size", [fh, fw], f"image_size {[height, width]} divided by one whole stride")
    if transform["type"] == "DepthLSSTransform" and height // fh != 8:
        raise check.fail(f"{vt}.feature_size", [fh, fw], f"stride 8, {[height // 8, width // 8]}: dtransform has it")
    count = {key: check.bound(f"{vt}.{key}") for key in ("xbound", "ybound", "zbound", "dbound")}
    if count["dbound"] * fh * fw > MOST_POINTS or count["xbound"] * count["ybound"] * count["zbound"] > MOST_POINTS:
        raise check.fail(
            vt, "xbound, ybound, zbound, dbound and feature_size", f"at most {MOST_POINTS:,} cells, and points"
        )


def _check_head(check: _Checker) -> None:
    """The head's tasks, and what decode reads of test_cfg and bbox_coder. After `check_values`, which has looked at each value's
    kind."""
    where = "model.heads.object"
    classes = list(check.get("object_classes"))
    tasks = check.get(f"{where}.tasks")
    flat = [name for task in tasks for name in task]
    if flat != classes:
        raise check.fail(f"{where}.tasks", flat, f"object_classes in their order, {classes}")
    if check.section(where).get("separate_head"):
        separate = check.section(f"{where}.separate_head")
        kind = separate.get("type", "SeparateHead")
        if kind != "SeparateHead":
            raise check.fail(f"{where}.separate_head.type", kind, "SeparateHead")
        check.options(f"{where}.separate_head", kind)
    maps = check.section(f"{where}.common_heads")
    for name, shape in maps.items():
        if name not in MAPS or shape[0] != MAPS[name]:
            wanted = ", ".join(f"{known} ({channels})" for known, channels in MAPS.items())
            raise check.fail(f"{where}.common_heads.{name}", shape, f"one of {wanted} channels")
    for name in ("height", "dim", "rot"):
        if name not in maps:
            raise check.fail(f"{where}.common_heads", list(maps), f"{name} among them: decode needs it")

    kind = check.section(f"{where}.bbox_coder").get("type", "CenterPointBBoxCoder")
    if kind != "CenterPointBBoxCoder":
        raise check.fail(f"{where}.bbox_coder.type", kind, "CenterPointBBoxCoder")
    check.options(f"{where}.bbox_coder", kind)
    check.numbers(f"{where}.bbox_coder.post_center_range", 6)
    for key in ("max_num", "out_size_factor", "pc_range", "voxel_size"):
        check.get(f"{where}.bbox_coder.{key}")

    test = check.section(f"{where}.test_cfg")
    check.get(f"{where}.test_cfg.post_max_size")
    kinds = check.get(f"{where}.test_cfg.nms_type")
    if isinstance(kinds, list):
        check.one_a_task(f"{where}.test_cfg.nms_type", len(tasks))
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in ("circle", "rotate"):
            raise check.fail(f"{where}.test_cfg.nms_type", kind, "circle or rotate")
        if kind == "circle":
            check.one_a_task(f"{where}.test_cfg.min_radius", len(tasks))
        else:
            check.get(f"{where}.test_cfg.nms_thr")
            check.get(f"{where}.test_cfg.pre_max_size")
    if isinstance(test.get("nms_scale"), list):
        check.one_a_task(f"{where}.test_cfg.nms_scale", len(tasks))
        for task, scales in zip(tasks, test["nms_scale"], strict=True):
            if not isinstance(scales, list | tuple) or len(scales) != len(task):
                raise check.fail(f"{where}.test_cfg.nms_scale", scales, f"a factor for each of {list(task)}")


def need_training(config: Mapping[str, Any], source: str = "config") -> None:
    """Raises `UserError` where a whole detector's config lacks what training reads of its head."""
    check_training(config, _Checker(config, source).fail)


def is_camera_branch(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a camera branch alone, as `camera_branch` makes it: its decoder and its heads are null.

    (A config that lacks them is a damaged one of a whole detector.)
    """
    model = config.get("model")
    return isinstance(model, Mapping) and all(name in model and model[name] is None for name in ("decoder", "heads"))


def camera_branch(config: Mapping[str, Any]) -> Config:
    """The camera branch of a whole model's config, checked by `check_config`, as a config of its own.

    It holds `model.encoders.camera`, image_size, the test pipeline and what data and augmentation read; `model.decoder`
    and `model.heads` are null, by which `is_camera_branch` knows it. Plain containers, nothing shared with `config`.
    """
    camera = config["model"]["encoders"]["camera"]
    # A value that the branch does not need may be unresolved, or a name for something else.
    kept = {key: config[key] for key in _KEPT if config.get(key) is not None and not _find_interpolation(config[key])}
    return copy.deepcopy(
        {
            **kept,
            "model": {
                "encoders": {"camera": {name: camera[name] for name in ("backbone", "neck", "vtransform")}},
                "decoder": None,
                "heads": None,
            },
            "data": {"test": {"pipeline": test_pipeline(config)}},
        }
    )


def camera_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Channels of the cameras in the order of every [N, …] input: the config's `cameras`, which is this project's own key,
    or nuScenes' six."""
    return tuple(config.get("cameras") or CAMERAS)


def needs_depth(config: Mapping[str, Any]) -> bool:
    """Whether the camera part has a `depth` input."""
    return config["model"]["encoders"]["camera"]["vtransform"]["type"] == "DepthLSSTransform"


def need_boxes(config: Mapping[str, Any], what: str, fix: str) -> None:
    """Raises `UserError` where `config` is a camera branch alone, which gives BEV features and no boxes.

    what, fix: the beginning and the end of the message: what asks for boxes, and what to do instead.
    """
    if is_camera_branch(config):
        raise UserError(
            f"{what}: found a camera branch alone, which gives BEV features and no boxes, expected a whole detector; "
            f"{fix}"
        )


def _check_size(value: Any, path: Path) -> None:
    """Raises `UserError` where a config is not the few hundred values of one: anchors can make it contain itself, or be a
    few lines that stand for 10²⁰ values, which everything that walks through it would meet."""
    sizes: dict[int, int] = {}

    def size(item: Any, depth: int) -> int:
        if not isinstance(item, dict | list):
            return 1
        if id(item) not in sizes:
            if depth > MOST_NESTED:
                raise UserError(f"{path}: found values nested more than {MOST_NESTED} deep, expected a config")
            sizes[id(item)] = MOST_VALUES + 1  # what a value that contains itself finds
            sizes[id(item)] = 1 + sum(size(v, depth + 1) for v in (item.values() if isinstance(item, dict) else item))
        return sizes[id(item)]

    if size(value, 0) > MOST_VALUES:
        raise UserError(
            f"{path}: found more than {MOST_VALUES:,} values, or one that contains itself, expected a config: look at its anchors"
        )


def _brackets(text: str) -> int:
    """How deep brackets and braces are nested in a text, whatever they stand in."""
    depth = deepest = 0
    for match in re.finditer(r"[\[{\]}]", text):
        depth = depth + 1 if match[0] in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _read(path: Path) -> Config:
    """A YAML file that holds a mapping.

    Raises:
        UserError: it cannot be read, is not YAML, is far larger than a config, or holds something else.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: found {path.stat().st_size:,} bytes, expected a config of at most {MOST_BYTES:,}")
        text = path.read_text(encoding="utf-8")
        if (deep := _brackets(text)) > MOST_NESTED:  # the time that PyYAML takes for them grows with their square
            raise UserError(f"{path}: not valid YAML: found brackets {deep:,} deep, expected at most {MOST_NESTED}")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, TypeError, LookupError, OverflowError, AttributeError, RecursionError) as error:
        # what its constructors make of a date that is none, of a number too long, of a nest
        raise UserError(f"{path}: not valid YAML: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: found {type(config).__name__}, expected a mapping with BEVFusion's keys")
    _check_size(config, path)
    return config


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def _with_numbers(value: Any) -> Any:
    """A config whose texts such as 1e-3 are numbers, as YAML 1.2 and mmcv's own Python configs have them. YAML 1.1, which PyYAML
    and torchpack read, wants 1.0e-3."""
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def load_config(path: str | Path, branch: Branch | None = None) -> Config:
    """Reads and checks a YAML config with BEVFusion's keys.

    Either all is in the one file, as in a run's dumped configs.yaml, or the file is of BEVFusion's own tree
    (`configs/nuscenes/det/…`): then it inherits every default.yaml above it, which needs torchpack. Values written as `${…}`
    are evaluated (`qat.families.bevfusion.config_tree`).

    branch: "camera" gives the `camera_branch` of a whole model's config; what is outside it is not looked at.

    Raises:
        UserError: a file cannot be read, is not YAML, or describes something we cannot build; torchpack is needed and not
            installed; an expression is not understood.
    """
    file = Path(path)
    config = _read(file)
    whole = all(key in config for key in WHOLE) and not has_expressions(config)
    if not whole and (defaults := defaults_above(file)):
        for default in defaults:
            _read(default)  # what is wrong with one of them is told by its name
        config = inherit(file)
    config = _with_numbers(config)
    if branch is None:
        config = resolve(config, str(path))
    else:
        with suppress(
            UserError
        ):  # outside the branch anything may stand; inside it check_config names what is unresolved
            config = resolve(config, str(path))
    check_config(config, str(path), branch)
    return camera_branch(config) if branch == "camera" else config


def test_pipeline(config: Mapping[str, Any], source: str = "config") -> list[dict[str, Any]]:
    """The steps that test data goes through: `data.test.pipeline`, or `test_pipeline` of an undumped config."""
    check = _Checker(config, source)
    steps = _steps(config, check)
    if not steps:
        raise UserError(f"{source}: data.test.pipeline: missing; a dumped BEVFusion configs.yaml has it")
    check_steps(steps, "data.test.pipeline", check.fail)
    return list(steps)


def _steps(config: Mapping[str, Any], check: _Checker) -> Any:
    value: Any = config
    for path in ("data", "data.test", "data.test.pipeline"):
        value = value.get(path.rpartition(".")[2]) or {}
        if path != "data.test.pipeline" and not isinstance(value, Mapping):
            raise check.fail(path, value, "a section of keys and values")
    return value or config.get("test_pipeline")


def has_steps(config: Mapping[str, Any], source: str = "config") -> bool:
    """Whether a config says how test data is read; one that builds a network alone need not."""
    return bool(_steps(config, _Checker(config, source)))
