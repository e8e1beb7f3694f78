"""CenterHead (Yin et al., CVPR 2021): maps of heat, offset, height, size, rotation and velocity for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qat.families.bevfusion.networks.blocks import BATCH_NORM, ConvModule

SEPARATE: Mapping[str, Any] = {"final_kernel": 3}


class SeparateHead(nn.Module):
    """One task: a small stack of convolutions for each map. [B,C,H,W] → {name: [B,channels,H,W]}."""

    def __init__(
        self,
        in_channels: int,
        heads: Mapping[str, Sequence[int]],
        head_conv: int = 64,
        final_kernel: int = 1,
        init_bias: float = -2.19,
        norm_cfg: Mapping[str, Any] | None = BATCH_NORM,
        **_: Any,
    ) -> None:
        super().__init__()
        self.names = tuple(heads)
        for name, (channels, count) in heads.items():
            layers: list[nn.Module] = []
            width = in_channels
            for _layer in range(count - 1):
                layers.append(ConvModule(width, head_conv, final_kernel, norm_cfg is not None))
                width = head_conv
            layers.append(nn.Conv2d(width, channels, final_kernel, padding=final_kernel // 2))
            setattr(self, name, nn.Sequential(*layers))
        nn.init.constant_(self.heatmap[-1].bias, init_bias)  # type: ignore[union-attr, index]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name)(x) for name in self.names}


class CenterHead(nn.Module):
    """A shared convolution, then one `SeparateHead` a task. Heatmaps are logits."""

    def __init__(
        self,
        in_channels: int,
        tasks: Sequence[Sequence[str]],
        common_heads: Mapping[str, Sequence[int]],
        separate_head: Mapping[str, Any] = SEPARATE,
        share_conv_channel: int = 64,
        num_heatmap_convs: int = 2,
        norm_cfg: Mapping[str, Any] | None = BATCH_NORM,
        **_: Any,
    ) -> None:
        super().__init__()
        separate = {k: v for k, v in separate_head.items() if k != "type"}
        self.shared_conv = ConvModule(in_channels, share_conv_channel, 3, norm_cfg is not None)
        self.task_heads = nn.ModuleList(
            SeparateHead(share_conv_channel, {**common_heads, "heatmap": (len(task), num_heatmap_convs)}, **separate)
            for task in tasks
        )

    def forward(self, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """[B,C,nx,ny] → for each task, {map name: [B,channels,nx,ny]}."""
        shared = self.shared_conv(x)
        return [head(shared) for head in self.task_heads]
