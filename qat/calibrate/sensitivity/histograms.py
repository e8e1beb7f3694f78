"""Histograms of the inputs of units' activation quantizers, with the chosen ranges."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qat import __version__
from qat.calibrate.sensitivity.reasons import range_method
from qat.calibrate.sensitivity.result import ActivationHistogram
from qat.calibrate.sensitivity.tensors import float_tensors
from qat.core.files import read_arrays, write_arrays
from qat.core.progress import progress_bar
from qat.families.flow import Session
from qat.lean.calibrators import HistogramCalibrator
from qat.lean.modes import quantizers
from qat.lean.quantizer import BOUND
from qat.model.quantized import QuantizedModel
from qat.model.runners import to_numpy, torch_runners
from qat.model.units import Unit

SHOWN_BINS = 80  # most bins of a histogram
_TALLY = ("values", "zeros", "to_zero", "clipped")


class _Tally:
    """The histogram of one unit's activations, and how many of them are rounded to 0 or clipped; exact, whatever the order of
    the frames."""

    def __init__(self, name: str, amax: float) -> None:
        self.histogram = HistogramCalibrator(name)
        self.step = amax / BOUND
        self.counts = dict.fromkeys(_TALLY, 0)

    def see(self, x: torch.Tensor) -> None:
        """Adds the quantizer's input, of any shape."""
        self.histogram.collect(x)
        magnitude = x.detach().abs()
        zeros = int((magnitude == 0).sum())
        # Levels are −128 to 127; a half rounds to the even level.
        beyond = (x > (BOUND + 0.5) * self.step).sum() + (x < -(BOUND + 1.5) * self.step).sum()
        seen = x.numel(), zeros, int((magnitude <= self.step / 2).sum()) - zeros, int(beyond)
        for name, count in zip(_TALLY, seen, strict=True):
            self.counts[name] += count

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """For a file."""
        own = self.histogram
        assert own.counts is not None
        return {
            f"{prefix}.counts": own.counts.long().cpu().numpy(),
            f"{prefix}.range": np.array([own.log2_range, own.largest]),
            f"{prefix}.tally": np.array(list(self.counts.values()), np.int64),
        }

    def add(self, arrays: Mapping[str, np.ndarray], prefix: str) -> None:
        """Adds the result of `arrays` of another frame."""
        other = HistogramCalibrator(self.histogram.name)
        other.counts = torch.from_numpy(arrays[f"{prefix}.counts"]).double()
        log2_range, other.largest = arrays[f"{prefix}.range"].tolist()
        other.log2_range = int(log2_range)
        self.histogram.merge(other)
        for name, count in zip(_TALLY, arrays[f"{prefix}.tally"].tolist(), strict=True):
            self.counts[name] += count

    def compact(self) -> tuple[float, list[int]]:
        """Width and counts of at most SHOWN_BINS bins, up to the last one that is not empty."""
        counts = self.histogram.counts
        filled = counts.nonzero() if counts is not None else torch.zeros(0)
        if counts is None or not len(filled):
            return self.step * BOUND, [0]
        last = int(filled.max()) + 1
        merged = -(-last // SHOWN_BINS)
        padded = torch.nn.functional.pad(counts[:last], (0, -last % merged))
        width = 2.0**self.histogram.log2_range / len(counts) * merged
        return width, [int(count) for count in padded.view(-1, merged).sum(1)]


def measure_histograms(
    model: QuantizedModel,
    frames: Sequence[Any],
    cache: Path,
    key: str,
    chosen: Sequence[Unit],
    recipe: Mapping[str, Any],
) -> list[ActivationHistogram]:
    """Histograms of these units' activations in the float network, with the chosen ranges.

    Args:
        cache, key: as in `measure_sensitivity`; a frame that is in the cache is not run again.
        recipe: the checkpoint's, for the method of each range.

    Raises:
        UserError: a frame's values are not finite.
    """
    own = quantizers(model.parts)
    ranges = [float(own[unit.quantizers[0]].range) for unit in chosen]
    named = [__version__, key, model.config, [[unit.name, amax] for unit, amax in zip(chosen, ranges, strict=True)]]
    name = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]
    session = Session(model.flow, keyed=True)
    totals = [_Tally(unit.name, amax) for unit, amax in zip(chosen, ranges, strict=True)]
    with progress_bar("histograms: frames", len(frames)) as done:
        for index, frame in enumerate(frames):
            feeds, digest = session.begin(frame)
            path = cache / f"{name}-{digest}.npz"
            found = read_arrays(path)
            if len(found) != 3 * len(chosen) + len(model.plan.state) or not session.restore(found):
                tallies = [_Tally(unit.name, amax) for unit, amax in zip(chosen, ranges, strict=True)]
                seen = {unit.quantizers[0]: tally for unit, tally in zip(chosen, tallies, strict=True)}
                session.end(_see_inputs(model, feeds, seen))
                found = session.saved()
                for n, tally in enumerate(tallies):
                    found |= tally.arrays(str(n))
                write_arrays(path, found)
            for n, tally in enumerate(totals):
                tally.add(found, str(n))
            done(index + 1)
    result = []
    for unit, amax, tally in zip(chosen, ranges, totals, strict=True):
        counted = tally.counts
        width, counts = tally.compact()
        result.append(
            ActivationHistogram(
                unit=unit.name,
                layers=list(unit.layers),
                method=range_method(unit.name, recipe),
                amax=amax,
                largest=tally.histogram.largest,
                values=counted["values"],
                zeros=counted["zeros"] / max(counted["values"], 1),
                to_zero=counted["to_zero"] / max(counted["values"], 1),
                clipped=counted["clipped"] / max(counted["values"], 1),
                bin_width=width,
                counts=counts,
            )
        )
    return result


def _see_inputs(
    model: QuantizedModel, feeds: Mapping[str, np.ndarray], tallies: Mapping[str, _Tally]
) -> dict[str, np.ndarray]:
    """Runs the float network on a frame and tallies each quantizer's input. Returns the tensors."""

    def watch(tally: _Tally) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, inputs: tally.see(inputs[0])

    own = quantizers(model.parts)
    handles = [own[name].register_forward_pre_hook(watch(tally)) for name, tally in tallies.items()]
    try:
        with torch.inference_mode():
            return to_numpy(float_tensors(model, torch_runners(model), feeds))
    finally:
        for handle in handles:
            handle.remove()
