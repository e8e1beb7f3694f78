"""Deploy configs of other tools: read as they are, and run with this project's export, engines, verification and comparison.

MMDeploy's functions for mmdet3d's lidar detectors, with its signatures; each is imported when it is used:

    from qat.deploy import inference_model, torch2onnx, visualize_model, build_task_processor, create_calib_input_data
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat.deploy.mmdeploy.api import (
        build_task_processor,
        create_calib_input_data,
        inference_model,
        torch2onnx,
        visualize_model,
    )

__all__ = ["build_task_processor", "create_calib_input_data", "inference_model", "torch2onnx", "visualize_model"]


def __getattr__(name: str) -> Any:
    """One of MMDeploy's functions."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qat.deploy.mmdeploy import api

    return getattr(api, name)
