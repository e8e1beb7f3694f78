"""One-line errors for nuScenes-format data: the table or file, the record, what was expected."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qat.core.errors import UserError

TABLES = (
    "category",
    "attribute",
    "visibility",
    "instance",
    "sensor",
    "calibrated_sensor",
    "ego_pose",
    "log",
    "scene",
    "sample",
    "sample_data",
    "sample_annotation",
    "map",
)
FETCH = "fetch the data set's metadata again"


def diagnose(folder: Path, error: Exception) -> UserError:
    """Why the devkit could not open the tables of `folder`. Called only after it raised `error`: tables may be gigabytes, and
    valid ones should not be read twice."""
    missing = [f"{name}.json" for name in TABLES if not (folder / f"{name}.json").is_file()]
    if missing:
        return UserError(f"{folder}: found no {', '.join(missing)}, expected nuScenes' {len(TABLES)} tables; {FETCH}")
    for name in TABLES:
        path = folder / f"{name}.json"
        try:
            rows = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as fault:
            return UserError(f"{path}: not valid JSON ({fault}); {FETCH}")
        except OSError as fault:
            return UserError(f"{path}: cannot be read: {fault.strerror}")
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "token" in row for row in rows):
            return UserError(
                f"{path}: found something other than records with tokens, expected a list of them; {FETCH}"
            )
    if isinstance(error, KeyError) and error.args:
        why = f"found nothing for {str(error.args[0])[:80]!r}, which a record refers to or requires"
    else:
        why = f"found {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return UserError(f"{folder}: the tables do not fit each other: {why}; {FETCH}")


def check_tokens(tables: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> None:
    """Raises `UserError` if two records of a table have the same token: the devkit would keep only the last."""
    for name, rows in tables.items():
        seen: set[str] = set()
        for row in rows:
            if row["token"] in seen:
                raise UserError(f"{folder / name}.json: found token {row['token']!r} twice, expected it once; {FETCH}")
            seen.add(row["token"])


def check_splits(splits: Any, path: Path) -> None:
    """Raises `UserError` if splits.json does not list scene names by split."""
    good = isinstance(splits, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in splits.values()
    )
    if not good:
        raise UserError(
            f'{path}: found something else, expected lists of scenes by split, such as {{"calib": ["scene-1"]}}'
        )


def numbers_of(record: Mapping[str, Any], key: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """A record's numbers, float64[shape].

    where: the table and the record, for messages.

    Raises:
        UserError: missing, of another shape, or NaN or infinity among them.
    """
    try:
        found = np.asarray(record[key], np.float64)
    except (KeyError, TypeError, ValueError):
        found = None
    if found is None or found.shape != shape:
        text = repr(record.get(key))[:80] if key in record else "none"
        raise UserError(f"{where}: {key}: found {text}, expected numbers [{','.join(map(str, shape))}]; fix the table")
    if not np.isfinite(found).all():
        raise UserError(f"{where}: {key}: found {repr(record[key])[:80]}, which is not finite; fix the table")
    return found


def rotation_of(record: Mapping[str, Any], where: str) -> np.ndarray:
    """A record's quaternion w, x, y, z, float64[4].

    Raises:
        UserError: like `numbers_of`, or it is not a rotation.
    """
    found = numbers_of(record, "rotation", (4,), where)
    norm = float(np.linalg.norm(found))
    if abs(norm - 1) > 0.01:
        raise UserError(
            f"{where}: rotation: found {found.round(4).tolist()} of length {norm:.3g}, expected a quaternion w, x, y, z of "
            "length 1; fix the table"
        )
    return found


def check_intrinsics(matrix: np.ndarray, width: int, height: int, where: str) -> None:
    """Raises `UserError` for intrinsics that are not valid for a camera, or not for pictures of this size.

    The optical axis may miss the picture (after a crop), but not by more than the picture's size.
    """
    fx, fy, cx, cy = matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]
    if fx <= 0 or fy <= 0 or not np.allclose(matrix[2], [0, 0, 1]):
        raise UserError(
            f"{where}: camera_intrinsic: found {matrix.round(3).tolist()}, expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with "
            "focal lengths above 0; fix the table"
        )
    if not (-width <= cx <= 2 * width and -height <= cy <= 2 * height):
        raise UserError(
            f"{where}: camera_intrinsic: found the optical axis at ({cx:.0f}, {cy:.0f}), expected it near a picture of "
            f"{width}×{height} pixels: they are for another size; scale them with the pictures"
        )
