"""A detector's parts run by PyTorch: the reference beside the engines, in the same Pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from qat.families.bevfusion.config import is_camera_branch, needs_depth
from qat.families.bevfusion.parts import CameraBackbone, CameraBackboneWithoutDepth, CameraVTransform, Fuser, HeadBBox
from qat.families.bevfusion.settings import head_maps


def build_wrappers(detector: Any) -> dict[str, nn.Module]:
    """The exported parts of a float or quantized detector, in the order in which they run, in eval mode."""
    config = detector.config
    backbone = CameraBackbone if needs_depth(config) else CameraBackboneWithoutDepth
    parts: dict[str, nn.Module] = {"camera.backbone": backbone(detector)}
    if config["model"]["encoders"]["camera"]["vtransform"].get("downsample", 1) > 1:
        parts["camera.vtransform"] = CameraVTransform(detector)
    if not is_camera_branch(config):
        parts["fuser"] = Fuser(detector)
        parts["head.bbox"] = HeadBBox(detector, head_maps(config))
    return {name: part.eval() for name, part in parts.items()}


class TorchPart:
    """Runs one wrapper on numpy arrays: a `qat.runtime.PartRunner`."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by input name → arrays by output name."""
        device = next(self.wrapper.parameters()).device
        with torch.inference_mode():
            result = self.wrapper(*(torch.from_numpy(feeds[name]).to(device) for name in self.wrapper.inputs))
        values = result if isinstance(result, tuple) else (result,)
        return {
            name: np.ascontiguousarray(value.cpu().numpy())
            for name, value in zip(self.wrapper.outputs, values, strict=True)
        }


def torch_parts(detector: Any) -> dict[str, TorchPart]:
    """Runners of a detector's parts, for `qat.runtime.Pipeline` and for verification. Puts it into eval mode."""
    return {name: TorchPart(wrapper) for name, wrapper in build_wrappers(detector).items()}
