"""The result of a sensitivity measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qat.boxes.detections import Detections
from qat.plan import Plan

OBJECTS = "objects"  # the values of the last label in cells where the float network detects an object
Metric = Callable[[Mapping[str, Detections]], Mapping[str, float]]


@dataclass(frozen=True)
class UnitDamage:
    """The loss of one unit alone.

    layers: with INT8 weights. macs_share: theirs, of all multiply-accumulates. sqnr_db: at each of `tensors_of`, against
    float; 200 where nothing changed, or no object was seen. metric: with only this unit in INT8, and drop: its loss against float; None without a metric.
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

    method: chose the range. amax: the magnitude of code 127. largest: of all magnitudes. values: how many were
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
    """units: worst first. together: with all units on. reference: the float network's metric. floats: what stays
    float, the largest share of the multiply-accumulates first. histograms: of the worst units, where requested."""

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
    """The tensors that are compared: the plan's labels, and for a plan with boxes also the last label's values at objects."""
    return (*plan.judged, *([OBJECTS] if plan.boxes else ()))
