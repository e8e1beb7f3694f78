"""Equalized channels: the same function, less rounding noise, and only where it pays."""

import pytest
import torch
from torch import nn

from qat.calibrate import calibrate, load_ptq, save_ptq
from qat.calibrate.inspection import inspect_detector
from qat.core.tensors import compare_tensors
from qat.lean.equalize import FLOOR, INSIDE, channel_scales, equalizable, equalize, output_noise
from qat.lean.insert import quantize_graph
from qat.lean.modes import quantizers_off
from qat.lean.trace import trace

SPREAD = 2.0 ** -torch.arange(8.0)


class Two(nn.Module):
    """One input for two convolutions."""

    def __init__(self, groups=1):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], 1)


class Residual(Two):
    def forward(self, x):
        return self.a(x) + x


def quantized(network):
    graph = trace(network, (torch.zeros(2, network.a.weight.shape[1] * network.a.groups, 16, 16),))
    inventory = quantize_graph(graph)
    for name in inventory.quantizers:
        graph.get_submodule(name).set_range(torch.tensor(4.0))
    return graph, inventory


@pytest.fixture
def x():
    return torch.randn(2, 8, 16, 16).clamp(-4, 4) * SPREAD.reshape(1, 8, 1, 1)


def test_the_function_stays_what_it_was(x):
    network = Two()
    graph, inventory = quantized(network)
    before = network(x)
    assert equalizable(graph, inventory) == {"quant_x": ["a", "b"]}
    equalize(graph, "quant_x", SPREAD)
    with quantizers_off(graph):
        assert torch.allclose(graph(x), before, atol=1e-5)
    assert torch.equal(network(x), before)  # the float network keeps its weights


def test_small_channels_are_rounded_as_finely_as_large_ones(x):
    """Every channel's noise falls to what its own range gives: (amax_c / 127)² / 12."""
    torch.manual_seed(0)
    network = Two()
    graph, _ = quantized(network)
    expected = network(x).detach().numpy()
    with torch.no_grad():
        before = compare_tensors(expected, graph(x).numpy())["sqnr_db"]
        equalize(graph, "quant_x", SPREAD)
        after = compare_tensors(expected, graph(x).numpy())["sqnr_db"]
        rounded = graph.quant_x(graph.quant_x_scale(x)) / graph.quant_x_scale.inverse
    assert after > before + 5
    noise = (rounded - x).square().mean((0, 2, 3))
    assert torch.allclose(noise, (4 * SPREAD / 127) ** 2 / 12, rtol=0.2)


def sparse(spread):
    """Mean squares of inputs that are mostly zero, as a pooled BEV grid's."""
    return (4 * spread) ** 2 / 100


def test_scales_are_the_channels_ranges_where_that_pays():
    weights = [torch.randn(4, 8, 3, 3), torch.randn(2, 8, 1, 1)]
    assert torch.equal(channel_scales(4 * SPREAD, sparse(SPREAD), weights), SPREAD.clamp(min=FLOOR))
    even = torch.linspace(0.75, 1.0, 8)
    assert channel_scales(4 * even, sparse(even), weights) is None
    only_the_largest_counts = [torch.cat([torch.ones(4, 1, 1, 1), torch.zeros(4, 7, 1, 1)], 1)]
    assert channel_scales(4 * SPREAD, sparse(SPREAD), only_the_largest_counts) is None
    assert channel_scales(torch.zeros(8), torch.zeros(8), weights) is None


def test_dense_inputs_whose_weights_would_pay_for_it_are_left_alone():
    """Always near their range: what coarser weights add outweighs what finer inputs save, or nearly."""
    torch.manual_seed(1)
    assert channel_scales(4 * SPREAD, (4 * SPREAD) ** 2 * 0.9, [torch.randn(4, 8, 3, 3)]) is None


