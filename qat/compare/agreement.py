"""Whether backends agree: every pair of rows, every output in its own unit, then the boxes. Each check can fail.

A pair of two FP32 rows is judged by its largest difference, any other by its root mean square (rounding is spread over all values; a
mistake in a map is not). Nothing passes that was not compared: rows that are one and the same engine, no boxes, maps of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from qat.boxes.detections import Detections
from qat.compare.rows import Row
from qat.core.errors import NotFiniteError, UserError
from qat.core.tensors import decibels
from qat.families.flow import InUnit

REACH = 2.0  # metres between the centres of boxes that are the same object
# The least share of boxes that both rows have. Scores near the threshold differ, so a box counts from a tenth above it.
SHARES = {True: 1.0, False: 0.8}
MARGIN = 0.1
ALL = "all"
LEAST_DB = {True: 60.0, False: 12.0}  # of outputs without a unit


@dataclass
class Figures:
    """The difference of one output in one region, over all frames. unit: "" for an output's own numbers."""

    unit: str
    limit: float | None
    exact: bool
    count: int = 0
    largest: float = 0.0
    noise: float = 0.0
    signal: float = 0.0

    def add(self, a: InUnit, b: InUnit, where: np.ndarray) -> None:
        """One frame's values where the mask has them; NaN, where an output means nothing, is left out."""
        x, y = a.values[where].astype(np.float64), b.values[where].astype(np.float64)
        known = ~(np.isnan(x) | np.isnan(y))
        x, y = x[known], y[known]
        difference = x - y
        if a.period:
            difference -= a.period * np.round(difference / a.period)
        self.count += difference.size
        self.largest = max(self.largest, float(np.abs(difference).max(initial=0.0)))
        self.noise += float(difference @ difference)
        self.signal += float(x @ x)

    @property
    def rms(self) -> float:
        """Root mean square of the difference."""
        return float(np.sqrt(self.noise / max(self.count, 1)))

    @property
    def sqnr_db(self) -> float:
        """As `qat.core.tensors.compare_tensors`."""
        return decibels(self.signal, self.noise)

    @property
    def wrong(self) -> str:
        """What is out of tolerance; empty where it passes."""
        if not self.count or not self.signal:
            return "nothing to compare: no values, or zeros alone"
        if self.limit is None:
            least = LEAST_DB[self.exact]
            return "" if self.sqnr_db >= least else f"found {self.sqnr_db:.0f} dB SQNR, expected {least:.0f} or more"
        kind, found = ("largest", self.largest) if self.exact else ("root mean square", self.rms)
        return (
            "" if found <= self.limit else f"found {found:.2g} {self.unit} ({kind}), expected at most {self.limit:.2g}"
        )

    def described(self) -> dict[str, Any]:
        """For --json."""
        figures = {"max": self.largest, "rms": self.rms, "sqnr_db": self.sqnr_db, "count": self.count}
        return {"unit": self.unit, "limit": self.limit, **figures, "wrong": self.wrong, "passed": not self.wrong}


@dataclass
class BoxFigures:
    """The boxes of two rows. judged, found: of boxes well above the score threshold in either row, how many there are, and how many
    the other row has too. centre, yaw, score: differences of matched ones."""

    exact: bool
    matched: int = 0
    missed: int = 0
    extra: int = 0
    judged: int = 0
    found: int = 0
    centre: list[float] = field(default_factory=list)
    yaw: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)

    def add(self, a: Detections, b: Detections, least: float) -> None:
        """One frame's boxes. least: the score from which a box is judged."""
        pairs = matched(a, b)
        first, second = (np.array([pair[place] for pair in pairs], int) for place in (0, 1))
        self.matched += len(pairs)
        self.missed += len(a) - len(pairs)
        self.extra += len(b) - len(pairs)
        for own, taken in ((a, first), (b, second)):
            sure = own.scores >= least
            self.judged += int(sure.sum())
            self.found += int(sure[taken].sum())
        turn = a.boxes[first, 6] - b.boxes[second, 6]
        self.centre += np.linalg.norm(a.boxes[first, :3] - b.boxes[second, :3], axis=1).tolist()
        self.yaw += np.abs((turn + np.pi) % (2 * np.pi) - np.pi).tolist()
        self.score += np.abs(a.scores[first] - b.scores[second]).tolist()

    @property
    def wrong(self) -> str:
        """As `Figures.wrong`."""
        if not self.judged:
            return "nothing to compare: no boxes well above the score threshold; take other frames"
        share = self.found / self.judged
        least = SHARES[self.exact]
        if share < least:
            return f"found {self.found} of {self.judged} boxes in both, expected at least {least:.0%}"
        return ""

    def described(self) -> dict[str, Any]:
        """For --json: counts, and the median and largest differences of matched boxes."""
        counts = {name: getattr(self, name) for name in ("matched", "missed", "extra", "judged", "found")}
        differences = {
            name: {"median": float(np.median(values)), "max": float(np.max(values))} if values else None
            for name, values in (("centre_m", self.centre), ("yaw_rad", self.yaw), ("score", self.score))
        }
        return {**counts, **differences, "wrong": self.wrong, "passed": not self.wrong}


