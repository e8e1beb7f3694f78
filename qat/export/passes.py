"""The passes over ONNX graphs by the names that flavours list them under (`qat.lean.flavours`)."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from qat.export.conv_as_matmul import convs_to_matmuls
from qat.export.global_pool import means_to_pools
from qat.export.hard_sigmoid import hard_sigmoids_to_clips, hard_sigmoids_to_sums
from qat.export.integer_weights import store_integers
from qat.export.scale_as_depthwise import scales_to_depthwise
from qat.export.scale_as_product import scales_to_products
from qat.export.silu import silus_to_one
from qat.export.sunk_transpose import sink_transposes
from qat.lean.flavours import Flavour


def _convs_as_matmuls(model: onnx.ModelProto) -> int:
    changed = convs_to_matmuls(model)
    if changed:
        sink_transposes(model)
    return changed


PASSES: dict[str, Callable[[onnx.ModelProto], int]] = {
    "scale_as_depthwise": scales_to_depthwise,
    "integer_weights": store_integers,
    "conv_as_matmul": _convs_as_matmuls,
    "scale_as_product": scales_to_products,
    "global_pool": means_to_pools,
    "hard_sigmoid_as_sum": hard_sigmoids_to_sums,
    "hard_sigmoid_as_clip": hard_sigmoids_to_clips,
    "silu": silus_to_one,  # the last pass: shapes cannot be inferred after its operator
}


def in_flavour(model: onnx.ModelProto, flavour: Flavour) -> onnx.ModelProto:
    """The final form of a graph that was traced in a flavour; the argument is not changed."""
    if not flavour.passes:
        return model
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for name in flavour.passes:
        PASSES[name](model)
    onnx.checker.check_model(model, full_check=True)
    return model
