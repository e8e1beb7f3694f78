"""Swin against a second, plain definition with mmdet's names, and mmdet's state dict both ways."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat.core.errors import UserError
from qat.core.validation import validated
from qat.families.bevfusion.detector import build_model
from qat.families.bevfusion.networks.backbone import build_backbone
from qat.families.bevfusion.networks.swin import from_unfold_order, mmdet_name, to_unfold_order
from qat.families.bevfusion.schema import SwinTransformer
from qat.families.bevfusion.state import load_state
from tests.messages import refused

WINDOW = 7
TINY = {
    "type": "SwinTransformer",
    "embed_dims": 8,
    "depths": [2, 1, 2, 1],
    "num_heads": [1, 2, 2, 4],
    "window_size": WINDOW,
    "mlp_ratio": 2,
    "qkv_bias": True,
    "qk_scale": None,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.2,
    "patch_norm": True,
    "out_indices": [1, 2, 3],
    "with_cp": False,
    "convert_weights": True,
    "init_cfg": None,
}


def linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def windowed_attention(x, state, name, heads, shift):
    """x [H,W,C]: padded with zeros to whole windows; each window that starts `shift` further down and right, around the
    edges, attends within itself, but not from what went around an edge to what did not."""
    height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
    offsets = [(r, c) for r in range(WINDOW) for c in range(WINDOW)]
    rows, columns = (torch.tensor(axis) for axis in zip(*offsets, strict=True))
    table = state[f"{name}.relative_position_bias_table"]
    apart = (rows[:, None] - rows + WINDOW - 1) * (2 * WINDOW - 1) + columns[:, None] - columns + WINDOW - 1
    out = torch.zeros_like(x)
    for top in range(0, x.shape[0], WINDOW):
        for left in range(0, x.shape[1], WINDOW):
            r, c = top + rows + shift, left + columns + shift
            edge = 2 * (r >= x.shape[0]).int() + (c >= x.shape[1]).int()
            mask = torch.where(edge[:, None] == edge, 0.0, -100.0)
            r, c = r % x.shape[0], c % x.shape[1]
            q, k, v = linear(x[r, c], state, f"{name}.qkv").view(49, 3, heads, -1).permute(1, 2, 0, 3)
            scores = q @ k.transpose(1, 2) / (channels // heads) ** 0.5 + table[apart].permute(2, 0, 1) + mask
            out[r, c] = linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), state, f"{name}.proj")
    return out[:height, :width]


def plain_swin(image, state, config):
    """image [3,H,W] → a map [C,h,w] for each of out_indices."""
    x = F.conv2d(image, state["patch_embed.projection.weight"], state["patch_embed.projection.bias"], stride=4)
    x = norm(x.permute(1, 2, 0), state, "patch_embed.norm")
    outputs = []
    for i, (depth, heads) in enumerate(zip(config["depths"], config["num_heads"], strict=True)):
        for j in range(depth):
            block = f"stages.{i}.blocks.{j}"
            shift = WINDOW // 2 * (j % 2)
            x = x + windowed_attention(norm(x, state, f"{block}.norm1"), state, f"{block}.attn.w_msa", heads, shift)
            y = F.gelu(linear(norm(x, state, f"{block}.norm2"), state, f"{block}.ffn.layers.0.0"))
            x = x + linear(y, state, f"{block}.ffn.layers.1")
        if i in config["out_indices"]:
            outputs.append(norm(x, state, f"norm{i}").permute(2, 0, 1))
        if i + 1 < len(config["depths"]):
            h, w = (size + size % 2 for size in x.shape[:2])
            x = F.pad(x, (0, 0, 0, w - x.shape[1], 0, h - x.shape[0])).permute(2, 0, 1)
            x = nn.Unfold(2, stride=2)(x[None])[0].T.view(h // 2, w // 2, -1)
            x = linear(norm(x, state, f"stages.{i}.downsample.norm"), state, f"stages.{i}.downsample.reduction")
    return outputs


@pytest.fixture
def tiny_swin():
    """size → a seeded network whose every parameter matters, in eval mode."""

    def make(size, **options):
        torch.manual_seed(0)
        net = build_backbone({**TINY, **options}, size).eval()
        for name, parameter in net.named_parameters():
            nn.init.normal_(parameter, float("norm" in name and name.endswith("weight")), 0.4)
        return net

    return make


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((256, 704), {}),  # no stage is a multiple of the window
        ((64, 96), {"qkv_bias": False}),  # the last two are smaller than it
        ((60, 100), {"depths": [1, 2, 2, 2]}),  # odd maps, which merging pads too
        ((224, 224), {"out_indices": [0, 3]}),  # every stage is a multiple
    ],
)
def test_it_computes_what_the_plain_definition_does(tiny_swin, size, options):
    net = tiny_swin(size, **options).double()  # in float32 two right orders of a sum differ by more on some processors
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        found = net(image)
        expected = plain_swin(image[1], net.state_dict(), {**TINY, **options})
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a[1].shape == b.shape and float(b.std()) > 0.1
        assert torch.allclose(a[1], b, atol=1e-9), float((a[1] - b).abs().max())


def test_merged_patches_are_in_unfolds_order():
    x = torch.arange(3 * 2 * 2.0).view(1, 3, 2, 2)  # channel, row, column
    timm = torch.stack([x[0, :, r, c] for c in (0, 1) for r in (0, 1)]).flatten()
    unfold = nn.Unfold(2)(x).flatten()
    assert torch.equal(to_unfold_order(timm), unfold) and torch.equal(from_unfold_order(unfold), timm)


def test_names_and_shapes_are_mmdets():
    """Swin-T as in BEVFusion's configs; names written from mmdet's modules."""
    swin_t = {**TINY, "embed_dims": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "mlp_ratio": 4}
    with torch.device("meta"):
        state = build_backbone(swin_t, (256, 704)).state_dict()
    expected = {
        "patch_embed.projection.weight": (96, 3, 4, 4),
        "patch_embed.norm.bias": (96,),
        "stages.0.blocks.0.norm1.weight": (96,),
        "stages.0.blocks.0.attn.w_msa.relative_position_bias_table": (169, 3),
        "stages.0.blocks.0.attn.w_msa.relative_position_index": (49, 49),
        "stages.0.blocks.0.attn.w_msa.qkv.weight": (288, 96),
        "stages.0.blocks.1.attn.w_msa.proj.bias": (96,),
        "stages.0.blocks.1.norm2.bias": (96,),
        "stages.0.blocks.1.ffn.layers.0.0.weight": (384, 96),
        "stages.2.blocks.5.ffn.layers.1.weight": (384, 1536),
        "stages.0.downsample.norm.weight": (384,),
        "stages.2.downsample.reduction.weight": (768, 1536),
        "norm1.weight": (192,),
        "norm3.bias": (768,),
    }
    for name, shape in expected.items():
        assert tuple(state[name].shape) == shape, name
    # 13 tensors and an index for each of 12 blocks, 3 for each of 3 mergings, patch embedding, norms
    assert len(state) == 12 * 14 + 3 * 3 + 4 + 3 * 2
    assert not any(name.startswith("stages.3.downsample") for name in state)


@pytest.fixture
def detector_config(tiny_config):
    config = copy.deepcopy(tiny_config)
    config["model"]["encoders"]["camera"]["backbone"] = dict(TINY, out_indices=[1, 2])
    config["model"]["encoders"]["camera"]["neck"]["in_channels"] = [16, 32]
    return config


def test_a_bevfusion_state_dict_loads_as_it_is_and_is_saved_back_equal(detector_config):
    torch.manual_seed(1)
    model = build_model(detector_config)
    state = {
        name: torch.randn_like(x) if x.is_floating_point() and ".vtransform." not in name else x
        for name, x in model.state_dict().items()
    }
    unused = {"encoders.camera.backbone.stages.3.blocks.0.norm1.weight": torch.ones(64)}
    load_state(model, {**state, **unused}, "x.pth")
    own = model.state_dict()
    assert own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)
    merging = model.encoders["camera"]["backbone"].stages[1].downsample.reduction.weight
    theirs = state["encoders.camera.backbone.stages.0.downsample.reduction.weight"]
    assert torch.equal(merging, from_unfold_order(theirs)) and not torch.equal(merging, theirs)


def test_windows_indices_may_be_left_out_but_not_be_others(detector_config):
    model = build_model(detector_config)
    state = model.state_dict()
    indices = [name for name in state if name.endswith("relative_position_index")]
    load_state(model, {name: x for name, x in state.items() if name not in indices}, "x.pth")
    with pytest.raises(UserError, match=r"x\.pth: .*relative_position_index: another order") as error:
        load_state(model, {**state, indices[0]: state[indices[0]].T}, "x.pth")
    assert "\n" not in str(error.value)


def test_weights_of_another_width_are_named(detector_config):
    model = build_model(detector_config)
    name = "encoders.camera.backbone.stages.0.downsample.reduction.weight"
    with refused("stages.0.downsample.reduction.weight", "found shape [16, 30]"):
        load_state(model, {**model.state_dict(), name: torch.zeros(16, 30)}, "x.pth")
    with pytest.raises(UserError, match=r"missing encoders\.camera\.backbone\.\* \(1\)"):
        load_state(model, {k: v for k, v in model.state_dict().items() if k != name}, "x.pth")


def test_with_keep_vars_the_state_dict_holds_the_parameters_themselves(tiny_swin):
    """torch's exporters look parameters up in it by identity."""
    net = tiny_swin((64, 96))
    assert {id(x) for x in net.state_dict(keep_vars=True).values()} == {id(x) for x in net.parameters()}


