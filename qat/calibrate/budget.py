"""Mixed precision: the fewest and cheapest units in float that keep the metric's drop within a budget.

The units are ranked by accuracy loss, one at a time. The search finds, by doubling and halving, the fewest units from the top
of that ranking that must stay float; then units return to INT8, the largest first, as long as the budget holds. Each set that
is tried runs over all frames and is scored by the metric: accuracy losses do not add up exactly.
Each set's result on a frame is kept on disk, so an interrupted search resumes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from qat import __version__
from qat.boxes.detections import Detections
from qat.calibrate.sensitivity import Metric, Sensitivity
from qat.core.console import results_console
from qat.core.errors import UserError
from qat.core.files import read_arrays, write_arrays, write_figure
from qat.core.progress import progress_bar
from qat.families.flow import Session
from qat.lean.modes import quantizers
from qat.model.quantized import QuantizedModel
from qat.model.runners import to_numpy, torch_feeds, torch_runners
from qat.model.units import Unit, only_on, units
from qat.plan import run


@dataclass(frozen=True)
class BudgetPoint:
    """One set of units left float: their names, the share of multiply-accumulates that stays INT8, the metric, and its drop
    from the float network's first figure."""

    floats: list[str]
    int8_share: float
    metric: dict[str, float]
    drop: float


@dataclass
class Budget:
    """budget: the allowed drop of the figure `of`. reference: the float network's metric. points: all sets that were tried,
    most INT8 first. chosen: the selected one."""

    budget: float
    of: str
    frames: int
    reference: dict[str, float]
    points: list[BudgetPoint]
    chosen: BudgetPoint

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        return asdict(self)


class _Trials:
    """Runs sets of units over the frames, each set once."""

    def __init__(
        self,
        model: QuantizedModel,
        frames: Sequence[Any],
        metric: Metric,
        shares: Mapping[str, float],
        cache: Path,
        key: str,
    ) -> None:
        self.model, self.frames, self.metric, self.shares = model, frames, metric, shares
        self.cache, self.key = cache, key
        self.every, self.runners = units(model), torch_runners(model)
        self.reference: dict[str, float] = {}
        self.points: dict[frozenset[str], BudgetPoint] = {}
        self.reference = self._score([])
        self.of = next(iter(self.reference))

    def _score(self, on: Sequence[Unit]) -> dict[str, float]:
        named = json.dumps([__version__, self.key, self.model.config, sorted(unit.name for unit in on)], sort_keys=True)
        name = hashlib.sha256(named.encode()).hexdigest()[:16]
        boxes = {}
        with progress_bar(f"set {len(self.points) + 1}: frames", len(self.frames)) as done:
            session = Session(self.model.flow, keyed=True)
            for n, frame in enumerate(self.frames):
                feeds, digest = session.begin(frame)
                path = self.cache / f"{name}-{digest}.npz"
                found = read_arrays(path)
                if not {"boxes", "scores", "labels"} <= found.keys() or not session.restore(found):
                    with torch.inference_mode(), only_on(self.model, on):
                        tensors = to_numpy(run(self.model.plan, self.runners, torch_feeds(self.model, feeds)))
                    session.end(tensors)
                    own = self.model.flow.decode(tensors)
                    found = {**own.arrays(), **session.saved()}
                    write_arrays(path, found)
                boxes[frame.token] = Detections.of(found)
                done(n + 1)
        return dict(self.metric(boxes))

    def point(self, floats: Sequence[str]) -> BudgetPoint:
        """The figures with these units in float."""
        chosen = frozenset(floats)
        if chosen not in self.points:
            on = [unit for unit in self.every if unit.name not in chosen]
            metric = self._score(on)
            share = sum(self.shares[unit.name] for unit in on)
            ordered = [unit.name for unit in self.every if unit.name in chosen]
            drop = self.reference[self.of] - metric[self.of]
            self.points[chosen] = BudgetPoint(ordered, round(share, 6), metric, drop)
        return self.points[chosen]


