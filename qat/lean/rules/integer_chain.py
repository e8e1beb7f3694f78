"""For ONNX Runtime's CPU: rounds the outputs of integer kernels, and of following operations while all inputs are rounded.

    before   conv ─► sigmoid ─► · ─► conv           after   conv ─► Q ─► sigmoid ─► · ─► Q ─► conv
             conv ─► leaky ─► conv                          conv ─► Q ─► leaky ─► Q ─► conv
             relu ─► mean ─► conv                           relu ─► Q ─► mean ─► Q ─► conv
             conv ─► add ─► relu ─► pool                    conv ─► Q ─► add ─► relu ─► Q ─► pool

Its convolutions run in integers only if a Q follows them (a ReLU between them folds into the rounding); otherwise the whole
layer is float. A separate batch norm becomes such a convolution (`qat.export.scale_as_depthwise`). LeakyReLU, HardSigmoid and
global average pooling have integer kernels worth their rounding everywhere; adds, products, sigmoids and concatenations only
if all of their inputs are rounded anyway. A SiLU's sigmoid and product stay float between their roundings: one float kernel
is faster than two integer ones. Other backends round none of these.

Outputs of the graph are not rounded unless requested (`round_outputs`): the last convolution is then float, because ONNX
Runtime's ConvInteger takes four times as long as a float convolution.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from qat.lean.layers import ScaleShift
from qat.lean.ops import (
    MOVES,
    RESHAPES,
    concatenated,
    is_add,
    is_concat,
    is_global_mean,
    is_multiplication,
    is_resize,
    passes_values_on,
    source_of,
    two_tensors,
)
from qat.lean.placement import Placement, rule

aten = torch.ops.aten
ROLE = "integer"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
KERNELS = (nn.LeakyReLU, nn.Hardsigmoid)
FOLDS = (nn.ReLU, nn.ReLU6)


def is_silu_part(placement: Placement, node: fx.Node) -> bool:
    """Whether a node is the sigmoid or the product of x · sigmoid(x)."""
    if isinstance(placement.module(node), nn.Sigmoid):
        user = next(iter(node.users)) if len(node.users) == 1 else None
        return user is not None and is_multiplication(user) and source_of(node) in user.args
    if not is_multiplication(node):
        return False
    a, b = node.args[:2]
    for gate, value in ((a, b), (b, a)):
        if isinstance(gate, fx.Node) and isinstance(placement.module(gate), nn.Sigmoid) and source_of(gate) is value:
            return True
    return False


def is_scale_shift(placement: Placement, node: fx.Node) -> bool:
    """Whether a node is a separate batch norm of images (`qat.export.scale_as_depthwise`)."""
    value = node.meta.get("val")
    return isinstance(placement.module(node), ScaleShift) and getattr(value, "ndim", None) == 4


def behind(placement: Placement, node: fx.Node) -> fx.Node:
    """The tensor to round: that of the ReLU that alone reads a node's result, if there is one, or the node's."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    module = placement.module(user)
    folds = isinstance(module, FOLDS) or (isinstance(module, nn.Hardtanh) and module.min_val == 0)
    return user if user is not None and folds else node


@rule
def integer_chain(placement: Placement) -> None:
    """Requests the outputs of integer kernels, in the role "integer"."""
    rounded = {tensor for tensor, users in placement.requests.items() if set(users.values()) - {"identity"}}

    def ask(tensor: fx.Node) -> None:
        # An output of the graph reads the rounded tensor if another reader does: a float reader would keep the kernel float.
        users = list(tensor.users)
        if placement.round_outputs or any(user.op != "output" for user in users):
            for user in users:
                placement.quantize(tensor, user, ROLE)
            rounded.add(tensor)

    weighted = set(placement.weighted)
    for node in placement.nodes():
        module = placement.module(node)
        if node in weighted and isinstance(module, CONVOLUTIONS):
            ask(behind(placement, node))
            continue
        if isinstance(module, KERNELS) or is_global_mean(node):
            source = source_of(node)
            assert source is not None
            placement.quantize(source, node, ROLE)
            rounded.add(source)
            ask(behind(placement, node))
            continue
        if passes_values_on(node) or is_resize(node):
            source = source_of(node)
            if (
                source in rounded
                and source is not None
                and source.op != "placeholder"
                and node.target not in (*RESHAPES, *MOVES)
            ):
                placement.quantize(source, node, ROLE)
                placement.tie(source, node)
                ask(node)
            continue
        if is_scale_shift(placement, node) or (
            node.target is aten.avg_pool2d.default
            and any(is_concat(user) or is_scale_shift(placement, user) for user in node.users)
        ):
            source = source_of(node)
            if source in rounded and source is not None:
                placement.quantize(source, node, ROLE)
                ask(behind(placement, node))
            continue
        if is_concat(node):
            readers = [user for user in node.users if not is_scale_shift(placement, user)]
            if not all(user in placement.requests.get(node, {}) for user in readers):
                continue  # it has a float reader: copying bytes would gain nothing
            taken = concatenated(node)
        elif is_add(node) or is_multiplication(node):
            taken = list(two_tensors(node) or ())
        elif isinstance(module, nn.Sigmoid):
            taken = [source for source in (source_of(node),) if source is not None]
        else:
            continue
        if is_silu_part(placement, node) or not all(source in rounded for source in taken):
            continue
        for source in taken:
            placement.quantize(source, node, ROLE)
        ask(behind(placement, node))
