"""Post-training quantization: run frames through the float network, choose each tensor's range."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from qat.calibrate.distributed import agree, merge_calibrators, total
from qat.core.errors import NotFiniteError, UserError
from qat.families.flow import Session
from qat.lean import METHODS
from qat.lean.calibrators import HistogramCalibrator
from qat.lean.equalize import INPUTS, INSIDE, by_input, channel_scales
from qat.lean.modes import quantizers
from qat.lean.observe import counting_macs, observing, set_ranges
from qat.lean.quantizer import Quantizer
from qat.model.quantized import QuantizedModel
from qat.model.runners import to_numpy, torch_feeds, torch_runners
from qat.plan import run

FEW_FRAMES = (
    3  # channels are not equalized on fewer: a channel that is small on one or two frames may be large on the next
)


@dataclass
class CalibrationReport:
    """Calibration's report. macs: multiply-accumulates of all layers and products of activations, for
    one frame, by `part.path`; int8: the layers with INT8 weights that are on; unexcited: quantizers whose tensor was always
    zero."""

    frames: int = 0
    macs: dict[str, int] = field(default_factory=dict)
    int8: list[str] = field(default_factory=list)
    unexcited: list[str] = field(default_factory=list)

    @property
    def int8_share(self) -> float:
        """Share of the multiply-accumulates that are INT8."""
        total = sum(self.macs.values())
        return sum(self.macs[name] for name in self.int8) / total if total else 0.0


def check_frame(frame: Any) -> None:
    """Raises `UserError` for a frame that would spoil the ranges: NaN, or an image of one colour."""
    for name in ("img", "depth"):
        array = getattr(frame, name, None)
        if array is not None and not np.isfinite(array).all():
            raise UserError(f"calibration frame {frame.token}: {name} has NaN or infinity; drop the frame")
    if (img := getattr(frame, "img", None)) is None:
        return
    flat = img.reshape(*img.shape[:2], -1)  # normalisation turns black into three values
    constant = np.flatnonzero((flat.min(2) == flat.max(2)).all(1))
    if len(constant):
        raise UserError(f"calibration frame {frame.token}: camera {constant[0]} is one colour; drop the frame")


def _methods(model: QuantizedModel, method: str, by_layer: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The method of each activation quantizer."""
    names = [name for name, quantizer in model.activation_quantizers().items() if quantizer.shares is None]
    for pattern, other in by_layer:
        if other not in METHODS:
            raise UserError(f"--method-for {pattern}={other}: expected a method of {', '.join(METHODS)}")
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"--method-for {pattern}={other}: no quantizer has such a name; `bevqat inspect` lists them, such as "
                f"{names[0]}"
            )
    return {
        name: next((other for pattern, other in by_layer if fnmatch.fnmatchcase(name, pattern)), method)
        for name in names
    }


def calibrate(
    model: Any,
    frames: Iterable[Any],
    method: str = "mse",
    percentile: float = 99.99,
    progress: Callable[[int], None] | None = None,
    by_layer: Sequence[tuple[str, str]] = (),
    equalize: str | None = INPUTS,
) -> tuple[QuantizedModel, CalibrationReport]:
    """Sets the range of every quantizer from its tensor's values on `frames`.

    Args:
        model: a family's float network, or an already quantized model to calibrate again; equalized tensors stay equalized.
        frames: preprocessed; for a plan with state, whole scenes in time order.
        method: max, percentile, mse or entropy, for activations; weights take each channel's largest magnitude.
        percentile: share of magnitudes inside the range, in percent, for `percentile`.
        progress: called with the number of frames done.
        by_layer: (pattern, method) pairs for quantizers with another method; the pattern (shell style) is matched against
            `part.quantizer`, and the first match counts.
        equalize: where channels are divided by their magnitudes if that pays (`qat.lean.equalize`): INPUTS; INSIDE, after which
            another calibration finds the ranges of what was divided; or None.

    Under torchrun each process passes its own share of the frames, and all end with the same ranges.

    Raises:
        UserError: no frames, a frame with NaN or without content, NaN in an activation (the frame and the quantizer are named).
    """
    if method not in METHODS:
        raise UserError(f"--method: found {method!r}, expected one of {', '.join(METHODS)}")
    quantized = model if isinstance(model, QuantizedModel) else QuantizedModel(model)
    report = CalibrationReport()
    inside = quantized.equalizable(INSIDE)
    divided = [name for name in quantized.equalized if name not in inside]
    choice = _methods(quantized, method, by_layer) | dict.fromkeys(divided, "max")
    error = None
    session, runners = Session(quantized.flow), torch_runners(quantized)
    observed = observing(quantized.parts, quantized.equalizable(equalize) if equalize else None)
    with torch.inference_mode(), observed as calibrators, counting_macs(quantized.parts, report.macs):
        try:
            for frame in frames:
                check_frame(frame)
                try:
                    feeds, _ = session.begin(frame)
                    tensors = run(quantized.plan, runners, torch_feeds(quantized, feeds))
                    session.end(to_numpy(tensors, list(quantized.plan.state)))
                except NotFiniteError as found:
                    raise NotFiniteError(f"frame {frame.token}: {found}") from None
                report.frames += 1
                if progress:
                    progress(report.frames)
            if report.frames == 0:
                raise UserError("calibration: found no frames, expected at least one for each process")
        except UserError as found:
            error = found
    agree(error)
    report.frames = total(report.frames)
    merge_calibrators(calibrators)
    report.unexcited = set_ranges(quantizers(quantized.parts), calibrators, choice, percentile)
    if equalize and report.frames >= FEW_FRAMES:
        _equalize(quantized, calibrators, by_layer, equalize)
    quantized.keep_background()
    report.int8 = int8_layers(quantized)
    return quantized, report


def _equalize(
    model: QuantizedModel,
    calibrators: Mapping[str, HistogramCalibrator],
    by_layer: Sequence[tuple[str, str]],
    kind: str,
) -> None:
    """Equalizes the channels of a kind of place if that pays and no method was set for the quantizer by name.

    Like a weight's, an equalized channel's range is its largest magnitude, whatever the method.
    """
    own, modules = quantizers(model.parts), dict(model.parts.named_modules())
    for name, layers in model.equalizable(kind).items():
        calibrator = calibrators[name]
        assert calibrator.channels is not None and calibrator.squares is not None
        weights = [by_input(modules[path]) for path in layers]
        scales = channel_scales(calibrator.channels, calibrator.squares / calibrator.values, weights, kind)
        if scales is None or name in (pattern for pattern, _ in by_layer):
            continue
        model.equalize(name, scales)
        quantizer = own[name]
        assert isinstance(quantizer, Quantizer)
        quantizer.set_range(torch.tensor(calibrator.largest))


def int8_layers(model: QuantizedModel) -> list[str]:
    """`part.path` of every layer whose weights are INT8 and on."""
    own = quantizers(model.parts)
    named = [f"{part}.{path}" for part, inventory in model.inventory.items() for path in inventory.quantized]
    return [name for name in named if not own[f"{name}.weight_quantizer"]._disabled]
