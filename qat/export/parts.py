"""The export: a detector in, a folder of ONNX parts with their manifest out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from qat.core.config import CAMERAS
from qat.core.errors import UserError
from qat.core.files import atomic_directory, sha256, write_json
from qat.core.manifest import FILE, FORMAT, SCHEMA
from qat.core.versions import versions
from qat.export.flavour_onnxruntime import never_negative_outputs, to_onnxruntime
from qat.export.graph import op_counts, simplify, tensor_specs, trace
from qat.export.settings import pipeline_settings
from qat.export.torch_parts import torch_parts
from qat.export.verify import Verification
from qat.lean.modes import qdq_tracing, quantizers, quantizers_off, watched_on

PRECISIONS = ("fp32", "fp16", "int8")
FLAVOURS = ("tensorrt", "onnxruntime")
OPSET = 13


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
        seed: of the random frame for verification.
        frames: real ones to verify on too, what `qat.runtime.SampleTensors` describes, preprocessed for this model.

    Returns:
        the manifest. `manifest["verification"]["passed"]` is False when a part is out of tolerance; the files are
        written all the same, to be looked at.

    Raises:
        UserError: an unknown precision, INT8 asked of a float detector, a frame of other cameras or another size,
            onnxsim's or ONNX's check failed.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if precision == "int8" and not quantizers(detector):
        raise UserError("precision int8: found a float detector, expected a calibrated one; run calibrate first")
    if flavour not in FLAVOURS:
        raise UserError(f"flavour: found {flavour!r}, expected one of {', '.join(FLAVOURS)}")
    if flavour == "onnxruntime" and precision != "int8":
        raise UserError(f"flavour onnxruntime: found precision {precision}, expected int8; leave --flavour out")
    detector.eval()
    settings = pipeline_settings(detector.config, cameras)
    state: AbstractContextManager[None] = nullcontext()
    if precision != "int8":
        state = quantizers_off(detector)
    elif flavour == "onnxruntime":
        state = watched_on(detector)
    with state:
        return _export(detector, Path(out), precision, flavour, settings, checkpoint, recipe, opset, seed, frames)


def _model_name(checkpoint: str | Path | None) -> str | None:
    return None if checkpoint is None else Path(checkpoint).resolve().parent.name


def _export(
    detector: Any,
    out: Path,
    precision: str,
    flavour: str,
    settings: dict[str, Any],
    checkpoint: str | Path | None,
    recipe: Mapping[str, Any] | None,
    opset: int,
    seed: int,
    frames: Sequence[Any],
) -> dict[str, Any]:
    parts = torch_parts(detector)
    verification = Verification(detector, parts, settings, frames, seed)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "schema": SCHEMA,
        "model": _model_name(checkpoint),
        "precision": precision,
        "flavour": flavour,
        "types": {
            "fp32": "FP32 throughout",
            "fp16": "FP32-typed graph without QDQ: build it with the builder's FP16 flag, keeping FP32 inputs and "
            "outputs or choosing fp16:chw ones",
            "int8": "FP32-typed graph with QDQ: build it with the builder's INT8 flag (and FP16 for the rest)"
            if flavour == "tensorrt"
            else "FP32-typed graph with QDQ: u8 activations, s8 weights, s32 biases",
        }[precision],
        "opset": opset,
        "checkpoint": None,
        "calibration": dict(recipe) if recipe is not None and precision == "int8" else None,
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
            tensors = [torch.from_numpy(verification.feeds[tensor]) for tensor in part.wrapper.inputs]
            with qdq_tracing():
                model = trace(part.wrapper, tensors, part.wrapper.inputs, part.wrapper.outputs, opset)
            model = source = simplify(model, name)
            if flavour == "onnxruntime":
                known = part.wrapper.inputs if positive else ()
                model = to_onnxruntime(model, known)
                positive = name != "camera.backbone" and bool(never_negative_outputs(model, known))
            counts = op_counts(model)
            graph = model.SerializeToString(deterministic=True)
            (folder / f"{name}.onnx").write_bytes(graph)
            has_qdq = counts["QuantizeLinear"] > 0
            takes, gives = tensor_specs(model)
            manifest["parts"][name] = {
                "file": f"{name}.onnx",
                "sha256": hashlib.sha256(graph).hexdigest(),
                "precision": "fp32" if precision == "int8" and not has_qdq else precision,
                "inputs": takes,
                "outputs": gives,
                "operators": dict(sorted(counts.items())),
                **verification.check(name, graph, source),
            }
        manifest["verification"] = verification.write(folder)
        write_json(folder / FILE, manifest)
    return manifest
