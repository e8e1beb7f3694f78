"""The rules on ten camera backbones from timm: traced, folded, quantized, exported, and run in ONNX Runtime."""

import warnings

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from qat.core.tensors import compare_tensors
from qat.core.verification import INT8_MARGIN_DB
from qat.export.graph import op_counts, simplify
from qat.export.graph import trace as to_onnx
from qat.export.passes import in_flavour
from qat.export.verify import compare_scales, graph_scales
from qat.families.bevfusion.networks.backbone import build_backbone
from qat.lean.flavours import FLAVOURS
from qat.lean.fold import fold_batch_norm
from qat.lean.insert import quantize_graph
from qat.lean.layers import ScaleShift
from qat.lean.modes import qdq_tracing, quantizers, quantizers_off, recording_scales
from qat.lean.quantizer import QUANTIZED, Quantizer
from qat.lean.trace import trace

LAYERS = tuple(quantized for _, quantized in QUANTIZED)
SIZE = 64, 96
# name: out_indices; layers with INT8 weights, layer norms, products of two activations, counted from the architectures
BACKBONES = {
    "resnet18": ([1, 2, 3], 1 + 6 * 2 + 2, 0, 0),
    "resnet50": ([1, 2, 3], 1 + 13 * 3 + 3, 0, 0),
    "resnext50_32x4d": ([1, 2, 3], 1 + 13 * 3 + 3, 0, 0),
    "swin_tiny_patch4_window7_224": ([0, 1, 2], 1 + 10 * 4 + 2, 1 + 10 * 2 + 2, 10 * 2),
    "convnext_tiny": ([0, 1, 2], 1 + 15 * 3 + 2, 1 + 15 + 2, 0),
    "efficientnet_b0": ([1, 2, 3], 1 + 4 + 10 * 5, 0, 0),
    "ese_vovnet39b": ([1, 2, 3], 3 + 4 * 6 + 3, 0, 0),
    "regnety_016": ([1, 2, 3], 1 + 25 * 5 + 3, 0, 0),
    "mobilenetv3_large_100": ([1, 2, 3], 1 + 2 + 2 * 3 + 3 * 5 + 4 * 3 + 2 * 5, 0, 0),
    "vit_small_patch16_224": ([3, 7, 11], 1 + 12 * 4, 12 * 2, 12 * 2),
}


def picture(seed):
    """Smooth noise, as pictures are."""
    coarse = torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")


class Case:
    """One backbone, quantized, with ranges from two pictures and every tensor of a third."""

    def __init__(self, name):
        self.name = name
        torch.manual_seed(0)
        config = {"type": "timm", "model_name": name, "out_indices": BACKBONES[name][0]}
        self.backbone = build_backbone(config, SIZE).eval()
        for module in self.backbone.modules():  # batch norms that do something, so that folding is put to the test
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
        with torch.no_grad():
            self.expected = self.backbone(picture(3))
        self.graph = trace(self.backbone, (torch.zeros(2, 3, *SIZE),))
        self.folded = fold_batch_norm(self.graph)
        with torch.no_grad():
            self.unquantized = self.graph(picture(3))
        self.inventory = quantize_graph(self.graph)
        self._calibrate()

    def _calibrate(self):
        seen = {}

        def record(module, args):
            seen[module] = max(seen.get(module, 0.0), float(args[0].abs().max()))

        own = [q for name, q in quantizers(self.graph).items() if not q.weights and q.shares is None]
        handles = [q.register_forward_pre_hook(record) for q in own]
        with quantizers_off(self.graph), torch.no_grad():
            for seed in (1, 2):
                self.graph(picture(seed))
        for handle in handles:
            handle.remove()
        for quantizer in own:
            quantizer.set_range(torch.tensor(max(seen.get(quantizer, 0.0), 1e-6)))


@pytest.fixture(scope="module", params=list(BACKBONES))
def case(request):
    return Case(request.param)


