"""A detector on a frame: tensors in, head maps or boxes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qat.boxes.centerhead import decode
from qat.boxes.detections import Detections
from qat.core.frame import Frame
from qat.families.bevfusion.config import need_boxes
from qat.families.bevfusion.pooling.geometry import PoolPattern


def frame_tensors(model: Any, frame: Frame) -> tuple[torch.Tensor, torch.Tensor, list[PoolPattern]]:
    """img [1,N,3,H,W] and depth [1,N,1,H,W] on the model's device, and the pooling pattern."""
    device = next(model.parameters()).device
    matrices = (frame.camera_intrinsics, frame.camera2lidar, frame.img_aug_matrix, frame.lidar_aug_matrix)
    img, depth = (torch.from_numpy(np.ascontiguousarray(x))[None].to(device) for x in (frame.img, frame.depth))
    return img, depth, model.patterns(*(matrix[None] for matrix in matrices))


def run_frame(model: Any, frame: Frame) -> list[dict[str, torch.Tensor]]:
    """Runs one frame through all parts; what `CameraBEVDetector.forward` gives. `model` has that class's interface."""
    maps: list[dict[str, torch.Tensor]] = model(*frame_tensors(model, frame))
    return maps


def boxes_of(maps: Sequence[Mapping[str, torch.Tensor]], config: Mapping[str, Any]) -> Detections:
    """Boxes of one frame's head maps. config: the detector's.

    Raises:
        UserError: it is a camera branch alone, which has no head.
    """
    need_boxes(config, "boxes", "a camera branch is judged by its BEV features (`bevqat sensitivity`)")
    head = config["model"]["heads"]["object"]
    return decode([{name: x.float().cpu().numpy() for name, x in task.items()} for task in maps], head)
