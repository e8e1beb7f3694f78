"""Where accuracy goes: the damage that each quantized unit does alone.

The float network's tensors between the parts are kept for a frame, so a unit of the head costs a pass through the head,
not through the camera part. What a frame gave is kept on disk: an interrupted run goes on with the next frame.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from qat import __version__
from qat.boxes.detections import Detections
from qat.calibrate.ptq import check_frame
from qat.core.console import results_console
from qat.core.errors import NotFiniteError, UserError
from qat.core.files import read_arrays, read_json, sha256, write_arrays, write_figure, write_json
from qat.core.progress import progress_bar
from qat.core.provenance import made_by
from qat.core.tensors import decibels
from qat.families.flow import Session
from qat.lean.calibrators import HistogramCalibrator
from qat.lean.modes import quantizers, quantizers_off
from qat.lean.observe import counting_macs
from qat.lean.quantizer import BOUND
from qat.model.quantized import QuantizedModel
from qat.model.runners import to_numpy, torch_feeds, torch_runners
from qat.model.units import Unit, only_on, units
from qat.plan import Plan, Runner, run

OBJECTS = "objects"  # the values of the last label in the cells where the float network sees an object
HEADINGS = {"bev": "SQNR BEV", "heads": "SQNR heads", OBJECTS: "at objects"}
FORMAT, SCHEMA = "bevqat-sensitivity", 1
WORST = 8  # units whose activations the command takes histograms of
SHOWN_BINS = 80  # of a histogram, at most
ALL = "all of them"
Metric = Callable[[Mapping[str, Detections]], Mapping[str, float]]


@dataclass(frozen=True)
class UnitDamage:
    """What one unit does alone.

    layers: with INT8 weights. macs_share: theirs, of all multiply-accumulates. sqnr_db: at each of `tensors_of`, against
    float; 200 where nothing changed, or no object was seen. metric: with this unit alone in INT8, and drop: what it lost of float's; None without a metric.
    """

    name: str
    layers: list[str]
    macs_share: float
    sqnr_db: dict[str, float]
    metric: dict[str, float] | None = None
    drop: dict[str, float] | None = None


@dataclass(frozen=True)
class FloatLayers:
    """Layers of a part that stay float for one reason, the rule that says so, and their share of the multiply-accumulates."""

    part: str
    rule: str
    reason: str
    layers: list[str]
    macs_share: float


@dataclass(frozen=True)
class ActivationHistogram:
    """|x| at a unit's activation quantizer in the float network, over all frames.

    method: that chose the range. amax: the magnitude that 127 stands for. largest: of all magnitudes. values: how many were
    seen; of them the shares zeros (exactly 0), to_zero (rounded to 0, and were not) and clipped (beyond the last level).
    counts: of bins of `bin_width` from 0 up, zeros left out; they end with `largest`.
    """

    unit: str
    layers: list[str]
    method: str
    amax: float
    largest: float
    values: int
    zeros: float
    to_zero: float
    clipped: float
    bin_width: float
    counts: list[int]


@dataclass
class Sensitivity:
    """units: the most harmful first. together: with all units on. reference: the float network's metric. floats: what stays
    float, the largest share of the multiply-accumulates first. histograms: of the most harmful units, where asked for."""

    frames: int
    units: list[UnitDamage]
    together: UnitDamage
    reference: dict[str, float] | None
    floats: list[FloatLayers] = field(default_factory=list)
    histograms: list[ActivationHistogram] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        return asdict(self)


def tensors_of(plan: Plan) -> tuple[str, ...]:
    """What is judged of a plan: its labels, and of one with boxes also the last one's values at objects."""
    return (*plan.judged, *([OBJECTS] if plan.boxes else ()))


