"""Options of a calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.calibrate.budget import check_budget
from qat.calibrate.distributed import place
from qat.calibrate.sensitivity import Metric
from qat.core.errors import UserError
from qat.lean.module import float_rules
from qat.lean.placement import FloatRule
from qat.model.opening import Source


@dataclass(frozen=True)
class BudgetOptions:
    """The accuracy that INT8 may lose, and the data to measure it on.

    drop: of mAP. data, version, split, frames: annotated keyframes, as in `NuScenesDataset`. metric: scores boxes by frame
    token on such a data set. ranked_on: number of frames on which the units' losses are measured.
    """

    drop: float
    data: Path
    split: str
    metric: Callable[[Any], Metric]
    version: str | None = None
    frames: int | None = None
    ranked_on: int = 4


@dataclass(frozen=True)
class CalibrateOptions:
    """Calibration options; flags of `bevqat calibrate` have the same names unless stated.

    data, split, version, frames: the keyframes to calibrate on, as for `NuScenesDataset`.
    method: one of `qat.lean.METHODS`, or "auto" for the best one of each part (the family's recipe). percentile: for that
    method. by_layer: (pattern, method) pairs that override it; flag --method-for.
    budget: leave units float to meet it.
    equalize: divide the channels of a part's input by their magnitudes where that pays; flag --no-equalize.
    keep_float: layers to leave float besides the family's own, as `PATTERN` or `PATTERN=reason`.
    """

    data: Path
    split: str
    version: str | None = None
    frames: int | None = None
    method: str = "auto"
    percentile: float = 99.99
    by_layer: Sequence[tuple[str, str]] = ()
    budget: BudgetOptions | None = None
    equalize: bool = True
    keep_float: Sequence[str] = ()

    @property
    def rules(self) -> list[FloatRule]:
        """`keep_float` as rules; raises `UserError` for an invalid one."""
        return float_rules(self.keep_float)

    def check(self, source: Source) -> None:
        """Raises `UserError` for options that contradict each other or this source, by the name of the flag.

        (Methods and patterns are checked where the network is known: `qat.calibrate.ptq`, `qat.lean.module`.)
        """
        float_rules(self.keep_float)
        if not 50 < self.percentile <= 100:
            raise UserError(f"--percentile: found {self.percentile}, expected above 50 and at most 100")
        if self.budget is None:
            return
        if place()[1] > 1:
            raise UserError("--budget: found several processes, expected one; run without torchrun")
        if source.checkpoint is None:
            raise UserError("--budget: found random weights, expected a trained detector's, whose mAP can fall")
        check_budget(self.budget.drop)
