"""Layers that move values without changing them keep their input's scale; so does a resize.

    before  x ─┬─► maxpool ─► conv          after  x ─┬─► maxpool ─► Q₁ ─► conv
               └─► conv                               └─► Q₁ ─► conv

With one scale on both sides the engine runs the pooling, reshape or resize in INT8, between the quantizers. A
bilinear resize makes new values, but none outside its input's range.
"""

from __future__ import annotations

from torch import fx

from qat.lean.ops import is_resize, passes_values_on
from qat.lean.placement import Placement, rule


@rule
def pass_through(placement: Placement) -> None:
    """Ties each such node's output to its input."""
    for node in placement.nodes():
        if passes_values_on(node) or is_resize(node):
            source = node.args[0]
            if isinstance(source, fx.Node) and source.op != "placeholder":
                placement.tie(source, node)
