"""Swin Transformer (Liu et al., ICCV 2021) with mmdet's structure and names, computed by timm's modules.

Differences between mmdet and timm, and where they are handled:

- A block pads its map to whole windows and then shifts it; timm shifts first, so that at a size that is not a multiple of the
  window, such as every stage of 256×704, rows of opposite edges attend to each other (`PaddedBlock`).
- Windows keep their size on maps smaller than them; timm would shrink them.
- Each output has its own layer norm, norm1 to norm3, and is [B,C,H,W].
- PatchMerging is at the end of a stage (timm: at the start of the next) and orders the 4·C values that it merges like
  nn.Unfold, c·4 + 2·row + column; timm as (2·column + row)·C + c.
- Names: see `mmdet_name`. A state dict has mmdet's names and orders, both ways; the modules inside have timm's.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import timm.models.swin_transformer as timm_swin
import torch
from torch import nn
from torch.nn import functional as F

from qat.core.errors import UserError

PATCH = 4
# timm's name inside a stage or the patch embedding → mmdet's
RENAMED = (
    (re.compile(r"^patch_embed\.proj\."), "patch_embed.projection."),
    (re.compile(r"\.attn\."), ".attn.w_msa."),
    (re.compile(r"\.mlp\.fc1\."), ".ffn.layers.0.0."),
    (re.compile(r"\.mlp\.fc2\."), ".ffn.layers.1."),
)
MERGING = re.compile(r"^stages\.(\d+)\.downsample\.")
INDEX = "relative_position_index"


def mmdet_name(name: str) -> str:
    """mmdet's name of a parameter from its path in `SwinTransformer`, whose modules are timm's.

    `stages.1.downsample.norm.weight` → `stages.0.downsample.norm.weight`,
    `stages.0.blocks.1.attn.qkv.bias` → `stages.0.blocks.1.attn.w_msa.qkv.bias`,
    `stages.0.blocks.1.mlp.fc1.bias` → `stages.0.blocks.1.ffn.layers.0.0.bias`.
    """
    if merging := MERGING.match(name):
        return f"stages.{int(merging.group(1)) - 1}.downsample.{name[merging.end() :]}"
    for pattern, theirs in RENAMED:
        name = pattern.sub(theirs, name)
    return name


def to_unfold_order(x: torch.Tensor) -> torch.Tensor:
    """Reorders the last axis, 4·C, from timm's order of merged patches to nn.Unfold's; [..., 4·C] → [..., 4·C]."""
    return x.unflatten(-1, (2, 2, -1)).movedim(-1, -3).transpose(-1, -2).flatten(-3).contiguous()


def from_unfold_order(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_unfold_order`."""
    return x.unflatten(-1, (-1, 2, 2)).transpose(-1, -2).movedim(-3, -1).flatten(-3).contiguous()


class PaddedBlock(timm_swin.SwinTransformerBlock):
    """timm's block with the map padded to whole windows before the shift, not after it."""

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        height, width = int(self.input_resolution[0]), int(self.input_resolution[1])  # type: ignore[index]
        below, right = -height % self.window_size[0], -width % self.window_size[1]
        if not (below or right):
            return super()._attn(x)
        return super()._attn(F.pad(x, (0, 0, 0, right, 0, below)))[:, :height, :width]


class SwinTransformer(nn.Module):
    """mmdet's SwinTransformer: [B,3,H,W] → for each of `out_indices`, [B, embed_dims·2ⁱ, H/2ⁱ⁺², W/2ⁱ⁺²], rounded up.

    Args:
        image_size: (H, W), multiples of 4. The windows' masks depend on it, so no other size can be run.
        drop_path_rate, attn_drop_rate: in training only.

    Raises:
        UserError: `image_size` is not a multiple of the patches. ValueError, AssertionError: other invalid values.
    """

    def __init__(
        self,
        image_size: Sequence[int],
        embed_dims: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        **_: Any,
    ) -> None:
        super().__init__()
        if image_size[0] % PATCH or image_size[1] % PATCH:
            raise UserError(f"image_size: found {list(image_size)}, expected multiples of {PATCH} for SwinTransformer")
        if len(depths) != len(num_heads):
            raise ValueError(f"found {len(depths)} depths and {len(num_heads)} num_heads, expected as many of both")
        if not out_indices or sorted(set(out_indices)) != list(out_indices) or out_indices[0] < 0:
            raise ValueError(f"found out_indices {list(out_indices)}, expected stages in order")
        if out_indices[-1] >= len(depths):
            raise ValueError(f"found out_indices {list(out_indices)}, expected stages below {len(depths)}")
        for stage, heads in enumerate(num_heads):
            if embed_dims * 2**stage % heads:
                raise ValueError(f"found {heads} heads for {embed_dims * 2**stage} channels, expected a divisor")
        network = timm_swin.SwinTransformer(
            img_size=(int(image_size[0]), int(image_size[1])),
            patch_size=PATCH,
            num_classes=0,
            embed_dim=embed_dims,
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            window_size=window_size,
            always_partition=True,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        self.out_indices = tuple(out_indices)
        self.patch_embed = network.patch_embed
        self.stages = nn.ModuleList(list(network.layers)[: self.out_indices[-1] + 1])
        for i in self.out_indices:
            self.add_module(f"norm{i}", nn.LayerNorm(embed_dims * 2**i))
        for block in self.blocks():
            block.__class__ = PaddedBlock  # timm has no argument for the class of its blocks; this one adds no state
            block.attn.fused_attn = False  # type: ignore[misc]  # the fused call, which timm takes on request only, has no opset 13 form

    def blocks(self) -> list[timm_swin.SwinTransformerBlock]:
        """All blocks, in order of execution."""
        return [block for stage in self.stages for block in stage.blocks]  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.patch_embed(x)
        outputs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outputs.append(getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2).contiguous())
        return outputs

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Like nn.Module's, with mmdet's names, order of merged patches, and relative_position_index.

        With `keep_vars` the tensors must be the parameters themselves (torch's exporters rely on it), so names and orders are
        timm's.
        """
        if keep_vars:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=True)
        own: Any = super().state_dict(prefix=prefix)
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        for path, tensor in own.items():
            name = path[len(prefix) :]
            destination[prefix + mmdet_name(name)] = to_unfold_order(tensor) if MERGING.match(name) else tensor
        for name, buffer in self._indices().items():
            destination[prefix + name] = buffer
        if hasattr(destination, "_metadata"):
            destination._metadata.update(own._metadata)
        return destination

    def _indices(self) -> dict[str, torch.Tensor]:
        """The index in the bias table for each pair of a window's pixels, by mmdet's name; fixed by the window."""
        return {
            f"stages.{i}.blocks.{j}.attn.w_msa.{INDEX}": block.attn.relative_position_index
            for i, stage in enumerate(self.stages)
            for j, block in enumerate(stage.blocks)  # type: ignore[arg-type]
        }

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Converts mmdet's names and orders to timm's, in place, before the children read their entries."""
        given = {}
        for name, _ in self.named_parameters():
            value = state_dict.pop(prefix + mmdet_name(name), None)
            if value is not None:
                given[prefix + name] = from_unfold_order(value) if MERGING.match(name) else value
        state_dict.update(given)
        for name, index in self._indices().items():
            value = state_dict.pop(prefix + name, None)
            if value is not None and not (value.shape == index.shape and torch.equal(value.to(index), index)):
                error_msgs.append(f"{prefix}{name}: another order of a window's pixels than mmdet's")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
