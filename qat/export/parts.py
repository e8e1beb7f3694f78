"""The export: a detector in, a folder of ONNX parts with their manifest out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from qat.core.errors import UserError
from qat.core.files import atomic_directory, write_json
from qat.core.progress import progress_bar
from qat.engine import CPU_FLAVOURS
from qat.export.flavour_tensorrt_strong import to_tensorrt_strong
from qat.export.graph import op_counts, simplify, tensor_specs, trace
from qat.export.lookups import opset_of
from qat.export.manifest_head import check_calibrated, manifest_head
from qat.export.padded_pool import pads_into_pools
from qat.export.passes import in_flavour
from qat.export.verify import Verification
from qat.lean.flavours import flavour_of
from qat.lean.modes import qdq_tracing, quantizers_off, seven_bit_weights
from qat.manifest import FILE
from qat.model.runners import TorchPart, flow_for, torch_parts
from qat.plan import BATCH, Plan

PRECISIONS = ("fp32", "fp16", "int8")
IO = ("fp32", "fp16")
OPSET, OPSETS = 13, range(13, 21)  # per-channel Q/DQ begins with 13; torch's TorchScript exporter ends with 20


@dataclass(frozen=True)
class Form:
    """What the graphs are to be; `export_parts` describes each field."""

    precision: str
    flavour: str = "tensorrt"
    opset: int | None = None
    batch: int = 1
    dynamic_batch: bool = False
    parts: tuple[str, ...] | None = None
    parts_int8: tuple[str, ...] = ()
    reduce_range: bool = False
    io: str = "fp32"

    @property
    def strong(self) -> bool:
        """Whether precision is written in the graph's types."""
        return self.flavour == "tensorrt-strong"

    def check(self, detector: Any) -> None:
        """Raises `UserError` for a form that this detector cannot have, by the name of the flag."""
        if self.precision not in PRECISIONS:
            raise UserError(f"precision: found {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        check_calibrated(detector, self.precision)
        flavour_of(self.flavour)
        if self.flavour in CPU_FLAVOURS and self.precision != "int8":
            raise UserError(
                f"flavour {self.flavour}: found precision {self.precision}, expected int8; leave --flavour out"
            )
        if self.opset is not None and self.opset not in OPSETS:
            raise UserError(f"opset: found {self.opset}, expected {OPSETS[0]} to {OPSETS[-1]}")
        if self.batch < 1:
            raise UserError(f"batch: found {self.batch}, expected at least 1 sample")
        if self.reduce_range and self.flavour not in CPU_FLAVOURS:
            raise UserError(
                f"reduce-range: found flavour {self.flavour}, expected {' or '.join(CPU_FLAVOURS)}: seven bits are for "
                "u8·s8 products"
            )
        if self.io not in IO:
            raise UserError(f"io: found {self.io!r}, expected one of {', '.join(IO)}")
        if self.io == "fp16" and not (self.strong and self.precision != "fp32"):
            raise UserError(
                f"io fp16: found flavour {self.flavour} in {self.precision}, expected tensorrt-strong in fp16 or int8; for "
                "others the engine's builder chooses its inputs' and outputs' type"
            )
        if self.parts_int8 and self.precision != "int8":
            raise UserError(f"parts-int8: found precision {self.precision}, expected int8")
        fixed = getattr(detector, "fixed_views", None)
        if self.precision == "int8" and fixed is not None and (self.batch > 1 or self.dynamic_batch):
            raise UserError(
                f"batch: found a backbone that fixes the number of images when it is traced, at {fixed}, expected one that "
                "takes any; export it for one sample"
            )

    @contextmanager
    def applied(self, detector: Any) -> Iterator[None]:
        """Inside the block the detector's quantizers are on and off, and as fine, as the graphs are to have them."""
        with ExitStack() as stack:
            if self.precision != "int8":
                stack.enter_context(quantizers_off(detector))
            else:
                stack.enter_context(detector.in_flavour(self.flavour, self.parts_int8))
                if self.reduce_range:
                    stack.enter_context(seven_bit_weights(detector))
                    detector.correct_background()
            yield

    def chosen(self, parts: Mapping[str, TorchPart]) -> list[str]:
        """Names of the parts to write, in the order in which they run.

        Raises:
            UserError: the detector has no such part.
        """
        for name in self.parts or ():
            if name not in parts:
                raise UserError(f"parts: found {name!r}, expected some of {', '.join(parts)}")
        return [name for name in parts if self.parts is None or name in self.parts]


def export_parts(
    detector: Any,
    out: str | Path,
    precision: str,
    *,
    flavour: str = "tensorrt",
    checkpoint: str | Path | None = None,
    recipe: Mapping[str, Any] | None = None,
    opset: int | None = None,
    batch: int = 1,
    dynamic_batch: bool = False,
    only: Sequence[str] | None = None,
    parts_int8: Sequence[str] = (),
    reduce_range: bool = False,
    io: str = "fp32",
    seed: int = 0,
    frames: Sequence[Any] = (),
    ema: bool = False,
) -> dict[str, Any]:
    """Writes a detector's ONNX parts and manifest.json into `out`, whole or not at all, and verifies each part.

    The same detector gives the same bytes. An earlier `out` is replaced.

    Args:
        detector: a family's float network, or for INT8 a `qat.model.quantized.QuantizedModel`, on the CPU.
        out: the folder.
        precision: "int8" writes Q/DQ pairs at the detector's quantizers; "fp32" none; "fp16" the same graph as "fp32",
            for a builder that is told by a flag to run it in FP16.
        flavour: "tensorrt" for symmetric s8 Q/DQ on float weights; "tensorrt-strong" for strongly typed networks, with
            precision in the graph's types (`qat.export.flavour_tensorrt_strong`); "onnxruntime" and "openvino" for what
            these fuse on a CPU, INT8 only (`qat.lean.flavours`).
        checkpoint: where the weights came from; its name and sha256 go into the manifest. ema: whether they are its averaged ones.
        recipe: how the quantizers were calibrated, for the manifest.
        opset: 13 to 20; None for 13, and for INT8 of tensorrt-strong 19, the first with FP16 scales.
        batch: samples (of all cameras) in an input. dynamic_batch: any number of them; `batch` and one more are verified.
        only: names of the parts to write; None for all.
        parts_int8: parts that the calibration left off, to quantize all the same.
        io: "fp16" for FP16 inputs and outputs of tensorrt-strong.
        reduce_range: weights to seven bits, for CPUs without VNNI, whose u8·s8 sums of two products saturate at 16 bits.
        seed: of the made-up frame for verification.
        frames: real ones to verify on too, preprocessed for this model.

    Returns:
        the manifest. `manifest["verification"]["passed"]` is False when a part is out of tolerance; the files are
        written all the same, to be looked at.

    Raises:
        UserError: a form that the detector cannot have, a frame of other cameras or another size, onnxsim's or ONNX's
            check failed.
    """
    form = Form(
        precision,
        flavour,
        opset,
        batch,
        dynamic_batch,
        None if only is None else tuple(only),
        tuple(parts_int8),
        reduce_range,
        io,
    )
    form.check(detector)
    detector.eval()
    with form.applied(detector):
        head = manifest_head(flow_for(detector).settings, form.precision, checkpoint, recipe, ema)
        return _export(detector, Path(out), form, head, seed, frames)


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
    form: Form,
    head: dict[str, Any],
    seed: int,
    frames: Sequence[Any],
) -> dict[str, Any]:
    parts = torch_parts(detector)
    left = form.chosen(parts)
    batches = (form.batch, form.batch + 1) if form.dynamic_batch else (form.batch,)
    verification = Verification(detector, parts, frames, seed, batches)
    manifest = {
        **head,
        "flavour": form.flavour,
        "types": TYPES.get(f"{form.precision} {form.flavour}", TYPES[form.precision]),
        "opset": form.opset or OPSET,
        "io": form.io,
        "batch": None if form.dynamic_batch else form.batch,
        "reduce_range": form.reduce_range,
    }
    total = len(left)
    with atomic_directory(out) as folder, progress_bar("export", total) as done:
        for name, part in parts.items():
            if not left:
                break  # what comes behind the last part that is asked for
            done(total - len(left), name)
            if name not in left:
                verification.skip(name)
                continue
            model = source = _graph(part, name, verification.feeds(name), form, varying_axes(verification.plan, name))
            typed = None
            if form.strong:
                model, typed = to_tensorrt_strong(
                    source, form.precision, verification.all_feeds(name), form.opset, keep_io=form.io == "fp32"
                )
                manifest["opset"] = max(manifest["opset"], opset_of(model))
            if form.precision == "int8":
                model = in_flavour(model, flavour_of(form.flavour))
            left.remove(name)
            counts = op_counts(model)
            graph = model.SerializeToString(deterministic=True)
            (folder / f"{name}.onnx").write_bytes(graph)
            has_qdq = counts["DequantizeLinear"] > 0
            takes, gives = tensor_specs(model)
            precision = form.precision
            if precision == "int8" and not has_qdq:
                precision = "fp16" if form.strong else "fp32"
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
        write_json(folder / FILE, manifest)
    return manifest


def varying_axes(plan: Plan, name: str) -> dict[str, dict[int, str]]:
    """The axes of a part's inputs and outputs that vary from frame to frame (not the batch), by its names for them."""
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
    form: Form,
    varying: Mapping[str, Mapping[int, str]],
) -> onnx.ModelProto:
    """A part's simplified graph in the `tensorrt` flavour."""
    wrapper = part.wrapper
    tensors = [torch.from_numpy(feeds[tensor]) for tensor in wrapper.inputs]
    with qdq_tracing():
        # tensorrt-strong raises the opset itself, where the types ask for it
        opset = OPSET if form.strong or form.opset is None else form.opset
        model = trace(wrapper, tensors, wrapper.inputs, wrapper.outputs, opset, form.dynamic_batch, varying)
    model = simplify(model, name)
    pads_into_pools(model)
    return model