def _float_tensors(
    model: QuantizedModel,
    runners: Mapping[str, Runner],
    feeds: Mapping[str, np.ndarray],
    macs: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Every tensor of the plan in the float network."""
    with quantizers_off(model), nullcontext() if macs is None else counting_macs(model.parts, macs):
        return run(model.plan, runners, torch_feeds(model, feeds))


def _judged(plan: Plan, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """For each label, all its tensors in one row, float64."""
    return {
        label: torch.cat([tensors[name].flatten() for name in names]).double().cpu().numpy()
        for label, names in plan.judged.items()
    }


def _energy(reference: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    noise = reference - found
    return float(reference @ reference), float(noise @ noise)


def _boxes(model: QuantizedModel, tensors: Mapping[str, Any]) -> Detections:
    return model.flow.decode(to_numpy(tensors, model.plan.outputs))


def _one_frame(
    model: QuantizedModel,
    frame: Any,
    session: Session,
    feeds: Mapping[str, np.ndarray],
    every: Sequence[Unit],
    with_boxes: bool,
    progress: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Arrays of one frame: energies [units + 1, tensors, 2] (the last row with all units on), the float network's state, and, if
    asked, boxes of each row and, last, of the float network.

    Everything before a unit's part is the float network's, the state too: a unit is charged with its own frame alone.
    """
    plan, runners = model.plan, torch_runners(model)
    with torch.inference_mode():
        tensors = _float_tensors(model, runners, feeds)
        expected = _judged(plan, tensors)
        for label, values in expected.items():
            if not np.isfinite(values).all():
                raise NotFiniteError(
                    f"frame {frame.token}: {label}: the float network gives values that are not finite"
                )
        objects = _objects(model, tensors)
        rows = [([unit], plan.scopes[unit.part]) for unit in every] + [(list(every), plan.steps[0].name)]
        energies = np.zeros((len(rows), len(tensors_of(plan)), 2))
        boxes = []
        for n, (chosen, part) in enumerate(rows):
            with only_on(model, chosen):
                own = run(plan, runners, tensors, start=part)
            found = _judged(plan, own)
            for t, label in enumerate(plan.judged):
                energies[n, t] = _energy(expected[label], found[label])
            if objects is not None:
                energies[n, -1] = _energy(expected[label][objects], found[label][objects])
            if with_boxes:
                boxes.append(_boxes(model, own))
            progress(n + 1)
        session.end(to_numpy(tensors, list(plan.state)))
        arrays = {"energies": energies, **session.saved()}
        if with_boxes:
            for n, detections in enumerate([*boxes, _boxes(model, tensors)]):
                arrays |= detections.arrays(str(n))
    return arrays


def _objects(model: QuantizedModel, tensors: Mapping[str, Any]) -> np.ndarray | None:
    """Which values of the last label's row belong to objects; None where there are no boxes."""
    names = list(model.plan.judged.values())[-1]
    masks = model.flow.objects(to_numpy(tensors, names)) if model.plan.boxes else None
    return None if masks is None else np.concatenate([masks[name].ravel() for name in names])


def measure_sensitivity(
    model: QuantizedModel,
    frames: Sequence[Any],
    cache: Path,
    key: str,
    metric: Metric | None = None,
    recipe: Mapping[str, Any] | None = None,
    worst: int = 0,
) -> Sensitivity:
    """Runs every unit alone on every frame.

    Args:
        model: calibrated.
        cache: folder for what each frame gave.
        key: of the checkpoint, so that another one's results are not taken for this one's.
        metric: boxes by frame token → figures such as {"map": …, "nds": …}.
        recipe: the checkpoint's, for the reasons why layers stay float and the methods that chose the ranges.
        worst: of how many units, the most harmful first, to take histograms of the activations too.

    Raises:
        UserError: no frames, nothing quantized, a frame with NaN, or a metric asked of a camera branch alone.
    """
    if worst < 0:
        raise UserError(f"--histograms: found {worst}, expected 0 or more")
    if metric is not None:
        model.flow.need_boxes("--metric map", "give --metric sqnr, which judges the BEV features")
    tensors = tensors_of(model.plan)
    every = units(model)
    if not every:
        raise UserError("sensitivity: found no quantizer that is on, expected a calibrated detector")
    if not len(frames):
        raise UserError("sensitivity: found no frames, expected at least one")
    name = hashlib.sha256(
        json.dumps([__version__, key, model.config, [u.name for u in every]], sort_keys=True).encode()
    ).hexdigest()[:16]
    energies = np.zeros((len(every) + 1, len(tensors), 2))
    boxes: list[dict[str, Detections]] = [{} for _ in range(len(every) + 2)]
    macs: dict[str, int] = {}
    rows_each = len(every) + 1
    session = Session(model.flow, keyed=True)
    with progress_bar("units × frames", len(frames) * rows_each) as done:
        for index, frame in enumerate(frames):
            before = index * rows_each

            def row_done(row: int, before: int = before) -> None:
                done(before + row)

            check_frame(frame)
            feeds, digest = session.begin(frame)
            if not macs:
                with torch.inference_mode():
                    _float_tensors(model, torch_runners(model), feeds, macs)
            path = cache / f"{name}-{digest}.npz"
            found = read_arrays(path)
            if (
                found.get("energies", np.empty(0)).shape != energies.shape
                or (metric is not None and "boxes0" not in found)
                or not session.restore(found)
            ):
                found = _one_frame(model, frame, session, feeds, every, metric is not None, row_done)
                write_arrays(path, found)
            done(before + rows_each)
            energies += found["energies"]
            if metric is not None:
                for n, own in enumerate(boxes):
                    own[frame.token] = Detections.of(found, str(n))
    reference = dict(metric(boxes[-1])) if metric is not None else None
    total = sum(macs.values())
    rows = []
    for n, (title, layers) in enumerate(
        [*((u.name, u.layers) for u in every), (ALL, [x for u in every for x in u.layers])]
    ):
        figures = dict(metric(boxes[n])) if metric is not None else None
        drop = {k: reference[k] - v for k, v in figures.items()} if figures is not None and reference else None
        sqnr = {tensor: round(decibels(*energies[n, t]), 2) for t, tensor in enumerate(tensors)}
        share = sum(macs[layer] for layer in layers) / total
        rows.append(UnitDamage(title, list(layers), round(share, 6), sqnr, figures, drop))
    *alone, together = rows

    def harm(row: UnitDamage) -> tuple[float, ...]:
        drop = -next(iter(row.drop.values())) if row.drop else 0.0
        return drop, *(row.sqnr_db[tensor] for tensor in reversed(tensors[1:] or tensors))

    alone.sort(key=harm)
    by_name = {unit.name: unit for unit in every}
    chosen = [by_name[row.name] for row in alone[:worst]]
    histograms = measure_histograms(model, frames, cache, key, chosen, recipe or {}) if chosen else []
    return Sensitivity(len(frames), alone, together, reference, kept_in_float(model, macs, recipe or {}), histograms)


def kept_in_float(model: QuantizedModel, macs: Mapping[str, int], recipe: Mapping[str, Any]) -> list[FloatLayers]:
    """What stays float and why, the largest share of the multiply-accumulates first.

    Args:
        macs: of every weighted layer, as `counting_macs` notes them.
        recipe: of the checkpoint: whether a budget or another tool switched layers off.
    """
    if budget := recipe.get("budget"):
        off = "budget", f"INT8 costs more {budget['of']} than the budget of {budget['drop']:g} allows"
    elif recipe.get("method") == "imported":
        off = "imported", "the tool that quantized the network left it float"
    else:
        off = "off", "switched off in the checkpoint"
    groups: dict[tuple[str, str, str], list[str]] = {}
    own = quantizers(model.parts)
    for part, inventory in model.inventory.items():
        if part in model.parts_off:
            reason = model.family.recipe(model.config).off_reason or "the part is float as a whole"
            groups[part, "parts_off", reason] = [name for name in macs if name.startswith(f"{part}.")]
            continue
        for name, kept in inventory.kept.items():
            if kept.flavours and model.flavour not in kept.flavours:
                continue
            groups.setdefault((part, kept.rule, kept.reason), []).append(f"{part}.{name}")
        for path in inventory.quantized:
            if own[f"{part}.{path}.weight_quantizer"].off:
                groups.setdefault((part, *off), []).append(f"{part}.{path}")
    total = sum(macs.values())
    found = [
        FloatLayers(*group, layers, round(sum(macs.get(layer, 0) for layer in layers) / total, 6))
        for group, layers in groups.items()
        if layers  # a view transform that does not downsample has none
    ]
    return sorted(found, key=lambda group: -group.macs_share)


def range_method(quantizer: str, recipe: Mapping[str, Any]) -> str:
    """The method by which calibration chose the range of `part.quantizer`, in words; "unknown" where the recipe does not say."""
    if recipe.get("finetune", {}).get("learn_ranges"):
        return "learned"
    if quantizer in recipe.get("equalized", ()):
        return "max, channels equalized"
    method = next(
        (other for pattern, other in recipe.get("by_layer", ()) if fnmatch.fnmatchcase(quantizer, pattern)),
        recipe.get("default_method", recipe.get("method", "unknown")),
    )
    return (
        f"percentile {recipe['percentile']:g}" if method == "percentile" and recipe.get("percentile") else str(method)
    )


_TALLY = ("values", "zeros", "to_zero", "clipped")


class _Tally:
    """The histogram of one unit's activations, and how many of them rounding makes 0 or clips; exact, whatever the order of
    the frames."""

    def __init__(self, name: str, amax: float) -> None:
        self.histogram = HistogramCalibrator(name)
        self.step = amax / BOUND
        self.counts = dict.fromkeys(_TALLY, 0)

    def see(self, x: torch.Tensor) -> None:
        """Adds the tensor that the quantizer is given, of any shape."""
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
        """Adds what `arrays` gave of another frame."""
        other = HistogramCalibrator(self.histogram.name)
        other.counts = torch.from_numpy(arrays[f"{prefix}.counts"]).double()
        log2_range, other.largest = arrays[f"{prefix}.range"].tolist()
        other.log2_range = int(log2_range)
        self.histogram.merge(other)
        for name, count in zip(_TALLY, arrays[f"{prefix}.tally"].tolist(), strict=True):
            self.counts[name] += count

    def compact(self) -> tuple[float, list[int]]:
        """Width and counts of at most SHOWN_BINS bins, which end with the last that is not empty."""
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
    """The activations of these units in the float network, beside the range that was chosen for them.

    Args:
        cache, key: as for `measure_sensitivity`; a frame that is there already is not run again.
        recipe: the checkpoint's, for the method of each range.

    Raises:
        UserError: a frame gives values that are not finite.
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
    """Runs the float network on a frame; each quantizer's tally sees what it is given. Returns the tensors."""

    def watch(tally: _Tally) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, inputs: tally.see(inputs[0])

    own = quantizers(model.parts)
    handles = [own[name].register_forward_pre_hook(watch(tally)) for name, tally in tallies.items()]
    try:
        with torch.inference_mode():
            return to_numpy(_float_tensors(model, torch_runners(model), feeds))
    finally:
        for handle in handles:
            handle.remove()


def write_sensitivity(path: str | Path, found: Sensitivity, checkpoint: str | Path, dataset: Mapping[str, Any]) -> None:
    """Writes sensitivity.json, whole or not at all: `found` and what it is of.

    Args:
        checkpoint: the PTQ checkpoint that was measured. dataset: {"name", "version", "split"} of the frames.
    """
    head = {
        "format": FORMAT,
        "schema": SCHEMA,
        "checkpoint": {"file": Path(checkpoint).name, "sha256": sha256(checkpoint)},
        "dataset": dict(dataset),
        **made_by(),
    }
    write_json(path, {**head, **found.to_json()})


def load_sensitivity(path: str | Path, checkpoint: str | Path) -> dict[str, Any]:
    """A sensitivity.json's content, of this PTQ checkpoint.

    Raises:
        UserError: the file cannot be read, is none of `write_sensitivity`, or is of another checkpoint.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(
            f"{path}: not a sensitivity of format {FORMAT!r}; write it with `bevqat sensitivity {checkpoint}`"
        )
    if found.get("schema") != SCHEMA:
        raise UserError(f"{path}: found schema {found.get('schema')!r}, expected {SCHEMA}; run sensitivity again")
    source, expected = found.get("checkpoint"), sha256(checkpoint)
    measured = source.get("sha256") if isinstance(source, dict) else None
    if measured != expected:
        raise UserError(
            f"{path}: measured on a checkpoint with sha256 {str(measured)[:12]}…, {checkpoint} has {expected[:12]}…; run "
            f"`bevqat sensitivity {checkpoint}` again"
        )
    return found


def print_sensitivity(found: Sensitivity, most: int = 30) -> None:
    """Prints the most harmful units, and all of them together."""
    table = Table(title=f"damage of each quantized unit alone, over {found.frames} frames", title_justify="left")
    names = list(found.reference or {})
    tensors = list(found.together.sqnr_db)
    for heading in (
        "unit",
        "layers",
        "MACs",
        *(HEADINGS.get(tensor, f"SQNR {tensor}") for tensor in tensors),
        *(f"Δ {name}" for name in names),
    ):
        table.add_column(heading, justify="left" if heading == "unit" else "right", overflow="fold")
    for row in [*found.units[:most], found.together]:
        drops = [f"{-row.drop[name]:+.4f}" for name in names] if row.drop else []
        sqnr = [f"{row.sqnr_db[t]:.1f} dB" for t in tensors]
        table.add_row(row.name, str(len(row.layers)), f"{row.macs_share:.1%}", *sqnr, *drops)
    results_console(140).print(table)
    if len(found.units) > most:
        print(f"and {len(found.units) - most} more, which do less")


def draw_sensitivity(found: Sensitivity, path: Path, most: int = 40) -> None:
    """Writes a PNG: noise at the head maps where objects are, in dB below the signal, of the most harmful units; of a
    camera branch alone, noise at the BEV features."""
    from matplotlib.figure import Figure

    judged = list(found.together.sqnr_db)[-1]
    where = {"bev": "the BEV features", OBJECTS: "the head maps where objects are"}.get(judged, judged)
    rows = sorted(found.units, key=lambda row: row.sqnr_db[judged])[:most][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh([row.name for row in rows], [row.sqnr_db[judged] for row in rows], color="#4477aa")
    axes.axvline(found.together.sqnr_db[judged], color="#cc3311", label="all units on")
    axes.set(xlabel=f"SQNR at {where}, dB (lower does more harm)")
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    axes.legend(loc="lower right")
    write_figure(path, figure)