def test_a_merging_is_named_after_the_stage_that_it_ends():
    assert mmdet_name("stages.1.downsample.norm.weight") == "stages.0.downsample.norm.weight"
    assert mmdet_name("stages.1.blocks.0.mlp.fc2.bias") == "stages.1.blocks.0.ffn.layers.1.bias"


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({"out_indices": [1, 4]}, (64, 96), "stages below 4"),
        ({"out_indices": [2, 1]}, (64, 96), "stages in order"),
        ({"num_heads": [3, 2, 2, 4]}, (64, 96), "3 heads for 8 channels"),
        ({"depths": [1, 1, 1]}, (64, 96), "3 depths and 4 num_heads"),
        ({}, (66, 96), "multiples of 4"),
    ],
)
def test_values_that_make_no_network_are_one_line(options, size, message):
    with pytest.raises(UserError, match=message) as error:
        build_backbone({**TINY, **options}, size)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("qk_scale", 0.1),
        ("drop_rate", 0.1),
        ("patch_norm", False),
        ("use_abs_pos_embed", True),
        ("patch_size", 2),
        ("norm_cfg", {"type": "BN"}),
        ("pretrained_window_sizes", [7]),
    ],
)
def test_options_that_would_build_another_network_are_refused(option, value):
    validated(SwinTransformer, TINY, "config")
    with pytest.raises(UserError, match=f"config: {option}: found "):
        validated(SwinTransformer, {**TINY, option: value}, "config")


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "vit_tiny_patch16_224"])
def test_timms_channels_last_and_token_networks_give_maps(name):
    indices = [0, 1]
    with torch.device("meta"):
        net = build_backbone({"type": "timm", "model_name": name, "out_indices": indices}, (64, 96))
        maps = net(torch.zeros(2, 3, 64, 96))
    strides = [64 // x.shape[2] for x in maps]
    assert [tuple(x.shape) for x in maps] == [
        (2, c, 64 // s, 96 // s) for c, s in zip(net.feature_info.channels(), strides, strict=True)
    ]
    assert strides == ([16, 16] if "vit" in name else [4, 8])
