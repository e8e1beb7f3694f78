"""Each network against a second, plain definition."""

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from qat.families.bevfusion.networks.bev_pool import bev_pool
from qat.families.bevfusion.networks.blocks import BasicBlock
from qat.families.bevfusion.networks.centerhead import CenterHead
from qat.families.bevfusion.networks.decoder import LSSFPN, GeneralizedResNet
from qat.families.bevfusion.networks.generalized_lssfpn import GeneralizedLSSFPN
from qat.families.bevfusion.networks.second import SECOND, SECONDFPN
from qat.families.bevfusion.networks.vtransform import DepthLSSTransform, LSSTransform
from qat.families.bevfusion.pooling.geometry import create_frustum, frustum_to_lidar, pooling_pattern


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def shaken(module):
    """The module in eval mode with batch norms that do something."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.3)
    return module.eval()


def bn(x, state, name, eps=1e-5):
    scale = state[f"{name}.weight"] / torch.sqrt(state[f"{name}.running_var"] + eps)
    shift = state[f"{name}.bias"] - state[f"{name}.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def close(a, b):
    assert a.shape == b.shape
    assert torch.allclose(a, b, atol=1e-5), float((a - b).abs().max())


def test_generalized_lssfpn_goes_top_down_and_drops_the_coarsest():
    net = shaken(GeneralizedLSSFPN([4, 6, 8], 5, num_outs=3, upsample_cfg={"mode": "bilinear", "align_corners": False}))
    s = net.state_dict()
    x = [torch.randn(2, c, n, n + 2) for c, n in ((4, 8), (6, 4), (8, 2))]

    def join(fine, coarse, i):
        up = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
        y = F.conv2d(torch.cat([fine, up], 1), s[f"lateral_convs.{i}.conv.weight"])
        y = F.relu(bn(y, s, f"lateral_convs.{i}.bn"))
        return F.relu(bn(F.conv2d(y, s[f"fpn_convs.{i}.conv.weight"], padding=1), s, f"fpn_convs.{i}.bn"))

    middle = join(x[1], x[2], 1)
    out = net(x)
    assert len(out) == 2
    close(out[1], middle)
    close(out[0], join(x[0], middle, 0))


def test_secondfpn_brings_levels_to_one_size_with_strides_above_and_below_one():
    net = shaken(SECONDFPN([4, 4, 4], [3, 3, 3], [0.5, 1, 2]))
    s = net.state_dict()
    x = [torch.randn(1, 4, n, n) for n in (8, 4, 2)]
    parts = [
        F.conv2d(x[0], s["deblocks.0.0.weight"], stride=2),
        F.conv_transpose2d(x[1], s["deblocks.1.0.weight"], stride=1),
        F.conv_transpose2d(x[2], s["deblocks.2.0.weight"], stride=2),
    ]
    expected = torch.cat([F.relu(bn(p, s, f"deblocks.{i}.1", 1e-3)) for i, p in enumerate(parts)], 1)
    (out,) = net(x)
    close(out, expected)


def test_second_downsamples_with_the_first_convolution_of_a_stage():
    net = shaken(SECOND(3, [4, 6], [1, 0], [1, 2]))
    s = net.state_dict()
    x = torch.randn(1, 3, 8, 8)
    a = F.relu(bn(F.conv2d(x, s["blocks.0.0.weight"], padding=1), s, "blocks.0.1", 1e-3))
    a = F.relu(bn(F.conv2d(a, s["blocks.0.3.weight"], padding=1), s, "blocks.0.4", 1e-3))
    b = F.relu(bn(F.conv2d(a, s["blocks.1.0.weight"], stride=2, padding=1), s, "blocks.1.1", 1e-3))
    out = net(x)
    close(out[0], a)
    close(out[1], b)


def test_basic_block_adds_the_downsampled_identity():
    net = shaken(BasicBlock(4, 6, 2))
    s = net.state_dict()
    x = torch.randn(1, 4, 8, 8)
    y = F.relu(bn(F.conv2d(x, s["conv1.weight"], stride=2, padding=1), s, "bn1"))
    y = bn(F.conv2d(y, s["conv2.weight"], padding=1), s, "bn2")
    close(net(x), F.relu(y + bn(F.conv2d(x, s["downsample.0.weight"], stride=2), s, "downsample.1")))


def test_generalized_resnet_returns_every_stage():
    net = shaken(GeneralizedResNet(3, [[1, 4, 1], [2, 6, 2]]))
    x = torch.randn(1, 3, 8, 8)
    out = net(x)
    assert [tuple(o.shape) for o in out] == [(1, 4, 8, 8), (1, 6, 4, 4)]
    close(out[1], net[1](out[0]))
    assert "1.1.conv2.weight" in net.state_dict() and "1.0.downsample.1.bias" in net.state_dict()


def test_lssfpn_joins_coarse_to_fine_then_upsamples():
    net = shaken(LSSFPN([-1, 0], [6, 4], 5, scale_factor=2))
    s = net.state_dict()
    fine, coarse = torch.randn(1, 4, 8, 8), torch.randn(1, 6, 4, 4)
    y = torch.cat([F.interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=True), fine], 1)
    y = F.relu(bn(F.conv2d(y, s["fuse.0.weight"]), s, "fuse.1"))
    y = F.relu(bn(F.conv2d(y, s["fuse.3.weight"], padding=1), s, "fuse.4"))
    y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
    close(net([fine, coarse]), F.relu(bn(F.conv2d(y, s["upsample.1.weight"], padding=1), s, "upsample.2")))


VTRANSFORM = {
    "in_channels": 6,
    "out_channels": 5,
    "image_size": (32, 64),
    "feature_size": (4, 8),
    "xbound": [-8.0, 8.0, 1.0],
    "ybound": [-8.0, 8.0, 2.0],
    "zbound": [-10.0, 10.0, 20.0],
    "dbound": [1.0, 9.0, 1.0],
}


def test_depth_lss_transform_lifts_with_the_depth_map_beside_the_features():
    net = shaken(DepthLSSTransform(**VTRANSFORM, downsample=2))
    s = net.state_dict()
    x, depth = torch.randn(3, 6, 4, 8), torch.rand(3, 1, 32, 64) * 9
    d = depth
    for i, (stride, padding) in ((0, (1, 0)), (3, (4, 2)), (6, (2, 2))):
        d = F.conv2d(d, s[f"dtransform.{i}.weight"], s[f"dtransform.{i}.bias"], stride, padding)
        d = F.relu(bn(d, s, f"dtransform.{i + 1}"))
    y = torch.cat([d, x], 1)
    for i in (0, 3):
        y = F.relu(
            bn(F.conv2d(y, s[f"depthnet.{i}.weight"], s[f"depthnet.{i}.bias"], padding=1), s, f"depthnet.{i + 1}")
        )
    y = F.conv2d(y, s["depthnet.6.weight"], s["depthnet.6.bias"])
    weights, context = net.split(net.depth_and_context(x, depth))
    close(weights, torch.softmax(y[:, :8], 1))
    close(context, y[:, 8:])
    assert net.downsample[3].stride == (2, 2) and net.downsample[0].bias is None


def test_lss_transform_needs_no_depth_and_keeps_bevfusions_parameters():
    net = LSSTransform(**VTRANSFORM)
    assert {"dx", "bx", "nx", "frustum"} <= set(net.state_dict())
    assert (
        net.dx.tolist() == [1.0, 2.0, 20.0] and net.bx.tolist() == [-7.5, -7.0, 0.0] and net.nx.tolist() == [16, 8, 1]
    )
    assert not net.frustum.requires_grad
    weights, context = net.split(net.depth_and_context(torch.randn(2, 6, 4, 8), None))
    assert weights.shape == (2, 8, 4, 8) and context.shape == (2, 5, 4, 8)
    assert isinstance(net.downsample, nn.Identity)


def test_center_head_has_a_map_for_each_name_and_heat_for_each_class():
    common = {"reg": [2, 2], "height": [1, 2], "dim": [3, 2], "rot": [2, 2], "vel": [2, 2]}
    separate = {"type": "SeparateHead", "init_bias": -2.19, "final_kernel": 3, "head_conv": 4}
    net = shaken(CenterHead(6, [["car"], ["bus", "truck"]], common, separate, share_conv_channel=5))
    s = net.state_dict()
    x = torch.randn(1, 6, 7, 7)
    shared = F.relu(bn(F.conv2d(x, s["shared_conv.conv.weight"], padding=1), s, "shared_conv.bn"))
    y = F.relu(bn(F.conv2d(shared, s["task_heads.1.heatmap.0.conv.weight"], padding=1), s, "task_heads.1.heatmap.0.bn"))
    y = F.conv2d(y, s["task_heads.1.heatmap.1.weight"], s["task_heads.1.heatmap.1.bias"], padding=1)
    out = net(x)
    close(out[1]["heatmap"], y)
    assert [task["heatmap"].shape[1] for task in out] == [1, 2]
    assert list(out[0]) == ["reg", "height", "dim", "rot", "vel", "heatmap"]
    assert torch.all(s["task_heads.0.heatmap.1.bias"] == -2.19)


@pytest.fixture
def pattern():
    eye = np.eye(4, dtype=np.float32)
    intrinsics, camera2lidar, aug = (np.tile(eye, (2, 1, 1)) for _ in range(3))
    intrinsics[:, :3, :3] = [[40, 0, 32], [0, 40, 16], [0, 0, 1]]
    camera2lidar[0, :3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    camera2lidar[1, :3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    frustum = create_frustum((32, 64), (4, 8), (1.0, 9.0, 1.0))
    points = frustum_to_lidar(frustum, intrinsics, camera2lidar, aug, eye)
    return pooling_pattern(points, [-8.0, 8.0, 1.0], [-8.0, 8.0, 2.0], [-4.0, 4.0, 4.0]), points


def naive_pool(weights, context, points):
    """BEVFusion's sum over the whole frustum tensor."""
    n, d, h, w, _ = points.shape
    c = context.shape[1]
    frustum = weights[..., None] * context.permute(0, 2, 3, 1)[:, None]
    out = torch.zeros(2, 16, 8, c, dtype=context.dtype)
    for i in np.ndindex(n, d, h, w):
        x, y, z = points[i]
        ix, iy, iz = int((x + 8) / 1), int((y + 8) / 2), int((z + 4) / 4)
        if 0 <= ix < 16 and 0 <= iy < 8 and 0 <= iz < 2:
            out[iz, ix, iy] += frustum[i]
    return out.permute(0, 3, 1, 2).reshape(2 * c, 16, 8)


def test_bev_pooling_equals_the_sum_over_the_frustum_tensor(pattern):
    weights, context = torch.randn(2, 8, 4, 8).softmax(1), torch.randn(2, 3, 4, 8)
    close(bev_pool(weights, context, pattern[0]), naive_pool(weights, context, pattern[1]))


def test_bev_poolings_gradients_are_right(pattern):
    weights = torch.rand(2, 8, 4, 8, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(6, 16, 8, dtype=torch.float64)
    ours = torch.autograd.grad((bev_pool(weights, context, pattern[0]) * upstream).sum(), (weights, context))
    naive = torch.autograd.grad((naive_pool(weights, context, pattern[1]) * upstream).sum(), (weights, context))
    for a, b in zip(ours, naive, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_every_network_traces_with_fx():
    networks = [
        (GeneralizedResNet(3, [[1, 4, 2]]), (torch.randn(1, 3, 8, 8),)),
        (DepthLSSTransform(**VTRANSFORM).depthnet, (torch.randn(1, 70, 4, 8),)),
    ]
    for network, inputs in networks:
        network.eval()
        for a, b in zip(fx.symbolic_trace(network)(*inputs)[0], network(*inputs)[0], strict=True):
            assert torch.equal(a, b)
