"""The CPU flavours on the smallest networks that show them: which tensors are rounded from zero up, what is stored as integers,
and the numbers against integer arithmetic."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

from qat.export import export_module
from qat.export.integer_weights import store_integers
from qat.export.passes import in_flavour
from qat.lean import quantize
from qat.lean.flavours import FLAVOURS
from qat.lean.ops import least_values
from qat.lean.quantizer import S8, U8, U8_AFFINE, Quantizer

SCALE = np.float32(1 / 32)
INFINITE = float("inf")


def conv_graph(zero=128, channels=4) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """x ─► Q(u8) ─► DQ ─► 1×1 Conv with QDQ weights and a bias, as it is traced in a CPU flavour.

    channels: scales of the weight; 1 for one that serves all."""
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (4, 3, 1, 1)).astype(np.float32) / 256
    bias = random.integers(-1000, 1000, 4).astype(np.float32) / 8192
    values = {
        "w": weight,
        "ws": np.full(channels, 1 / 256, np.float32) if channels > 1 else np.float32(1 / 256),
        "wz": np.zeros(channels, np.int8) if channels > 1 else np.int8(0),
        "b": bias,
        "s": SCALE,
        "z": np.uint8(zero),
    }
    axis = {"axis": 0} if channels > 1 else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], **axis),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], **axis),
        helper.make_node("Conv", ["xd", "wd", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 5, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 5, 6])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), weight, bias


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def parts(model: onnx.ModelProto) -> tuple[dict[str, np.ndarray], dict[str, onnx.NodeProto]]:
    values = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return values, {node.output[0]: node for node in model.graph.node}


@pytest.fixture
def x():
    return np.random.default_rng(1).uniform(-5, 5, (1, 3, 5, 6)).astype(np.float32)


class Between(nn.Module):
    """conv ─► what is asked about ─► conv; `other` is a second convolution of the input, for what takes two tensors."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.function = function
        width = function(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)).shape[1]
        self.register_buffer("positive", torch.full((1, 4, 1, 1), 0.5))
        self.register_buffer("negative", torch.full((1, 4, 1, 1), -0.5))
        self.last = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self.conv(x), self.other(x)))


# What lies between the convolutions → what it never goes below.
LEAST = {
    "nothing": (lambda a, b: a, -INFINITE),
    "relu": (lambda a, b: F.relu(a), 0.0),
    "relu6": (lambda a, b: F.relu6(a), 0.0),
    "sigmoid": (lambda a, b: torch.sigmoid(a), 0.0),
    "hardsigmoid": (lambda a, b: F.hardsigmoid(a), 0.0),
    "softmax": (lambda a, b: a.softmax(1), 0.0),
    "leaky relu": (lambda a, b: F.leaky_relu(a, 0.1), -INFINITE),
    "silu": (lambda a, b: F.silu(a), -0.27846455),
    "hardswish": (lambda a, b: F.hardswish(a), -0.375),
    "relu · 0.5": (lambda a, b: F.relu(a) * 0.5, 0.0),
    "relu · −0.5": (lambda a, b: F.relu(a) * -0.5, -INFINITE),
    "relu · sigmoid": (lambda a, b: F.relu(a) * torch.sigmoid(b), 0.0),
    "relu · conv": (lambda a, b: F.relu(a) * b, -INFINITE),
    "relu + relu": (lambda a, b: F.relu(a) + F.relu(b), 0.0),
    "relu + conv": (lambda a, b: F.relu(a) + b, -INFINITE),
    "relu − 1": (lambda a, b: F.relu(a) - 1, -INFINITE),
    "max pool of relu": (lambda a, b: F.max_pool2d(F.relu(a), 2), 0.0),
    "max pool": (lambda a, b: F.max_pool2d(a, 2), -INFINITE),
    "average of relu": (lambda a, b: F.adaptive_avg_pool2d(F.relu(a), 1), 0.0),
    "resized relu": (lambda a, b: F.interpolate(F.relu(a), scale_factor=2), 0.0),
    "half of relu": (lambda a, b: F.relu(a)[:, :2], 0.0),
    "clamp": (lambda a, b: a.clamp(min=0.0), 0.0),
    "concat of relus": (lambda a, b: torch.cat([F.relu(a), F.relu6(b)], 1), 0.0),
    "concat with a conv": (lambda a, b: torch.cat([F.relu(a), b], 1), -INFINITE),
}


