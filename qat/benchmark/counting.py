"""Multiply-accumulates and bytes of an ONNX graph: what a roofline is drawn from. Needs the onnx package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qat.core.errors import UserError
from qat.core.onnx_file import load_graph

if TYPE_CHECKING:
    import onnx

COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# A rounded value that goes through these is still on its scale.
_PASSES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "MaxPool", "Resize", "Slice", "Pad")
# What every backend computes within the layer before it: the value between is not written to memory.
_FUSED = (
    "Relu",
    "Clip",
    "Add",
    "LeakyRelu",
    "Sigmoid",
    "Mul",
    "HardSwish",
    "HardSigmoid",
    "BatchNormalization",
    "Cast",
)


@dataclass(frozen=True)
class Layer:
    """One counted operator. precision: what it multiplies in, by the graph. bytes: its inputs', weights' and output's."""

    name: str
    type: str
    precision: str
    macs: int
    bytes: int


@dataclass
class Count:
    """Of a graph: macs by precision, bytes of all counted layers."""

    layers: list[Layer] = field(default_factory=list)

    @property
    def macs(self) -> dict[str, int]:
        """By precision."""
        found: dict[str, int] = {}
        for layer in self.layers:
            found[layer.precision] = found.get(layer.precision, 0) + layer.macs
        return found

    @property
    def bytes(self) -> int:
        """Read and written by the counted layers."""
        return sum(layer.bytes for layer in self.layers)


class _Graph:
    """Shapes, types, producers and consumers of a graph's values."""

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        for value in model.graph.input:
            for dim in value.type.tensor_type.shape.dim:
                if not dim.HasField("dim_value"):  # a batch of any size: timed as one
                    dim.Clear()
                    dim.dim_value = 1
        # What an earlier inference left of another batch would contradict it.
        del model.graph.value_info[:]
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self.nodes = list(graph.node)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, int] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            self.types[value.name] = tensor.elem_type
            dims = tensor.shape.dim if tensor.HasField("shape") else []
            if tensor.HasField("shape") and all(d.HasField("dim_value") for d in dims):
                self.shapes[value.name] = tuple(d.dim_value for d in dims)
        for constant in graph.initializer:
            self.shapes[constant.name] = tuple(constant.dims)
            self.types[constant.name] = constant.data_type
        self.constants = {constant.name for constant in graph.initializer}
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}

    def elements(self, name: str) -> int:
        return int(np.prod(self.shapes[name], dtype=np.int64))

    def width(self, name: str) -> int:
        """Bytes of one element as it is typed."""
        import onnx

        return int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.types[name])).itemsize)

    def rounded(self, name: str) -> bool:
        """Whether the value comes out of a DequantizeLinear, or through operators that keep it on its scale."""
        node = self.producer.get(name)
        if node is None:
            return False
        if node.op_type == "DequantizeLinear":
            return True
        if node.op_type == "Concat":
            return all(self.rounded(source) for source in node.input)
        return node.op_type in _PASSES and self.rounded(node.input[0])

    def written_rounded(self, name: str) -> bool:
        """Whether what is written of an output is its 8-bit form: all that is done with it, up to there, is fused."""
        following = self.consumers.get(name, [])
        if not following or name in self.outputs:
            return False
        if all(node.op_type == "QuantizeLinear" for node in following):
            return True
        return len(following) == 1 and following[0].op_type in _FUSED and self.written_rounded(following[0].output[0])


def _macs(graph: _Graph, node: onnx.NodeProto) -> int:
    if node.op_type == "Conv":  # weight [O, I/groups, …]
        return graph.elements(node.output[0]) * int(np.prod(graph.shapes[node.input[1]][1:]))
    if node.op_type == "ConvTranspose":  # weight [I, O/groups, …]: each input value meets its channel's weights
        return graph.elements(node.input[0]) * int(np.prod(graph.shapes[node.input[1]][1:]))
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return graph.elements(node.output[0]) * graph.shapes[node.input[0]][0 if transposed else 1]
    return graph.elements(node.output[0]) * graph.shapes[node.input[0]][-1]


