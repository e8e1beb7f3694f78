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

from qat.core.config import CAMERAS
from qat.core.errors import UserError
from qat.core.files import atomic_directory, sha256, write_json
from qat.core.manifest import FILE, FORMAT, SCHEMA
from qat.core.versions import versions
from qat.export.flavour_onnxruntime import to_onnxruntime
from qat.export.graph import op_counts, simplify, tensor_specs, trace
from qat.export.settings import pipeline_settings
from qat.export.torch_parts import TorchPart, torch_parts
from qat.export.unsigned import never_negative_outputs, to_unsigned
from qat.export.verify import Verification
from qat.lean.modes import (
    parts_on,
    qdq_tracing,
    quantizers,
    quantizers_off,
    seven_bit_weights,
    watched_on,
)

PRECISIONS = ("fp32", "fp16", "int8")
FLAVOURS = ("tensorrt", "onnxruntime", "openvino")
CPU_FLAVOURS = ("onnxruntime", "openvino")  # u8 activations
OPSET, OPSETS = 13, range(13, 21)  # per-channel Q/DQ begins with 13; torch's TorchScript exporter ends with 20


@dataclass(frozen=True)
class Form:
    """What the graphs are to be; `export_parts` describes each field."""

    precision: str
    flavour: str = "tensorrt"
    opset: int = OPSET
    batch: int = 1
    dynamic_batch: bool = False
    parts: tuple[str, ...] | None = None
    parts_int8: tuple[str, ...] = ()
    reduce_range: bool = False

    def check(self, detector: Any) -> None:
        """Raises `UserError` for a form that this detector cannot have, by the name of the flag."""
        if self.precision not in PRECISIONS:
            raise UserError(f"precision: found {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.precision == "int8" and not quantizers(detector):
            raise UserError("precision int8: found a float detector, expected a calibrated one; run calibrate first")
        if self.flavour not in FLAVOURS:
            raise UserError(f"flavour: found {self.flavour!r}, expected one of {', '.join(FLAVOURS)}")
        if self.flavour == "onnxruntime" and self.precision != "int8":
            raise UserError(
                f"flavour onnxruntime: found precision {self.precision}, expected int8; leave --flavour out"
            )
        if self.opset not in OPSETS:
            raise UserError(f"opset: found {self.opset}, expected {OPSETS[0]} to {OPSETS[-1]}")
        if self.batch < 1:
            raise UserError(f"batch: found {self.batch}, expected at least 1 sample")
        if self.reduce_range and self.flavour not in CPU_FLAVOURS:
            raise UserError(
                f"reduce-range: found flavour {self.flavour}, expected {' or '.join(CPU_FLAVOURS)}: seven bits are for "
                "u8·s8 products"
            )
        if self.parts_int8:
            if self.precision != "int8":
                raise UserError(f"parts-int8: found precision {self.precision}, expected int8")
            for name in self.parts_int8:
                if name not in detector.parts_off:
                    off = ", ".join(detector.parts_off) or "none"
                    raise UserError(f"parts-int8: found {name!r}, expected a part that calibrate left off: {off}")

    @contextmanager
    def applied(self, detector: Any) -> Iterator[None]:
        """Inside the block the detector's quantizers are on and off, and as fine, as the graphs are to have them."""
        with ExitStack() as stack:
            if self.precision != "int8":
                stack.enter_context(quantizers_off(detector))
            else:
                stack.enter_context(parts_on(detector, self.parts_int8))
                if self.flavour in CPU_FLAVOURS:
                    stack.enter_context(watched_on(detector))
                if self.reduce_range:
                    stack.enter_context(seven_bit_weights(detector))
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
    cameras: Sequence[str] = CAMERAS,
    opset: int = OPSET,
    batch: int = 1,
    dynamic_batch: bool = False,
    only: Sequence[str] | None = None,
    parts_int8: Sequence[str] = (),
    reduce_range: bool = False,
    seed: int = 0,
    frames: Sequence[Any] = (),
) -> dict[str, Any]:
    """Writes a detector's ONNX parts and manifest.json into `out`, whole or not at all, and verifies each part.

    The same detector gives the same bytes. An earlier `out` is replaced.

    Args:
        detector: a `qat.models.CameraBEVDetector`, or for INT8 a `qat.lean.QuantizedDetector`, on the CPU.
        out: the folder.
        precision: "int8" writes Q/DQ pairs at the detector's quantizers; "fp32" none; "fp16" the same graph as "fp32",
            for a builder that is told by a flag to run it in FP16.
        flavour: "tensorrt" for symmetric s8 Q/DQ on float weights, which OpenVINO runs well too; "onnxruntime" for what
            ONNX Runtime's CPU fuses, INT8 only (`qat.export.flavour_onnxruntime`).
        checkpoint: where the weights came from; its name and sha256 go into the manifest.
        recipe: how the quantizers were calibrated, for the manifest.
        cameras: names in the order of the inputs.
        opset: 13 to 20.
        batch: samples (of all cameras) in an input. dynamic_batch: any number of them; `batch` and one more are verified.
        only: names of the parts to write; None for all.
        parts_int8: parts that the calibration left off (the vtransform) to quantize all the same.
        reduce_range: weights to seven bits, for CPUs without VNNI, whose u8·s8 sums of two products saturate at 16 bits.
        seed: of the random frame for verification.
        frames: real ones to verify on too, what `qat.runtime.SampleTensors` describes, preprocessed for this model.

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
    )
    form.check(detector)
    detector.eval()
    settings = pipeline_settings(detector.config, cameras)
    with form.applied(detector):
        return _export(detector, Path(out), form, settings, checkpoint, recipe, seed, frames)


def _model_name(checkpoint: str | Path | None) -> str | None:
    return None if checkpoint is None else Path(checkpoint).resolve().parent.name


TYPES = {
    "fp32": "FP32 throughout",
    "fp16": "FP32-typed graph without QDQ: build it with the builder's FP16 flag, keeping FP32 inputs and outputs or "
    "choosing fp16:chw ones",
    "int8": "FP32-typed graph with QDQ: build it with the builder's INT8 flag (and FP16 for the rest)",
    **dict.fromkeys(
        [f"int8 {flavour}" for flavour in CPU_FLAVOURS],
        "FP32-typed graph with QDQ: u8 activations, s8 weights, s32 biases",
    ),
}


def _export(
    detector: Any,
    out: Path,
    form: Form,
    settings: dict[str, Any],
    checkpoint: str | Path | None,
    recipe: Mapping[str, Any] | None,
    seed: int,
    frames: Sequence[Any],
) -> dict[str, Any]:
    parts = torch_parts(detector)
    chosen = form.chosen(parts)
    batches = (form.batch, form.batch + 1) if form.dynamic_batch else (form.batch,)
    verification = Verification(detector, parts, settings, frames, seed, batches)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "schema": SCHEMA,
        "model": _model_name(checkpoint),
        "precision": form.precision,
        "flavour": form.flavour,
        "types": TYPES.get(f"{form.precision} {form.flavour}", TYPES[form.precision]),
        "opset": form.opset,
        "batch": None if form.dynamic_batch else form.batch,
        "reduce_range": form.reduce_range,
        "checkpoint": None,
        "calibration": dict(recipe) if recipe is not None and form.precision == "int8" else None,
        "versions": versions(),
        "pipeline": settings,
        "parts": {},
    }
    if checkpoint is not None:
        manifest["checkpoint"] = {"file": Path(checkpoint).name, "sha256": sha256(checkpoint)}
    # Of the tensor before the next part, for what is behind a part's last ReLU is u8 in the next one too. Pooled features
    # have a sign: the context of a pixel has.
    positive = False
    with atomic_directory(out) as folder:
        for name, part in parts.items():
            model = source = _graph(part, name, verification.feeds, form)
            if form.flavour in CPU_FLAVOURS:
                known = part.wrapper.inputs if positive else ()
                model = (to_onnxruntime if form.flavour == "onnxruntime" else to_unsigned)(model, known)
                positive = name != "camera.backbone" and bool(never_negative_outputs(model, known))
            if name not in chosen:
                verification.skip(name)
                continue
            counts = op_counts(model)
            graph = model.SerializeToString(deterministic=True)
            (folder / f"{name}.onnx").write_bytes(graph)
            has_qdq = counts["DequantizeLinear"] > 0
            takes, gives = tensor_specs(model)
            manifest["parts"][name] = {
                "file": f"{name}.onnx",
                "sha256": hashlib.sha256(graph).hexdigest(),
                "precision": "fp32" if form.precision == "int8" and not has_qdq else form.precision,
                "inputs": takes,
                "outputs": gives,
                "operators": dict(sorted(counts.items())),
                **verification.check(name, graph, source),
            }
        manifest["verification"] = verification.write(folder)
        write_json(folder / FILE, manifest)
    return manifest


def _graph(part: TorchPart, name: str, feeds: Mapping[str, np.ndarray], form: Form) -> onnx.ModelProto:
    """A part's simplified graph in the `tensorrt` flavour."""
    wrapper = part.wrapper
    tensors = [torch.from_numpy(feeds[tensor]) for tensor in wrapper.inputs]
    with qdq_tracing():
        model = trace(wrapper, tensors, wrapper.inputs, wrapper.outputs, form.opset, form.dynamic_batch)
    return simplify(model, name)
