"""The inputs of a concatenation share one scale.

    before  a ─┐                            after  a ─► Q ─┐
               ├─► cat ─► conv                             ├─► cat ─► Q ─► conv      (one quantizer, three places)
            b ─┘                                   b ─► Q ─┘

A concatenation in INT8 copies bytes, which is right only if all inputs have the same scale. The last Q changes nothing
(its input is on its grid); engines require one before the convolution.
"""

from __future__ import annotations

from qat.lean.ops import concatenated, is_concat
from qat.lean.placement import Placement, rule


@rule
def concat(placement: Placement) -> None:
    """Ties the inputs of every concatenation whose output is quantized, and requests each of them."""
    for node in placement.nodes():
        if is_concat(node) and node in placement.requests:
            for source in concatenated(node):
                if source.op != "get_attr":
                    placement.tie(source, node)
                    placement.quantize(source, node, "concat")
