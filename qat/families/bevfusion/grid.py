"""How many steps a bound [lower, upper, step] has: one count for the checks, the networks and the runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence

Bound = Sequence[float]
CLOSE = 1e-6  # of a step: what binary fractions add to or take from a whole number


def cells(bound: Bound) -> int:
    """Cells of a BEV axis: the whole steps between its ends.

    (38.4 − −38.4) / 0.8 is 95.99999999999999 in float64, and 96 here. BEVFusion's own int() has 95 there
    (`bevfusion_cells`).
    """
    steps = (bound[1] - bound[0]) / bound[2]
    return round(steps) if abs(steps - round(steps)) <= CLOSE else int(steps)


def bevfusion_cells(bound: Bound) -> int:
    """Cells as BEVFusion's `gen_dx_bx` counts them: int() of the quotient, which is one fewer where it lies just below a whole
    number. The `nx` of its checkpoints says so."""
    return int((bound[1] - bound[0]) / bound[2])


def depth_count(dbound: Bound) -> int:
    """Depth bins, as torch.arange counts them: BEVFusion's networks have as many channels."""
    return math.ceil((dbound[1] - dbound[0]) / dbound[2])
