"""The export of any quantized module: `qat.lean.quantize` in, one verified ONNX file out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qat.core.errors import UserError
from qat.core.files import atomic_path
from qat.export.flavour_tensorrt_strong import to_tensorrt_strong, verify_strong
from qat.export.graph import simplify, trace
from qat.export.passes import in_flavour
from qat.export.verify import verify_part
from qat.lean.flavours import flavour_of
from qat.lean.modes import qdq_tracing, quantizers_off
from qat.lean.module import QuantizedModule


class _Flat(nn.Module):
    """A module whose outputs are a plain tuple of tensors, whatever it nests them in."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves, _ = torch.utils._pytree.tree_flatten(self.module(*inputs))
        return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def export_module(
    module: QuantizedModule,
    path: str | Path,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    opset: int = 13,
    dynamic_batch: bool = False,
) -> dict[str, dict[str, Any]]:
    """Writes a quantized module's ONNX file in its flavour, and verifies it against the simulation on its example inputs.

    Args:
        inputs, outputs: names; None for the arguments' names and output_0, output_1, …
        opset: 13 to 20.
        dynamic_batch: the first dimension may vary.

    Returns:
        for each output: max_abs, cosine, sqnr_db, tolerance_db, quantization_db and passed.

    Raises:
        UserError: the exporter or ONNX's check refuses the graph.
    """
    tensors = [value for value in module.example_inputs if isinstance(value, torch.Tensor)]
    placeholders = [node for node in module.graph.graph.nodes if node.op == "placeholder"]
    names = list(inputs or [str(node.target) for node in placeholders if "val" in node.meta])
    flat = _Flat(module).eval()
    arguments = [value.detach() for value in tensors]
    with torch.inference_mode():
        simulated = flat(*module.example_inputs)
        with quantizers_off(module):
            exact = flat(*module.example_inputs)
    results = list(outputs or [f"output_{n}" for n in range(len(simulated))])
    if len(results) != len(simulated):
        raise UserError(f"outputs: found {len(results)} names, expected {len(simulated)}")
    with qdq_tracing():
        graph = trace(flat, arguments, names, results, opset, dynamic_batch)
    model = simplify(graph, Path(path).stem)
    feeds = {name: value.numpy() for name, value in zip(names, arguments, strict=True)}
    reference = {name: np.asarray(value) for name, value in zip(results, simulated, strict=True)}
    unquantized = {name: np.asarray(value) for name, value in zip(results, exact, strict=True)}
    if module.flavour == "tensorrt-strong":
        model, typed = to_tensorrt_strong(model, "int8", [feeds], None if opset == 13 else opset)
        report = verify_strong(model, typed, reference, feeds, unquantized)
    else:
        model = in_flavour(model, flavour_of(module.flavour))
        report = verify_part(model.SerializeToString(), reference, feeds, unquantized)
    with atomic_path(path) as temporary:
        Path(temporary).write_bytes(model.SerializeToString(deterministic=True))
    return report
