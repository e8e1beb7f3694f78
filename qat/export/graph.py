"""Exports a traced module as a checked ONNX graph."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxsim
import torch
from torch import nn

from qat.core.errors import UserError
from qat.export.linear_norm import fold_linear_norms

MOST_BYTES = 2**31
# LpNormalization over channels takes ONNX Runtime 11 ms where a norm and a quotient take under one (256 × 1024 values).
NOT_FUSED = ["fuse_lp_normalization"]
# Exceptions of torch's exporter for a network that it cannot export.
UNEXPORTABLE = (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError, ValueError, LookupError, AttributeError)


def trace(
    module: nn.Module,
    args: Sequence[torch.Tensor],
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int,
    dynamic_batch: bool = False,
    varying: Mapping[str, Mapping[int, str]] | None = None,
) -> onnx.ModelProto:
    """Traces a module with torch's TorchScript exporter, the one that still writes opset 13.

    dynamic_batch: the first dimension of every input and output may vary: "batch", or where it is not as long as the
    first input's, "views" (the cameras of all samples). varying: other dimensions that may, by input or output: {place: name}.

    Raises:
        UserError: the exporter does not support an operator, or the graph exceeds the 2 GB limit of an ONNX file.
    """
    buffer = io.BytesIO()
    axes: dict[str, dict[int, str]] = {name: dict(places) for name, places in (varying or {}).items()}
    if dynamic_batch:
        with torch.no_grad():
            results = module(*args)
        results = results if isinstance(results, tuple) else (results,)
        for name, tensor in zip((*inputs, *outputs), (*args, *results), strict=True):
            axes.setdefault(name, {}).setdefault(0, "batch" if len(tensor) == len(args[0]) else "views")
    with warnings.catch_warnings(), torch.no_grad():
        # Shapes are fixed on purpose (TracerWarning), and so is the exporter (DeprecationWarning, UserWarning).
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            torch.onnx.export(
                module,
                tuple(args),
                buffer,  # type: ignore[arg-type]  # the TorchScript exporter takes streams
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=opset,
                dynamic_axes=axes,
                dynamo=False,
            )
        except UNEXPORTABLE as error:
            bytes_held = sum(p.numel() * p.element_size() for p in module.parameters())
            if bytes_held > MOST_BYTES:
                raise UserError(
                    f"ONNX export: found {bytes_held / 1e9:.1f} GB of weights, expected at most 2 GB, which is what an ONNX file "
                    "can hold; take a smaller network"
                ) from error
            what = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(
                f"ONNX export at opset {opset}: torch's exporter found {what[:200]!r}; another --opset may have the operator"
            ) from error
    return onnx.load_from_string(buffer.getvalue())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block nothing is printed: neither onnxsim's progress nor its harmless messages about operators that it cannot
    compute ahead yet (paddings of a computed size). Exceptions are raised as usual."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def simplify(
    model: onnx.ModelProto,
    name: str,
    folded: str | None = None,
    norms: bool = False,
    compared: bool = True,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> onnx.ModelProto:
    """Runs onnxsim, with its comparison of both graphs on random input, then the full ONNX check.

    Args:
        folded: the largest constant to compute ahead, such as "1MB"; None for any. norms: batch norms may be left.
        compared: False if random inputs are meaningless (indices) and the caller compares on real ones.
        shapes: those of the inputs of that comparison; needed where more than the first dimension varies.

    Raises:
        UserError: the simplified graph computes something else, or batch norms remain.
    """
    np.random.seed(0)  # onnxsim draws its inputs from numpy's global generator
    try:
        with _quiet():
            more: dict[str, Any] = {} if folded is None else {"tensor_size_threshold": folded}
            if shapes is not None:
                more["test_input_shapes"] = {given: list(shape) for given, shape in shapes.items()}
            simplified, same = onnxsim.simplify(model, check_n=int(compared), skipped_optimizers=NOT_FUSED, **more)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        what = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{name}.onnx: onnxsim found {what[:200]!r}; please report it") from error
    if not same:
        raise UserError(f"{name}.onnx: onnxsim's check found another result after simplification; please report it")
    fold_linear_norms(simplified)
    left = op_counts(simplified)["BatchNormalization"]
    if left and not norms:
        raise UserError(f"{name}.onnx: found {left} BatchNormalization that cannot be folded, expected none")
    _strip(simplified)
    onnx.checker.check_model(simplified, full_check=True)
    return simplified


def _strip(model: onnx.ModelProto) -> None:
    """Removes fields that differ between runs or machines and do not matter to a runtime."""
    model.doc_string = model.graph.doc_string = ""
    del model.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]


def op_counts(model: onnx.ModelProto) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(node.op_type for node in model.graph.node)


def tensor_specs(model: onnx.ModelProto) -> tuple[dict[str, dict[str, object]], dict[str, dict[str, object]]]:
    """Inputs and outputs, each name → {"dtype": numpy name, "shape": [...]}; a dimension that varies is given by its name."""

    def specs(values: Sequence[onnx.ValueInfoProto]) -> dict[str, dict[str, object]]:
        return {
            value.name: {
                "dtype": onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                "shape": [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
            }
            for value in values
        }

    return specs(model.graph.input), specs(model.graph.output)
