"""Computes every tensor inside a graph on given inputs; runs each node once and never holds all tensors in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from qat.core.errors import UserError

BUDGET = 256 << 20  # bytes of tensors that one session returns


def tensor_types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Name → element type and shape of every input, initializer and node output.

    Raises:
        UserError: the graph has an operator whose output types ONNX cannot infer.
    """
    try:
        graph = onnx.shape_inference.infer_shapes(_standard(model), strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise UserError(
            f"ONNX graph: shape inference found {str(error).splitlines()[0]!r}, expected a valid graph"
        ) from error
    found = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output, *graph.value_info)}
    for value in graph.initializer:
        found[value.name] = helper.make_tensor_type_proto(value.data_type, value.dims).tensor_type
    for node in graph.node:
        for name in node.output:
            if name and not found.get(name, onnx.TypeProto.Tensor()).elem_type:
                raise UserError(
                    f"{node.op_type} {node.name or name}: found no type for its output, expected standard ONNX"
                )
    return found


def _standard(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with ONNX Runtime's operators (`qat.export.silu`) replaced by ones with the same types and shapes."""
    if all(node.domain in ("", "ai.onnx") for node in model.graph.node):
        return model
    plain = onnx.ModelProto.FromString(model.SerializeToString())
    for node in plain.graph.node:
        if node.op_type == "QuickGelu":
            node.CopyFrom(helper.make_node("Identity", [node.input[0]], list(node.output), name=node.name))
    return plain


def fixed_inputs(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A copy whose inputs have the shapes of `feeds`, without recorded shapes of intermediate tensors.

    Raises:
        UserError: `feeds` lacks an input.
    """
    fixed = onnx.ModelProto.FromString(model.SerializeToString())
    del fixed.graph.value_info[:]
    stored = {value.name for value in fixed.graph.initializer}
    for value in fixed.graph.input:
        if value.name in stored:
            continue
        if value.name not in feeds:
            raise UserError(
                f"frames: found {', '.join(sorted(feeds)) or 'no tensors'}, expected the input {value.name} too"
            )
        shape = helper.make_tensor_type_proto(value.type.tensor_type.elem_type, feeds[value.name].shape)
        value.type.CopyFrom(shape)
    return fixed


class _Segment:
    """A session of consecutive nodes, with their inputs and all of their outputs."""

    def __init__(
        self, model: onnx.ModelProto, nodes: list[onnx.NodeProto], types: Mapping[str, onnx.TypeProto.Tensor]
    ) -> None:
        stored = {value.name: value for value in model.graph.initializer}
        used = list(dict.fromkeys(name for node in nodes for name in node.input if name))
        self.made = [name for node in nodes for name in node.output if name]
        inner = set(self.made)
        self.takes = [name for name in used if name not in inner and name not in stored]

        def values(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(name, types[name].elem_type, None) for name in names]

        graph = helper.make_graph(
            nodes, "segment", values(self.takes), values(self.made), [stored[name] for name in used if name in stored]
        )
        part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        self.session = ort.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self.session.run(self.made, {name: tensors[name] for name in self.takes})
        return dict(zip(self.made, outputs, strict=True))


def each_tensor(
    model: onnx.ModelProto, feeds: Sequence[Mapping[str, np.ndarray]], budget: int = BUDGET
) -> Iterator[tuple[str, np.ndarray]]:
    """Runs the graph in ONNX Runtime (its optimizer off) and yields every input and every node's output.

    The nodes are cut into segments whose outputs take `budget` bytes at most (one node's may take more). Each segment runs
    once on a frame; between segments only what later ones read is kept.

    Args:
        feeds: one mapping of inputs for each frame, of one shape.

    Yields:
        (tensor's name, its value), frame after frame, in the graph's order.

    Raises:
        UserError: an input is missing from a frame; an operator of unknown type.
    """
    if not feeds:
        return
    model = fixed_inputs(model, feeds[0])
    types = tensor_types(model)

    def size(name: str) -> int:
        if not name:
            return 0
        shape = [max(1, d.dim_value) for d in types[name].shape.dim]
        return int(np.prod(shape)) * helper.tensor_dtype_to_np_dtype(types[name].elem_type).itemsize

    groups: list[list[onnx.NodeProto]] = [[]]
    held = 0
    for node in model.graph.node:
        needs = sum(size(name) for name in node.output)
        if groups[-1] and held + needs > budget:
            groups.append([])
            held = 0
        groups[-1].append(node)
        held += needs
    segments = [_Segment(model, group, types) for group in groups if group]
    last_use = {name: k for k, segment in enumerate(segments) for name in segment.takes}
    for frame in feeds:
        kept: dict[str, np.ndarray] = {}
        for value in model.graph.input:
            if value.name in frame:
                kept[value.name] = np.asarray(frame[value.name])
                yield value.name, kept[value.name]
        for k, segment in enumerate(segments):
            made = segment.run(kept)
            yield from made.items()
            kept.update(made)
            kept = {name: value for name, value in kept.items() if last_use.get(name, -1) > k}
            del made
