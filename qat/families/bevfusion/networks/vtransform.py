"""LSSTransform and DepthLSSTransform: image features to BEV (Philion & Fidler, ECCV 2020; BEVFusion, ICRA 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from qat.families.bevfusion.networks.blocks import conv_bn_relu
from qat.families.bevfusion.pooling.geometry import (
    PoolPattern,
    create_frustum,
    frustum_to_lidar,
    grid_size,
    pooling_pattern,
)


def split(out: torch.Tensor, bins: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N,D+C,fH,fW] → depth weights [N,D,fH,fW], summing to 1 over D, and context [N,C,fH,fW]."""
    return out[:, :bins].softmax(dim=1), out[:, bins : bins + channels]


class LSSTransform(nn.Module):
    """Predicts a depth distribution and a context vector for every feature pixel.

    `dx`, `bx`, `nx` and `frustum` are parameters without gradients, as in BEVFusion, so that its checkpoints load.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: Sequence[int],
        feature_size: Sequence[int],
        xbound: Sequence[float],
        ybound: Sequence[float],
        zbound: Sequence[float],
        dbound: Sequence[float],
        downsample: int = 1,
        **_: Any,
    ) -> None:
        super().__init__()
        bounds = (xbound, ybound, zbound)
        self.bounds = bounds
        self.C = out_channels

        def fixed(value: torch.Tensor) -> nn.Parameter:
            return nn.Parameter(value, requires_grad=False)

        self.dx = fixed(torch.tensor([float(row[2]) for row in bounds]))
        self.bx = fixed(torch.tensor([row[0] + row[2] / 2.0 for row in bounds]))
        self.nx = fixed(torch.tensor(grid_size(*bounds)))
        self.frustum = fixed(torch.from_numpy(create_frustum(image_size, feature_size, dbound)))
        self.D = self.frustum.shape[0]
        self._build_depthnet(in_channels)
        self.downsample: nn.Module = nn.Identity()
        if downsample > 1:
            self.downsample = nn.Sequential(
                *conv_bn_relu(out_channels, out_channels),
                *conv_bn_relu(out_channels, out_channels, stride=downsample),
                *conv_bn_relu(out_channels, out_channels),
            )

    needs_depth = False

    def set_bounds(self, xbound: Sequence[float], ybound: Sequence[float], zbound: Sequence[float]) -> None:
        """Lowers the upper ends, for fewer cells; lower ends and steps do not change."""
        self.bounds = (xbound, ybound, zbound)
        self.nx.data = torch.tensor(grid_size(*self.bounds))

    def _build_depthnet(self, in_channels: int) -> None:
        self.depthnet: nn.Module = nn.Conv2d(in_channels, self.D + self.C, 1)

    def depth_and_context(self, x: torch.Tensor, depth: torch.Tensor | None) -> torch.Tensor:
        """[N,Cin,fH,fW] (and [N,1,H,W] metres) → [N,D+C,fH,fW]: depth logits, then context."""
        return self.depthnet(x)

    def split(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `split`, with this transform's sizes."""
        return split(out, self.D, self.C)

    def pattern(
        self,
        camera_intrinsics: np.ndarray,
        camera2lidar: np.ndarray,
        img_aug_matrix: np.ndarray,
        lidar_aug_matrix: np.ndarray,
    ) -> PoolPattern:
        """The pooling pattern of one sample; matrices float32[N,4,4] and [4,4]."""
        frustum = self.frustum.detach().cpu().numpy()
        points = frustum_to_lidar(frustum, camera_intrinsics, camera2lidar, img_aug_matrix, lidar_aug_matrix)
        return pooling_pattern(points, *self.bounds)


class DepthLSSTransform(LSSTransform):
    """LSSTransform that also uses the lidar's sparse depth map, through `dtransform`."""

    needs_depth = True

    def _build_depthnet(self, in_channels: int) -> None:
        self.dtransform = nn.Sequential(
            *conv_bn_relu(1, 8, kernel=1, bias=True),
            *conv_bn_relu(8, 32, stride=4, kernel=5, bias=True),
            *conv_bn_relu(32, 64, stride=2, kernel=5, bias=True),
        )
        self.depthnet = nn.Sequential(
            *conv_bn_relu(in_channels + 64, in_channels, bias=True),
            *conv_bn_relu(in_channels, in_channels, bias=True),
            nn.Conv2d(in_channels, self.D + self.C, 1),
        )

    def depth_and_context(self, x: torch.Tensor, depth: torch.Tensor | None) -> torch.Tensor:
        """[N,Cin,fH,fW] and [N,1,H,W] metres → [N,D+C,fH,fW]: depth logits, then context."""
        return self.depthnet(torch.cat([self.dtransform(depth), x], dim=1))
