"""Layers that several networks share, with mmcv's and torchvision's names in a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

BATCH_NORM: Mapping[str, Any] = {"type": "BN"}
RELU: Mapping[str, Any] = {"type": "ReLU"}


class ConvModule(nn.Module):
    """Convolution, batch norm, ReLU; state-dict names `conv.*` and `bn.*` as mmcv's ConvModule has them.

    [B,Cin,H,W] → [B,Cout,H,W]. Without a norm the convolution has a bias. `norm` and `activation` are False if the config's
    norm_cfg and act_cfg are null.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, norm: bool = True, activation: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm)
        self.bn = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.activate = nn.ReLU(inplace=False) if activation else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activate(self.bn(self.conv(x)))


class BasicBlock(nn.Module):
    """ResNet's basic block (He et al., CVPR 2016): [B,Cin,H,W] → [B,Cout,H/stride,W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=False)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + identity)


def conv_bn_relu(
    in_channels: int, out_channels: int, stride: int = 1, kernel: int = 3, bias: bool = False
) -> list[nn.Module]:
    """Three layers for an `nn.Sequential`."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=bias)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=False)]
