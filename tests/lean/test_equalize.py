"""Equalized channels: the same function, less rounding noise, and only where it pays."""

import pytest
import torch
from torch import nn

from qat.calibrate import calibrate, load_ptq, save_ptq
from qat.calibrate.inspection import inspect_detector
from qat.core.tensors import compare_tensors
from qat.lean.equalize import FLOOR, channel_scales, equalizable, equalize
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
    graph = trace(network)
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
    equalize(graph, "quant_x", 4 * SPREAD)
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
        equalize(graph, "quant_x", 4 * SPREAD)
        after = compare_tensors(expected, graph(x).numpy())["sqnr_db"]
        rounded = graph.quant_x(graph.quant_x_scale(x)) / graph.quant_x_scale.inverse
    assert after > before + 5
    noise = (rounded - x).square().mean((0, 2, 3))
    assert torch.allclose(noise, (4 * SPREAD / 127) ** 2 / 12, rtol=0.2)


def test_scales_are_the_channels_ranges_where_that_pays():
    weights = [torch.ones(4, 8, 3, 3), torch.ones(2, 8, 1, 1)]
    assert torch.equal(channel_scales(4 * SPREAD, weights), 4 * SPREAD)
    assert channel_scales(torch.linspace(3.0, 4.0, 8), weights) is None
    only_the_largest_counts = [torch.cat([torch.ones(4, 1, 1, 1), torch.zeros(4, 7, 1, 1)], 1)]
    assert channel_scales(4 * SPREAD, only_the_largest_counts) is None
    assert channel_scales(torch.zeros(8), weights) is None


def test_an_empty_channel_gets_a_floor():
    largest = torch.cat([torch.full((1,), 4.0), torch.zeros(7)])
    scales = channel_scales(largest, [torch.ones(4, 8, 1, 1)])
    assert torch.equal(scales[1:], torch.full((7,), 4.0 * FLOOR))


@pytest.mark.parametrize("network", [Residual(), Two(groups=8)])
def test_what_an_add_or_a_grouped_convolution_takes_is_left_alone(network):
    graph, inventory = quantized(network)
    assert equalizable(graph, inventory) == {}
    with pytest.raises(ValueError, match="cannot be equalized"):
        equalize(graph, "quant_x", SPREAD)


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
    assert list(model.equalized) == ["decoder.quant_x"]
    assert calibrate(tiny_model, tiny_frames, "mse", equalize=False)[0].equalized == {}
    assert model.amax()["decoder.quant_x"] == 1.0  # whatever the method
    group = next(g for g in inspect_detector(model, {}).groups if g.quantizer == "quant_x" and g.part == "decoder")
    assert group.channels[1] / group.channels[0] > 16
    save_ptq(tmp_path / "ptq.pth", model, tiny_model, {})
    again, _ = load_ptq(tmp_path / "ptq.pth")
    bev = torch.rand(1, tiny_model.vtransform.C, 16, 16)
    with torch.inference_mode():
        assert torch.equal(model.decode_bev(bev), again.decode_bev(bev))
