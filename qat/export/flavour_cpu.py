"""The CPU flavours, `onnxruntime` and `openvino`: the same quantized network in the form that these backends fuse.

The u8 form (`qat.export.unsigned`), then `qat.export.early_rounding`, `qat.export.conv_as_matmul`,
`qat.export.sunk_transpose` and `qat.export.scale_as_product`, after which every layer with INT8 weights runs in integers. As measured by benchmarks/flavours.py, one form is the fastest on
both; they stay two names because measurement decides for each.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx

from qat.export.conv_as_matmul import convs_to_matmuls
from qat.export.early_rounding import round_early
from qat.export.scale_as_product import scales_to_products
from qat.export.sunk_transpose import sink_transposes
from qat.export.unsigned import to_unsigned


def to_cpu(model: onnx.ModelProto, never_negative: Collection[str] = ()) -> onnx.ModelProto:
    """The CPU flavours' form of a `tensorrt`-flavoured graph; the argument is left as it is.

    Args, Raises: as `to_unsigned`.
    """
    model = to_unsigned(model, never_negative)
    round_early(model)
    if convs_to_matmuls(model):
        sink_transposes(model)
    scales_to_products(model)
    onnx.checker.check_model(model, full_check=True)
    return model
