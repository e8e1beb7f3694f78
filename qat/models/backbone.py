"""Camera backbones, from timm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import nn

from qat.core.errors import UserError


def build_backbone(config: Mapping[str, Any], image_size: Sequence[int] | None = None) -> nn.Module:
    """A backbone whose forward takes [B,3,H,W] and returns a list of feature maps, one for each of `out_indices`.

    image_size: (H, W), for transformers, whose position embeddings and windows depend on it.

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
    options: dict[str, Any] = {"pretrained": False, "features_only": True, "out_indices": indices}
    try:
        if image_size is None:
            return timm.create_model(name, **options)
        try:
            return timm.create_model(name, img_size=tuple(image_size), **options)
        except TypeError:  # a convolutional network takes any size, and no such option
            return timm.create_model(name, **options)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise UserError(
            f"model.encoders.camera.backbone: found {name!r} with out_indices {list(indices)}, expected a timm model "
            f"that has them: {error}"
        ) from None