def test_the_expected_noise_is_what_rounding_makes():
    torch.manual_seed(2)
    layer = nn.Conv2d(8, 8, 3, bias=False)
    x = torch.randn(4, 8, 64, 64).clamp(-4, 4) * SPREAD.reshape(1, 8, 1, 1)
    for scales in (torch.ones(8), SPREAD):
        step = 4.0 / 127 * scales
        rounded = (x / step.reshape(1, -1, 1, 1)).round() * step.reshape(1, -1, 1, 1)
        scaled = layer.weight.detach() * scales.reshape(1, -1, 1, 1)
        weight_step = scaled.abs().amax((1, 2, 3), keepdim=True) / 127
        weight = (scaled / weight_step).round() * weight_step / scales.reshape(1, -1, 1, 1)
        made = torch.conv2d(rounded, weight) - torch.conv2d(x, layer.weight.detach())
        expected = output_noise(step, scales, x.square().mean((0, 2, 3)), [layer.weight])
        assert float(made.square().mean((0, 2, 3)).sum()) == pytest.approx(expected, rel=0.25)


def test_a_channel_that_calibration_left_empty_keeps_the_tensors_range():
    largest = torch.cat([torch.full((1,), 4.0), torch.full((6,), 0.01), torch.zeros(1)])
    scales = channel_scales(largest, largest**2 / 100, [torch.ones(4, 8, 1, 1)])
    assert scales.tolist() == [1.0, *[FLOOR] * 6, 1.0]


@pytest.mark.parametrize("network", [Residual(), Two(groups=8)])
def test_what_an_add_or_a_grouped_convolution_takes_is_left_alone(network):
    graph, inventory = quantized(network)
    assert equalizable(graph, inventory) == {}
    with pytest.raises(ValueError, match="cannot be equalized"):
        equalize(graph, "quant_x", SPREAD)


class Depth(nn.Module):
    """Two convolutions behind the depth map; with `through` between them."""

    def __init__(self, through=None):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 5, 3, padding=1)
        self.through = through or nn.ReLU()

    def forward(self, depth):
        return self.b(self.through(self.a(depth)))


class Image(Depth):
    def forward(self, img):
        return self.b(self.through(self.a(img)))


def test_behind_the_depth_map_the_convolution_before_takes_the_division():
    network = Depth()
    graph, inventory = quantized(network)
    depth = torch.rand(1, 1, 16, 16)
    before, weights = network(depth), [layer.weight.clone() for layer in (network.a, network.b)]
    modules = len(list(graph.graph.nodes))
    assert equalizable(graph, inventory) == {"quant_depth": ["a"], "quant_through": ["b"]}
    equalize(graph, "quant_through", SPREAD)
    assert len(list(graph.graph.nodes)) == modules  # nothing is added to the network
    assert torch.allclose(graph.a.weight, weights[0] / SPREAD.reshape(-1, 1, 1, 1))
    assert torch.equal(graph.a.weight_quantizer.amax.flatten(), graph.a.weight.abs().amax((1, 2, 3)))
    with quantizers_off(graph):
        assert torch.allclose(graph(depth), before, atol=1e-5)
    assert all(torch.equal(x, y.weight) for x, y in zip(weights, (network.a, network.b), strict=True))


@pytest.mark.parametrize("network", [Image(), Depth(nn.SiLU())])
def test_behind_an_image_or_what_does_not_scale_channels_are_left_alone(network):
    graph, inventory = quantized(network)
    assert "quant_through" not in equalizable(graph, inventory)


class Neck(nn.Module):
    """A block whose output a convolution and a transposed one take, as SECONDFPN's do."""

    def __init__(self):
        super().__init__()
        self.a, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.b, self.up = nn.Conv2d(8, 5, 1), nn.ConvTranspose2d(8, 4, 2, 2)

    def forward(self, x):
        y = self.relu(self.a(x))
        return self.b(y), self.up(y)


