"""The operators of `mmcv._ext` by mmcv's names and signatures: most write into tensors that they are given.

Every public function of the modules here is one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from qat.families.mmdet3d.ops.mmcv_ext import assign_score, boxes, convolutions, points, rois, scatter, voxels

OPERATORS: dict[str, Callable[..., Any]] = {
    name: function
    for module in (assign_score, boxes, convolutions, points, rois, scatter, voxels)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith("_")
}