def check_budget(budget: float) -> None:
    """Raises `UserError` for a negative or missing budget."""
    if not 0 <= budget < math.inf:
        raise UserError(f"--budget: found {budget}, expected 0 or more of mAP, such as 0.001")


def keep_within_budget(
    model: QuantizedModel,
    frames: Sequence[Any],
    budget: float,
    metric: Metric,
    sensitivity: Sensitivity,
    cache: Path,
    key: str,
) -> Budget:
    """Switches units of `model` off until the metric drops by no more than `budget` from the float network's.

    Args:
        model: calibrated; changed in place.
        frames: annotated; enough for the budget's size: on few frames a metric varies more than that by chance.
        budget: of the metric's first figure, such as 0.001 mAP.
        metric: boxes by frame token → figures such as {"map": …, "nds": …}.
        sensitivity: the units of this model, worst first.
        cache: folder for the results of each set.
        key: identifies the calibrated model, so that results of another model are not used.

    Raises:
        UserError: a negative budget, no frames, or a ranking of other units.
    """
    check_budget(budget)
    if not len(frames):
        raise UserError("--budget: found no frames, expected at least one with annotated objects")
    shares = {row.name: row.macs_share for row in sensitivity.units}
    if set(shares) != {unit.name for unit in units(model)}:
        raise ValueError("the ranking is for other units")
    ranking = [row.name for row in sensitivity.units]
    trials = _Trials(model, frames, metric, shares, cache, key)

    def holds(floats: Sequence[str]) -> bool:
        return trials.point(floats).drop <= budget

    fails, count = -1, 0
    while not holds(ranking[:count]):  # ends: with all of them in float the drop is 0
        fails, count = count, min(len(ranking), max(1, 2 * count))
    while count - fails > 1:
        middle = (count + fails) // 2
        fails, count = (fails, middle) if holds(ranking[:middle]) else (middle, count)
    floats = ranking[:count]
    # The last unit is needed: without it the search continued.
    for name in sorted(floats[:-1], key=lambda unit: -shares[unit]):
        fewer = [other for other in floats if other != name]
        if holds(fewer):
            floats = fewer
    chosen = trials.point(floats)
    own = quantizers(model.parts)
    for unit in trials.every:
        if unit.name in chosen.floats:
            for name in unit.quantizers:
                own[name].off = own[name]._disabled = True
    points = sorted(trials.points.values(), key=lambda point: -point.int8_share)
    return Budget(budget, trials.of, len(frames), trials.reference, points, chosen)


def print_budget(found: Budget) -> None:
    """Prints the trade-off curve, and the units that stay float."""
    names = list(found.reference)
    table = Table(title=f"float for accuracy, over {found.frames} frames", title_justify="left")
    for heading in ("units in float", "MACs in INT8", *(f"Δ {name}" for name in names), ""):
        table.add_column(heading, justify="right")
    for point in found.points:
        changes = [f"{point.metric[name] - found.reference[name]:+.4f}" for name in names]
        mark = "chosen" if point is found.chosen else "" if point.drop <= found.budget else "over"
        table.add_row(str(len(point.floats)), f"{point.int8_share:.1%}", *changes, mark)
    console = results_console()
    console.print(table)
    if not found.chosen.floats:
        console.print(
            f"all units within a drop of {found.budget:g} {found.of}: nothing has to stay float", highlight=False
        )
    for name in found.chosen.floats:
        console.print(f"float: {name} (the budget of {found.budget:g} {found.of})", highlight=False)


def draw_budget(found: Budget, path: Path) -> None:
    """Writes a PNG: the drop against the INT8 share of multiply-accumulates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    shares = [100 * point.int8_share for point in found.points]
    axes.plot(shares, [point.drop for point in found.points], "o", color="#4477aa", label="sets tried")
    axes.plot([100 * found.chosen.int8_share], [found.chosen.drop], "o", color="#228833", ms=10, label="chosen")
    axes.axhline(found.budget, color="#cc3311", lw=1, label=f"budget {found.budget:g}")
    axes.set(xlabel="multiply-accumulates in INT8, %", ylabel=f"drop of {found.of}")
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(path, figure)
