"""Exports the parts as torch.export programs: NAME.pt2 files, for use in PyTorch.

A program holds its own weights and runs without this package: `torch.export.load(file).module()(*inputs)`. An INT8 one
has torch's own fake-quantize operators, with the ranges as buffers named `…_amax`: what calibration chose can be read
from it, and torch's compilers find operators that they support.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from qat.checkpoints.reading import saving
from qat.core.files import atomic_directory, sha256
from qat.core.progress import progress_bar
from qat.core.tensors import compare_tensors
from qat.export.manifest_head import manifest_head
from qat.export.options import ExportOptions, Origin
from qat.lean.modes import quantizers, quantizers_off
from qat.lean.quantizer import Quantizer
from qat.manifest_schema import Manifest, write_manifest
from qat.model.runners import flow_for, torch_parts
from qat.runtime import Pipeline

SEED = 0  # seed of the random frame that the parts are run on
# A trace's records of an operator's origin: paths of this machine and classes of this package.
PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack")


def _fake_quantize(quantizer: Quantizer, x: torch.Tensor) -> torch.Tensor:
    """Computes the same as `qat.lean.quantizer.Quantizer`, bit for bit, with the range as a tensor of the graph."""
    amax, spec = quantizer.range, quantizer.spec
    if amax.numel() > 1 and not spec.per_channel:
        amax = amax.max()
    if spec.zero_point is None:
        scales, zero_point = quantizer.parameters_of_rounding()
        scale, zero = scales, torch.full_like(scales, zero_point, dtype=torch.int32)
    else:
        scale = amax.flatten() / spec.levels
        zero = torch.full_like(scale, spec.zero_point, dtype=torch.int32)
    if scale.numel() == 1:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, spec.low, spec.high)
    axis = next(i for i, size in enumerate(amax.shape) if size > 1)
    return torch.fake_quantize_per_channel_affine(x, scale, zero, axis, spec.low, spec.high)


@contextmanager
def _ranges_as_tensors(module: nn.Module) -> Iterator[None]:
    """Inside the block, quantizers can be traced by torch.export.

    (Their own forward takes the range out of its tensor as a Python number, which a program that is traced without
    values cannot do.)
    """
    own = quantizers(module).values()
    for quantizer in own:
        quantizer._quant_forward = partial(_fake_quantize, quantizer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for quantizer in own:
            del quantizer._quant_forward


def _drop_unused_weights(program: ExportedProgram) -> None:
    """Removes what the program never reads. (A wrapper holds the whole detector, and torch.export keeps all of it.)"""
    specs = program.graph_signature.input_specs
    for node in [node for node in program.graph.nodes if node.op == "placeholder" and not node.users]:
        spec = next(spec for spec in specs if spec.arg.name == node.name)
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            program.graph.erase_node(node)
            specs.remove(spec)
            # A buffer that is not part of state dicts (a correction of a bias) is a constant of the program.
            (program.constants if spec.persistent is False else program.state_dict).pop(str(spec.target))


def strip_provenance(program: ExportedProgram) -> None:
    """Removes the origins of a trace's operators, and its example inputs, which would be written with the weights."""
    for node in program.graph.nodes:
        for key in PROVENANCE:
            node.meta.pop(key, None)
    program.example_inputs = None


def trace_program(wrapper: nn.Module, inputs: tuple[torch.Tensor, ...]) -> ExportedProgram:
    """One part as a program for inputs of these shapes, quantizers as torch's fake-quantize operators.

    Traced without dynamo (strict=False): the wrappers' shape arithmetic and fx parts are plain Python, which needs no
    bytecode analysis, and dynamo fails on branches in TensorQuantizer's forward.
    """
    with torch.no_grad(), _ranges_as_tensors(wrapper):
        program = torch.export.export(wrapper, inputs, strict=False)
    _drop_unused_weights(program)
    strip_provenance(program)
    return program


def _operators(program: ExportedProgram) -> dict[str, int]:
    counts = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return dict(sorted(counts.items()))


