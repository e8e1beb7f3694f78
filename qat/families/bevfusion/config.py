"""Reading and checking configs in BEVFusion's schema."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml

from qat.core.errors import UserError
from qat.core.frame import CAMERAS
from qat.core.validation import validated
from qat.families.bevfusion.config_tree import defaults_above, has_expressions, inherit, resolve
from qat.families.bevfusion.schema import CameraConfig, DetectorConfig, Steps, Training
from qat.families.bevfusion.sizes import check_sizes

Config = dict[str, Any]
Branch = Literal["camera"]

# Far above any real config. A larger file is damaged, or meant to fill the memory.
MOST_BYTES, MOST_VALUES, MOST_NESTED = 1 << 20, 100_000, 100

WHOLE = ("model", "image_size", "object_classes")  # keys of a config that is complete in one file

CAMERA_BRANCH = "model.encoders.camera"
# Keys of a whole model's config that the camera branch, its data and its training read, besides the branch and test pipeline.
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
    """Raises `UserError` with the key, what was found and what was expected, for a config we cannot build.

    branch: "camera" checks only what `camera_branch` takes from a whole model's config: another encoder, a fuser,
        decoder or heads may be anything, or absent. A config that is a camera branch alone is recognized without it.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"{source}: found {type(config).__name__}, expected a mapping with BEVFusion's keys")
    alone = branch == "camera" or is_camera_branch(config)
    if has_steps(config, source) or alone:
        _check_resolved("data.test.pipeline", test_pipeline(config, source), source)
    _check_resolved(CAMERA_BRANCH if alone else "model", _branch_of(config) if alone else config.get("model"), source)
    read_config(config, source, branch, check_sizes)


def read_config(
    config: Mapping[str, Any], source: str, branch: Branch | None = None, *checks: Callable[[CameraConfig], None]
) -> CameraConfig:
    """The config, or the camera branch in it, as a typed object. Raises like `check_config`, for the types and for `checks`."""
    model = CameraConfig if branch == "camera" or is_camera_branch(config) else DetectorConfig
    known = {key: config[key] for key in model.model_fields if key in config}
    return validated(model, known, source, *checks)


def _branch_of(config: Mapping[str, Any]) -> Any:
    value: Any = config
    for key in CAMERA_BRANCH.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _check_resolved(path: str, value: Any, source: str) -> None:
    if found := _find_interpolation(value, path):
        raise UserError(
            f"{source}: {found[0]}: found {found[1]!r}, expected a resolved value: give the run's dumped configs.yaml"
        )


def need_training(config: Mapping[str, Any], source: str = "config") -> None:
    """Raises `UserError` if a whole detector's config lacks keys of the head that training reads."""
    validated(Training, config["model"]["heads"]["object"], source, under="model.heads.object")


def is_camera_branch(config: Mapping[str, Any]) -> bool:
    """Whether a config describes a camera branch alone, as `camera_branch` returns it: its decoder and heads are null.

    (A config without these keys is a damaged config of a whole detector.)
    """
    model = config.get("model")
    return isinstance(model, Mapping) and all(name in model and model[name] is None for name in ("decoder", "heads"))


def camera_branch(config: Mapping[str, Any]) -> Config:
    """The camera branch of a whole model's config (checked by `check_config`) as a separate config.

    It holds `model.encoders.camera`, image_size, the test pipeline and the keys that data and augmentation read.
    `model.decoder` and `model.heads` are null; `is_camera_branch` tests for that. Plain containers, nothing shared with
    `config`.
    """
    camera = config["model"]["encoders"]["camera"]
    # Values that the branch does not need may be unresolved, or mean something else.
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
    """Channels of the cameras in the order of every [N, …] input: the config's `cameras` (a key of this project), or
    nuScenes' six."""
    return tuple(config.get("cameras") or CAMERAS)


def needs_depth(config: Mapping[str, Any]) -> bool:
    """Whether the camera part has a `depth` input."""
    return config["model"]["encoders"]["camera"]["vtransform"]["type"] == "DepthLSSTransform"


def need_boxes(config: Mapping[str, Any], what: str, fix: str) -> None:
    """Raises `UserError` if `config` is a camera branch alone, which computes BEV features and no boxes.

    what, fix: the beginning and the end of the message: what needs boxes, and what to do instead.
    """
    if is_camera_branch(config):
        raise UserError(
            f"{what}: found a camera branch alone, which computes BEV features and no boxes, expected a whole detector; "
            f"{fix}"
        )


