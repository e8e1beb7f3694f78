"""The depth map's background: exact after rounding, at any grid, and only while the layer is INT8."""

import pytest
import torch
from torch import nn

from qat.calibrate import calibrate, load_ptq, save_ptq
from qat.export.options import ExportOptions
from qat.export.parts import quantizers_set
from qat.lean.background import absorb_backgrounds, backgrounds, correct_backgrounds
from qat.lean.insert import quantize_graph, use_flavour
from qat.lean.modes import quantizers, quantizers_off
from qat.lean.placement import FloatRule
from qat.lean.quantizer import U8, U8_COARSE
from qat.lean.trace import trace


class Branch(nn.Module):
    """A depth branch like BEVFusion's dtransform, with a grouped convolution, beside an image branch."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 16, 5, 2, 2), nn.Conv2d(16, 16, 5, 2, 2, groups=4)
        self.image = nn.Conv2d(3, 16, 3, 4, 1)
        self.silu, self.relu = nn.SiLU(), nn.ReLU()

    def forward(self, img, depth):
        return self.c(self.relu(self.b(self.silu(self.a(depth))))), self.image(img)


class Rectified(Branch):
    """The last input comes out of a ReLU."""

    def forward(self, img, depth):
        return self.c(self.relu(self.b(self.a(depth)))), self.image(img)


class Doubling(Branch):
    """With an operation whose effect on a constant map nobody looks up."""

    def forward(self, img, depth):
        x = self.a(depth)
        return self.b(x + x), self.c(self.image(img))


def prepared(kind=Branch, keep=()):
    torch.manual_seed(0)
    network = kind().eval()
    graph = trace(network, [torch.zeros(2, *x.shape[1:]) for x in INPUTS])
    quantize_graph(graph, [FloatRule(name, "test") for name in keep])
    for quantizer in quantizers(graph).values():
        if quantizer.amax is None:
            quantizer.set_range(torch.tensor(37.0))
    return network, graph


INPUTS = torch.randn(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
MIDDLE = (slice(None), slice(None), slice(4, -4), slice(4, -4))


def test_the_background_of_the_rounded_branch_is_the_float_one():
    network, graph = prepared()
    exact = network(*INPUTS)[0][MIDDLE]
    before = (graph(*INPUTS)[0][MIDDLE] - exact).abs().amax()
    assert correct_backgrounds(graph) == ["a", "b", "c"]
    after = (graph(*INPUTS)[0][MIDDLE] - exact).abs().amax()
    assert before > 0.05 and after < 1e-5


def test_a_float_layer_in_between_is_passed():
    network, graph = prepared(keep=["b"])
    assert correct_backgrounds(graph) == ["a", "c"]
    assert torch.allclose(graph(*INPUTS)[0][MIDDLE], network(*INPUTS)[0][MIDDLE], atol=1e-5)


def test_what_also_sees_the_image_or_an_unknown_operation_is_left_alone():
    _, graph = prepared(Doubling)
    assert list(backgrounds(graph)) == ["a"]


@pytest.mark.parametrize("spec", [U8, U8_COARSE])
def test_in_u8_the_background_is_exact_after_another_correction(spec):
    network, graph = prepared(Rectified)
    exact = network(*INPUTS)[0][MIDDLE]
    correct_backgrounds(graph)
    use_flavour(graph, "openvino")
    assert graph.quant_relu.spec == U8
    graph.quant_relu.spec = spec
    correct_backgrounds(graph)
    found = graph(*INPUTS)[0][MIDDLE]
    depth = torch.rand(1, 1, 64, 64) * 40
    assert torch.allclose(found, exact, atol=1e-5)
    step = torch.tensor(37.0) / spec.levels
    assert torch.allclose(graph.quant_relu(depth), (depth / step).round().clamp(0, 255) * step)
    use_flavour(graph, "tensorrt")
    assert graph.quant_relu(-depth).min() < -1


def test_with_quantizers_off_the_network_is_the_float_one():
    network, graph = prepared()
    correct_backgrounds(graph)
    depth = torch.rand(1, 1, 64, 64)
    with quantizers_off(graph):
        assert torch.equal(graph(INPUTS[0], depth)[0], network(INPUTS[0], depth)[0])


def test_absorbed_corrections_compute_the_same_and_leave_the_float_network_its_biases():
    network, graph = prepared()
    biases = [layer.bias.clone() for layer in (network.a, network.b, network.c)]
    correct_backgrounds(graph)
    before = graph(*INPUTS)[0]
    absorb_backgrounds(graph)
    assert torch.equal(graph(*INPUTS)[0], before)
    assert graph.get_submodule("b").background_shift is None
    assert all(
        torch.equal(layer.bias, bias) for layer, bias in zip((network.a, network.b, network.c), biases, strict=True)
    )


@pytest.fixture
def calibrated(tiny_model, tiny_frames):
    return calibrate(tiny_model, tiny_frames)[0]


def shifts(detector):
    return {
        name: module.background_shift.clone()
        for name, module in detector.parts.named_modules()
        if getattr(module, "background_shift", None) is not None
    }


def test_a_reloaded_checkpoint_has_the_same_corrections(calibrated, tiny_model, tmp_path):
    save_ptq(tmp_path / "ptq.pth", calibrated, tiny_model, {})
    again, recipe = load_ptq(tmp_path / "ptq.pth")
    own = shifts(calibrated)
    assert recipe["background"] == "corrected" and sorted(own) == sorted(shifts(again))
    assert [name.rpartition("dtransform.")[2] for name in own] == ["3", "6"]
    assert all(torch.equal(own[name], other) for name, other in shifts(again).items())


def test_a_checkpoint_from_before_the_corrections_loads_without_them(calibrated, tiny_model, tmp_path):
    save_ptq(tmp_path / "ptq.pth", calibrated, tiny_model, {})
    content = torch.load(tmp_path / "ptq.pth", weights_only=True)
    del content["recipe"]["background"]
    torch.save(content, tmp_path / "ptq.pth")
    loaded = load_ptq(tmp_path / "ptq.pth")[0]
    assert not shifts(loaded) and loaded.background is None


def test_absorbed_corrections_are_remembered(calibrated, tiny_model, tmp_path):
    """An export in u8 must keep the step that they are for."""
    calibrated.absorb_background()
    save_ptq(tmp_path / "ptq.pth", calibrated, tiny_model, {}, trained=True)
    loaded = load_ptq(tmp_path / "ptq.pth")[0]
    assert loaded.background == "absorbed" and loaded.absorbed == calibrated.absorbed
    assert all(torch.equal(value, loaded.weights()[name]) for name, value in calibrated.weights().items())


def test_seven_bit_weights_get_corrections_of_their_own(calibrated):
    before = shifts(calibrated)
    with quantizers_set(calibrated, ExportOptions("int8", "onnxruntime", reduce_range=True)):
        inside = shifts(calibrated)
    assert any(not torch.equal(before[name], inside[name]) for name in before)
    assert all(torch.equal(before[name], after) for name, after in shifts(calibrated).items())
