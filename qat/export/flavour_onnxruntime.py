"""The `onnxruntime` flavour: the same quantized network in the form that ONNX Runtime's CPU fuses.

The u8 form (`qat.export.unsigned`), then what ONNX Runtime needs beyond it to run every convolution in integers:
`qat.export.rounded_resize` and `qat.export.conv_as_matmul`.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx

from qat.export.conv_as_matmul import convs_to_matmuls
from qat.export.rounded_resize import round_resize_inputs
from qat.export.unsigned import to_unsigned


def to_onnxruntime(model: onnx.ModelProto, never_negative: Collection[str] = ()) -> onnx.ModelProto:
    """The `onnxruntime` flavour of a `tensorrt`-flavoured graph; the argument is left as it is.

    Args, Raises: as `to_unsigned`.
    """
    model = to_unsigned(model, never_negative)
    round_resize_inputs(model)
    convs_to_matmuls(model)
    onnx.checker.check_model(model, full_check=True)
    return model
