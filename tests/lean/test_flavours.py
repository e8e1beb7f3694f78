"""Flavours as policies: what each rounds, to which integers, and what its backend makes of it."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

from qat.export import export_module, module
from qat.export.passes import in_flavour
from qat.lean import quantize
from qat.lean.flavours import FLAVOURS
from qat.lean.modes import quantizers
from qat.lean.ops import least_values
from qat.lean.quantizer import S8, S8_TENSOR, U8, U8_AFFINE, Quantizer, Spec
from qat.lean.trace import trace

BOTH = ("onnxruntime", "openvino")


class Network(nn.Module):
    """stem conv → what is asked for → conv."""

    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.d = nn.Conv1d(8, 8, 3, padding=1)
        self.middle = middle

    def forward(self, x):
        return self.c(self.middle(self, self.a(x)))


MIDDLES = {
    "relu": lambda net, x: x.relu(),
    "relu6": lambda net, x: F.relu6(x),
    "leaky": lambda net, x: F.leaky_relu(x, 0.1),
    "silu": lambda net, x: F.silu(x),
    "hardswish": lambda net, x: F.hardswish(x),
    "gelu": lambda net, x: F.gelu(x),
    "sigmoid": lambda net, x: x.sigmoid(),
    "none": lambda net, x: x,
    "gate": lambda net, x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "residual": lambda net, x: (net.b(x.relu()) + x.relu()).relu(),
    "pool": lambda net, x: F.max_pool2d(x.relu(), 2),
    "gathered pool": lambda net, x: (
        F.max_pool2d(x.relu(), 2).flatten(2).index_select(2, torch.arange(9, -1, -1))[..., None]
    ),
    "one dimension": lambda net, x: net.d(x.relu().flatten(2)).relu().unflatten(2, x.shape[2:]),
    "resize": lambda net, x: F.interpolate(x.relu(), scale_factor=2, mode="bilinear"),
    "concat": lambda net, x: torch.cat([x[:, :4].relu(), net.b(x).relu()[:, 4:]], 1),
}
# the smallest value of what the last convolution takes
LEAST = {"relu": 0, "relu6": 0, "leaky": None, "silu": -0.2785, "hardswish": -0.375, "gelu": -0.17004, "sigmoid": 0}
LEAST |= {
    "none": None,
    "gate": None,
    "residual": 0,
    "pool": 0,
    "gathered pool": 0,
    "one dimension": 0,
    "resize": 0,
    "concat": 0,
}


def images(count=2):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2


def calibrated(name):
    return quantize(Network(MIDDLES[name]).eval(), (images(),))


@pytest.mark.parametrize("name", MIDDLES)
def test_what_a_tensor_never_goes_below_is_told_by_the_operators_before_it(name):
    graph = trace(Network(MIDDLES[name]).eval(), (images(),))
    least = least_values(graph)
    (taken,) = [node.args[0] for node in graph.graph.nodes if node.target == "c"]
    expected = -np.inf if LEAST[name] is None else LEAST[name]
    assert least[taken] == pytest.approx(expected, abs=1e-4)
    with torch.no_grad():
        assert (
            LEAST[name] is None
            or float(MIDDLES[name](Network(MIDDLES[name]), torch.randn(9, 8, 9, 9) * 9).min()) >= expected - 1e-5
        )


@pytest.mark.parametrize("name", MIDDLES)
def test_activations_are_u8_from_zero_where_nothing_is_negative_and_affine_elsewhere_on_a_cpu(name):
    quantized = calibrated(name)
    for flavour in FLAVOURS:
        quantized.use(flavour)
        on = [q for q in quantizers(quantized).values() if not q._disabled and not q.weights]
        assert on
        for quantizer in on:
            least = (quantizer.shares or quantizer).least
            expected = S8 if flavour.startswith("tensorrt") else U8 if least >= 0 else U8_AFFINE
            assert quantizer.spec == expected
            scale, zero = quantizer.parameters_of_rounding()
            if quantizer.spec == U8_AFFINE:  # from end to end, and 0 is exact
                low, high = (quantizer.shares or quantizer).ends
                reach = float(quantizer.range)
                assert float(scale) * (0 - zero) == pytest.approx(max(min(low, 0), -reach), abs=float(scale))
                assert float(scale) * (255 - zero) == pytest.approx(min(max(high, 0), reach), abs=float(scale))


@pytest.mark.parametrize("spec", [S8, U8, U8_AFFINE, Spec(0, 255, 127, 128)])
def test_rounding_is_that_of_quantize_linear(spec):
    quantizer = Quantizer()
    quantizer.spec, quantizer.ends = spec, (-0.7, 2.9)
    quantizer.set_range(torch.tensor(3.0))
    x = torch.randn(5, 7) * 2
    scale, zero = quantizer.parameters_of_rounding()
    stored = np.clip(np.rint(x.numpy() / scale.numpy()) + zero, spec.low, spec.high)
    expected = (stored - zero) * scale.numpy()
    with torch.no_grad():
        np.testing.assert_allclose(quantizer(x).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(quantizer(x.requires_grad_()).detach().numpy(), expected, atol=1e-6)


def test_a_transposed_convolutions_weight_has_one_scale_on_tensorrt_and_one_a_channel_on_a_cpu(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, 2)).eval()
    quantized = quantize(net, (images(),))
    weight = quantized.graph.get_submodule("2").weight_quantizer
    assert weight.spec == S8_TENSOR and weight.steps.shape == (1,)
    export_module(quantized, tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    axes = [
        [a.i for a in node.attribute if a.name == "axis"]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    ]
    assert axes.count([0]) == 1 and [1] not in axes  # the convolution's; the others are per tensor
    assert quantized.use("openvino") and weight.spec == S8 and weight.steps.shape == (6,)


def test_a_convolution_in_one_dimension_is_int8_on_a_cpu_alone(tmp_path):
    quantized = calibrated("one dimension")
    for flavour in FLAVOURS:
        quantized.use(flavour)
        assert quantized.graph.get_submodule("d").weight_quantizer._disabled == (flavour not in BOTH)
    assert quantized.use("onnxruntime") and export_module(quantized, tmp_path / "net.onnx").passed
    assert optimized(tmp_path / "net.onnx", tmp_path)["QLinearConv"] == 2


def test_a_pool_is_rounded_on_both_sides_with_one_scale_where_its_values_are_only_moved_before_they_are(tmp_path):
    quantized = calibrated("gathered pool")
    assert quantized.use("onnxruntime") and export_module(quantized, tmp_path / "net.onnx").passed
    optimized(tmp_path / "net.onnx", tmp_path)
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    maker = {output: node.op_type for node in graph.node for output in node.output}
    (pool,) = [node for node in graph.node if "MaxPool" in node.op_type]
    assert maker[pool.input[0]] == "QLinearConv"
    named = {name: q for name, q in quantizers(quantized).items() if not q.weights}
    for flavour, rounded in (("openvino", True), ("tensorrt", False)):
        quantized.use(flavour)
        assert any(q.role == "output" and not q._disabled for q in named.values()) == rounded


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", MIDDLES)
def test_an_export_is_its_simulation(name, flavour, tmp_path):
    quantized = calibrated(name).use(flavour)
    report = export_module(quantized, tmp_path / "net.onnx")
    assert report.passed
    # A step of the last convolution's input somewhere, at most: far below what the quantization itself costs. (FP16 costs more.)
    assert flavour == "tensorrt-strong" or all(
        entry["sqnr_db"] > entry["quantization_db"] + 10 for entry in report.outputs.values()
    )


def optimized(path, tmp_path):
    """Operators after ONNX Runtime's own fusions."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


