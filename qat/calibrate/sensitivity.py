"""Where accuracy goes: the damage that each quantized unit does alone.

The float network's tensors between the parts are kept for a frame, so a unit of the head costs a pass through the head,
not through the camera part. What a frame gave is kept on disk: an interrupted run goes on with the next frame.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from qat import __version__
from qat.calibrate.ptq import check_frame, counting_macs
from qat.core.centerhead import Detections
from qat.core.config import is_camera_branch, need_boxes
from qat.core.console import results_console
from qat.core.errors import UserError
from qat.core.files import read_arrays, write_arrays, write_figure
from qat.core.frame import Frame
from qat.core.progress import progress_bar
from qat.core.tensors import decibels, frame_digest
from qat.lean import QuantizedDetector
from qat.lean.modes import quantizers_off
from qat.lean.units import Unit, only_on, units
from qat.models.run import boxes_of, frame_tensors

# The decoder's map; all of the head's maps together; and these in the cells where the float network sees an object. A
# camera branch alone has the first, which is then what its downsampling gives.
TENSORS = ("bev", "heads", "objects")
HEADINGS = {"bev": "SQNR BEV", "heads": "SQNR heads", "objects": "at objects"}
HOT = 0.1  # heat above which a cell is an object's
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


@dataclass
class Sensitivity:
    """units: the most harmful first. together: with all units on. reference: the float network's metric."""

    frames: int
    units: list[UnitDamage]
    together: UnitDamage
    reference: dict[str, float] | None

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        return asdict(self)


def tensors_of(model: QuantizedDetector) -> tuple[str, ...]:
    """Those of `TENSORS` that a detector has."""
    return TENSORS[:1] if is_camera_branch(model.config) else TENSORS


class _FloatTensors:
    """What the float network has between its parts on one frame, and any part's continuation from there."""

    def __init__(self, model: QuantizedDetector, frame: Frame, macs: dict[str, int] | None = None) -> None:
        self.model = model
        self.img, self.depth, self.patterns = frame_tensors(model, frame)
        with quantizers_off(model), nullcontext() if macs is None else counting_macs(model, macs):
            self.pooled = model.pool(*model.lift(self.img, self.depth), self.patterns)
            self.lowered = model.downsample(self.pooled)
            self.bev, self.maps = self._behind(self.lowered)

    def _behind(self, lowered: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        """The BEV features and head maps from what the view transform gives; of a camera branch, that and no maps."""
        if is_camera_branch(self.model.config):
            return lowered, []
        bev = self.model.decode_bev(lowered)
        return bev, self.model.head(bev)

    def run(self, part: str) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        """The BEV features and head maps when everything up to `part` was float."""
        model = self.model
        if part == "head":
            return self.bev, model.head(self.bev)
        if part == "decoder":
            lowered = self.lowered
        elif part == "vtransform":
            lowered = model.downsample(self.pooled)
        else:
            lowered = model.downsample(model.pool(*model.lift(self.img, self.depth), self.patterns))
        return self._behind(lowered)


def _flat(maps: Sequence[Mapping[str, torch.Tensor]]) -> np.ndarray:
    if not maps:
        return np.zeros(0)
    return torch.cat([value.flatten() for task in maps for value in task.values()]).double().cpu().numpy()


def _objects(maps: Sequence[Mapping[str, torch.Tensor]]) -> np.ndarray:
    """Which values of `_flat` lie in a cell whose heat, of any class, is over HOT."""
    hot = [(task["heatmap"].sigmoid().amax(1, keepdim=True) > HOT, task) for task in maps]
    return torch.cat([cells.expand_as(value).flatten() for cells, task in hot for value in task.values()]).cpu().numpy()


def _energy(reference: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    noise = reference - found
    return float(reference @ reference), float(noise @ noise)


def _one_frame(
    model: QuantizedDetector,
    frame: Frame,
    every: Sequence[Unit],
    with_boxes: bool,
    progress: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Arrays of one frame: energies [units + 1, tensors, 2] (the last row with all units on), and, if asked, boxes of
    each row and, last, of the float network."""
    found: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        tensors = _FloatTensors(model, frame)
        bev, maps = tensors.bev.double().flatten().cpu().numpy(), _flat(tensors.maps)
        if not (np.isfinite(bev).all() and np.isfinite(maps).all()):
            raise UserError(f"frame {frame.token}: the float network gives values that are not finite")
        objects = _objects(tensors.maps) if tensors.maps else None
        rows = [([unit], unit.part) for unit in every] + [(list(every), "camera")]
        energies = np.zeros((len(rows), len(tensors_of(model)), 2))
        boxes = []
        for n, (chosen, part) in enumerate(rows):
            with only_on(model, chosen):
                own_bev, own_maps = tensors.run(part)
            energies[n, 0] = _energy(bev, own_bev.double().flatten().cpu().numpy())
            if objects is not None:
                found_maps = _flat(own_maps)
                energies[n, 1] = _energy(maps, found_maps)
                energies[n, 2] = _energy(maps[objects], found_maps[objects])
            if with_boxes:
                boxes.append(boxes_of(own_maps, model.config))
            progress(n + 1)
        found["energies"] = energies
        if with_boxes:
            for n, detections in enumerate([*boxes, boxes_of(tensors.maps, model.config)]):
                found[f"boxes{n}"], found[f"scores{n}"], found[f"labels{n}"] = (
                    detections.boxes,
                    detections.scores,
                    detections.labels,
                )
    return found


def measure_sensitivity(
    model: QuantizedDetector,
    frames: Sequence[Frame],
    cache: Path,
    key: str,
    metric: Metric | None = None,
) -> Sensitivity:
    """Runs every unit alone on every frame.

    Args:
        model: calibrated.
        cache: folder for what each frame gave.
        key: of the checkpoint, so that another one's results are not taken for this one's.
        metric: boxes by frame token → figures such as {"map": …, "nds": …}.

    Raises:
        UserError: no frames, nothing quantized, a frame with NaN, or a metric asked of a camera branch alone.
    """
    if metric is not None:
        need_boxes(model.config, "--metric map", "give --metric sqnr, which judges the BEV features")
    tensors = tensors_of(model)
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
    with progress_bar("units × frames", len(frames) * rows_each) as done:
        for index, frame in enumerate(frames):
            before = index * rows_each

            def row_done(row: int, before: int = before) -> None:
                done(before + row)

            check_frame(frame)
            if not macs:
                with torch.inference_mode():
                    _FloatTensors(model, frame, macs)
            path = cache / f"{name}-{frame_digest(frame)}.npz"
            found = read_arrays(path)
            if found.get("energies", np.empty(0)).shape != energies.shape or (
                metric is not None and "boxes0" not in found
            ):
                found = _one_frame(model, frame, every, metric is not None, row_done)
                write_arrays(path, found)
            done(before + rows_each)
            energies += found["energies"]
            if metric is not None:
                for n, own in enumerate(boxes):
                    own[frame.token] = Detections(found[f"boxes{n}"], found[f"scores{n}"], found[f"labels{n}"])
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

    return Sensitivity(len(frames), sorted(alone, key=harm), together, reference)


def print_sensitivity(found: Sensitivity, most: int = 30) -> None:
    """Prints the most harmful units, and all of them together."""
    table = Table(title=f"damage of each quantized unit alone, over {found.frames} frames", title_justify="left")
    names = list(found.reference or {})
    tensors = list(found.together.sqnr_db)
    for heading in (
        "unit",
        "layers",
        "MACs",
        *(HEADINGS[tensor] for tensor in tensors),
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
    where = {"bev": "the BEV features", "objects": "the head maps where objects are"}[judged]
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
