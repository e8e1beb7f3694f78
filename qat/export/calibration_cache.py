"""INT8 scales as a TensorRT calibration cache, for builders that quantize implicitly (DLA, TensorRT 8 to 10).

The file is text. Its first line names the TensorRT version and the calibrator; each further one a tensor and its scale,
amax/127, as the eight hexadecimal digits of an IEEE float32, most significant first:

    TRT-8503-EntropyCalibration2
    images: 3c010a14

It goes with a graph without Q/DQ: the builder looks scales up by tensor name, and a tensor without one runs in a float type.
Weights are not in it, for the builder takes their scales from the weights.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qat.core.errors import UserError
from qat.core.files import write_text
from qat.export.lookups import constants, consumers

HEADER = re.compile(r"TRT-(\d+)-(\w+)")
LINE = re.compile(r"(.+): ([0-9a-fA-F]{8})")
REORDERS = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity")  # the same values in another place
SELECTS = ("MaxPool", "Slice", "Split", "Gather")  # some of them


def _pairs(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, list[onnx.NodeProto]]]:
    """Each QuantizeLinear with its DequantizeLinear.

    Raises:
        UserError: another flavour than tensorrt.
    """
    known, readers = constants(model.graph), consumers(model.graph)
    pairs = []
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in known:
            raise UserError(f"{node.name}: found weights stored as integers, expected the tensorrt flavour")
        if node.op_type != "QuantizeLinear":
            continue
        zero = known.get(node.input[2]) if len(node.input) > 2 else None
        behind = readers[node.output[0]]
        if zero is None or zero.dtype != np.int8 or zero.any() or node.input[1] not in known:
            raise UserError(f"{node.name}: found another zero point than 0 in s8, expected the tensorrt flavour")
        if any(reader.op_type != "DequantizeLinear" for reader in behind):
            raise UserError(
                f"{node.name}: found its integers read by {behind[0].op_type}, expected DequantizeLinear alone"
            )
        pairs.append((node, behind))
    return pairs


def _keeps_range(node: onnx.NodeProto) -> bool:
    if node.op_type == "Resize":  # cubic interpolation overshoots
        return all(a.s != b"cubic" for a in node.attribute if a.name == "mode")
    return node.op_type in (*REORDERS, *SELECTS, "Concat")


def strip_qdq(int8_model: onnx.ModelProto) -> onnx.ModelProto:
    """A `tensorrt`-flavoured graph without its Q/DQ pairs, tensor names as they were; the argument is left as it is.

    Raises:
        UserError: another flavour.
    """
    model = onnx.ModelProto.FromString(int8_model.SerializeToString())
    graph = model.graph
    source: dict[str, str] = {}
    removed = set()
    for quantize, behind in _pairs(model):
        removed.add(quantize.output[0])
        for dequantize in behind:
            source[dequantize.output[0]] = quantize.input[0]
            removed.add(dequantize.output[0])

    def origin(name: str) -> str:
        while name in source:  # a pair may read another's output
            name = source[name]
        return name

    outputs = {value.name for value in graph.output}
    nodes = []
    for node in graph.node:
        if removed.intersection(node.output):
            for name in outputs.intersection(node.output):
                nodes.append(onnx.helper.make_node("Identity", [origin(name)], [name], name=f"{name}_identity"))
            continue
        for i, name in enumerate(node.input):
            node.input[i] = origin(name)
        nodes.append(node)
    used = {name for node in nodes for name in node.input} | outputs
    nodes = [node for node in nodes if node.op_type != "Constant" or node.output[0] in used]
    values = [value for value in graph.initializer if value.name in used]
    kept = {name for node in nodes for name in node.output}
    infos = [value for value in graph.value_info if value.name in kept]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(values)
    graph.value_info.extend(infos)
    onnx.checker.check_model(model, full_check=True)
    return model


def activation_scales(int8_model: onnx.ModelProto) -> dict[str, float]:
    """The scale of each tensor that a `tensorrt`-flavoured graph quantizes, by the tensor's name in `strip_qdq`'s graph.

    The scale is handed on where it holds for a neighbour too, for a builder needs one on every tensor that is to be INT8:
    to what moves, selects or interpolates values, to a concatenation of tensors of one scale; and back to what is only
    moved, to what only a ReLU reads (it cuts the rest off), to what only a resize or, behind a ReLU, a max-pooling reads. So
    the network's input has a scale where the first thing done to it is a reshape. A tensor quantized in two ways takes the
    larger scale, which clips nothing.

    Raises:
        UserError: another flavour.
    """
    known = constants(int8_model.graph)
    pairs = _pairs(int8_model)
    source = {dequantize.output[0]: quantize.input[0] for quantize, behind in pairs for dequantize in behind}
    scales: dict[str, float] = {}
    for quantize, _ in pairs:
        name = quantize.input[0]
        while name in source:
            name = source[name]
        if name not in known:
            scales[name] = max(scales.get(name, 0.0), float(known[quantize.input[1]].reshape(-1).max()))
    nodes = strip_qdq(int8_model).graph.node
    made_by = {name: node.op_type for node in nodes for name in node.output}
    readers = Counter(name for node in nodes for name in node.input)
    for node in reversed(nodes):
        before = node.input[0] if node.input else ""
        if node.op_type in REORDERS:
            back = True
        elif readers[before] == 1:
            pooled = node.op_type == "MaxPool" and made_by.get(before) == "Relu"
            back = node.op_type == "Relu" or pooled or (node.op_type == "Resize" and _keeps_range(node))
        else:
            back = False
        if back and before not in known and node.output[0] in scales:
            scales.setdefault(before, scales[node.output[0]])
    for node in nodes:
        data = list(node.input) if node.op_type == "Concat" else list(node.input[:1])
        found = {scales.get(name) for name in data}
        if len(found) == 1 and None not in found and _keeps_range(node):
            for name in node.output:
                scales.setdefault(name, scales[data[0]])
    return scales


def write_calibration_cache(
    int8_model: onnx.ModelProto,
    float_model: onnx.ModelProto,
    path: str | Path,
    version: int = 8503,
) -> dict[str, Any]:
    """Writes the scales of an INT8 graph for the graph without Q/DQ that lies beside it.

    Args:
        int8_model: of the `tensorrt` flavour.
        float_model: the graph that the builder will be given: `strip_qdq(int8_model)`, or an export without Q/DQ of the same
            quantized detector if its tensors have the same names.
        path: the file.
        version: of TensorRT, as its header has it: 8503 for 8.5.3, 100300 for 10.3.

    Returns:
        `tensors`, how many have a scale; `missing`, the tensors without one, which run in FP16 or FP32 (a convolution
        before a residual add, what stays float).

    Raises:
        UserError: another flavour, nothing quantized, a name that `float_model` lacks or that the format cannot hold.
    """
    scales = activation_scales(int8_model)
    if not scales:
        raise UserError(f"{path}: found no Q/DQ pair on an activation, expected an INT8 graph")
    if any(node.op_type == "QuantizeLinear" for node in float_model.graph.node):
        raise UserError(f"{path}: found Q/DQ in the graph to go with the cache, expected none; use strip_qdq")
    stored = set(constants(float_model.graph))
    names = [value.name for value in float_model.graph.input if value.name not in stored]
    names += [name for node in float_model.graph.node if node.op_type != "Constant" for name in node.output if name]
    strangers = [name for name in scales if name not in set(names)]
    if strangers:
        raise UserError(
            f"{path}: found no tensor {strangers[0]!r} in the float graph ({len(strangers)} such names), "
            "expected the INT8 graph's names; use strip_qdq"
        )
    lines = [f"TRT-{version}-EntropyCalibration2"]
    for name in names:
        if name in scales:
            if any(c in name for c in "\n\r") or ": " in name:
                raise UserError(f"{path}: found a line break or ': ' in the tensor name {name!r}, expected none")
            lines.append(f"{name}: {struct.pack('>f', scales[name]).hex()}")
    write_text(path, "\n".join(lines) + "\n")
    return {"tensors": len(lines) - 1, "missing": [name for name in names if name not in scales]}


def read_calibration_cache(path: str | Path) -> tuple[str, dict[str, float]]:
    """The header and each tensor's scale.

    Raises:
        UserError: no such file, another format, a scale that is not positive and finite, a tensor named twice.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: found no readable file ({error.strerror}), expected a calibration cache") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: found bytes that are no text, expected a calibration cache") from error
    if not lines or not HEADER.fullmatch(lines[0]):
        found = repr(lines[0][:60]) if lines else "an empty file"
        raise UserError(f"{path}: found {found}, expected a first line such as TRT-8503-EntropyCalibration2")
    scales: dict[str, float] = {}
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        match = LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{path}:{number}: found {line[:60]!r}, expected NAME: eight hexadecimal digits")
        name = match[1]
        (scale,) = struct.unpack(">f", bytes.fromhex(match[2]))
        if not (np.isfinite(scale) and scale > 0):
            raise UserError(f"{path}:{number}: found the scale {scale} for {name}, expected a positive number")
        if name in scales:
            raise UserError(f"{path}:{number}: found {name} a second time, expected each tensor once")
        scales[name] = scale
    return lines[0], scales
