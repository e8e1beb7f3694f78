"""Each placement rule on the smallest graph that shows it."""

import numpy as np
import pytest
import torch
from torch import nn

from qat.lean import ops
from qat.lean.fold import fold_batch_norm
from qat.lean.insert import quantize_graph
from qat.lean.layers import Conv2d, ScaleShift
from qat.lean.modes import quantizers
from qat.lean.placement import FloatRule, Kept
from qat.lean.quantizer import Quantizer
from qat.lean.trace import trace


class Residual(nn.Module):
    """conv → relu → conv, plus the identity."""

    def __init__(self, downsample: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.downsample = nn.Conv2d(4, 4, 1) if downsample else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return (self.conv2(self.conv1(x).relu()) + self.downsample(x)).relu()


def traced(net, shape=(2, 3, 8, 8)):
    return trace(net, (torch.zeros(shape),))


def inputs_of(graph, kind):
    """For each node of a kind (target predicate), the names of the nodes it reads."""
    return [[source.name for source in node.all_input_nodes] for node in graph.graph.nodes if kind(node)]


def is_add(node):
    return ops.is_add(node)


def test_residual_add_quantizes_the_identity_only():
    graph = traced(Residual())
    quantize_graph(graph)
    (sources,) = inputs_of(graph, is_add)
    rounded = [name for name in sources if isinstance(graph.get_submodule(_target(graph, name)), Quantizer)]
    on = [name for name in rounded if not graph.get_submodule(_target(graph, name))._disabled]
    assert len(on) == 1 and "conv2" not in on[0]
    assert outputs(graph) == ["quant_conv2_output"]


def outputs(graph):
    """Quantizers of convolutions' outputs, which some flavours alone switch on."""
    return [name for name, q in quantizers(graph).items() if q.role == "output" and q._disabled]


def _target(graph, name):
    (node,) = [n for n in graph.graph.nodes if n.name == name]
    return node.target


def test_a_downsampled_identity_is_quantized_and_the_longer_branch_is_not():
    graph = traced(Residual(downsample=True))
    inventory = quantize_graph(graph)
    assert "quant_downsample" in inventory.quantizers
    assert outputs(graph) == ["quant_conv2_output"]


def test_the_identity_shares_the_quantizer_of_the_convolution_beside_it():
    graph = traced(Residual())
    inventory = quantize_graph(graph)
    # the image; relu(stem), for conv1 and for the add, since nn.Identity is not there; relu(conv1); conv2's output
    assert len(inventory.quantizers) == 4
    assert sorted(map(len, inventory.quantizers.values())) == [1, 1, 1, 1]
    assert {
        type(graph.get_submodule(user.target)).__name__ if user.op == "call_module" else "add"
        for node in graph.graph.nodes
        if node.target == "quant_relu"
        for user in node.users
    } == {"QuantizedConv2d", "add"}


def test_an_add_that_no_convolution_feeds_has_both_inputs_on_one_scale():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(2, 2, 1) for _ in range(3))

        def forward(self, x):
            p, q = self.a(x).relu(), self.b(x).relu()
            return self.c(p) * self.c(q), p + q

    graph = traced(Net(), (2, 2, 4, 4))
    inventory = quantize_graph(graph)
    shared = [tensors for tensors in inventory.quantizers.values() if len(tensors) == 2]
    assert shared == [["relu", "relu_1"]]


def test_the_inputs_of_a_concat_and_its_output_share_one_quantizer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.c(torch.cat([self.a(x).relu(), self.b(x).relu()], 1))

    graph = traced(Net(), (2, 2, 4, 4))
    inventory = quantize_graph(graph)
    assert sorted(map(len, inventory.quantizers.values())) == [1, 3]
    (sources,) = inputs_of(graph, ops.is_concat)
    assert len({_target(graph, name) for name in sources}) == 1


def test_max_pooling_and_resize_pass_their_inputs_scale_on():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(2, 2, 1) for _ in range(3))
            self.pool = nn.MaxPool2d(2)

        def forward(self, x):
            y = self.a(x).relu()
            small = self.pool(y)
            large = nn.functional.interpolate(small, size=(8, 8), mode="bilinear", align_corners=True)
            return self.b(y), self.c(large)

    graph = traced(Net(), (2, 2, 4, 4))
    inventory = quantize_graph(graph)
    on = [tensors for name, tensors in inventory.quantizers.items() if not graph.get_submodule(name)._disabled]
    assert sorted(map(len, on)) == [1, 2]  # the image; relu(a) and the resized map


