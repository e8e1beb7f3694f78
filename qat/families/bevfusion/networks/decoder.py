"""GeneralizedResNet and LSSFPN: BEVFusion's BEV decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qat.families.bevfusion.networks.blocks import BasicBlock, conv_bn_relu


class GeneralizedResNet(nn.ModuleList):
    """Stages of basic blocks; `blocks` lists (count, channels, stride): [B,C,H,W] → one map a stage."""

    def __init__(self, in_channels: int, blocks: Sequence[Sequence[int]], **_: Any) -> None:
        super().__init__()
        for count, channels, stride in blocks:
            stage = [BasicBlock(in_channels, channels, stride)]
            stage += [BasicBlock(channels, channels) for _ in range(count - 1)]
            self.append(nn.Sequential(*stage))
            in_channels = channels

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for stage in self:
            x = stage(x)
            outputs.append(x)
        return outputs


class LSSFPN(nn.Module):
    """Joins a coarse and a fine map, then upsamples (Philion & Fidler, ECCV 2020): [B,out,H·scale,W·scale]."""

    def __init__(
        self, in_indices: Sequence[int], in_channels: Sequence[int], out_channels: int, scale_factor: int = 1, **_: Any
    ) -> None:
        super().__init__()
        self.in_indices = tuple(in_indices)
        self.fuse = nn.Sequential(
            *conv_bn_relu(in_channels[0] + in_channels[1], out_channels, kernel=1),
            *conv_bn_relu(out_channels, out_channels),
        )
        self.upsample: nn.Sequential | None = None
        if scale_factor > 1:
            self.upsample = nn.Sequential(
                nn.Upsample(scale_factor=scale_factor, mode="bilinear", align_corners=True),
                *conv_bn_relu(out_channels, out_channels),
            )

    def forward(self, x: Sequence[torch.Tensor]) -> torch.Tensor:
        coarse, fine = x[self.in_indices[0]], x[self.in_indices[1]]
        coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=True)
        out = self.fuse(torch.cat([coarse, fine], dim=1))
        return out if self.upsample is None else self.upsample(out)
