"""The operators of `mmcv._ext` by mmcv's names and signatures: most write into tensors that they are given.

Every public function of the modules here is one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from qat.core.errors import UserError
from qat.families.mmdet3d.ops.mmcv_ext import assign_score, boxes, convolutions, points, rois, scatter, voxels


def _standard(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses the TorchScript exporter, which makes mmcv's functions nodes of their own, that no backend knows."""

    @functools.wraps(function)
    def operator(*args: Any, **kwargs: Any) -> Any:
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            raise UserError(
                f"mmcv's operator {name} is not exported by torch.onnx's TorchScript exporter (dynamo=False): it would be no "
                "standard operator. Export with dynamo=True, optimize=False"
            )
        return function(*args, **kwargs)

    return operator


OPERATORS: dict[str, Callable[..., Any]] = {
    name: _standard(name, function)
    for module in (assign_score, boxes, convolutions, points, rois, scatter, voxels)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith("_")
}
