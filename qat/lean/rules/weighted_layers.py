"""Convolutions, transposed convolutions and linear layers get an INT8 input and INT8 weights.

    before  x ─► conv ─► y          after  x ─► Q ─► conv ─► y
                  ▲                                   ▲
                  w                              w ─► Q (one scale for each output channel)

The output is not rounded: the next layer's input quantizer follows the ReLU, which the engine fuses.
"""

from __future__ import annotations

from torch import fx, nn

from qat.lean.canonical import PATH
from qat.lean.flavours import FLAVOURS
from qat.lean.layers import WEIGHTED
from qat.lean.placement import Placement, rule

# Dimensions without an INT8 convolution in any engine here.
NO_KERNEL = (nn.ConvTranspose1d, nn.Conv3d, nn.ConvTranspose3d)


@rule
def weighted_layers(placement: Placement) -> None:
    """Requests the input of each such layer, unless the layer stays float in all flavours."""
    for node in placement.nodes():
        module = placement.module(node)
        if not isinstance(module, WEIGHTED):
            continue
        path = str(node.meta[PATH])
        if isinstance(module, NO_KERNEL):
            dims = type(module).__name__[-2:].lower()
            placement.keep(path, "weighted_layers", f"a convolution in {dims}, which the backends only run in float")
            continue
        if isinstance(
            module, nn.Conv1d
        ):  # TensorRT turns it into one in 2d, by reshapes between Q/DQ and the convolution
            others = tuple(name for name, flavour in FLAVOURS.items() if not flavour.conv1d)
            placement.keep(path, "weighted_layers", "a convolution in 1d, which the backend has in float alone", others)
            placement.only[node] = frozenset(FLAVOURS) - set(others)
        rules = placement.float_rules(path)
        for found in sorted(
            rules, key=lambda one: bool(one.flavours), reverse=True
        ):  # one for all flavours has the last word
            placement.keep(path, "keep_float", found.reason, found.flavours)
        if not placement.flavours(node):
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        placement.weighted.append(node)
        placement.quantize(source, node, "input")
