"""mmdet3d's own metrics, without a GPU and without the packages that the rest of its evaluation wants: compiled loops run as Python,
the intersection on the GPU is shapely's."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from shapely import affinity
from shapely.geometry import box as rectangle

from qat.boxes.detections import Detections


def mmdet3d_file(name: str) -> Path:
    """A file of the installed mmdet3d, found without importing it."""
    spec = importlib.util.find_spec("mmdet3d")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("mmdet3d is not installed")
    return Path(spec.submodule_search_locations[0]) / name


def by_shapely(boxes: np.ndarray, other: np.ndarray, criterion: int = -1) -> np.ndarray:
    """What mmdet3d's rotate_iou_gpu_eval gives of boxes that turn clockwise, float32: intersection over union, or (2) alone."""

    def polygons(rows: np.ndarray) -> list:
        return [
            affinity.rotate(rectangle(x - w / 2, y - h / 2, x + w / 2, y + h / 2), -turn, (x, y), use_radians=True)
            for x, y, w, h, turn in rows.astype(np.float32).astype(np.float64)
        ]

    assert criterion in (-1, 2)
    result = np.zeros((len(boxes), len(other)), np.float32)
    seconds = polygons(other)
    for i, first in enumerate(polygons(boxes)):
        for j, second in enumerate(seconds):
            common = first.intersection(second).area
            result[i, j] = common if criterion == 2 else common / (first.area + second.area - common)
    return result


@contextmanager
def mmdet3ds_kitti_eval() -> Iterator[ModuleType]:
    """mmdet3d's kitti_utils/eval.py: compiling it takes longer than running it as Python."""
    path = mmdet3d_file("evaluation/functional/kitti_utils/eval.py")
    plain = ModuleType("numba")
    plain.prange = range
    plain.jit = lambda *args, **_: args[0] if args else (lambda function: function)
    package, rotate = ModuleType("theirs"), ModuleType("theirs.rotate_iou")
    package.__path__, rotate.rotate_iou_gpu_eval = [], by_shapely
    spec = importlib.util.spec_from_file_location("theirs.eval", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("theirs", package), ("theirs.rotate_iou", rotate), ("theirs.eval", module)):
            patch.setitem(sys.modules, name, value)
        with pytest.MonkeyPatch.context() as numba:
            numba.setitem(sys.modules, "numba", plain)
            spec.loader.exec_module(module)
        yield module


@contextmanager
def _metric(file: str, kitti_eval: Any = None) -> Iterator[Any]:
    """The metric of a file of mmdet3d.evaluation, whose package wants lyft_dataset_sdk."""
    path = mmdet3d_file(f"evaluation/metrics/{file}.py")
    import qat.lean._torchvision  # noqa: F401
    from qat.families.mmdet3d import ops

    ops.install()
    evaluation = ModuleType("mmdet3d.evaluation")
    evaluation.kitti_eval = kitti_eval
    spec = importlib.util.spec_from_file_location(f"their_{file}", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mmdet3d.evaluation", evaluation)
        spec.loader.exec_module(module)
    from mmdet3d.registry import METRICS

    (name,) = (name for name in vars(module) if name.lower() == file.replace("_", ""))
    yield getattr(module, name)
    METRICS._module_dict.pop(name)


@contextmanager
def mmdet3ds_kitti_metric(kitti: ModuleType) -> Iterator[Any]:
    """mmdet3d's KittiMetric. kitti: of `mmdet3ds_kitti_eval`."""
    with _metric("kitti_metric", kitti.kitti_eval) as metric:
        yield metric


@contextmanager
def mmdet3ds_nuscenes_metric() -> Iterator[Any]:
    """mmdet3d's NuScenesMetric."""
    with _metric("nuscenes_metric") as metric:
        yield metric


def their_boxes(found: Detections, columns: int = 7) -> dict[str, Any]:
    """Detections as mmdet3d's metrics take them."""
    import torch
    from mmdet3d.structures import LiDARInstance3DBoxes

    boxes = torch.from_numpy(found.converted("mmdet3d").boxes[:, :columns].copy())
    return {
        "bboxes_3d": LiDARInstance3DBoxes(boxes, box_dim=columns),
        "scores_3d": torch.from_numpy(found.scores),
        "labels_3d": torch.from_numpy(found.labels),
    }
