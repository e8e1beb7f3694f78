"""An mmdet3d config as a family keeps it: its model and how its points are read, in Python's own values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.core.errors import UserError

MMDET3D, OLDER, UNKNOWN = "mmdet3d", "older", "unknown"  # boxes from mmdet3d 1.0 on; before it, and Autoware's
KEYS = {"family", "source", "model", "classes", "load_dim", "columns"}


def plain(value: Any) -> Any:
    """mmengine's config values as Python's own."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(entry) for entry in value)
    return value


def read_description(path: str | Path, family: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Reads a config, which is Python, and is run.

    Returns:
        `KEYS` with "model", mmdet3d's description, "load_dim", the float32 values of a point in a file, and "columns", which of them
        are used (of merged sweeps the fifth is the time in seconds since the point was measured); and the steps of the test pipeline by
        their type.

    Raises:
        UserError: it cannot be read; a point's first columns are not x, y and z.
    """
    from qat.families.mmdet3d.config import read
    from qat.families.mmdet3d.inputs import flattened, pipeline_of

    config = read(path)
    steps = {str(step.get("type", "")).split(".")[-1]: plain(step) for step in flattened(pipeline_of(config))}
    loads = steps.get("LoadPointsFromFile", {})
    use = steps.get("LoadPointsFromMultiSweeps", loads).get("use_dim", loads.get("use_dim", loads.get("load_dim", 4)))
    used = list(range(use)) if isinstance(use, int) else list(use)
    if used[:3] != [0, 1, 2] or max(used) >= int(loads.get("load_dim", 4)):
        raise UserError(
            f"{config.source}: use_dim: found {used}, expected columns of a point that begin with 0, 1, 2 (x, y, z)"
        )
    described = {
        "family": family,
        "source": str(Path(config.source).name),
        "model": {key: value for key, value in plain(config.model.to_dict()).items() if key != "train_cfg"},
        "classes": classes_of(config),
        "load_dim": int(loads.get("load_dim", 4)),
        "columns": used,
    }
    return described, steps


def classes_of(config: Any) -> list[str]:
    """The names of a config's labels: of its test set, or else of the config itself, which may still have those of its base, in another
    order (mmdet3d's CenterPoint). config: mmengine's."""
    from qat.families.mmdet3d.config import test_dataset

    dataset = test_dataset(config, "metainfo")
    found = [(place.get("metainfo") or {}).get("classes") for place in (dataset, config)]
    named = next((names for names in (*found, config.get("class_names")) if names), ())
    return [named] if isinstance(named, str) else list(named)


def check_keys(config: object, keys: set[str], family: str, source: str) -> Mapping[str, Any]:
    """The description, if it is one with these keys.

    Raises:
        UserError: it is not.
    """
    if not isinstance(config, Mapping) or not set(config) >= keys or not isinstance(config["model"], Mapping):
        raise UserError(f"{source}: found no description of a {family}, expected the keys {', '.join(sorted(keys))}")
    return config


def boxes_of(meta: Mapping[str, Any]) -> str:
    """The convention of the boxes that a checkpoint was trained with, by its `meta`: MMDET3D, OLDER, or UNKNOWN. Runners of 1.x write
    mmengine's release, those before it mmdet3d's."""
    release = str(meta.get("mmdet3d_version", ""))
    if release.startswith("0."):
        return OLDER
    return MMDET3D if release or "mmengine_version" in meta else UNKNOWN
