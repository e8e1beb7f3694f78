"""Exports any module quantized by `qat.lean.quantize` as one verified ONNX file."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qat.core.errors import UserError
from qat.core.files import atomic_path
from qat.core.sites import check_sites, runner_of
from qat.export.flavour_tensorrt_strong import to_tensorrt_strong, verify_strong
from qat.export.graph import simplify, trace
from qat.export.padded_pool import pads_into_pools
from qat.export.passes import in_flavour
from qat.export.sites import SiteReference, prepared
from qat.export.verify import verify_part
from qat.lean.flavours import flavour_of
from qat.lean.modes import qdq_tracing, quantizers_off
from qat.lean.module import QuantizedModule
from qat.model.runners import TorchPart


class _Flat(nn.Module):
    """A module whose outputs are a plain tuple of tensors, whatever their nesting. inputs, outputs: their names.

    Changed for tracing: nothing else.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> None:
        super().__init__()
        self.module = module
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves, _ = torch.utils._pytree.tree_flatten(self.module(*inputs))
        return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


@dataclass
class ModuleExport:
    """The results of an export's verification.

    outputs: for each output max_abs, cosine, sqnr_db, tolerance_db, quantization_db and passed. sites: how many places of the graph
    were checked one by one (`qat.core.sites`); 0 where PyTorch cannot run the network in float64. failures: what is wrong at them, a line each.
    """

    outputs: dict[str, dict[str, Any]]
    sites: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the file computes what the simulation does."""
        return not self.failures and all(entry["passed"] for entry in self.outputs.values())


def export_module(
    module: QuantizedModule,
    path: str | Path,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    opset: int = 13,
    dynamic_batch: bool = False,
) -> ModuleExport:
    """Writes a quantized module's ONNX file in its flavour, and verifies it against the simulation on its example inputs.

    Args:
        inputs, outputs: names; None for the arguments' names and output_0, output_1, …
        opset: 13 to 20.
        dynamic_batch: the first dimension may vary.

    Raises:
        UserError: the exporter or ONNX's check refuses the graph.
    """
    tensors = [value for value in module.example_inputs if isinstance(value, torch.Tensor)]
    placeholders = [node for node in module.graph.graph.nodes if node.op == "placeholder"]
    names = list(inputs or [str(node.target) for node in placeholders if "val" in node.meta])
    flat = _Flat(module, names).eval()
    arguments = [value.detach() for value in tensors]
    with torch.inference_mode():
        simulated = flat(*module.example_inputs)
        with quantizers_off(module):
            exact = flat(*module.example_inputs)
    results = list(outputs or [f"output_{n}" for n in range(len(simulated))])
    flat.outputs = tuple(results)
    if len(results) != len(simulated):
        raise UserError(f"outputs: found {len(results)} names, expected {len(simulated)}")
    with qdq_tracing():
        graph = trace(flat, arguments, names, results, opset, dynamic_batch)
    model = simplify(graph, Path(path).stem)
    pads_into_pools(model)
    feeds = {name: value.numpy() for name, value in zip(names, arguments, strict=True)}
    reference = {name: np.asarray(value) for name, value in zip(results, simulated, strict=True)}
    unquantized = {name: np.asarray(value) for name, value in zip(results, exact, strict=True)}
    if module.flavour == "tensorrt-strong":
        model, typed = to_tensorrt_strong(model, "int8", [feeds], None if opset == 13 else opset)
        report = ModuleExport(verify_strong(model, typed, reference, feeds, unquantized))
    else:
        model = in_flavour(model, flavour_of(module.flavour))
        report = ModuleExport(verify_part(model.SerializeToString(), reference, feeds, unquantized))
    data = model.SerializeToString(deterministic=True)
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        _check_sites(flat, data, feeds, module.flavour == "tensorrt-strong", report)
    with atomic_path(path) as temporary:
        Path(temporary).write_bytes(data)
    return report


def _check_sites(flat: _Flat, graph: bytes, feeds: Mapping[str, np.ndarray], half: bool, report: ModuleExport) -> None:
    """Adds failures at the graph's sites to the report, with ONNX Runtime's optimizer off and on."""
    base = prepared({"module": flat}, half)["module"]
    reference = SiteReference(TorchPart(flat), base, lambda: copy.deepcopy(base).double(), graph, feeds, half)
    codes = reference.codes(feeds)
    report.failures += reference.problems
    if report.failures:
        return
    try:
        sites = reference.sites(feeds, codes)
    except RuntimeError as error:  # a network that has another type inside, a recurrent one's first state say
        if "dtype" not in str(error):
            raise
        return
    report.sites = len(sites)
    for optimized in (False, True):
        found = check_sites(reference.cut, sites, feeds, codes, runner_of(reference.cut, sites, optimized=optimized))
        report.failures += [str(row["note"]) for row in reference.failures(found)]
