"""Number of steps in a bound [lower, upper, step]: one count for the checks, the networks and the runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence

Bound = Sequence[float]
CLOSE = 1e-6  # share of a step: rounding error of binary fractions at a whole number


def cells(bound: Bound) -> int:
    """Cells of a BEV axis: the whole steps between its ends.

    (38.4 − −38.4) / 0.8 is 95.99999999999999 in float64, and 96 here. BEVFusion's int() gives 95 there
    (`bevfusion_cells`).
    """
    steps = (bound[1] - bound[0]) / bound[2]
    return round(steps) if abs(steps - round(steps)) <= CLOSE else int(steps)


def bevfusion_cells(bound: Bound) -> int:
    """Cells as counted by BEVFusion's `gen_dx_bx`: int() of the quotient, which is one fewer if that is just below a whole
    number. Its checkpoints store this count as `nx`."""
    return int((bound[1] - bound[0]) / bound[2])


def depth_count(dbound: Bound) -> int:
    """Depth bins, as counted by torch.arange: the number of channels in BEVFusion's networks."""
    return math.ceil((dbound[1] - dbound[0]) / dbound[2])