def test_it_is_traced_and_folded_without_changing_a_value(case):
    assert not any(isinstance(m, nn.BatchNorm2d | ScaleShift | nn.Dropout | nn.Identity) for m in case.graph.modules())
    for expected, found in zip(case.expected, case.unquantized, strict=True):
        assert compare_tensors(expected.numpy(), found.numpy())["sqnr_db"] > 90


def test_what_is_quantized_and_what_stays_float(case):
    _, layers, norms, products = BACKBONES[case.name]
    reasons = [kept.reason for kept in case.inventory.kept.values()]
    assert len(case.inventory.quantized) == layers
    assert sum("layer norm" in reason for reason in reasons) == norms
    assert sum("product" in reason for reason in reasons) == products


def exported(case):
    with qdq_tracing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = to_onnx(case.graph, [picture(3)], ["img"], [f"p{i}" for i in range(len(case.expected))], 13)
    return simplify(model, "backbone")


def test_onnx_runtime_computes_what_the_simulation_does(case):
    """The whole, on ONNX Runtime with its optimizer on: within the noise of quantization itself (see export.verify)."""
    with recording_scales(case.graph) as scales, torch.no_grad():
        simulated = case.graph(picture(3))
    model = exported(case)
    assert compare_scales(graph_scales(model), scales)["passed"]
    assert op_counts(model)["BatchNormalization"] == 0
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"img": picture(3).numpy()})
    for exact, expected, value in zip(case.unquantized, simulated, found, strict=True):
        noise = compare_tensors(exact.numpy(), expected.numpy())["sqnr_db"]
        assert noise > 5, "quantization leaves nothing of the signal"
        assert compare_tensors(expected.numpy(), value)["sqnr_db"] > noise + INT8_MARGIN_DB


class Isolated(nn.Module):
    """One layer between quantizers."""

    def __init__(self, before, layer, after):
        super().__init__()
        self.before, self.layer, self.after = before, layer, after

    def forward(self, x):
        return self.after(self.layer(self.before(x)))


def isolated(case):
    """Each kind of layer in the graph once, with its own input quantizer and the input that it had."""
    modules = dict(case.graph.named_modules())
    inputs, kinds = {}, {}
    for node in case.graph.graph.nodes:
        layer = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(layer, LAYERS):
            spatial = () if isinstance(layer, nn.Linear) else (layer.kernel_size, layer.stride, layer.padding)
            grouped = 0 if isinstance(layer, nn.Linear) else min(layer.groups, 2) + (layer.groups == layer.in_channels)
            kinds.setdefault((type(layer), spatial, grouped), (node.target, modules[node.args[0].target], layer))
    handles = [
        layer.register_forward_pre_hook(lambda _, args, key=key: inputs.__setitem__(key, args[0].detach().clone()))
        for key, (_, _, layer) in kinds.items()
    ]
    with quantizers_off(case.graph), torch.no_grad():
        case.graph(picture(3))
    for handle in handles:
        handle.remove()
    for key, (path, before, layer) in kinds.items():
        with torch.no_grad():
            after = Quantizer()
            after.set_range(layer(before(inputs[key])).abs().max())
        yield path, Isolated(before, layer, after).eval(), inputs[key]


@pytest.mark.parametrize("flavour", ["tensorrt", "onnxruntime"])
def test_each_kind_of_layer_is_within_one_step_of_its_simulation(case, flavour):
    checked = 0
    for path, module, x in isolated(case):
        with qdq_tracing(), torch.no_grad():
            model = to_onnx(module, [x], ["x"], ["y"], 13)
            expected = module(x).numpy()
            unrounded = module.layer(module.before(x)).numpy()
        model = simplify(model, path)
        step = float(module.after.amax) / 127
        model = in_flavour(model, FLAVOURS[flavour])
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": x.numpy()})
        assert np.abs(found - expected).max() < 1.01 * step, path
        assert np.abs(found - unrounded).max() < (1.01 * step if flavour == "onnxruntime" else 1.51 * step), path
        checked += 1
    assert checked >= 2