def quantized(net, size=(2, 3, 8, 8)):
    images = torch.randn(*size, generator=torch.Generator().manual_seed(1))
    return quantize(net.eval(), (images,), method="max")


@pytest.mark.parametrize("name", LEAST)
def test_what_a_tensor_never_goes_below_is_known_from_the_graph(name):
    """And decides how it is rounded: in u8 from zero up where it cannot be negative, else from its smallest to its largest value."""
    function, expected = LEAST[name]
    module = quantized(Between(function))
    graph = module.graph
    last = next(node for node in graph.graph.nodes if node.target == "last")
    quantizer = graph.get_submodule(str(last.args[0].target))
    assert isinstance(quantizer, Quantizer)
    assert least_values(graph)[last.args[0].args[0]] == quantizer.least == pytest.approx(expected)
    for flavour in FLAVOURS:
        module.use(flavour)
        cpu = flavour in ("onnxruntime", "openvino")
        assert quantizer.spec == (S8 if not cpu else U8 if expected >= 0 else U8_AFFINE), flavour


@pytest.mark.parametrize(("factor", "spec"), [("positive", U8), ("negative", U8_AFFINE)])
def test_a_product_with_a_positive_constant_keeps_the_sign(factor, spec):
    """An equalized part's input: what comes in is never negative, and is multiplied before it is rounded."""

    class Scaled(Between):
        def forward(self, x):
            return self.last(F.relu(self.conv(x)) * getattr(self, factor))

    module = quantized(Scaled(lambda a, b: a)).use("onnxruntime")
    last = next(node for node in module.graph.graph.nodes if node.target == "last")
    assert module.graph.get_submodule(str(last.args[0].target)).spec == spec


def test_what_is_concatenated_is_rounded_alike_even_where_one_of_it_is_never_negative():
    """One scale and one zero point: a concatenation of integers copies them."""
    module = quantized(Between(LEAST["concat with a conv"][0])).use("onnxruntime")
    (cat,) = (node for node in module.graph.graph.nodes if "cat" in str(node.target) and node.op == "call_function")
    taken = {str(source.target) for source in cat.all_input_nodes}
    assert len(taken) == 1 and module.graph.get_submodule(taken.pop()).spec == U8_AFFINE


def test_an_input_that_another_part_leaves_behind_a_relu_is_rounded_from_zero_up(quantized_detector):
    """The BEV decoder's comes out of the vtransform's ReLU, the head's out of the decoder's; a picture has a sign."""
    parts_of = quantized_detector.parts
    with quantized_detector.in_flavour("onnxruntime"):
        assert parts_of["decoder"].quant_x.spec == parts_of["head"].quant_x.spec == U8
        assert parts_of["camera"].quant_img.spec == U8_AFFINE
    assert parts_of["decoder"].quant_x.spec == S8


@pytest.fixture(scope="module")
def quantized_detector(quantized):
    return quantized


def test_signed_activations_are_u8_around_128_with_s8s_result(x):
    model, weight, bias = conv_graph(zero=128)
    changed = in_flavour(model, FLAVOURS["onnxruntime"])
    rounded = np.clip(np.rint(x / SCALE), -128, 127) * SCALE
    expected = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], rounded) + bias[:, None, None]
    np.testing.assert_allclose(run(changed, x), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [4, 1])
