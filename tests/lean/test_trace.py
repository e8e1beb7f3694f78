"""Tracing: one spelling for each operation, any batch, the same numbers, and one line where it cannot be done."""

import gc
import weakref

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from qat.core.errors import UserError
from qat.export import export_module
from qat.lean import quantize
from qat.lean import trace as tracing
from qat.lean.fold import fold_batch_norm
from qat.lean.insert import quantize_graph
from qat.lean.layers import Product, ScaleShift
from qat.lean.modes import quantizers, quantizers_off
from qat.lean.trace import FIXED_BATCH, trace
from tests.messages import refused


def seeded(module, seed=0):
    """A module with drawn weights, and batch norms that do something."""
    torch.manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.running_mean is not None:
            nn.init.uniform_(child.running_mean, -0.5, 0.5)
            nn.init.uniform_(child.running_var, 0.5, 2)
            nn.init.uniform_(child.weight, 0.5, 2)
            nn.init.uniform_(child.bias, -0.5, 0.5)
        elif isinstance(child, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.Conv1d):
            child.reset_parameters()
    return module.eval()


def same(module, graph, *shape):
    """The graph computes what the module does, for one, two and three samples."""
    for batch in (1, 2, 3):
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            expected, found = module(x), graph(x)
        assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max())), batch


class Spelled(nn.Module):
    """conv → ReLU → conv, with the ReLU spelled in a way of its own."""

    def __init__(self, relu):
        super().__init__()
        self.a, self.b, self.act, self.spell = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), relu

    def forward(self, x):
        return self.b(self.spell(self, self.a(x)))


SPELLINGS = {
    "module": lambda net, x: net.act(x),
    "function": lambda net, x: F.relu(x),
    "keyword": lambda net, x: F.relu(input=x, inplace=True),
    "method": lambda net, x: x.relu(),
    "in place": lambda net, x: x.relu_(),
    "torch": lambda net, x: torch.relu(x),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_an_activation_gives_the_same_graph(spelling):
    net = seeded(Spelled(SPELLINGS[spelling]))
    graph = trace(net, (torch.zeros(2, 3, 12, 12),))
    assert [type(m).__name__ for m in graph.modules() if not list(m.children())] == ["Conv2d", "ReLU", "Conv2d"]
    inventory = quantize_graph(graph)
    assert list(inventory.quantizers) == ["quant_x", "quant_act" if spelling == "module" else "quant_relu"]
    with quantizers_off(graph):
        same(net, graph, 3, 12, 12)


class Repeated(nn.Module):
    """One convolution and one batch norm for two inputs, as heads over levels have them; `twice` has a norm for each."""

    def __init__(self, norms=1):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(norms))

    def forward(self, x):
        y = self.norms[0](self.conv(x)).relu()
        return self.norms[-1](self.conv(y)).relu()


@pytest.mark.parametrize("norms", [1, 2])
def test_a_convolution_that_is_called_twice_is_folded_right(norms):
    net = seeded(Repeated(norms))
    graph = trace(net, (torch.zeros(2, 3, 8, 8),))
    assert fold_batch_norm(graph) == 2
    same(net, graph, 3, 8, 8)
    inventory = quantize_graph(graph)
    assert inventory.quantized == (["conv"] if norms == 1 else ["conv", "conv_1"])
    assert {"quant_x", "quant_relu"} <= set(inventory.quantizers)


def test_a_convolution_called_with_and_without_its_norm_keeps_both_forms():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(x)) + self.conv(x.relu())

    net = seeded(Net())
    graph = trace(net, (torch.zeros(2, 3, 4, 4),))
    assert fold_batch_norm(graph) == 1
    same(net, graph, 3, 4, 4)


FOLDED = {
    "convolution": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, 2), nn.BatchNorm2d(6)),
    "grouped transposed": (nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.BatchNorm2d(6)),
    "depthwise transposed": (nn.ConvTranspose2d(4, 4, 2, 2, groups=4, bias=False), nn.BatchNorm2d(4)),
    "one dimension": (nn.Flatten(2), nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)),
    "linear": (nn.Flatten(), nn.Linear(4 * 36, 5), nn.BatchNorm1d(5)),
    "weight norm": (torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
}


