"""Exports a detector as a folder of ONNX parts with their manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from qat.core.files import atomic_directory, write_text
from qat.core.progress import progress_bar
from qat.engine import CPU_FLAVOURS
from qat.export.flavour_tensorrt_strong import to_tensorrt_strong
from qat.export.graph import op_counts, simplify, tensor_specs, trace
from qat.export.lookups import opset_of
from qat.export.manifest_head import manifest_head
from qat.export.options import OPSETS, ExportOptions, Origin
from qat.export.padded_pool import pads_into_pools
from qat.export.passes import in_flavour
from qat.export.verify import Verification
from qat.lean.flavours import flavour_of
from qat.lean.modes import qdq_tracing, quantizers_off, seven_bit_weights
from qat.manifest_schema import GraphManifest, write_manifest
from qat.model.runners import TorchPart, flow_for, torch_parts, whose
from qat.plan import BATCH, Plan
from qat.runtime.axes import note_axes

OPSET = OPSETS[0]
SEED = 0  # seed of the generated frame that every part is verified on


def export_parts(
    detector: Any,
    out: str | Path,
    options: ExportOptions | None = None,
    frames: Sequence[Any] = (),
    origin: Origin | None = None,
) -> dict[str, Any]:
    """Writes a detector's ONNX parts and manifest.json into `out`, whole or not at all, and verifies each part.

    The same detector has the same bytes. An earlier `out` is replaced.

    Args:
        detector: a family's float network, or for INT8 a `qat.model.quantized.QuantizedModel`, on the CPU.
        out: the folder.
        frames: real ones to verify on in addition to a generated one, preprocessed for this model.
        origin: of the weights, for the manifest.

    Returns:
        the manifest. `manifest["verification"]["passed"]` is False when a part is out of tolerance; the files are
        written anyway, for inspection.

    Raises:
        UserError: options that do not fit the detector, a frame with other cameras or another size, onnxsim's or ONNX's
            check failed.
    """
    options = (options or ExportOptions()).settled(detector)
    detector.eval()
    with in_layout(detector, options), quantizers_set(detector, options):
        head = manifest_head(flow_for(detector).settings, str(options.precision), origin or Origin())
        return _export(detector, Path(out), options, head, frames)


@contextmanager
def in_layout(detector: Any, options: ExportOptions) -> Iterator[None]:
    """Inside the block the detector's parts are in the layout of the options."""
    if options.layout is None:
        yield
        return
    family, network = whose(detector)
    kept = [(model, model.config) for model in {id(m): m for m in (detector, network)}.values()]
    changed = family.in_layout(detector.config, options)
    for model, _ in kept:
        model.config = changed
    try:
        yield
    finally:
        for model, config in kept:
            model.config = config


@contextmanager
def quantizers_set(detector: Any, options: ExportOptions) -> Iterator[None]:
    """Inside the block the detector's quantizers have the states and resolution of the settled options."""
    with ExitStack() as stack:
        if options.precision != "int8":
            stack.enter_context(quantizers_off(detector))
        else:
            stack.enter_context(detector.in_flavour(options.flavour, options.parts_int8))
            if options.reduce_range:
                stack.enter_context(seven_bit_weights(detector))
                detector.correct_background()
        yield


TYPES = {
    "fp32": "FP32 throughout",
    "fp16": "FP32-typed graph without QDQ: build it with the builder's FP16 flag, keeping FP32 inputs and outputs or "
    "choosing fp16:chw ones",
    "int8": "FP32-typed graph with QDQ: build it with the builder's INT8 flag (and FP16 for the rest)",
    "fp32 tensorrt-strong": "FP32 throughout, for a strongly typed network",
    "fp16 tensorrt-strong": "FP16 written in the graph's types: build it strongly typed",
    "int8 tensorrt-strong": "QDQ, and FP16 for the rest, written in the graph's types: build it strongly typed",
    **dict.fromkeys(
        [f"int8 {flavour}" for flavour in CPU_FLAVOURS],
        "FP32-typed graph with QDQ: u8 activations, s8 weights, s32 biases",
    ),
}


