"""GeneralizedLSSFPN: BEVFusion's camera neck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qat.families.bevfusion.networks.blocks import BATCH_NORM, RELU, ConvModule

BILINEAR: Mapping[str, Any] = {"mode": "bilinear", "align_corners": True}


class GeneralizedLSSFPN(nn.Module):
    """Top-down: upsample the coarser map, concatenate, 1×1, 3×3.

    Accepts n maps, finest first, and returns n − 1: the coarsest has no output.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int | None = None,
        start_level: int = 0,
        no_norm_on_lateral: bool = False,
        norm_cfg: Mapping[str, Any] | None = BATCH_NORM,
        act_cfg: Mapping[str, Any] | None = RELU,
        upsample_cfg: Mapping[str, Any] = BILINEAR,
        **_: Any,
    ) -> None:
        super().__init__()
        self.start_level = start_level
        self.upsample_cfg = dict(upsample_cfg)
        if (
            self.upsample_cfg.get("mode") == "nearest"
        ):  # nearest has no align_corners; torch refuses the argument even if it is False
            self.upsample_cfg.pop("align_corners", None)
        norm, activation = norm_cfg is not None, act_cfg is not None
        last = len(in_channels) - 1
        self.lateral_convs = nn.ModuleList()
        self.fpn_convs = nn.ModuleList()
        for i in range(start_level, last):
            coarser = in_channels[i + 1] if i == last - 1 else out_channels
            self.lateral_convs.append(
                ConvModule(in_channels[i] + coarser, out_channels, 1, norm and not no_norm_on_lateral, activation)
            )
            self.fpn_convs.append(ConvModule(out_channels, out_channels, 3, norm, activation))

    def forward(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[B,Ci,Hi,Wi] for each level, finest first → [B,out,Hi,Wi] for each level but the last."""
        levels = list(inputs[self.start_level :])
        for i in range(len(self.lateral_convs) - 1, -1, -1):
            coarse = F.interpolate(levels[i + 1], size=levels[i].shape[2:], **self.upsample_cfg)
            levels[i] = self.fpn_convs[i](self.lateral_convs[i](torch.cat([levels[i], coarse], dim=1)))
        return levels[:-1]