@pytest.mark.parametrize("kind", FOLDED)
def test_a_batch_norm_is_folded_into_whatever_layer_is_before_it(kind):
    net = seeded(nn.Sequential(*FOLDED[kind]))
    graph = trace(net, (torch.zeros(2, 4, 6, 6),))
    assert fold_batch_norm(graph) == 1
    assert not any(isinstance(m, ScaleShift) for m in graph.modules())
    same(net, graph, 4, 6, 6)


def test_a_batch_norm_with_no_layer_before_it_becomes_a_scale_and_a_shift_in_every_flavour(tmp_path):
    net = seeded(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3)))
    x = torch.randn(2, 3, 8, 8)
    quantized = quantize(net, (x,))
    assert any(isinstance(m, ScaleShift) for m in quantized.modules())
    for flavour in ("tensorrt", "tensorrt-strong", "onnxruntime", "openvino"):
        report = export_module(quantized.use(flavour), tmp_path / "net.onnx")
        assert report.passed


def test_a_batch_norm_without_statistics_is_refused_in_one_line():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with refused("1", "found a batch norm without running statistics, expected"):
        trace(net, (torch.zeros(2, 3, 8, 8),))


class SamePadding(nn.Module):
    """An even kernel, whose SAME padding differs from side to side; a string; a Pad by itself."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 4, 4, padding="same" if kind == "string" else 0)

    def forward(self, x):
        return self.conv(x if self.kind == "string" else F.pad(x, (1, 2, 1, 2)))


@pytest.mark.parametrize("kind", ["string", "pad"])
def test_padding_that_differs_from_side_to_side_is_the_convolutions_own(kind, tmp_path):
    """A Pad between Q and the convolution would keep engines from fusing the two."""
    net = seeded(SamePadding(kind))
    graph = trace(net, (torch.zeros(2, 3, 9, 9),))
    same(net, graph, 3, 9, 9)
    quantized = quantize(net, (torch.randn(2, 3, 9, 9),), flavour="onnxruntime")
    assert export_module(quantized, tmp_path / "net.onnx").passed
    import onnx

    operators = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert "Pad" not in operators and "Conv" in operators


def test_functional_convolutions_and_subclasses_are_layers():
    class Own(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(input=x, weight=self.weight, bias=self.bias, padding=1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = Own(3, 4, 3)
            self.kernel = nn.Parameter(torch.randn(5, 4, 1, 1))

        def forward(self, x):
            return F.conv2d(torch.cat(tensors=[self.own(x).relu()], dim=1), self.kernel * 2)

    net = seeded(Net())
    quantized = quantize(net, (torch.randn(2, 3, 6, 6),))
    summary = quantized.summary()
    assert summary.int8 == ["own", "conv"] and summary.int8_share == 1.0
    assert summary.macs == {"own": 2 * 36 * 4 * 27, "conv": 2 * 36 * 5 * 4}
    with quantizers_off(quantized):
        same(net, quantized, 3, 6, 6)


class Attention(nn.Module):
    """torch's own attention over the pixels, and a Conv1d."""

    def __init__(self):
        super().__init__()
        self.stem, self.attention = nn.Conv2d(3, 8, 2, 2), nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix, self.norm = nn.Conv1d(8, 8, 3, padding=1), nn.LayerNorm(8)

    def forward(self, x):
        tokens = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.mix(tokens.transpose(1, 2))


def test_everything_that_multiplies_is_counted_and_what_stays_float_is_listed():
    net = seeded(Attention())
    quantized = quantize(net, (torch.randn(2, 3, 8, 8),))
    with quantizers_off(quantized):
        same(net, quantized, 3, 8, 8)
    summary = quantized.summary()
    assert summary.int8 == ["stem", "attention.in_proj", "attention.out_proj"]
    products = [path for path, module in quantized.graph.named_modules() if isinstance(module, Product)]
    assert len(products) == 2 and set(products) < set(summary.floats)
    assert "mix" in summary.floats and "norm" in summary.floats
    pixels, heads = 2 * 16, 2
    macs = {"stem": pixels * 8 * 12, "in_proj": pixels * 8 * 24, "out_proj": pixels * 64, "mix": pixels * 64 * 3}
    product = heads * 2 * 16 * 16 * 4  # for each of two samples and heads, [16,4] · [4,16] and back
    assert sum(summary.macs.values()) == sum(macs.values()) + 2 * product
    int8 = macs["stem"] + macs["in_proj"] + macs["out_proj"]
    assert summary.int8_share == pytest.approx(int8 / sum(summary.macs.values()))


