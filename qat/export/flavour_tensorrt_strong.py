"""The `tensorrt-strong` flavour: for strongly typed networks, where precision is written in the graph.

TensorRT 10 builds them on demand (`trtexec --stronglyTyped`), TensorRT 11 builds nothing else: each tensor has the type that
ONNX gives it, and builder flags for precision are gone.

    before   x ─► Q(s8) ─► DQ ─┐                      after   x in FP16 ─► Q(s8) ─► DQ ─┐
             w ─► Q(s8) ─► DQ ─┼─► Conv ─► Relu ─►            w in s8 ────────────► DQ ─┼─► Conv ─► Relu ─► in FP16
             b in FP32 ────────┘                              b in FP16 ────────────────┘   all scales in FP16

- FP16 types as `qat.export.fp16` decides them.
- From opset 19 on QuantizeLinear and DequantizeLinear take FP16 scales and a DequantizeLinear then returns FP16, so that an
  INT8 convolution is s8·s8 → FP16 for TensorRT to fuse. Before opset 19 they are FP32 only: casts surround them, and
  TensorRT may or may not fuse a convolution through them. Hence opset 19 by default.
- Weights are s8 initializers behind a DequantizeLinear. NVIDIA's documentation of explicit quantization allows these and
  float weights behind Q and DQ. Here integers are better: they are those of the checkpoint, found with the FP32 scale;
  FP16 weights divided by an FP16 scale would round some of them to a neighbour. The files are smaller, too.
- A channel whose scale is below 2⁻¹⁷, where FP16 holds it to 2⁻⁸ and no better, is nearly dead. All zero, it takes 2⁻¹⁴
  (TensorRT requires scales above 0, and a tiny one would be flushed to 0). Otherwise it is rounded again with step 2⁻¹⁷, if
  another channel of the tensor has at least that step: the layer's output is then no noisier than that channel makes it.
  A tensor that has only such channels, or an activation, keeps FP32 scales and a cast.
- A convolution's bias becomes FP16; one that does not fit keeps its convolution in FP32.

Tolerance (`tolerance_db`), as the SQNR against the FP32-typed graph or the PyTorch module:

- A rounding to FP16 of x in [2ᵉ, 2ᵉ⁺¹) errs by up to 2ᵉ⁻¹¹, evenly spread: noise 2²ᵉ⁻²²/3. Mantissas are about log-uniform,
  so x² is 2²ᵉ·(3/2)/ln 2 on average: 3·2²²·1.5/ln 2 between them, 74.3 dB. A value passes through R roundings at most (one
  for each operator, constant and cast, counted in the graph), whose errors add in power: 10·log10(R) less. The allowance for
  folded batch norms and cancellation is that for FP32 graphs, 15 dB (95 derived, 80 required: `qat.export.verify`), for they
  magnify any format's errors alike. Forty layers of operator, weight and bias: 74.3 − 20.8 − 15 = 38.5 dB.
- INT8: FP16's errors carry values over quantization thresholds, and as with FP32's the graph's noise may be twice that of the
  simulation and opposed to it: 7.7 dB below the SQNR of the quantization itself. FP16's own noise, as above, adds to it.

ONNX Runtime's CPU has no FP16 kernels for most operators: it computes them in FP32 and leaves out the rounding between two of
them, so a tensor that overflows FP16 may go unnoticed. `rounded` writes every rounding out, and `verify_strong` runs both.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from qat.core.errors import UserError
from qat.core.tensors import compare_tensors
from qat.core.verification import FP32_DB, INT8_MARGIN_DB
from qat.engine.onnxruntime_backend import PlainGraph
from qat.export.fp16 import EXACT, LEAST_SCALE, NORMAL, node_name, store_constants, to_fp16
from qat.export.intermediates import tensor_types
from qat.export.lookups import constants, opset_of

PRECISIONS = ("fp32", "fp16", "int8")
QDQ_OPSET = 19  # the first opset whose Q/DQ accept FP16
ROUNDING_DB = 10 * math.log10(3 * 2**22 * 1.5 / math.log(2))
ALLOWANCE_DB = 15.0


def tolerance_db(precision: str, roundings: int = 0, quantization_db: float | None = None) -> float:
    """The least SQNR (dB) that a correct strongly typed graph shows, derived in this module's docstring.

    Args:
        precision: "fp32", "fp16" or "int8".
        roundings: the report's `roundings`.
        quantization_db: for a graph with Q/DQ, the SQNR of the fake-quantized module against the float one; None for a
            graph without, as the INT8 export has too.
    """
    if precision == "fp32" and quantization_db is None:
        return FP32_DB
    own = min(FP32_DB, ROUNDING_DB - 10 * math.log10(roundings) - ALLOWANCE_DB) if roundings else FP32_DB
    if quantization_db is None:
        return own
    return -10 * math.log10(10 ** (-own / 10) + 10 ** (-(quantization_db + INT8_MARGIN_DB) / 10))


def _store_weights(model: onnx.ModelProto, opset: int) -> list[dict[str, Any]]:
    """w ─► Q ─► DQ becomes an s8 initializer ─► DQ; returns the weights with channels whose scale changed."""
    graph = model.graph
    known = constants(graph)
    raised = []
    added: dict[str, np.ndarray] = {}
    removed = set()
    for quantize in (node for node in graph.node if node.op_type == "QuantizeLinear"):
        zero = known.get(quantize.input[2]) if len(quantize.input) > 2 else None
        scale = known.get(quantize.input[1])
        if zero is None or scale is None or zero.dtype != np.int8 or zero.any():
            raise UserError(
                f"{node_name(quantize)}: found a zero point other than 0 in s8 or a computed scale, "
                "expected the tensorrt flavour"
            )
        weight = known.get(quantize.input[0])
        if weight is None:
            continue
        shape = [1] * weight.ndim
        if scale.size > 1:
            shape[next((a.i for a in quantize.attribute if a.name == "axis"), 1)] = -1
        stepped = np.asarray(scale, np.float32).copy().reshape(-1)
        small = stepped < LEAST_SCALE
        if opset >= QDQ_OPSET and small.any():
            axes = tuple(i for i, n in enumerate(shape) if n == 1)
            dead = small & ~np.broadcast_to((weight != 0).any(axes).reshape(-1), small.shape)
            coarsened = small & ~dead & (stepped.max() >= LEAST_SCALE)
            largest = float(stepped[coarsened].max(initial=0.0))
            stepped[dead], stepped[coarsened] = NORMAL, LEAST_SCALE
            if (dead | coarsened).any():
                counts = {"zero": int(dead.sum()), "coarsened": int(coarsened.sum())}
                raised.append({"tensor": quantize.input[0], **counts, "largest": largest})
        step = stepped.reshape(scale.shape)
        # float32 throughout, and rounding half to even: what QuantizeLinear does
        whole = np.clip(np.rint(weight / step.reshape(shape)), -128, 127).astype(np.int8)
        added[quantize.output[0]] = whole
        removed.add(quantize.output[0])
        if not np.array_equal(step, scale):
            added[f"{quantize.output[0]}_scale"] = step
            for dequantize in graph.node:
                if dequantize.op_type == "DequantizeLinear" and dequantize.input[0] == quantize.output[0]:
                    dequantize.input[1] = f"{quantize.output[0]}_scale"
    nodes = [node for node in graph.node if not removed.intersection(node.output)]
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    nodes = [node for node in nodes if node.op_type != "Constant" or node.output[0] in used]
    values = [value for value in graph.initializer if value.name in used]
    values += [numpy_helper.from_array(value, name) for name, value in added.items()]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(values)
    return raised


def _in_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    if opset_of(model) != opset:
        try:
            model = version_converter.convert_version(model, opset)
        except (RuntimeError, version_converter.ConvertError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"opset {opset}: onnx's version converter found {reason!r}; choose another --opset"
            ) from error
    model.ir_version = max(model.ir_version, helper.find_min_ir_version_for(model.opset_import))
    return model


def to_tensorrt_strong(
    model: onnx.ModelProto,
    precision: str,
    feeds: Sequence[Mapping[str, np.ndarray]],
    opset: int | None = None,
    *,
    keep_io: bool = True,
    geometry: Collection[str] = (),
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The `tensorrt-strong` flavour of a `tensorrt`-flavoured graph; the argument is not changed.

    Args:
        model: FP32-typed; for "int8" with symmetric s8 Q/DQ or, as a part that stays float, without; else without.
        precision: "fp32" writes no other types than there are; "fp16"; "int8" FP16 outside the Q/DQ pairs.
        feeds: for each frame the graph's inputs in FP32, used to find values that FP16 does not hold.
        opset: None keeps the graph's, or 19 for "int8".
        keep_io: whether inputs and outputs stay FP32 in an FP16 or INT8 graph.
        geometry: as in `qat.export.fp16.to_fp16`.

    Returns:
        the graph, checked, and a report: that of `to_fp16` (for "fp32" its `roundings` of 0 alone), `precision`, `opset`, and
        `raised_scales`: for each weight with channels whose scale had to be raised, how many are all `zero`, how many were
        `coarsened`, and the `largest` scale of these before.

    Raises:
        UserError: an unknown precision, Q/DQ in a graph that must have none, another flavour, an opset out of range.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")
    pairs = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if precision != "int8" and pairs:
        raise UserError(
            f"precision {precision}: found {pairs} QuantizeLinear in the graph, expected none; export it as {precision}"
        )
    if opset is None:
        opset = QDQ_OPSET if precision == "int8" else opset_of(model)
    model = _in_opset(onnx.ModelProto.FromString(model.SerializeToString()), opset)
    raised = _store_weights(model, opset)
    report: dict[str, Any] = {"roundings": 0}
    if precision != "fp32":
        model, report = to_fp16(model, feeds, keep_io, geometry)
    onnx.checker.check_model(model, full_check=True)
    return model, {"precision": precision, "opset": opset, **report, "raised_scales": raised}


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph that computes in FP32 what a strongly typed one does, each FP16 tensor rounded through a pair of casts.

    What TensorRT computes lies between the two: it sums in FP32 too, and rounds less often where it fuses. Run it with the
    optimizer off, which keeps the casts.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    store_constants(graph)
    types = {name: kind.elem_type for name, kind in tensor_types(model).items()}
    half, full = TensorProto.FLOAT16, TensorProto.FLOAT
    nodes: list[onnx.NodeProto] = []
    twin = {name: f"{name}/full" for name, kind in types.items() if kind == half}

    def cast(source: str, target: str, to: int) -> None:
        nodes.append(helper.make_node("Cast", [source], [target], to=to))

    values = []
    for value in graph.initializer:
        array = numpy_helper.to_array(value)
        values.append(
            numpy_helper.from_array(array.astype(np.float32), twin[value.name]) if value.name in twin else value
        )
    for value in graph.input:
        if value.name in twin:
            cast(value.name, twin[value.name], full)
    for node in graph.node:
        inputs = [twin.get(name, name) for name in node.input]
        outputs = list(node.output)
        inexact = node.op_type not in EXACT
        for i, name in enumerate(outputs):
            if name in twin:
                outputs[i] = f"{name}/exact" if inexact else twin[name]
        made = onnx.NodeProto.FromString(node.SerializeToString())
        del made.input[:], made.output[:]
        made.input.extend(inputs)
        made.output.extend(outputs)
        for attribute in made.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == half:
                attribute.i = full
            if attribute.name == "value" and attribute.t.data_type == half:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
        nodes.append(made)
        for name, source in zip(node.output, outputs, strict=True):
            if name in twin and inexact:
                cast(source, f"{name}/half", half)
                cast(f"{name}/half", twin[name], full)
    for value in graph.output:
        if value.name in twin:
            cast(twin[value.name], value.name, half)
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(values)
    return model


def _run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    graph = PlainGraph(model.SerializeToString())
    values = graph.run({name: feeds[name].astype(spec.dtype) for name, spec in graph.inputs.items()})
    return {name: value.astype(np.float32) for name, value in values.items()}


def verify_strong(
    model: onnx.ModelProto,
    report: Mapping[str, Any],
    reference: Mapping[str, np.ndarray],
    feeds: Mapping[str, np.ndarray],
    unquantized: Mapping[str, np.ndarray] | None = None,
    where: str = "compare",
) -> dict[str, dict[str, Any]]:
    """Compares a strongly typed graph with the outputs of its module or FP32-typed graph, as `qat.export.verify.verify_part` does.

    Args:
        model, report: results of `to_tensorrt_strong`.
        reference: the outputs to compare with, fake-quantized for a graph with Q/DQ.
        feeds: the inputs of both, in FP32.
        unquantized: for a graph with Q/DQ, the outputs without it.
        where: the frame and the part, for messages.

    Returns:
        for each output: max_abs, cosine, sqnr_db of the graph with every rounding written out (`rounded`); runtime_db, the
        SQNR of the graph as it is; tolerance_db; quantization_db where `unquantized` is given; passed.

    Raises:
        UserError: an output is not finite: a tensor overflows FP16 on this frame.
    """
    simulated, direct = _run(rounded(model), feeds), _run(model, feeds)
    entries: dict[str, dict[str, Any]] = {}
    for name, expected in reference.items():
        entry: dict[str, Any] = dict(compare_tensors(expected, simulated[name], f"{where}: {name}"))
        entry["runtime_db"] = compare_tensors(expected, direct[name], f"{where}: {name}")["sqnr_db"]
        lost = None
        if unquantized is not None:
            lost = entry["quantization_db"] = compare_tensors(
                unquantized[name], expected, f"{where}: {name} quantized"
            )["sqnr_db"]
        entry["tolerance_db"] = tolerance_db(str(report["precision"]), int(report["roundings"]), lost)
        entry["passed"] = min(entry["sqnr_db"], entry["runtime_db"]) >= entry["tolerance_db"]
        entries[name] = entry
    return entries