def count_graph(path: Path, float_precision: str = "fp32") -> Count:
    """Counts Conv, ConvTranspose, Gemm and MatMul; a dimension that may vary is taken as 1.

    A layer is INT8 where both its input and its weight come out of DequantizeLinear. Bytes are those of the layer's inputs,
    weights, bias and output, each once, at 1 byte where it is rounded; element-wise operators between a layer and the
    QuantizeLinear behind it count as fused. What no such layer reads or writes is not counted.

    Args:
        path: the graph's file.
        float_precision: what float layers run in; "fp16" for an FP32-typed graph that is built with an FP16 flag.

    Raises:
        UserError: no ONNX file, or the shapes of a counted layer do not follow from it.
    """
    model = load_graph(path)
    try:
        return _count(_Graph(model), path, float_precision)
    except UserError:
        raise
    except Exception as error:  # of onnx's shape inference, and what a graph that it passes over can still lack
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{path}: not a graph whose layers can be counted: {why}") from None


def _count(graph: _Graph, path: Path, float_precision: str) -> Count:
    import onnx

    layers = []
    for node in graph.nodes:
        if node.op_type not in COUNTED:
            continue
        names = [name for name in (*node.input, node.output[0]) if name]
        if missing := [name for name in names if name not in graph.shapes or name not in graph.types]:
            raise UserError(
                f"{path}: {node.op_type} {node.name or node.output[0]}: found no shape of {missing[0]}, expected one that "
                "follows from the inputs; export again without dynamic axes"
            )
        integer = graph.rounded(node.input[0]) and graph.rounded(node.input[1])
        half = graph.types[node.output[0]] == onnx.TensorProto.FLOAT16 or float_precision == "fp16"

        def size(name: str, rounded: bool, half: bool = half) -> int:
            return graph.elements(name) * (1 if rounded else 2 if half else graph.width(name))

        total = sum(size(name, graph.rounded(name)) for name in node.input[:2])
        total += sum(graph.elements(name) * graph.width(name) for name in node.input[2:] if name)
        total += size(node.output[0], graph.written_rounded(node.output[0]))
        precision = "int8" if integer else "fp16" if half else "fp32"
        layers.append(Layer(node.name or node.output[0], node.op_type, precision, _macs(graph, node), total))
    return Count(layers)


def roofline_ms(
    macs: Mapping[str, int], size: int, peaks: Mapping[str, float], bandwidth: float | None
) -> tuple[float, str] | None:
    """The least time that a machine could take: all its multiply-accumulates at their precision's peak, or all bytes at its
    bandwidth, whichever is longer (Williams, Waterman and Patterson's roofline, CACM 2009).

    Args:
        macs: by precision.
        size: bytes.
        peaks: 10⁹ multiply-accumulates a second, by precision.
        bandwidth: 10⁹ bytes a second; None where it is not known.

    Returns:
        milliseconds, and "compute" or "memory"; None where a peak is missing.
    """
    if not macs or any(not peaks.get(precision) for precision in macs):
        return None
    compute = sum(count / peaks[precision] for precision, count in macs.items()) / 1e6
    memory = 0.0 if bandwidth is None else size / bandwidth / 1e6
    return (compute, "compute") if compute >= memory else (memory, "memory")


def count_parts(files: Mapping[str, Path | None], float_precision: str) -> dict[str, Count] | str:
    """A `Count` of each part by its graph's file (None: not at hand), or why there is none; raises as `count_graph` does."""
    try:
        import onnx  # noqa: F401
    except ModuleNotFoundError:
        return "the package onnx is not installed"
    found = {}
    for name, file in files.items():
        if file is None:
            return f"the graph that {name} was built from is not among the folders"
        found[name] = count_graph(file, float_precision)
    return found
