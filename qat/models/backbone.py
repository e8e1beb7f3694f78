"""Camera backbones, from timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from qat.core.errors import UserError


def build_backbone(config: Mapping[str, Any]) -> nn.Module:
    """A backbone whose forward takes [B,3,H,W] and returns a list of feature maps, one for each of `out_indices`.

    Types:
        ResNet: mmdet's `depth` and `out_indices` (0 is the first stage); timm's parameter names equal mmdet's.
        timm: any `model_name` that timm offers with `features_only`; `out_indices` are timm's own.

    `pretrained` and `init_cfg` are not followed: every command here loads a checkpoint or trains from its own.

    Raises:
        UserError: timm does not have the model, or not with these indices.
    """
    if config["type"] == "ResNet":
        name = f"resnet{config['depth']}"
        indices = tuple(i + 1 for i in config["out_indices"])
    else:
        name, indices = config["model_name"], tuple(config["out_indices"])
    try:
        return timm.create_model(name, pretrained=False, features_only=True, out_indices=indices)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise UserError(
            f"model.encoders.camera.backbone: found {name!r} with out_indices {list(indices)}, expected a timm model "
            f"that has them: {error}"
        ) from None