def _check_size(value: Any, path: Path) -> None:
    """Raises `UserError` if a config is far larger than the usual few hundred values: with YAML anchors, a config can contain
    itself, and a few lines can expand to 10²⁰ values in any code that walks through it."""
    sizes: dict[int, int] = {}

    def size(item: Any, depth: int) -> int:
        if not isinstance(item, dict | list):
            return 1
        if id(item) not in sizes:
            if depth > MOST_NESTED:
                raise UserError(f"{path}: found values nested more than {MOST_NESTED} deep, expected a config")
            sizes[id(item)] = MOST_VALUES + 1  # the size that a value which contains itself finds
            sizes[id(item)] = 1 + sum(size(v, depth + 1) for v in (item.values() if isinstance(item, dict) else item))
        return sizes[id(item)]

    if size(value, 0) > MOST_VALUES:
        raise UserError(
            f"{path}: found more than {MOST_VALUES:,} values, or one that contains itself, expected a config: check its anchors"
        )


def _brackets(text: str) -> int:
    """How deep brackets and braces are nested in a text, including those in strings and comments."""
    depth = deepest = 0
    for match in re.finditer(r"[\[{\]}]", text):
        depth = depth + 1 if match[0] in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _read(path: Path) -> Config:
    """Reads a YAML file that holds a mapping.

    Raises:
        UserError: the file cannot be read, is not YAML, is far larger than a config, or holds something else.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: found {path.stat().st_size:,} bytes, expected a config of at most {MOST_BYTES:,}")
        text = path.read_text(encoding="utf-8")
        if (deep := _brackets(text)) > MOST_NESTED:  # PyYAML's time grows with the square of the depth
            raise UserError(f"{path}: not valid YAML: found brackets {deep:,} deep, expected at most {MOST_NESTED}")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, TypeError, LookupError, OverflowError, AttributeError, RecursionError) as error:
        # PyYAML's constructors raise these for invalid dates, numbers that are too long, and deep nesting
        raise UserError(f"{path}: not valid YAML: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: found {type(config).__name__}, expected a mapping with BEVFusion's keys")
    _check_size(config, path)
    return config


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def _with_numbers(value: Any) -> Any:
    """Converts texts such as 1e-3 to numbers, as in YAML 1.2 and mmcv's Python configs. PyYAML and torchpack read YAML 1.1,
    where only 1.0e-3 is a number."""
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def load_config(path: str | Path, branch: Branch | None = None) -> Config:
    """Reads and checks a YAML config with BEVFusion's keys.

    The file is either complete, such as a run's dumped configs.yaml, or part of BEVFusion's config tree
    (`configs/nuscenes/det/…`). A file of the tree inherits every default.yaml above it, which needs torchpack. Values written
    as `${…}` are evaluated (`qat.families.bevfusion.config_tree`).

    branch: "camera" returns the `camera_branch` of a whole model's config and ignores everything outside it.

    Raises:
        UserError: a file cannot be read, is not YAML, or describes something we cannot build; torchpack is needed and not
            installed; an expression is not supported.
    """
    file = Path(path)
    config = _read(file)
    whole = all(key in config for key in WHOLE) and not has_expressions(config)
    if not whole and (defaults := defaults_above(file)):
        for default in defaults:
            _read(default)  # an error in a default.yaml names that file
        config = inherit(file)
    config = _with_numbers(config)
    if branch is None:
        config = resolve(config, str(path))
    else:
        with suppress(
            UserError
        ):  # outside the branch, any value is allowed; inside it, check_config reports unresolved ones
            config = resolve(config, str(path))
    check_config(config, str(path), branch)
    return camera_branch(config) if branch == "camera" else config


def test_pipeline(config: Mapping[str, Any], source: str = "config") -> list[dict[str, Any]]:
    """The steps that prepare test data: `data.test.pipeline`, or `test_pipeline` in a config that was not dumped."""
    steps = _steps(config, source)
    if not steps:
        raise UserError(f"{source}: data.test.pipeline: missing; a dumped BEVFusion configs.yaml has it")
    validated(Steps, steps, source, under="data.test.pipeline")
    return list(steps)


def _steps(config: Mapping[str, Any], source: str) -> Any:
    value: Any = config
    for path in ("data", "data.test", "data.test.pipeline"):
        value = value.get(path.rpartition(".")[2]) or {}
        if path != "data.test.pipeline" and not isinstance(value, Mapping):
            raise UserError(
                f"{source}: {path}: found {value!r:.120}, expected a section of keys and values; fix it there"
            )
    return value or config.get("test_pipeline")


def has_steps(config: Mapping[str, Any], source: str = "config") -> bool:
    """Whether a config describes how test data is read; a config that only builds a network may omit it."""
    return bool(_steps(config, source))
