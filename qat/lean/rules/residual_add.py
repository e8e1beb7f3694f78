"""A residual add quantizes its identity input only.

    before  x ─┬─► conv ─► relu ─► conv ─► add ─► relu        after  x ─► Q ─┬─► conv … conv ─► add ─► relu
               └────────────────────────────┘                                └──────────────────┘

TensorRT fuses conv + add + ReLU into one INT8 kernel if the identity branch is INT8 and the convolution's output is not
(Developer Guide, "Explicit quantization: Q/DQ layer placement"). If both inputs are convolutions (a downsampled identity), the
identity is the shorter branch. An add without a convolution before it has both inputs quantized on one scale. A linear layer
does not count as a convolution here: engines do not fuse an INT8 add into it, and
the stream that a transformer adds to has too wide a range to be rounded at every block (see `layer_norm`).

The convolution's output is rounded too if a flavour requires it (role "output"): only then does ONNX Runtime fuse the add.
"""

from __future__ import annotations

from torch import fx, nn

from qat.lean.layers import WEIGHTED
from qat.lean.ops import is_add, two_tensors
from qat.lean.placement import Placement, rule

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


def _depths(placement: Placement) -> dict[fx.Node, int]:
    """For each node, the most weighted layers on any path that leads to it."""
    depth: dict[fx.Node, int] = {}
    for node in placement.nodes():
        before = max((depth[source] for source in node.all_input_nodes), default=0)
        depth[node] = before + isinstance(placement.module(node), WEIGHTED)
    return depth


@rule
def residual_add(placement: Placement) -> None:
    """Requests the identity of every add that follows a quantized layer."""
    depth = _depths(placement)
    quantized = set(placement.weighted)
    for node in placement.nodes():
        tensors = two_tensors(node) if is_add(node) else None
        if tensors is None:
            continue
        convs = [
            source
            for source in tensors
            if source in quantized and len(source.users) == 1 and isinstance(placement.module(source), CONVOLUTIONS)
        ]
        if not convs:
            if all("input" in placement.requests.get(source, {}).values() for source in tensors):
                placement.tie(*tensors)
                for source in tensors:
                    placement.quantize(source, node, "add")
            continue
        main = max(convs, key=lambda source: depth[source])
        identity = tensors[1] if main is tensors[0] else tensors[0]
        placement.quantize(identity, node, "identity")
        placement.quantize(main, node, "output")