@pytest.mark.parametrize("name", MIDDLES)
def test_every_convolution_but_the_last_is_an_integer_one_on_onnx_runtime(name, tmp_path):
    """The last one's result goes out as it is."""
    quantized = calibrated(name).use("onnxruntime")
    export_module(quantized, tmp_path / "net.onnx")
    found = optimized(tmp_path / "net.onnx", tmp_path)
    assert found["Conv"] + found["FusedConv"] == 0
    assert found["QLinearConv"] == (2 if name in ("residual", "concat", "one dimension") else 1)
    assert found["MatMulIntegerToFloat"] + found["QGemm"] == 1  # integers in, float out


def test_the_tensorrt_flavours_round_the_same():
    quantized = calibrated("residual")
    with torch.no_grad():
        assert torch.equal(quantized.use("tensorrt")(images()), quantized.use("tensorrt-strong")(images()))
        assert not torch.equal(quantized.use("tensorrt")(images()), quantized.use("openvino")(images()))


class Dense(nn.Module):
    """Convolutions whose results are concatenated again and again, a batch norm in front of each: DenseNet's block and transition."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(12), nn.BatchNorm2d(12)])
        self.convs = nn.ModuleList([nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(12, 12, 1)])
        self.last = nn.Conv2d(12, 5, 1)
        for norm in self.norms:
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.2, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.convs[0](self.norms[0](x).relu())], 1)
        x = nn.functional.avg_pool2d(self.convs[1](self.norms[1](x).relu()), 2)
        return self.last(self.norms[2](x).relu())


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_batch_norms_behind_concatenations_and_pools(flavour, tmp_path):
    torch.manual_seed(0)
    quantized = quantize(Dense().eval(), (images(),), round_outputs=True).use(flavour)
    report = export_module(quantized, tmp_path / "net.onnx")
    assert report.passed, report.failures
    if flavour == "onnxruntime":
        found = optimized(tmp_path / "net.onnx", tmp_path)
        assert found["QLinearConv"] == 4 + 3 and found["QLinearConcat"] == 1  # each batch norm is one
        assert not {"Conv", "FusedConv", "Mul", "Add", "Concat", "AveragePool", "Relu"} & set(found)


@pytest.mark.parametrize("damage", ["weight_s8", "weight_scale", "bias_s32"])
@pytest.mark.parametrize("at", range(3))
def test_damage_to_a_batch_norms_convolution_fails(damage, at, tmp_path, monkeypatch):
    """Weights one step off, one channel's scale doubled, one bias lost: `scale_as_depthwise` is seen by verification. (Weights of all
    channels: behind a ReLU one may be zero whatever its weight.)"""

    def damaged(model, flavour):
        model = in_flavour(model, flavour)
        conv = [node for node in model.graph.node if any(a.name == "group" and a.i > 1 for a in node.attribute)][at]
        made = {node.output[0]: node for node in model.graph.node}
        weight, bias = (made[name].input for name in conv.input[1:])
        name = {"weight_s8": weight[0], "weight_scale": weight[1], "bias_s32": bias[0]}[damage]
        (stored,) = (value for value in model.graph.initializer if value.name == name)
        array = numpy_helper.to_array(stored).copy()
        worst = np.s_[:] if damage == "weight_s8" else np.abs(array).argmax()
        change = {"weight_s8": lambda v: v - np.sign(v), "weight_scale": lambda v: 2 * v, "bias_s32": np.zeros_like}
        array[worst] = change[damage](array[worst])
        stored.CopyFrom(numpy_helper.from_array(array, name))
        return model

    monkeypatch.setattr(module, "in_flavour", damaged)
    torch.manual_seed(0)
    quantized = quantize(Dense().eval(), (images(),), round_outputs=True).use("onnxruntime")
    assert not export_module(quantized, tmp_path / "net.onnx").passed
