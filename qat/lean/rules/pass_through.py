"""Layers that move values without changing them, and resizes, keep their input's scale.

    before  x ─┬─► maxpool ─► conv          after  x ─┬─► maxpool ─► Q₁ ─► conv
               └─► conv                               └─► Q₁ ─► conv

With one scale on both sides the engine runs the pooling, reshape or resize in INT8, between the quantizers. A
bilinear resize computes new values, but none outside its input's range.

    before   conv ─► relu ─► resize ─► Q ─► conv          after   conv ─► relu ─► Q ─► resize ─► Q ─► conv

CPU backends compute a convolution (or an add) in integers only if a Q follows it, so in their flavours the input of a MaxPool
or a Resize is rounded too (role "output"), on the scale of its output. The same applies if the MaxPool's output is moved
before it is rounded: gathered, concatenated, transposed.
"""

from __future__ import annotations

from torch import fx, nn

from qat.lean.ops import MAX_POOLS, PARTS, is_add, is_concat, is_resize, passes_values_on
from qat.lean.placement import Placement, rule

MAKERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.ReLU, nn.ReLU6)


def rounded_behind(placement: Placement, node: fx.Node) -> bool:
    """Whether a node's values are rounded before anything computes with them."""
    if node in placement.requests:
        return True
    moved = [user for user in node.users if passes_values_on(user) or user.target in PARTS or is_concat(user)]
    return 0 < len(node.users) == len(moved) and all(rounded_behind(placement, user) for user in moved)


@rule
def pass_through(placement: Placement) -> None:
    """Ties each such node's output to its input."""
    for node in placement.nodes():
        if not (passes_values_on(node) or is_resize(node)):
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op == "placeholder":
            continue
        placement.tie(source, node)
        early = node.target in MAX_POOLS or is_resize(node)
        made = isinstance(placement.module(source), MAKERS) or is_add(source)
        if early and made and len(source.users) == 1 and rounded_behind(placement, node):
            placement.quantize(source, node, "output")