def test_tied_tensors_that_one_backend_alone_rounds_share_one_range():
    """A pool that only goes into a sum: no flavour but ONNX Runtime's rounds it, on both sides."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            pooled = nn.functional.max_pool2d(self.a(x).relu(), 2)
            return self.b(pooled.softmax(1)) + pooled.sin()

    graph = traced(Net(), (2, 2, 4, 4))
    quantize_graph(graph)
    pair = [q for q in quantizers(graph).values() if q.role == "integer" and q.flavours == {"onnxruntime"}]
    assert len(pair) >= 2 and sum(q.shares is None for q in pair) == len(pair) - 1


def test_a_layer_kept_float_has_no_quantizers_and_its_reason_is_told():
    graph = traced(Residual())
    inventory = quantize_graph(graph, [FloatRule("stem", "because")])
    assert inventory.kept == {"stem": Kept("keep_float", "because")}
    assert "stem" not in inventory.quantized
    assert type(graph.get_submodule("stem")) is Conv2d
    assert "quant_x" not in inventory.quantizers


def test_weights_have_one_scale_for_each_output_channel():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(5, 7, 2, 2), nn.Flatten(2), nn.Linear(100, 6))
    graph = traced(net, (2, 3, 7, 7))
    quantize_graph(graph)
    shapes = {name: tuple(q.amax.shape) for name, q in quantizers(graph).items() if name.endswith("weight_quantizer")}
    assert shapes == {
        "0.weight_quantizer": (5, 1, 1, 1),
        "1.weight_quantizer": (1, 7, 1, 1),
        "3.weight_quantizer": (6, 1),
    }
    expected = net[1].weight.abs().amax(dim=(0, 2, 3))
    assert torch.equal(graph.get_submodule("1.weight_quantizer").amax.flatten(), expected)


def test_a_channel_of_zeros_gets_a_floor_and_stays_zero():
    conv = nn.Conv2d(2, 3, 1)
    conv.weight.data[1] = 0
    graph = traced(nn.Sequential(conv), (2, 2, 4, 4))
    quantize_graph(graph)
    quantizer = graph.get_submodule("0.weight_quantizer")
    assert (quantizer.amax > 0).all()
    assert torch.equal(quantizer(conv.weight)[1], torch.zeros_like(conv.weight[1]))


def test_rounding_equals_torchs_own_fake_quantize():
    x = torch.randn(4, 3, 5, 5) * 3
    x[0, 0, 0] = torch.tensor([1e20, -1e20, 0.0, -0.0, 0.5 * 2.0 / 127])  # far outside, zeros, half a step
    quantizer = Quantizer()
    quantizer.set_range(torch.tensor(2.0))
    expected = torch.fake_quantize_per_tensor_affine(x, 2.0 / 127, 0, -128, 127)
    assert torch.equal(quantizer(x)[0, 0, 0, 2:], expected[0, 0, 0, 2:]) and torch.equal(quantizer(x)[1:], expected[1:])
    for amax in (0.013, 2.0, 517.3):
        quantizer.set_range(torch.tensor(amax))
        with torch.no_grad():  # another way, for speed: far outside, where torch's own overflows, it saturates
            fast = quantizer(x)
        assert torch.equal(fast[1:], quantizer(x)[1:])
        step = float(np.float32(amax / 127))
        assert fast[0, 0, 0, :2].tolist() == pytest.approx([127 * step, -128 * step])
    quantizer.set_range(torch.tensor(2.0))
    x = x[1:]
    by_hand = (x / (2.0 / 127)).round().clamp(-128, 127) * (2.0 / 127)
    assert torch.allclose(quantizer(x), by_hand, atol=1e-6)


def test_folding_batch_norm_changes_no_value():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2, 2), nn.BatchNorm2d(5)
    )
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
    x = torch.randn(2, 3, 8, 8)
    expected = net.eval()(x)
    graph = traced(net)
    assert fold_batch_norm(graph) == 2
    assert not any(isinstance(m, ScaleShift) for m in graph.modules())
    assert torch.allclose(graph(x), expected, atol=1e-5)
    assert isinstance(net[1], nn.BatchNorm2d)  # the traced network keeps its own


def test_a_convolution_that_feeds_two_layers_is_not_folded():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y

    assert fold_batch_norm(traced(Net(), (2, 2, 4, 4))) == 0


def test_a_module_that_is_called_twice_makes_two_tensors_with_two_quantizers():
    """ResNet's basic block has one ReLU for both of its activations."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.relu = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.ReLU()

        def forward(self, x):
            return self.c(self.relu(self.b(self.relu(self.a(x)))))

    graph = traced(Block(), (2, 2, 4, 4))
    inventory = quantize_graph(graph)
    assert inventory.quantizers == {"quant_x": ["x"], "quant_relu": ["relu"], "quant_relu_1": ["relu_1"]}
    assert graph.get_submodule("quant_relu") is not graph.get_submodule("quant_relu_1")