def _export(
    detector: Any,
    out: Path,
    options: ExportOptions,
    head: dict[str, Any],
    frames: Sequence[Any],
) -> dict[str, Any]:
    asked = str(options.precision)
    parts = torch_parts(detector)
    left = options.chosen(parts)
    batches = (options.batch, options.batch + 1) if options.dynamic_batch else (options.batch,)
    verification = Verification(detector, parts, frames, SEED, batches)
    manifest = {
        **head,
        "flavour": options.flavour,
        "types": TYPES.get(f"{asked} {options.flavour}", TYPES[asked]),
        "opset": options.opset or OPSET,
        "io": options.io,
        "batch": None if options.dynamic_batch else options.batch,
        "reduce_range": options.reduce_range,
    }
    total = len(left)
    with atomic_directory(out) as folder, progress_bar("export", total) as done:
        for name, part in parts.items():
            if not left:
                break  # after the last requested part
            done(total - len(left), name)
            if name not in left:
                verification.skip(name)
                continue
            model = source = _graph(
                part, name, verification.feeds(name), options, varying_axes(verification.plan, name)
            )
            typed = None
            if options.strong:
                taken = verification.plan.parts[name].inputs.items()
                model, typed = to_tensorrt_strong(
                    source,
                    asked,
                    verification.all_feeds(name),
                    options.opset,
                    keep_io=options.io == "fp32",
                    geometry=[own for own, tensor in taken if verification.plan.tensors[tensor].exact],
                )
                manifest["opset"] = max(manifest["opset"], opset_of(model))
            if asked == "int8":
                model = in_flavour(model, flavour_of(options.flavour))
            left.remove(name)
            counts = op_counts(model)
            graph = model.SerializeToString(deterministic=True)
            (folder / f"{name}.onnx").write_bytes(graph)
            has_qdq = counts["DequantizeLinear"] > 0
            takes, gives = tensor_specs(model)
            note_axes(takes, verification.plan)
            precision = asked
            if asked == "int8" and not has_qdq:
                precision = "fp16" if options.strong else "fp32"
            manifest["parts"][name] = {
                "file": f"{name}.onnx",
                "sha256": hashlib.sha256(graph).hexdigest(),
                "precision": precision,
                "opset": opset_of(model),
                "inputs": takes,
                "outputs": gives,
                "operators": dict(sorted(counts.items())),
                **({} if typed is None else {"types": typed}),
                **verification.check(name, graph, source, typed),
            }
        manifest["verification"] = verification.write(folder)
        for file, text in whose(detector)[0].companions(manifest).items():
            write_text(folder / file, text)
        write_manifest(folder, manifest, GraphManifest)
    return manifest


def varying_axes(plan: Plan, name: str) -> dict[str, dict[int, str]]:
    """The axes of a part's inputs and outputs that vary from frame to frame (not the batch), by the part's names."""
    part = plan.parts[name]
    tensors = {**part.inputs, **{output: output for output in part.outputs}}
    found = {
        own: {at: n for at, n in enumerate(plan.tensors[tensor].shape) if isinstance(n, str) and n != BATCH}
        for own, tensor in tensors.items()
    }
    return {own: axes for own, axes in found.items() if axes}


def _graph(
    part: TorchPart,
    name: str,
    feeds: Mapping[str, np.ndarray],
    options: ExportOptions,
    varying: Mapping[str, Mapping[int, str]],
) -> onnx.ModelProto:
    """A part's simplified graph in the `tensorrt` flavour."""
    wrapper = part.wrapper
    tensors = [torch.from_numpy(feeds[tensor]) for tensor in wrapper.inputs]
    with qdq_tracing():
        # tensorrt-strong raises the opset itself if the types require it
        opset = OPSET if options.strong or options.opset is None else options.opset
        model = trace(wrapper, tensors, wrapper.inputs, wrapper.outputs, opset, options.dynamic_batch, varying)
    shapes = {own: value.shape for own, value in zip(wrapper.inputs, tensors, strict=True)} if varying else None
    model = simplify(model, name, shapes=shapes)
    pads_into_pools(model)
    return model
