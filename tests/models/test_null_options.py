"""A key that is null is not a key that is absent: mmcv's ConvModule has no norm, or no activation, where its cfg is None."""

import copy

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from qat.core.errors import UserError
from qat.families.bevfusion.config import load_config
from qat.families.bevfusion.detector import build_model
from qat.families.bevfusion.networks.centerhead import CenterHead
from qat.families.bevfusion.networks.generalized_lssfpn import GeneralizedLSSFPN

CAMERA = ("model", "encoders", "camera")


def put(config, path, value):
    config = copy.deepcopy(config)
    *keys, last = path.split(".")
    at = config["model"]
    for key in keys:
        at = at[key]
    at[last] = value
    return config


def by_mmcvs_rule(neck, maps, norm, act):
    """Two maps through one lateral and one 3×3 convolution, written out with torch's functions."""
    coarse = F.interpolate(maps[1], size=maps[0].shape[2:], mode="bilinear", align_corners=True)
    x = torch.cat([maps[0], coarse], 1)
    for block in (neck.lateral_convs[0], neck.fpn_convs[0]):
        x = F.conv2d(x, block.conv.weight, block.conv.bias, padding=block.conv.padding)
        if norm:
            bn = block.bn
            x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-5)
        x = F.relu(x) if act else x
    return x


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("act", [True, False])
def test_a_neck_has_no_norm_and_no_activation_where_they_are_null(norm, act):
    torch.manual_seed(0)
    options = {} if norm else {"norm_cfg": None}
    options |= {} if act else {"act_cfg": None}
    neck = GeneralizedLSSFPN([4, 6], 5, num_outs=1, **options).eval()
    for module in neck.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    maps = [torch.randn(1, 4, 8, 12), torch.randn(1, 6, 4, 6)]
    with torch.no_grad():
        out = neck(maps)[0]
        assert torch.allclose(out, by_mmcvs_rule(neck, maps, norm, act), atol=1e-6)
    assert bool((out < 0).any()) != act
    assert ("fpn_convs.0.conv.bias" in neck.state_dict()) != norm


def test_absent_and_given_options_are_the_same_network():
    torch.manual_seed(0)
    given = GeneralizedLSSFPN(
        [4, 6],
        5,
        1,
        norm_cfg={"type": "BN2d"},
        act_cfg={"type": "ReLU"},
        upsample_cfg={"mode": "bilinear", "align_corners": True},
    )
    absent = GeneralizedLSSFPN([4, 6], 5, 1)
    absent.load_state_dict(given.state_dict())
    maps = [torch.randn(1, 4, 8, 12), torch.randn(1, 6, 4, 6)]
    assert torch.equal(given.eval()(maps)[0], absent.eval()(maps)[0])


def test_a_head_has_no_norm_where_it_is_null():
    heads = {"reg": (2, 2)}
    plain = CenterHead(6, [["car"]], heads).state_dict()
    shared = CenterHead(6, [["car"]], heads, norm_cfg=None).state_dict()
    tasks = CenterHead(6, [["car"]], heads, separate_head={"final_kernel": 3, "norm_cfg": None}).state_dict()
    assert "shared_conv.bn.weight" in plain and "shared_conv.conv.bias" not in plain
    assert "shared_conv.bn.weight" not in shared and "shared_conv.conv.bias" in shared
    assert "task_heads.0.reg.0.bn.weight" in shared and "task_heads.0.reg.0.bn.weight" not in tasks
    assert "task_heads.0.reg.0.conv.bias" in tasks and "shared_conv.bn.weight" in tasks


SECOND = {"type": "SECOND", "in_channels": 10, "out_channels": [8, 12], "layer_nums": [1, 1], "layer_strides": [1, 2]}
FPN = {"type": "SECONDFPN", "in_channels": [8, 12], "out_channels": [6, 6], "upsample_strides": [1, 2]}
# Where mmcv ends in an error of its own, or builds what is not built here.
REFUSED = [
    ("encoders.camera.backbone.norm_cfg", None),
    ("encoders.camera.neck.upsample_cfg", None),
    ("encoders.camera.neck.start_level", None),
    ("encoders.camera.neck.upsample_cfg", {"mode": "nearest", "align_corners": True}),
    ("encoders.camera.neck.upsample_cfg", {"mode": "area"}),
    ("encoders.camera.neck.norm_cfg", {"type": "BN", "eps": None}),
    ("decoder.backbone.norm_cfg", None),
    ("decoder.backbone.conv_cfg", None),
    ("decoder.backbone.norm_cfg", {"type": "BN", "eps": None}),
    ("decoder.backbone.norm_cfg", {"type": "BN", "eps": "small"}),
    ("decoder.backbone.norm_cfg", {"type": "BN", "eps": -1.0}),
    ("decoder.neck.norm_cfg", None),
    ("decoder.neck.upsample_cfg", None),
    ("heads.object.separate_head", None),
    ("heads.object.test_cfg.nms_scale", None),
]


@pytest.fixture
def second(tiny_config):
    config = copy.deepcopy(tiny_config)
    config["model"]["decoder"] = copy.deepcopy({"backbone": SECOND, "neck": FPN})
    return config


@pytest.mark.parametrize(("path", "value"), REFUSED, ids=[f"{path}={value}" for path, value in REFUSED])
def test_null_where_it_builds_nothing_is_refused_by_its_key(second, path, value):
    expected = rf"config: model\.{path}: found " + ("null" if value is None else r"\{.*\}") + ", expected "
    with pytest.raises(UserError, match=expected):
        build_model(put(second, path, value))


def test_null_load_dim_is_refused(tiny_config):
    with pytest.raises(UserError, match="load_dim: found null, expected a whole number"):
        build_model({**tiny_config, "load_dim": None})


def test_swins_null_options_are_refused(tiny_config):
    swin = {"type": "SwinTransformer", "out_indices": None}
    with pytest.raises(UserError, match=r"backbone\.out_indices: found null"):
        build_model(put(tiny_config, "encoders.camera.backbone", swin))
    with pytest.raises(UserError, match=r"backbone\.act_cfg: found null"):
        build_model(
            put(
                tiny_config,
                "encoders.camera.backbone",
                {"type": "SwinTransformer", "out_indices": [1, 2], "act_cfg": None},
            )
        )


def test_nearest_upsampling_takes_align_corners_false(tiny_config, tiny_frames):
    from qat.model.runners import run_frame

    config = put(tiny_config, "encoders.camera.neck.upsample_cfg", {"mode": "nearest", "align_corners": False})
    model = build_model(config).eval()
    plain = build_model(put(tiny_config, "encoders.camera.neck.upsample_cfg", {"mode": "nearest"})).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        found, expected = run_frame(model, tiny_frames[0]), run_frame(plain, tiny_frames[0])
    assert torch.equal(found["heatmap_0"], expected["heatmap_0"])


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "+1.e-3", "0.001"])
def test_numbers_that_yaml_1_1_takes_for_text_are_numbers(second, tmp_path, written):
    second["model"]["decoder"]["backbone"]["norm_cfg"] = {"type": "BN", "eps": "EPS", "momentum": 0.01}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(second).replace("EPS", written))
    model = build_model(load_config(tmp_path / "config.yaml"))
    assert {m.eps for m in model.decoder["backbone"].modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
