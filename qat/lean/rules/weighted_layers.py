"""Convolutions, transposed convolutions and linear layers take an INT8 input and INT8 weights.

    before  x ─► conv ─► y          after  x ─► Q ─► conv ─► y
                  ▲                                   ▲
                  w                              w ─► Q (one scale for each output channel)

The output is left alone: the next layer's input quantizer follows the ReLU, which the engine fuses.
"""

from __future__ import annotations

from torch import fx

from qat.lean.placement import WEIGHTED, Placement, rule


@rule
def weighted_layers(placement: Placement) -> None:
    """Asks for the input of each such layer, unless the layer is to stay float."""
    for node in placement.nodes():
        if not isinstance(placement.module(node), WEIGHTED):
            continue
        reason = placement.float_reason(node)
        if reason is not None:
            placement.keep(str(node.target), "keep_float", reason)
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        placement.weighted.append(node)
        placement.quantize(source, node)