def matched(a: Detections, b: Detections) -> list[tuple[int, int]]:
    """Pairs of boxes of one class that are nearest to each other, at most REACH apart; each box once, the nearest pair first."""
    distance = np.linalg.norm(a.boxes[:, None, :2] - b.boxes[None, :, :2], axis=2)
    distance[(a.labels[:, None] != b.labels[None]) | (distance > REACH)] = np.inf
    pairs = []
    while distance.size and np.isfinite(best := distance.min()):
        i, j = (int(n) for n in np.argwhere(distance == best)[0])
        pairs.append((i, j))
        distance[i], distance[:, j] = np.inf, np.inf
    return pairs


@dataclass
class Pair:
    """Two rows. outputs: by name and region. boxes: None for a model without."""

    first: str
    second: str
    outputs: dict[str, dict[str, Figures]] = field(default_factory=dict)
    boxes: BoxFigures | None = None

    @property
    def problems(self) -> list[str]:
        """A line for each output and for the boxes that are out of tolerance."""
        found = [
            f"{name}{'' if region == ALL else f' in {region} cells'}: {figures.wrong}"
            for name, regions in self.outputs.items()
            for region, figures in regions.items()
            if figures.wrong
        ]
        return found + ([f"boxes: {self.boxes.wrong}"] if self.boxes is not None and self.boxes.wrong else [])

    def described(self) -> dict[str, Any]:
        """For --json."""
        return {
            "rows": [self.first, self.second],
            "outputs": {n: {r: f.described() for r, f in regions.items()} for n, regions in self.outputs.items()},
            "boxes": None if self.boxes is None else self.boxes.described(),
            "passed": not self.problems,
        }


def _name(row: Row) -> str:
    return f"{row.name} ({row.flavour})" if row.precision.startswith("int8") else row.name


def agree(
    rows: Sequence[Row], frames: Sequence[Any], progress: Callable[[int], None] = lambda done: None
) -> list[Pair]:
    """Runs every row on every frame and compares each pair.

    Raises:
        UserError: there are fewer than two rows, two are the same engine, or no frames. NotFiniteError: a row returned NaN or infinity.
    """
    # Flavours that round alike are one simulation.
    rows = [row for n, row in enumerate(rows) if not row.simulated or row.key not in {r.key for r in rows[:n]}]
    if len(rows) < 2:
        raise UserError(
            f"agree: found {len(rows)} row, expected two or more; give exported parts (--onnx), or backends"
        )
    if not len(frames):
        raise UserError("agree: found no frames, expected one or more")
    for a, b in combinations(rows, 2):
        if a.key == b.key:
            raise UserError(f"agree: found {_name(a)} twice, of the same files: it agrees with itself; omit one")
    pairs = {
        (i, j): Pair(_name(rows[i]), _name(rows[j]))
        for i, j in combinations(range(len(rows)), 2)
    }  # fmt: skip
    exact = [row.precision == "fp32" for row in rows]
    for row in rows:
        row.pipeline.reset()
    for n in range(len(frames)):
        frame = frames[n]
        found = [_run(row, frame) for row in rows]
        regions = rows[0].pipeline.flow.regions(found[0][0]) or {ALL: np.ones((), bool)}
        for (i, j), pair in pairs.items():
            both = exact[i] and exact[j]
            (_, one, boxes_a), (_, other, boxes_b) = found[i], found[j]
            for name, value in one.items():
                limit = value.exact if both else value.rounded
                for region, where in regions.items():
                    figures = pair.outputs.setdefault(name, {}).setdefault(region, Figures(value.unit, limit, both))
                    figures.add(value, other[name], np.broadcast_to(where, value.values.shape))
            if boxes_a is not None and boxes_b is not None:
                pair.boxes = pair.boxes or BoxFigures(both)
                least = min((float(d.scores.min()) for d in (boxes_a, boxes_b) if len(d)), default=0.0) + MARGIN
                pair.boxes.add(boxes_a, boxes_b, least)
        progress(n + 1)
    return list(pairs.values())


def _run(row: Row, frame: Any) -> tuple[dict[str, Any], dict[str, InUnit], Detections | None]:
    """A row's tensors, its outputs in their units, and its boxes."""
    tensors = row.pipeline.forward(frame)
    flow = row.pipeline.flow
    for name in flow.plan.outputs:
        if not np.isfinite(tensors[name]).all():
            raise NotFiniteError(
                f"{row.name}: {name}: found NaN or infinity, expected finite values; run `bevqat health`"
            )
    boxes = row.pipeline.decode(tensors).converted() if flow.plan.boxes else None
    return tensors, flow.in_units({name: tensors[name] for name in flow.plan.outputs}), boxes
