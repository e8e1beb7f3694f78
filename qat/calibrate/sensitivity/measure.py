"""Runs every unit alone on every frame.

The float network's tensors between the parts are kept for a frame, so a unit of the head costs a pass through the head,
not through the camera part. Each frame's results are kept on disk: an interrupted run resumes with the next frame.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qat import __version__
from qat.boxes.detections import Detections
from qat.calibrate.ptq import check_frame
from qat.calibrate.sensitivity.histograms import measure_histograms
from qat.calibrate.sensitivity.reasons import kept_in_float
from qat.calibrate.sensitivity.result import Metric, Sensitivity, UnitDamage, tensors_of
from qat.calibrate.sensitivity.tensors import boxes_of, energy, float_tensors, judged, objects_of
from qat.core.errors import NotFiniteError, UserError
from qat.core.files import read_arrays, write_arrays
from qat.core.progress import progress_bar
from qat.core.tensors import decibels
from qat.families.flow import Session
from qat.model.quantized import QuantizedModel
from qat.model.runners import to_numpy, torch_runners
from qat.model.units import Unit, only_on, units
from qat.plan import run

ALL = "all of them"


def _one_frame(
    model: QuantizedModel,
    frame: Any,
    session: Session,
    feeds: Mapping[str, np.ndarray],
    every: Sequence[Unit],
    with_boxes: bool,
    progress: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Arrays of one frame: energies [units + 1, tensors, 2] (the last row with all units on), the float network's state, and,
    if requested, boxes of each row and, last, of the float network.

    Everything before a unit's part comes from the float network, including the state: a unit's loss covers only this frame.
    """
    plan, runners = model.plan, torch_runners(model)
    with torch.inference_mode():
        tensors = float_tensors(model, runners, feeds)
        expected = judged(plan, tensors)
        for label, values in expected.items():
            if not np.isfinite(values).all():
                raise NotFiniteError(f"frame {frame.token}: {label}: the float network's values are not finite")
        objects = objects_of(model, tensors)
        rows = [([unit], plan.scopes[unit.part]) for unit in every] + [(list(every), plan.steps[0].name)]
        energies = np.zeros((len(rows), len(tensors_of(plan)), 2))
        boxes = []
        for n, (chosen, part) in enumerate(rows):
            with only_on(model, chosen):
                own = run(plan, runners, tensors, start=part)
            found = judged(plan, own)
            for t, label in enumerate(plan.judged):
                energies[n, t] = energy(expected[label], found[label])
            if objects is not None:
                energies[n, -1] = energy(expected[label][objects], found[label][objects])
            if with_boxes:
                boxes.append(boxes_of(model, own))
            progress(n + 1)
        session.end(to_numpy(tensors, list(plan.state)))
        arrays = {"energies": energies, **session.saved()}
        if with_boxes:
            for n, detections in enumerate([*boxes, boxes_of(model, tensors)]):
                arrays |= detections.arrays(str(n))
    return arrays


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
        cache: folder for the results of each frame.
        key: identifies the checkpoint, so that results of another checkpoint are not used.
        metric: boxes by frame token → figures such as {"map": …, "nds": …}.
        recipe: the checkpoint's, for the reasons why layers stay float and the methods that chose the ranges.
        worst: number of units, worst first, to also record activation histograms of.

    Raises:
        UserError: no frames, nothing quantized, a frame with NaN, or a metric for a camera branch.
    """
    if worst < 0:
        raise UserError(f"--histograms: found {worst}, expected 0 or more")
    if metric is not None:
        model.flow.need_boxes("--metric map", "use --metric sqnr, which judges the BEV features")
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
                    float_tensors(model, torch_runners(model), feeds, macs)
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
