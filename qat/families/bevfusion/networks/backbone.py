"""Camera backbones, from timm."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import nn

from qat.core.errors import UserError
from qat.families.bevfusion.networks.swin import SwinTransformer

WHERE = "config: model.encoders.camera.backbone"


def build_backbone(config: Mapping[str, Any], image_size: Sequence[int] | None = None) -> nn.Module:
    """A backbone whose forward accepts [B,3,H,W] and returns a list of feature maps, one for each of `out_indices`.

    image_size: (H, W), for transformers, whose position embeddings and windows depend on it.

    Types:
        ResNet: mmdet's `depth` and `out_indices` (0 is the first stage); timm's parameter names equal mmdet's.
        SwinTransformer: mmdet's, see `qat.families.bevfusion.networks.swin`; its state dict has mmdet's names.
        timm: any `model_name` that timm offers with `features_only`; `out_indices` are timm's.

    `pretrained` and `init_cfg` are ignored: every command here loads a checkpoint or trains from its own initial weights. So
    are `with_cp` and `frozen_stages`, which affect training, not what a network computes.

    Raises:
        UserError: the model does not exist, or not with these options.
    """
    kind = config["type"]
    if kind == "SwinTransformer":
        return _build_swin(config, image_size)
    indices = config.get("out_indices")
    if (
        not isinstance(indices, list | tuple)
        or not all(type(i) is int and 0 <= i < 1000 for i in indices)
        or not indices
    ):
        raise UserError(f"{WHERE}.out_indices: found {indices!r}, expected the numbers of the stages to use")
    if kind == "ResNet":
        return _build_timm(f"resnet{config.get('depth')}", tuple(i + 1 for i in indices), image_size)
    return _build_timm(str(config.get("model_name")), tuple(indices), image_size)


def _build_swin(config: Mapping[str, Any], image_size: Sequence[int] | None) -> nn.Module:
    if image_size is None:
        raise UserError(f"{WHERE}: SwinTransformer needs image_size: its windows depend on it")
    arguments = {key: value for key, value in config.items() if key != "type"}
    try:
        return SwinTransformer(image_size, **arguments)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise UserError(f"{WHERE}: cannot build SwinTransformer from these values: {error}") from None


def _build_timm(name: str, indices: tuple[int, ...], image_size: Sequence[int] | None) -> nn.Module:
    if not re.fullmatch(
        r"[A-Za-z0-9_.-]+", name
    ):  # timm also accepts addresses and folders, from which it would fetch a config
        raise UserError(f"{WHERE}: found {name!r}, expected the name of a timm model")
    options: dict[str, Any] = {"pretrained": False, "features_only": True, "out_indices": indices}
    try:
        network = _create(name, image_size, options)
        if _layout(network) != "NCHW":  # timm's getter turns channels-last maps, and tokens, into [B,C,H,W]
            network = _create(name, image_size, {**options, "feature_cls": "getter"})
        maps: Any = getattr(network, "feature_info", None)
        if maps is not None:  # called here, where exceptions come from the model's code
            maps.channels(), maps.reduction()
    except MemoryError:
        raise
    except Exception as error:  # hundreds of networks' constructors, which may raise anything
        why = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            f"{WHERE}: found {name!r} with out_indices {list(indices)}, expected a timm model that has them: {why}"
        ) from None
    if _layout(network) != "NCHW":
        raise UserError(
            f"{WHERE}: found {name!r}, whose maps are {_layout(network)}, expected one that returns [B,C,H,W]"
        )
    return network


def _layout(network: nn.Module) -> str:
    found: Any = getattr(network, "output_fmt", "NCHW")  # purely convolutional networks do not have it
    return str(getattr(found, "value", found))


def _create(name: str, image_size: Sequence[int] | None, options: Mapping[str, Any]) -> nn.Module:
    if image_size is None:
        return timm.create_model(name, **options)
    try:
        return timm.create_model(name, img_size=tuple(image_size), **options)
    except TypeError:  # a convolutional network accepts any size, and has no such option
        return timm.create_model(name, **options)