@pytest.mark.parametrize("zero", [0, 128])
def test_weights_and_biases_are_stored_as_integers(x, channels, zero):
    model, weight, bias = conv_graph(zero, channels)
    before = run(model, x)
    assert store_integers(model) == 1
    values, nodes = parts(model)
    conv = nodes["y"]
    stored = values[nodes[conv.input[1]].input[0]]
    assert stored.dtype == np.int8
    np.testing.assert_array_equal(stored, weight * 256)
    whole, scale = (values[name] for name in nodes[conv.input[2]].input)
    assert whole.dtype == np.int32
    np.testing.assert_array_equal(whole, bias * 8192)  # 1/8192 = 1/32 · 1/256
    np.testing.assert_array_equal(scale, np.full(4, 1 / 8192, np.float32))
    assert not {"w", "b"} & set(values)
    integers = np.clip(np.rint(x / SCALE) + zero, 0, 255).astype(np.int64) - zero
    sums = np.einsum("oi,nihw->nohw", stored[:, :, 0, 0].astype(np.int64), integers) + whole[:, None, None]
    np.testing.assert_allclose(run(model, x), sums / 8192, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(run(model, x), before, rtol=1e-6, atol=1e-6)


def test_activations_stay_as_they_were_traced():
    """How they are rounded is the flavour's, in PyTorch already: no pass changes a zero point or a scale."""
    model, *_ = conv_graph(zero=0)
    store_integers(model)
    values, nodes = parts(model)
    assert list(nodes["xq"].input) == ["x", "s", "z"] and values["s"] == SCALE and values["z"] == 0


def test_a_bias_that_no_s32_holds_stays_float():
    """A channel of near-zero weights; ONNX Runtime leaves its convolution in float."""
    model, *_ = conv_graph()
    scale = next(value for value in model.graph.initializer if value.name == "ws")
    scale.CopyFrom(numpy_helper.from_array(np.float32([1e-9, 1, 1, 1]) / 256, "ws"))
    store_integers(model)
    values, nodes = parts(model)
    assert nodes["y"].input[2] == "b" and values["b"].dtype == np.float32 and values["w_s8"].dtype == np.int8


def test_the_graph_given_is_left_as_it_is():
    model, *_ = conv_graph()
    before = model.SerializeToString()
    in_flavour(model, FLAVOURS["openvino"])
    assert model.SerializeToString() == before


@pytest.mark.parametrize("flavour", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_the_exported_graph_computes_integer_arithmetic(activation, flavour, tmp_path):
    """Two 1×1 convolutions, computed by hand from the simulation's ranges: sums of products of integers, with the bias on
    their scale. With a ReLU between them the second takes u8 from zero up; with SiLU from its smallest value."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), activation(), nn.Conv2d(8, 5, 1))
    module = quantized(net, (2, 3, 6, 8)).use(flavour)
    report = export_module(module, tmp_path / "net.onnx", inputs=["x"], outputs=["y"])
    assert report.passed
    model = onnx.load(tmp_path / "net.onnx")
    x = np.random.default_rng(3).normal(0, 2, (2, 3, 6, 8)).astype(np.float32)

    value, zeros = x.astype(np.float64), []
    for path in ("0", "2"):
        layer = module.graph.get_submodule(path)
        call = next(node for node in module.graph.graph.nodes if node.target == path)
        quantizer = module.graph.get_submodule(str(call.args[0].target))
        (step,), zero = quantizer.parameters_of_rounding()
        step, zeros = float(step), [*zeros, zero]
        steps = layer.weight_quantizer.steps.double().numpy()
        weight = layer.weight.detach().double().numpy()[:, :, 0, 0]
        whole = np.clip(np.rint(weight / steps[:, None]), -128, 127)
        bias = np.rint(layer.bias.detach().double().numpy() / (step * steps))
        integers = np.clip(np.rint(value / step) + zero, 0, 255) - zero
        sums = np.einsum("oi,nihw->nohw", whole, integers) + bias[:, None, None]
        value = sums * (step * steps)[:, None, None]
        if path == "0":
            behind = next(iter(call.users))
            own = module.graph.get_submodule(str(behind.target))
            if isinstance(own, Quantizer) and not own._disabled:  # ONNX Runtime: Q behind the convolution
                (between,), shift = own.parameters_of_rounding()
                value = (np.clip(np.rint(value / float(between)) + shift, 0, 255) - shift) * float(between)
            value = activation()(torch.from_numpy(value)).numpy()
    assert zeros[1] == 0 if activation is nn.ReLU else 0 < zeros[1] < 128  # SiLU's smallest value is −0.278
    found = run(model, x)
    # A sum that lies within float32's error of half a step may be rounded to the other side there: one step of one value.
    assert np.median(np.abs(found - value)) < 1e-6
    assert np.abs(found - value).max() < 1.01 * step * 127 * steps.max()
    types = {numpy_helper.to_array(v).dtype for v in model.graph.initializer}
    assert np.dtype(np.int8) in types and np.dtype(np.int32) in types
