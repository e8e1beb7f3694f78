"""Detections of a test set as files: results.pkl, KITTI's label files, nuScenes' submission.

results.pkl is a list with an entry for each frame: {"sample_idx": the frame's number or token, "pred_instances_3d": {"bboxes_3d":
float32[N,7 or 9] in mmdet3d's convention, "scores_3d": float32[N], "labels_3d": int64[N]}}, plain arrays in mmdet3d's names.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qat.boxes.detections import Detections
from qat.core.errors import UserError
from qat.core.files import atomic_directory, atomic_path, write_json
from qat.families.mmdet3d.inputs import read_pickle

ENDINGS = (".pkl", ".pickle")
FIELD = "pred_instances_3d"
KEYS = ("bboxes_3d", "scores_3d", "labels_3d")


def write_results(path: str | Path, names: Sequence[str], found: Sequence[Detections]) -> None:
    """Writes results.pkl, whole or not at all. names: each frame's."""
    entries = []
    for name, own in zip(names, found, strict=True):
        boxes = own.boxes if own.convention == "mmdet3d" else own.converted("mmdet3d").boxes
        arrays = boxes.astype(np.float32), own.scores.astype(np.float32), own.labels.astype(np.int64)
        entries.append({"sample_idx": name, FIELD: dict(zip(KEYS, arrays, strict=True))})
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(pickle.dumps(entries, protocol=4))


def read_results(path: str | Path, names: Sequence[str], classes: Sequence[str]) -> list[Detections]:
    """The detections of results.pkl; nothing in it runs.

    Args:
        names: of the frames that it must be of, in their order. classes: that its labels count in.

    Raises:
        UserError: it is damaged, of other frames, or its arrays do not fit each other.
    """
    entries = read_pickle(path, "results that --out wrote")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: found a {type(entries).__name__}, expected a list of results, as --out writes them")
    if len(entries) != len(names):
        raise UserError(
            f"{path}: found results of {len(entries)} frames, expected {len(names)}, as many as the test set has; test again with --out"
        )
    return [_read(path, entry, name, len(classes)) for entry, name in zip(entries, names, strict=True)]


def _read(path: str | Path, entry: Mapping[str, Any], name: str, classes: int) -> Detections:
    where = f"{path}: frame {name}"
    if str(entry.get("sample_idx")) != name:
        raise UserError(
            f"{where}: found {entry.get('sample_idx')!r}, expected this frame; the results are of another test set"
        )
    given = entry.get(FIELD)
    arrays: list[Any] = [given.get(key) if isinstance(given, dict) else None for key in KEYS]
    for key, array in zip(KEYS, arrays, strict=True):
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            raise UserError(f"{where}: {FIELD}.{key}: found {type(array).__name__}, expected an array of numbers")
    boxes, scores, labels = arrays
    fits = boxes.ndim == 2 and boxes.shape[1] in (7, 9) and scores.shape == labels.shape == (len(boxes),)
    if not fits:
        shapes = ", ".join(str(list(array.shape)) for array in arrays)
        raise UserError(f"{where}: found shapes {shapes}, expected [N, 7 or 9], [N] and [N]")
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise UserError(f"{where}: found NaN or infinity, expected finite boxes and scores")
    if labels.dtype.kind == "f" or (len(labels) and not 0 <= labels.min() <= labels.max() < classes):
        raise UserError(
            f"{where}: labels_3d: found {labels.dtype} up to {labels.max()}, expected integers below {classes}"
        )
    return Detections(boxes.astype(np.float32), scores.astype(np.float32), labels.astype(np.int64), "mmdet3d")


def write_kitti_labels(folder: str | Path, names: Sequence[str], annos: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Writes a label file for each frame (KITTI's object development kit, readme.txt), the folder whole or not at all."""
    with atomic_directory(Path(folder)) as temporary:
        for name, anno in zip(names, annos, strict=True):
            lines = []
            for n, kind in enumerate(anno["name"]):
                length, height, width = anno["dimensions"][n]
                numbers = [anno["alpha"][n], *anno["bbox"][n], height, width, length, *anno["location"][n]]
                numbers += [anno["rotation_y"][n], anno["score"][n]]
                lines.append(f"{kind} -1 -1 {' '.join(f'{value:.4f}' for value in numbers)}\n")
            (temporary / f"{name}.txt").write_text("".join(lines))


def write_annos(path: str | Path, annos: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Writes KITTI annos as a pickle, as mmdet3d's KittiMetric does for pklfile_prefix."""
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(pickle.dumps([dict(anno) for anno in annos], protocol=4))


def write_submission(path: str | Path, boxes: Mapping[str, Sequence[Any]]) -> None:
    """Writes nuScenes' results_nusc.json. boxes: the devkit's DetectionBox of each sample token."""
    meta = {f"use_{name}": name == "lidar" for name in ("camera", "lidar", "radar", "map", "external")}
    rows = {
        token: [
            {
                "sample_token": token,
                "translation": [float(value) for value in box.translation],
                "size": [float(value) for value in box.size],
                "rotation": [float(value) for value in box.rotation],
                "velocity": [float(value) for value in box.velocity],
                "detection_name": box.detection_name,
                "detection_score": box.detection_score,
                "attribute_name": box.attribute_name,
            }
            for box in own
        ]
        for token, own in boxes.items()
    }
    write_json(path, {"meta": meta, "results": rows})
