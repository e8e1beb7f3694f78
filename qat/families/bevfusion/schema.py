"""Every option of BEVFusion's networks that is understood, so that no other is swallowed.

An option is free (FREE), or has the one value, or the few, that the networks here are built with. BEVFusion, mmdet
and mmcv accept more; what they would build differently is refused by name instead of ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

FREE = object()
BATCH_NORMS = ("BN", "BN1d", "BN2d", "SyncBN", "naiveSyncBN2d")


class Null:
    """What a key holds that is there and null, in messages: one that is absent has its default instead."""

    def __repr__(self) -> str:
        return "null"


NULL = Null()


class Norm:
    """A norm_cfg: batch norm, with PyTorch's eps unless `eps_free`. Absent is the default's, null is none (as mmcv's ConvModule
    has it) where `optional`."""

    def __init__(self, eps_free: bool = False, optional: bool = False) -> None:
        self.eps_free, self.optional = eps_free, optional

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if not isinstance(value, Mapping) or value.get("type", "BN") not in BATCH_NORMS:
            return False
        eps, momentum = value.get("eps", 1e-5), value.get("momentum", 0.1)
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < 1 for v in (eps, momentum))
        return numbers and (self.eps_free or eps == 1e-5)

    def __str__(self) -> str:
        return (
            "batch norm"
            + (", its eps and momentum numbers between 0 and 1" if self.eps_free else " with eps 1e-5")
            + (", or null for none" if self.optional else "")
        )


PLAIN_CONV = (None, {"type": "Conv2d"})
BIASLESS_CONV = ({"type": "Conv2d", "bias": False}, {"bias": False})  # null would be one with a bias
RELU = (None, {"type": "ReLU"}, {"type": "ReLU", "inplace": True}, {"type": "ReLU", "inplace": False})

_VTRANSFORM = {
    **dict.fromkeys(
        ("in_channels", "out_channels", "image_size", "feature_size", "xbound", "ybound", "zbound", "dbound"), FREE
    ),
    "downsample": (1, 2),
    "bevfusion_count": (None, True, False),  # ours: bounds of a checkpoint with BEVFusion's count of cells
    # CUDA-BEVFusion's models have these
    "depth_input": ("scalar",),
    "height_expand": (False,),
    "add_depth_features": (False,),
    "use_points": ("lidar",),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "ResNet": {
        **dict.fromkeys(
            ("depth", "out_indices", "norm_eval", "init_cfg", "pretrained", "frozen_stages", "with_cp"), FREE
        ),
        "zero_init_residual": FREE,
        "num_stages": (4,),
        "norm_cfg": Norm(),
        "style": ("pytorch",),
        "deep_stem": (False,),
        "avg_down": (False,),
        "in_channels": (3,),
        "stem_channels": (None, 64),
        "base_channels": (64,),
        "strides": ([1, 2, 2, 2],),
        "dilations": ([1, 1, 1, 1],),
        "conv_cfg": PLAIN_CONV,
        "dcn": (None,),
        "stage_with_dcn": ([False] * 4,),
        "plugins": (None,),
    },
    "SwinTransformer": {
        **dict.fromkeys(("embed_dims", "depths", "num_heads", "window_size", "mlp_ratio", "out_indices"), FREE),
        # training alone, or where weights would come from
        **dict.fromkeys(
            ("attn_drop_rate", "drop_path_rate", "with_cp", "frozen_stages", "pretrained", "init_cfg"), FREE
        ),
        **dict.fromkeys(("convert_weights", "pretrain_img_size"), FREE),
        "qkv_bias": (True, False),
        "qk_scale": (None,),
        "drop_rate": (0,),
        "patch_norm": (True,),
        "patch_size": (4,),
        "strides": ([4, 2, 2, 2],),
        "in_channels": (3,),
        "use_abs_pos_embed": (False,),
        "act_cfg": ({"type": "GELU"},),
        "norm_cfg": ({"type": "LN"},),
    },
    "timm": dict.fromkeys(("model_name", "out_indices", "pretrained"), FREE),
    "GeneralizedLSSFPN": {
        **dict.fromkeys(("in_channels", "out_channels", "num_outs", "start_level", "upsample_cfg"), FREE),
        "no_norm_on_lateral": (True, False),
        "end_level": (-1,),
        "norm_cfg": Norm(optional=True),
        "act_cfg": RELU,
        "conv_cfg": PLAIN_CONV,
    },
    "SECONDFPN": {
        **dict.fromkeys(("in_channels", "out_channels", "upsample_strides", "init_cfg"), FREE),
        "use_conv_for_no_stride": (True, False),
        "norm_cfg": Norm(eps_free=True),
        "upsample_cfg": ({"type": "deconv", "bias": False},),
        "conv_cfg": BIASLESS_CONV,
    },
    # BEVFusion's LSSTransform sees no points: how a depth map would be made changes nothing.
    "LSSTransform": {
        **_VTRANSFORM,
        "depth_input": ("scalar", "one-hot"),
        **dict.fromkeys(("height_expand", "add_depth_features"), (True, False)),
        "use_points": ("lidar", "radar"),
    },
    "DepthLSSTransform": _VTRANSFORM,
    "GeneralizedResNet": dict.fromkeys(("in_channels", "blocks"), FREE),
    "SECOND": {
        **dict.fromkeys(("in_channels", "out_channels", "layer_nums", "layer_strides", "init_cfg", "pretrained"), FREE),
        "norm_cfg": Norm(eps_free=True),
        "conv_cfg": BIASLESS_CONV,
    },
    "LSSFPN": dict.fromkeys(("in_indices", "in_channels", "out_channels", "scale_factor"), FREE),
    "CenterHead": {
        **dict.fromkeys(("in_channels", "tasks", "train_cfg", "test_cfg", "bbox_coder", "common_heads"), FREE),
        **dict.fromkeys(("loss_cls", "loss_bbox", "separate_head", "share_conv_channel", "num_heatmap_convs"), FREE),
        "norm_bbox": (True, False),
        "conv_cfg": PLAIN_CONV,
        "norm_cfg": Norm(optional=True),
        "bias": ("auto",),
        "init_cfg": (None,),
    },
    "SeparateHead": {
        **dict.fromkeys(("head_conv", "final_kernel", "init_bias"), FREE),
        "conv_cfg": PLAIN_CONV,
        "norm_cfg": Norm(optional=True),
        "bias": ("auto",),
        "init_cfg": (None,),
    },
    "CenterPointBBoxCoder": dict.fromkeys(
        ("pc_range", "out_size_factor", "voxel_size", "post_center_range", "score_threshold", "max_num", "code_size"),
        FREE,
    ),
}
MAPS = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}  # common_heads: channels of each


def problems(kind: str, options: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """(option, what was found, what is expected) of every option of a network of type `kind` that is not understood."""
    known = OPTIONS[kind]
    for name, value in options.items():
        if name == "type":
            continue
        if name not in known:
            yield name, value, f"no such option: {kind} has {', '.join(sorted(known))}"
            continue
        rule = known[name]
        if isinstance(rule, Norm):
            if not rule.accepts(value):
                yield name, NULL if value is None else value, str(rule)
        elif rule is not FREE:
            plain = list(value) if isinstance(value, tuple) else value
            if plain not in rule:
                yield (
                    name,
                    NULL if value is None else value,
                    " or ".join("null" if v is None else repr(v) for v in rule),
                )