@pytest.mark.parametrize("mask", ["none", "boolean", "added", "causal"])
def test_fused_attention_becomes_its_formula(mask, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            given = {"boolean": torch.ones(6, 6).tril() > 0, "added": torch.eye(6)}.get(mask)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=given, is_causal=mask == "causal")

    net = seeded(Net())
    graph = trace(net, (torch.zeros(2, 6, 8),))
    same(net, graph, 6, 8)
    assert sum(isinstance(m, Product) for m in graph.modules()) == 2


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224", "darknet53", "tf_efficientnetv2_b0"])
def test_a_backbone_is_the_same_bit_for_bit_before_folding(name):
    options = {"img_size": (64, 96)} if name.startswith("swin") else {}
    net = seeded(timm.create_model(name, features_only=True, **options))
    graph = trace(net, (torch.zeros(2, 3, 64, 96),))
    assert FIXED_BATCH not in graph.meta
    x = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        for expected, found in zip(net(x), graph(x), strict=True):
            # a batch norm is a scale and a shift there; nothing else may differ
            limit = 2e-5 * float(expected.abs().max()) if any(isinstance(m, ScaleShift) for m in graph.modules()) else 0
            assert float((expected - found).abs().max()) <= limit


def test_a_graph_trains_with_its_quantizers_on():
    net = seeded(Spelled(SPELLINGS["function"]))
    quantized = quantize(net, (torch.randn(2, 3, 12, 12),)).train()
    quantized(torch.randn(4, 3, 12, 12)).square().mean().backward()
    gradients = {name: p.grad for name, p in quantized.named_parameters()}
    assert set(gradients) == {"graph.a.weight", "graph.a.bias", "graph.b.weight", "graph.b.bias"}
    assert all(bool(g.abs().sum() > 0) for g in gradients.values())


