"""SECOND's backbone and FPN (Yan et al., Sensors 2018), with mmdet3d's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

NORM: Mapping[str, Any] = {"eps": 1e-3, "momentum": 0.01}  # mmdet3d's defaults for both networks


def _norm(config: Mapping[str, Any], channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=config.get("eps", 1e-5), momentum=config.get("momentum", 0.1))


class SECOND(nn.Module):
    """Stages of 3×3 convolutions, the first of each with a stride: [B,C,H,W] → one map a stage."""

    def __init__(
        self,
        in_channels: int,
        out_channels: Sequence[int],
        layer_nums: Sequence[int],
        layer_strides: Sequence[int],
        norm_cfg: Mapping[str, Any] = NORM,
        **_: Any,
    ) -> None:
        super().__init__()
        blocks = []
        for channels, count, stride in zip(out_channels, layer_nums, layer_strides, strict=True):
            layers: list[nn.Module] = []
            for k in range(count + 1):
                layers += [
                    nn.Conv2d(in_channels, channels, 3, stride=stride if k == 0 else 1, padding=1, bias=False),
                    _norm(norm_cfg, channels),
                    nn.ReLU(inplace=False),
                ]
                in_channels = channels
            blocks.append(nn.Sequential(*layers))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs


class SECONDFPN(nn.Module):
    """Resizes every level to one size and concatenates: Σ out_channels.

    A stride above 1 (or 1, unless `use_conv_for_no_stride`) upsamples by a transposed convolution; one below 1
    downsamples by a convolution with kernel and stride 1/stride.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        upsample_strides: Sequence[float],
        norm_cfg: Mapping[str, Any] = NORM,
        use_conv_for_no_stride: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        deblocks = []
        for cin, cout, stride in zip(in_channels, out_channels, upsample_strides, strict=True):
            layer: nn.Module
            if stride > 1 or (stride == 1 and not use_conv_for_no_stride):
                layer = nn.ConvTranspose2d(cin, cout, int(stride), stride=int(stride), bias=False)
            else:
                step = round(1 / stride)
                layer = nn.Conv2d(cin, cout, step, stride=step, bias=False)
            deblocks.append(nn.Sequential(layer, _norm(norm_cfg, cout), nn.ReLU(inplace=False)))
        self.deblocks = nn.ModuleList(deblocks)

    def forward(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One map a level → [one map]."""
        return [torch.cat([deblock(inputs[i]) for i, deblock in enumerate(self.deblocks)], dim=1)]
