"""A detector with random weights and realistic activations, for export, numerics and latency without a checkpoint.

PyTorch's and timm's initial values are not suitable: a signal shrinks from layer to layer, and timm starts residual branches at
or near zero (a block's last batch norm, a layer scale, Swin v2's norms, a transformer's linear layers), so that blocks have no
effect. Here such scales are near 1, linear layers keep the size of their inputs, and every batch norm has the statistics of its
input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from qat.core.frame import Frame, FrameArrays
from qat.core.geometry import camera_ring
from qat.families.bevfusion.config import camera_names
from qat.families.bevfusion.detector import CameraBEVDetector, build_model

MADE_UP = 1  # frames: six pictures, and a whole BEV grid
NOTHING = 1e-3  # a scale below it leaves a residual branch dead


def _made_up_frame(config: Mapping[str, Any]) -> FrameArrays:
    """A keyframe drawn from torch's generator: coarse and fine noise for pictures, one pixel in twenty with a depth, the
    config's cameras in a ring."""
    height, width = config["image_size"]
    cameras = len(camera_names(config))
    low, high, _ = config["model"]["encoders"]["camera"]["vtransform"]["dbound"]
    coarse = torch.randn(cameras, 3, max(1, height // 16), max(1, width // 16))
    img = F.interpolate(coarse, size=(height, width), mode="bilinear") + 0.3 * torch.randn(cameras, 3, height, width)
    shape = cameras, 1, height, width
    depth = (low + (high - low) * torch.rand(shape)) * (torch.rand(shape) < 0.05)
    eye = np.eye(4, dtype=np.float32)
    intrinsics, camera2lidar = (matrix.astype(np.float32) for matrix in camera_ring(cameras, (height, width)))
    unmoved = np.tile(eye, (cameras, 1, 1))
    return FrameArrays(
        token="made up",
        img=img.numpy(),
        depth=depth.numpy(),
        camera_intrinsics=intrinsics,
        camera2lidar=camera2lidar,
        img_aug_matrix=unmoved,
        lidar_aug_matrix=eye,
    )


def _enliven(model: nn.Module) -> None:
    """Draws scales and offsets of batch norms like trained ones, and scales residual branches to about the stream's size."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, module.in_features**-0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    for name, parameter in model.named_parameters():
        scales = parameter.dim() == 1 and parameter.requires_grad and not name.endswith("bias")
        if scales and float(parameter.detach().abs().max()) < NOTHING:
            nn.init.uniform_(parameter, 0.5, 1.5)


def _set_statistics(model: CameraBEVDetector, frames: Sequence[Frame]) -> None:
    """Sets every batch norm's mean and variance to the average over the frames; the rest runs as at inference."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
    with torch.no_grad():
        for frame in frames:
            matrices = (frame.camera_intrinsics, frame.camera2lidar, frame.img_aug_matrix, frame.lidar_aug_matrix)
            img, depth = (torch.from_numpy(array)[None] for array in (frame.img, frame.depth))
            model(img, depth, model.patterns(*(matrix[None] for matrix in matrices)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def random_model(config: Mapping[str, Any], seed: int = 0, frames: Sequence[Frame] | None = None) -> CameraBEVDetector:
    """The detector of `config` with random weights whose activations neither explode nor die, in eval mode.

    Args:
        config: a checked config (`load_config`).
        seed: the same seed and config give the same weights; torch's global generator is not changed.
        frames: preprocessed samples for the batch norms' statistics; None for generated ones of the config's cameras.

    Raises:
        UserError: the config has an option that is not supported, by name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config)
        _enliven(model)
        _set_statistics(model, frames if frames is not None else [_made_up_frame(config) for _ in range(MADE_UP)])
    return model