@pytest.mark.parametrize("flavour", ["tensorrt", "onnxruntime"])
def test_an_export_takes_two_sizes_of_batch(flavour, tmp_path):
    """Attention's reshapes do not bake the batch in."""
    net = seeded(Attention())
    quantized = quantize(net, (torch.randn(2, 3, 8, 8),), flavour=flavour)
    export_module(quantized, tmp_path / "net.onnx", dynamic_batch=True)
    session = ort.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            expected = quantized(x).numpy()
        (found,) = session.run(None, {"x": x.numpy()})
        assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_what_depends_on_values_is_refused_in_one_line():
    class Net(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(UserError, match=r"torch\.export cannot trace it") as error:
        trace(Net(), (torch.zeros(2, 3),))
    assert "\n" not in str(error.value)


def test_a_tensor_that_is_changed_in_part_is_computed_right_or_refused_in_one_line():
    class Net(nn.Module):
        def forward(self, x):
            y = x.clone()
            y[:, 0] = 0
            return y * 2

    try:
        graph = trace(Net(), (torch.zeros(2, 3),))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        same(Net(), graph, 3)


def test_keep_float_by_pattern_leaves_layers_alone_and_a_pattern_that_fits_none_is_refused():
    net = seeded(Spelled(SPELLINGS["module"]))
    quantized = quantize(net, (torch.randn(2, 3, 12, 12),), keep_float=["a=its input is raw"])
    assert quantized.summary().int8 == ["b"] and quantized.summary().floats == {"a": "its input is raw"}
    with pytest.raises(UserError, match=r"keep-float c: matches no layer's path"):
        quantize(net, (torch.randn(2, 3, 12, 12),), keep_float=["c"])


def test_quantizers_are_named_by_path_and_call(tmp_path):
    net = seeded(Repeated(1))
    names = list(quantizers(quantize(net, (torch.randn(2, 3, 8, 8),))))
    assert [name.removeprefix("graph.") for name in names] == ["conv.weight_quantizer", "quant_x", "quant_relu"]


class Ghost(nn.Module):
    """Adds to all channels of a concatenation, taken as a slice, in place: nothing else reads it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x)], 1)[:, :8]
        y += 1.5
        return self.c(torch.cat([y.relu()], 1))


def test_a_slice_that_is_changed_in_place_is_right_where_nothing_else_reads_its_memory():
    net = seeded(Ghost())
    same(net, trace(net, (torch.zeros(2, 3, 6, 6),)), 3, 6, 6)


class Embedding(nn.Module):
    """A convolution of positions, which depend on no input but on the batch's size."""

    def __init__(self):
        super().__init__()
        self.positions, self.stem = nn.Conv2d(1, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        rows = torch.ones(len(x), 1, *x.shape[2:]).cumsum(2)
        return self.stem(x) + self.positions(rows / 8)


@pytest.mark.parametrize("net", [Ghost(), Embedding()])
def test_a_concatenation_of_one_and_a_constant_that_is_rounded_are_no_missing_pairs(net, tmp_path):
    quantized = quantize(seeded(net), (torch.randn(2, 3, 8, 8),))
    report = export_module(quantized, tmp_path / "net.onnx")
    assert report.passed, report.failures
    assert report.sites >= 2


class Mixed(nn.Module):
    """Layers, a buffer, a constant that torch.export makes, and an option that the graph depends on."""

    def __init__(self, factor=2.0):
        super().__init__()
        self.factor, self.conv, self.norm = factor, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("shift", torch.randn(4, 1, 1))

    def forward(self, x):
        return self.norm(self.conv(x)).relu() * self.factor + self.shift + torch.tensor([0.5])


@pytest.fixture
def programs(monkeypatch):
    """The kept programs, none at first."""
    monkeypatch.setattr(tracing, "_known", type(tracing._known)())
    return tracing._known


def test_a_network_with_other_weights_takes_the_kept_program_and_keeps_its_own_tensors(programs):
    first, second = seeded(Mixed(), 1), seeded(Mixed(), 2)
    before = trace(first, (torch.zeros(2, 3, 8, 8),), keep=True)
    again = trace(second, (torch.zeros(2, 3, 8, 8),), keep=True)
    anew = trace(second, (torch.zeros(2, 3, 8, 8),))
    assert len(programs) == 1
    assert again.code == anew.code == before.code
    assert again.conv.weight is second.conv.weight and again.shift is second.shift
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(again(x), anew(x)) and not torch.equal(again(x), before(x))
    same(second, again, 3, 8, 8)


def test_what_a_trace_depends_on_is_traced_anew(programs, monkeypatch):
    inputs = (torch.zeros(2, 3, 8, 8),)
    trace(Mixed(), inputs, keep=True)
    changed = [
        (Mixed(factor=3.0), inputs),
        (Mixed().double(), (inputs[0].double(),)),
        (Mixed(), (torch.zeros(2, 3, 9, 8),)),
        (Mixed(), (torch.zeros(1, 3, 8, 8),)),
    ]
    for count, (net, given) in enumerate(changed, 2):
        same_code = trace(net, given, keep=True)
        assert len(programs) == count
        x = torch.randn_like(given[0])
        with torch.no_grad():
            assert torch.allclose(same_code(x), net.eval()(x), atol=1e-5)
    monkeypatch.setattr(Mixed, "forward", lambda self, x: self.conv(x).relu())
    assert [m for m in trace(Mixed(), inputs, keep=True).modules() if isinstance(m, ScaleShift)] == []


def test_a_network_that_cannot_be_written_down_is_traced_each_time(programs):
    net = Mixed()
    net.conv.register_forward_hook(lambda module, inputs, output: output * 2)
    graph = trace(net, (torch.zeros(2, 3, 8, 8),), keep=True)
    assert not programs
    same(net, graph, 3, 8, 8)


def test_a_kept_program_keeps_no_network_alive(programs):
    net = Mixed()
    trace(net, (torch.zeros(2, 3, 8, 8),), keep=True)
    gone = weakref.ref(net.conv.weight)
    del net
    gc.collect()
    assert len(programs) == 1 and gone() is None