def _specs(names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, object]]:
    return {name: {"dtype": arrays[name].dtype.name, "shape": list(arrays[name].shape)} for name in names}


def export_pt2(
    detector: Any,
    out: str | Path,
    options: ExportOptions | None = None,
    origin: Origin | None = None,
) -> dict[str, Any]:
    """Writes a detector's parts as .pt2 files with manifest.json into `out`, whole or not at all.

    Every file is loaded again and compared with its module: on the CPU, in one process, the same operators
    on the same number of threads have the same bits, and anything else fails. The same detector has the same bytes
    with torch 2.13; torch does not promise it. An earlier `out` is replaced.

    Args:
        detector: a family's float network, or for INT8 a `qat.model.quantized.QuantizedModel`, on the CPU.
        out: the folder.
        options: a precision, "int8" with torch's fake-quantize operators where the detector's quantizers are on, "fp32"
            without; and parts. The others are for ONNX graphs.
        origin: of the weights, for the manifest.

    Returns:
        the manifest, with format_of_parts "pt2" (an argument of `qat.manifest.load_manifest`). Its
        `verification["passed"]` is False if a reloaded program computes something else; the files are written anyway,
        so check it.

    Raises:
        UserError: an unknown precision or part, INT8 requested for a float detector, or an option that is for ONNX graphs.
    """
    options = (options or ExportOptions()).settled_for_programs(detector)
    precision = str(options.precision)
    flow = flow_for(detector)
    plan = flow.plan
    chosen = options.chosen(plan.parts)
    detector.eval()
    state: AbstractContextManager[None] = nullcontext() if precision == "int8" else quantizers_off(detector)
    manifest = {
        **manifest_head(flow.settings, precision, origin or Origin()),
        "format_of_parts": "pt2",
        "types": "FP32 tensors" + (", rounded by torch's fake-quantize operators" if precision == "int8" else ""),
    }
    passed = True
    with state, atomic_directory(out) as folder, progress_bar("export", len(chosen)) as done:
        runners = torch_parts(detector)
        frame = flow.made_frame(SEED, noise=True)
        every = {**flow.first_feeds([frame]), **Pipeline(runners, flow.settings).forward(frame)}
        for name in chosen:
            tensors = {**every, **{own: every[tensor] for own, tensor in plan.parts[name].inputs.items()}}
            done(len(manifest["parts"]), name)
            wrapper = runners[name].wrapper
            inputs = tuple(torch.from_numpy(tensors[tensor]) for tensor in wrapper.inputs)
            program = trace_program(wrapper, inputs)
            operators = _operators(program)
            file = folder / f"{name}.pt2"
            with saving(file) as stream:
                torch.export.save(program, stream)
            # Run again, right before the program: on another number of threads (pooling sets the process's) sums differ.
            reference = runners[name].run({tensor: tensors[tensor] for tensor in wrapper.inputs})
            with torch.inference_mode():
                found = torch.export.load(file).module()(*inputs)
            report: dict[str, dict[str, Any]] = {}
            for tensor, value in zip(wrapper.outputs, found if isinstance(found, tuple) else (found,), strict=True):
                candidate = value.numpy()
                identical = bool(np.array_equal(reference[tensor], candidate))
                report[tensor] = {
                    **compare_tensors(reference[tensor], candidate, f"{name}: {tensor}"),
                    "passed": identical,
                }
                passed &= identical
            rounded = any("fake_quantize" in operator for operator in operators)
            manifest["parts"][name] = {
                "file": file.name,
                "sha256": sha256(file),
                "precision": precision if rounded else "fp32",
                "inputs": _specs(wrapper.inputs, tensors),
                "outputs": _specs(wrapper.outputs, tensors),
                "operators": operators,
                "verification": report,
            }
        manifest["verification"] = {"runtime": "torch.export, reloaded", "seed": SEED, "passed": passed}
        write_manifest(folder, manifest, Manifest)
    return manifest