def test_between_two_layers_nothing_is_added_and_the_noise_falls(x):
    """Transposed convolutions have their input's channels first. Channels of one ReLU differ by a factor of 32 here."""
    torch.manual_seed(0)
    network = Neck()
    with torch.no_grad():
        network.a.weight.mul_(SPREAD.clamp(min=FLOOR).reshape(-1, 1, 1, 1))
        network.a.bias.mul_(SPREAD.clamp(min=FLOOR))
    graph, inventory = quantized(network)
    assert equalizable(graph, inventory) == {"quant_x": ["a"]}
    assert equalizable(graph, inventory, INSIDE) == {"quant_relu": ["b", "up"]}
    with torch.no_grad():
        expected = network(x)
        inside = network.relu(network.a(x))
        largest, energy = inside.amax((0, 2, 3)), inside.square().mean((0, 2, 3))
        graph.quant_relu.set_range(largest.max())
        before = [compare_tensors(e.numpy(), g.numpy())["sqnr_db"] for e, g in zip(expected, graph(x), strict=True)]
        weights = [network.b.weight, network.up.weight.transpose(0, 1)]
        scales = channel_scales(largest, energy, weights, INSIDE)
        nodes = len(list(graph.graph.nodes))
        equalize(graph, "quant_relu", scales)
        after = [compare_tensors(e.numpy(), g.numpy())["sqnr_db"] for e, g in zip(expected, graph(x), strict=True)]
        assert len(list(graph.graph.nodes)) == nodes
        with quantizers_off(graph):
            for e, g in zip(expected, graph(x), strict=True):
                assert torch.allclose(g, e, atol=1e-5)
    assert all(new >= old for old, new in zip(before, after, strict=True)) and sum(after) > sum(before) + 1


def test_between_two_layers_a_gain_of_any_size_is_taken():
    """What costs nothing need not halve the noise; what raises it is left."""
    torch.manual_seed(1)
    weights, some = [torch.randn(4, 8, 3, 3)], torch.linspace(0.4, 1, 8)
    assert channel_scales(4 * some, sparse(some), weights) is None
    assert channel_scales(4 * some, sparse(some), weights, INSIDE) is not None
    assert channel_scales(4 * some, (4 * some) ** 2 * 0.9, weights, INSIDE) is None


def test_other_numbers_of_channels_are_refused():
    graph, _ = quantized(Two())
    with pytest.raises(ValueError, match="found 3 scales, expected 8"):
        equalize(graph, "quant_x", torch.ones(3))


def test_calibration_equalizes_a_decoders_skewed_input_and_a_reload_has_it(tiny_model, tiny_frames, tmp_path):
    skew = 2.0 ** -torch.linspace(0, 7, tiny_model.vtransform.C)
    with torch.no_grad():  # the view transform's last batch norm scales what the decoder gets
        last = [m for m in tiny_model.vtransform.downsample.modules() if isinstance(m, nn.BatchNorm2d)][-1]
        last.weight.mul_(skew)
        last.bias.mul_(skew)
    model, _ = calibrate(tiny_model, tiny_frames, "mse")
    assert [name for name in model.equalized if "_dtransform_" not in name] == ["decoder.quant_x"]
    assert calibrate(tiny_model, tiny_frames, "mse", equalize=None)[0].equalized == {}
    widest = calibrate(tiny_model, tiny_frames, "max", equalize=None)[0].amax()["decoder.quant_x"]
    assert torch.equal(model.amax()["decoder.quant_x"], widest)  # whatever the method
    asked, _ = calibrate(tiny_model, tiny_frames, "max", by_layer=[("decoder.quant_x", "mse")])
    assert (
        "decoder.quant_x" not in asked.equalized and asked.amax()["decoder.quant_x"] < widest
    )  # but what was asked by name
    anew, _ = calibrate(model, tiny_frames, "mse")
    assert torch.allclose(anew.amax()["decoder.quant_x"], widest, rtol=1e-5)
    group = next(g for g in inspect_detector(model, {}).groups if g.quantizer == "quant_x" and g.part == "decoder")
    assert group.channels[1] == 1.0 and group.channels[0] < 1 / 8
    save_ptq(tmp_path / "ptq.pth", model, tiny_model, {})
    again, _ = load_ptq(tmp_path / "ptq.pth")
    bev = torch.rand(1, tiny_model.vtransform.C, 16, 16)
    with torch.inference_mode():
        assert torch.equal(model.parts["decoder"](bev), again.parts["decoder"](bev))
