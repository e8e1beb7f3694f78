"""A residual add quantizes its identity input only.

    before  x ─┬─► conv ─► relu ─► conv ─► add ─► relu        after  x ─► Q ─┬─► conv … conv ─► add ─► relu
               └────────────────────────────┘                                └──────────────────┘

TensorRT fuses conv + add + ReLU into one INT8 kernel when the branch that is not the convolution's comes in INT8 and
the convolution's own output does not (Developer Guide, "Explicit quantization: Q/DQ layer placement"). Where both
inputs are convolutions (a downsampled identity), the identity is the shorter branch. An add that no convolution
feeds has both inputs quantized on one scale. A linear layer is no convolution here: engines fuse no INT8 add into it, and
the stream that a transformer adds to has too wide a range to be rounded at every block (see `layer_norm`).

The convolution's output is watched: ONNX Runtime's flavour quantizes it too, and one calibration serves both.
"""

from __future__ import annotations

from torch import fx, nn

from qat.lean.placement import WEIGHTED, Placement, is_add, rule

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def _depths(placement: Placement) -> dict[fx.Node, int]:
    """For each node, the most weighted layers on any path that leads to it."""
    depth: dict[fx.Node, int] = {}
    for node in placement.nodes():
        before = max((depth[source] for source in node.all_input_nodes), default=0)
        depth[node] = before + isinstance(placement.module(node), WEIGHTED)
    return depth


@rule
def residual_add(placement: Placement) -> None:
    """Asks for the identity of every add beside a quantized layer."""
    depth = _depths(placement)
    quantized = set(placement.weighted)
    for node in placement.nodes():
        if not is_add(node):
            continue
        left, right = node.args[:2]
        assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
        convs = [
            source
            for source in (left, right)
            if source in quantized and len(source.users) == 1 and isinstance(placement.module(source), CONVOLUTIONS)
        ]
        if not convs:
            if all(placement.requests.get(source) for source in (left, right)):
                placement.tie(left, right)
                placement.quantize(left, node)
                placement.quantize(right, node)
            continue
        main = max(convs, key=lambda source: depth[source])
        identity = right if main is left else left
        placement.quantize(identity, node)
        placement.watch(main)
