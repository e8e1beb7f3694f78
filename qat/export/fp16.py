"""FP16 written into a graph: half-precision types where they hold the values, casts at the borders.

    before   x ─► Conv ─► Relu ─► Softmax ─► y       after   x ─► Cast(16) ─► Conv ─► Relu ─► Cast(32) ─► Softmax ─► y
             w, b in FP32                                    w, b in FP16

A node is either FP16 or FP32. A node stays FP32

- for what it is: softmax and the sums between the last product and it, a layer norm or RMS norm (decomposed or not), a division
  by what a constant below FP16's numbers keeps above zero (x / max(‖x‖, 1e-12)) with the norm in front, operators on
  geometry and indices (ScatterND, ScatterElements, CumSum, Range, GridSample), what is computed from inputs that the
  caller names as geometry, operators without an FP16 form in the graph's opset (QuantizeLinear and DequantizeLinear
  before 19), and what only moves values from one FP32 node to others;
- for its values on the given frames, for every tensor:
  *overflow*, a finite |x| above 65504, FP16's largest number;
  *underflow*: FP16 numbers from 2⁻¹⁴ on are within 2⁻¹¹ of what they round from, so rounding costs at most 2⁻²² of a
  tensor's energy. Below 2⁻¹⁴ the error is absolute, up to 2⁻²⁵, and up to there all is flushed to zero. A tensor underflows
  when those small values lose more than 2⁻²² of its energy, that is, more than rounding may cost a tensor without them:
      Σ_{|x|<2⁻¹⁴} (x − fp16(x))² > 2⁻²² Σ x².
  So a tensor whose values are mostly flushed underflows, and the tail of a softmax next to its peak does not;
- for its constants, by the same two rules;
- for the scale of a Q/DQ pair: below 2⁻¹⁷ half of FP16's spacing (2⁻²⁵) is more than 2⁻⁸ of the scale, half an INT8 step on
  the largest value; above 65504/128 what it dequantizes may overflow, and what reads that stays FP32 too.

Overflows inside an operator (a sum) are not detected; TensorRT sums in FP32 in its convolutions and products.

Why not `onnxruntime.transformers.float16.convert_float_to_float16`, which is well kept and does the types (1.31.1): between
two nodes on its block list the tensor goes through FP16, so an overflow kept in FP32 overflows in the cast after it; a
tensor that two blocked nodes read gets two casts of one name, an invalid graph; a constant that a blocked and another node
share is rounded for both, clipped to ±65504 and raised to 5.96e-8 without a word; a convolution's bias may end up behind a
Cast, which TensorRT's parser no longer takes as weights; its nodes are left unsorted. Each would have to be undone afterwards.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qat.core.errors import UserError
from qat.export.intermediates import each_tensor, tensor_types
from qat.export.lookups import opset_of

LARGEST = 65504.0
NORMAL = 2.0**-14  # the smallest number with all 11 bits
UNIT = 2.0**-11  # unit roundoff
LEAST_SCALE = 2.0**-17
LARGEST_SCALE = LARGEST / 128

KEPT = {
    "Softmax": "softmax",
    "LogSoftmax": "softmax",
    "LayerNormalization": "layer norm",
    "ScatterND": "geometry operator",
    "ScatterElements": "geometry operator",
    "CumSum": "geometry operator",
    "Range": "geometry operator",
    "GridSample": "geometry operator",
}
# They return values of their first input, moved or some of them.
MOVERS = (
    "Concat",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
SUMS = ("Add", "Sub", "Mul", "Div", "Where")  # between a product and a softmax: scale, bias, mask
EXACT = (
    *MOVERS,
    "Relu",
    "MaxPool",
    "Max",
    "Min",
    "Clip",
    "Abs",
    "Neg",
    "Where",
    "QuantizeLinear",
)  # FP16 in, no rounding
ANY_INPUT = ("Cast", "Shape", "Size")  # they accept floats of any type
QDQ = ("QuantizeLinear", "DequantizeLinear")


class _Range:
    """Statistics of a tensor over all frames."""

    def __init__(self) -> None:
        self.max_abs = 0.0  # of the finite values
        self.energy = 0.0
        self.lost = 0.0  # energy of the errors of values below 2^-14 in FP16

    def add(self, value: np.ndarray) -> None:
        magnitude = np.abs(value).ravel()
        largest = float(magnitude.max(initial=0.0))
        if not math.isfinite(largest):  # FP16 has infinities and NaN as well
            magnitude = magnitude[np.isfinite(magnitude)]
            largest = float(magnitude.max(initial=0.0))
        self.max_abs = max(self.max_abs, largest)
        energy = float(np.square(magnitude, dtype=np.float64).sum()) if largest > 1e18 else float(magnitude @ magnitude)
        self.energy += energy
        # Values below 2^-14 lose 2^-25 each at most: with an rms of 2^-14 in all that cannot be 2^-22 of the energy.
        if energy < magnitude.size * NORMAL**2:
            small = magnitude[magnitude < NORMAL].astype(np.float64)
            self.lost += float(np.square(small - small.astype(np.float16)).sum())

    @property
    def reason(self) -> str | None:
        if self.max_abs > LARGEST:
            return "overflow"
        return "underflow" if self.lost > UNIT**2 * self.energy else None


def fits(value: np.ndarray) -> bool:
    """Whether FP16 holds an array, by the rules above."""
    seen = _Range()
    seen.add(np.asarray(value, np.float32))
    return seen.reason is None


def node_name(node: onnx.NodeProto) -> str:
    """A node's name, or that of its first output if it has none."""
    return node.name or next((name for name in node.output if name), node.op_type)


def store_constants(graph: onnx.GraphProto) -> None:
    """Turns float Constant nodes into initializers, so that constants have one form."""
    kept = []
    for node in graph.node:
        value = helper.get_attribute_value(node.attribute[0]) if node.op_type == "Constant" else None
        if isinstance(value, TensorProto) and value.data_type == TensorProto.FLOAT:
            stored = TensorProto.FromString(value.SerializeToString())
            stored.name = node.output[0]
            graph.initializer.append(stored)
        elif node.op_type == "Constant" and node.attribute[0].name in ("value_float", "value_floats"):
            graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), node.output[0]))
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


class _Plan:
    """Chooses the nodes that stay FP32, with reasons."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.opset = opset_of(model)
        self.types = {name: kind.elem_type for name, kind in tensor_types(model).items()}
        self.constants = {
            value.name: numpy_helper.to_array(value)
            for value in model.graph.initializer
            if value.data_type == TensorProto.FLOAT
        }
        self.producer = {name: k for k, node in enumerate(model.graph.node) for name in node.output if name}
        self.consumers: dict[str, list[int]] = defaultdict(list)
        for k, node in enumerate(model.graph.node):
            for name in node.input:
                self.consumers[name].append(k)
        self.reasons: dict[int, tuple[str, str]] = {}  # node → reason, tensor
        self.half_inputs: dict[int, list[int]] = {}
        for k, node in enumerate(model.graph.node):
            self._formal_types(k, node)

    def is_float(self, name: str) -> bool:
        return bool(name) and self.types.get(name) == TensorProto.FLOAT

    def keep(self, k: int, reason: str, tensor: str = "") -> None:
        if k in self.half_inputs:
            self.reasons.setdefault(k, (reason, tensor))

    def _formal_types(self, k: int, node: onnx.NodeProto) -> None:
        """Reads from the operator's schema which of its inputs can be FP16."""
        floats = [name for name in (*node.input, *node.output) if self.is_float(name)]
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise UserError(
                f"{node_name(node)}: found {node.op_type} with a graph inside, expected a graph without branches"
            )
        if not floats or (all(not self.is_float(name) for name in node.output) and node.op_type in ANY_INPUT):
            return
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        except onnx.defs.SchemaError as error:
            raise UserError(f"{node_name(node)}: found the operator {node.op_type}, expected one of ONNX's") from error

        def halves(names: Sequence[str], formals: Sequence[Any]) -> list[int]:
            return [
                i
                for i, name in enumerate(names)
                if self.is_float(name) and "tensor(float16)" in formals[min(i, len(formals) - 1)].types
            ]

        taken = halves(node.input, schema.inputs) if node.input else []
        if node.op_type in ANY_INPUT:
            taken = []
        self.half_inputs[k] = taken
        outputs = [i for i, name in enumerate(node.output) if self.is_float(name)]
        first = next((i for i, name in enumerate(node.input) if self.is_float(name)), None)
        if halves(node.output, schema.outputs) != outputs or (
            first is not None and first not in taken and node.op_type not in ANY_INPUT
        ):
            self.keep(k, f"no FP16 form in opset {self.opset}")

    def softmax(self) -> None:
        """The sums between the last product and a softmax."""

        sums: dict[int, bool] = {}  # node → whether it is such a sum or moves the result of one

        def above(name: str) -> bool:
            k = self.producer.get(name)
            if k is None or not self.is_float(name):
                return False
            if k not in sums:
                node = self.graph.node[k]
                walked = node.op_type in (*SUMS, *MOVERS)
                found = [above(source) for source in node.input] if walked else []
                sums[k] = node.op_type in SUMS or any(found)
                if sums[k]:
                    self.keep(k, "softmax")
            return sums[k]

        for node in self.graph.node:
            if KEPT.get(node.op_type) == "softmax":
                above(node.input[0])

    def operators(self) -> None:
        for k, node in enumerate(self.graph.node):
            if node.op_type in KEPT:
                self.keep(k, KEPT[node.op_type])

    def _made_by(self, name: str, *operators: str) -> int | None:
        k = self.producer.get(name)
        return k if k is not None and self.graph.node[k].op_type in operators else None

    def _users(self, name: str, *operators: str) -> list[int]:
        return [k for k in self.consumers[name] if self.graph.node[k].op_type in operators]

    def layer_norms(self) -> None:
        """x − mean, its square's mean, + eps, √, the division (or the product with 1/√), and the affine pair behind it; an RMS
        norm has no mean."""
        nodes = self.graph.node
        for k, node in enumerate(nodes):
            if node.op_type != "Sqrt" or (plus := self._made_by(node.input[0], "Add")) is None:
                continue
            variance = next((m for i in nodes[plus].input if (m := self._made_by(i, "ReduceMean")) is not None), None)
            square = self._made_by(nodes[variance].input[0], "Pow", "Mul") if variance is not None else None
            if variance is None or square is None:
                continue
            members = [square, variance, plus, k]
            squared = nodes[square].input[0]
            if (centred := self._made_by(squared, "Sub")) is not None:
                mean = self._made_by(nodes[centred].input[1], "ReduceMean")
                members += [centred] if mean is None else [mean, centred]
            for divide in self._users(node.output[0], "Div", "Reciprocal"):
                members.append(divide)
                inverse = nodes[divide].op_type == "Reciprocal" or nodes[divide].input[0] in self.constants
                for behind in self._users(nodes[divide].output[0], "Mul") if inverse else [divide]:
                    members += [behind, *self._affine(behind)]
            for member in members:
                self.keep(member, "layer norm")

    def _affine(self, k: int) -> list[int]:
        """The product with a constant and the sum with one after a node, if nothing else reads it."""
        found = []
        for operator in ("Mul", "Add"):
            users = [
                user
                for user in self._users(self.graph.node[k].output[0], operator)
                if any(name in self.constants for name in self.graph.node[user].input)
            ]
            if len(users) == 1:
                k = users[0]
                found.append(k)
        return found

    def guarded_divisions(self) -> None:
        """A division whose divisor a constant keeps above zero, if that constant is zero in FP16: x / max(‖x‖, 1e-12) would be
        0/0 for a row of zeros. The norm before it stays FP32 too: its squares may be flushed to zero. After `stored_values`."""
        nodes = self.graph.node
        for k, node in enumerate(nodes):
            if node.op_type != "Div":
                continue
            at = self.producer.get(node.input[1])
            while at is not None and nodes[at].op_type in MOVERS:
                at = self.producer.get(nodes[at].input[0])
            if at is None or self.reasons.get(at, ("", ""))[0] != "constant underflow":
                continue
            self.keep(k, "division")
            norm = self._made_by(nodes[at].input[0], "ReduceL1", "ReduceL2", "Sqrt")
            while norm is not None:
                self.keep(norm, "division")
                norm = self._made_by(nodes[norm].input[0], "ReduceSum", "ReduceMean", "Pow", "Mul")

    def from_geometry(self, geometry: Collection[str]) -> None:
        """Nodes computed only from geometry. Where geometry is combined with features it has become weights or a mask; a
        convolution of it gives features."""
        derived = set(geometry)
        for k, node in enumerate(self.graph.node):
            sources = [name for name in node.input if self.is_float(name) and name not in self.constants]
            if sources and node.op_type != "Conv" and all(name in derived for name in sources):
                self.keep(k, "geometry")
                derived.update(name for name in node.output if self.is_float(name))

    def stored_values(self) -> None:
        """Scales and other constants."""
        for k, node in enumerate(self.graph.node):
            scale = node.input[1] if node.op_type in QDQ else None
            if scale is not None:
                value = self.constants.get(scale)
                if value is None or value.min() < LEAST_SCALE or value.max() > LARGEST_SCALE:
                    self.keep(k, "scale", scale)
            for i in self.half_inputs.get(k, ()):
                name = node.input[i]
                if name != scale and name in self.constants:
                    seen = _Range()
                    seen.add(self.constants[name])
                    if seen.reason:
                        self.keep(k, f"constant {seen.reason}", name)

    def seen_values(self, ranges: Mapping[str, _Range]) -> None:
        for k, node in enumerate(self.graph.node):
            for name in (*(node.input[i] for i in self.half_inputs.get(k, ())), *node.output):
                if self.is_float(name) and name in ranges and (reason := ranges[name].reason):
                    self.keep(k, reason, name)

    def full_codes(self) -> None:
        """Nodes that read, or pass on, the largest code of a DequantizeLinear whose scale makes it overflow: it may occur in
        frames other than the given ones."""
        bounds: dict[str, float] = {}
        for k, node in enumerate(self.graph.node):
            if node.op_type == "DequantizeLinear":
                scale = self.constants.get(node.input[1])
                bound = 0.0 if scale is None else float(scale.max(initial=0)) * 128
            else:
                bound = max((bounds.get(name, 0.0) for name in node.input), default=0.0)
                if bound > LARGEST:
                    self.keep(k, "overflow", next(name for name in node.input if bounds.get(name, 0.0) == bound))
                if node.op_type not in (*EXACT, "AveragePool"):
                    continue
            bounds.update((name, bound) for name in node.output if self.is_float(name))

    def between(self, full_outputs: Collection[str]) -> None:
        """Nodes that only move values between FP32 nodes: a detour through FP16 would only round them."""
        for k in reversed(range(len(self.graph.node))):
            node = self.graph.node[k]
            if node.op_type not in MOVERS or k not in self.half_inputs or k in self.reasons:
                continue
            sources = [name for name in node.input if self.is_float(name) and name not in self.constants]
            readers = [r for name in node.output for r in self.consumers[name]]
            if (
                all(self._full_behind(name) for name in sources)
                and all(r in self.reasons for r in readers)
                and all(name in full_outputs or self.consumers[name] for name in node.output if name)
            ):
                self.keep(k, "between FP32 nodes")

    def _full_behind(self, name: str) -> bool:
        k = self.producer.get(name)
        if k is None:
            return False
        node = self.graph.node[k]
        if k in self.reasons:
            return True
        return node.op_type in MOVERS and all(
            self._full_behind(i) for i in node.input if self.is_float(i) and i not in self.constants
        )


class _Rewriter:
    """Writes the planned types into the graph."""

    def __init__(self, plan: _Plan, full: Collection[str]) -> None:
        self.plan = plan
        self.graph = plan.graph
        self.full = set(full)  # inputs and outputs that stay FP32
        self.taken = set(plan.types)
        self.kind: dict[str, int] = {}  # tensor → FLOAT or FLOAT16
        self.actual: dict[str, str] = {}  # output → its name at its node, if a cast follows
        self.casts: dict[tuple[str, int], str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[tuple[str, int], str] = {}
        self.cast_count = 0

    def _new_name(self, name: str, kind: int) -> str:
        stem = f"{name}_{'fp16' if kind == TensorProto.FLOAT16 else 'fp32'}"
        new, count = stem, 1
        while new in self.taken:
            count += 1
            new = f"{stem}_{count}"
        self.taken.add(new)
        return new

    def _cast(self, source: str, target: str, kind: int) -> None:
        self.nodes.append(helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=kind))
        self.cast_count += 1

    def _read(self, name: str, kind: int) -> str:
        """The name of a tensor as FLOAT or FLOAT16."""
        if name in self.plan.constants:
            return self.stored.setdefault((name, kind), name)  # the two forms are distinguished at the end
        if self.kind[name] == kind:
            return self.actual.get(name, name)
        if (name, kind) not in self.casts:
            self.casts[name, kind] = self._new_name(name, kind)
            self._cast(self.actual.get(name, name), self.casts[name, kind], kind)
        return self.casts[name, kind]

    def _split_constants(self) -> dict[tuple[str, int], str]:
        """Names of the constants that both precisions read: FP32 keeps it."""
        read: dict[str, set[int]] = defaultdict(set)
        for k, node in enumerate(self.graph.node):
            for i, name in enumerate(node.input):
                if name in self.plan.constants:
                    half = k not in self.plan.reasons and i in self.plan.half_inputs.get(k, ())
                    read[name].add(TensorProto.FLOAT16 if half else TensorProto.FLOAT)
        for value in self.graph.output:
            if value.name in self.plan.constants:
                read[value.name].add(TensorProto.FLOAT)
        return {
            (name, kind): name if kind == TensorProto.FLOAT or len(kinds) == 1 else self._new_name(name, kind)
            for name, kinds in read.items()
            for kind in sorted(kinds)
        }

    def write(self) -> None:
        plan, graph = self.plan, self.graph
        self.stored = self._split_constants()
        for value in graph.input:
            if plan.is_float(value.name) and value.name not in plan.constants:
                kind = TensorProto.FLOAT if value.name in self.full else TensorProto.FLOAT16
                value.type.tensor_type.elem_type = self.kind[value.name] = kind
        outputs = {value.name: value for value in graph.output if plan.is_float(value.name)}
        for name, value in outputs.items():
            value.type.tensor_type.elem_type = TensorProto.FLOAT if name in self.full else TensorProto.FLOAT16
        for k, node in enumerate(list(graph.node)):
            half = k in plan.half_inputs and k not in plan.reasons
            kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            inputs = list(node.input)
            for i, name in enumerate(inputs):
                if not plan.is_float(name):
                    continue
                if node.op_type in ANY_INPUT and name not in plan.constants:
                    inputs[i] = self.actual.get(name, name)
                else:
                    taken = i in plan.half_inputs.get(k, ())
                    inputs[i] = self._read(name, kind if taken else TensorProto.FLOAT)
            made = onnx.NodeProto.FromString(node.SerializeToString())
            del made.input[:]
            made.input.extend(inputs)
            if half:
                self._set_type(made)
            self.nodes.append(made)
            for i, name in enumerate(node.output):
                if not plan.is_float(name):
                    continue
                self.kind[name] = kind
                if name in outputs and outputs[name].type.tensor_type.elem_type != kind:
                    declared = outputs[name].type.tensor_type.elem_type
                    self.actual[name] = made.output[i] = self._new_name(name, kind)
                    self._cast(made.output[i], name, declared)
                    self.casts[name, declared] = name
        self._replace()

    @staticmethod
    def _set_type(node: onnx.NodeProto) -> None:
        """Types that an operator keeps in an attribute."""
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
            if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float16)))
        if node.op_type == "ConstantOfShape" and not node.attribute:
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.zeros(1, np.float16))))

    def _replace(self) -> None:
        graph = self.graph
        values = []
        for value in graph.initializer:
            if value.name not in self.plan.constants:
                values.append(value)
        for (name, kind), stored in self.stored.items():
            array = self.plan.constants[name]
            values.append(
                numpy_helper.from_array(array.astype(np.float16) if kind == TensorProto.FLOAT16 else array, stored)
            )
        for_inputs = [value for value in graph.input if value.name not in self.plan.constants]
        del graph.node[:], graph.initializer[:], graph.value_info[:], graph.input[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(values)
        graph.input.extend(for_inputs)


def rounding_count(model: onnx.ModelProto) -> int:
    """The most roundings to FP16 that a value passes through from a graph's inputs to its outputs.

    One for each FP16 operator that computes (not those that move or select values), for each FP16 constant that enters it,
    for each cast to FP16.
    """
    types = {name: kind.elem_type for name, kind in tensor_types(model).items()}
    constants = {value.name for value in model.graph.initializer}
    # A weight after its DequantizeLinear is a constant too, with its own roundings.
    depth = {name: int(types[name] == TensorProto.FLOAT16) for name in constants}
    for node in model.graph.node:
        fixed = [name for name in node.input if name in constants]
        own = 0
        if any(types.get(name) == TensorProto.FLOAT16 for name in node.output):
            own = int(node.op_type not in EXACT and node.op_type != "DequantizeLinear")
            own += sum(depth[name] for name in fixed)
        if fixed and len(fixed) == sum(map(bool, node.input)):
            constants.update(node.output)
        deepest = max((depth.get(name, 0) for name in node.input if name not in constants), default=0)
        depth.update((name, deepest + own) for name in node.output)
    return max((depth.get(value.name, 0) for value in model.graph.output), default=0)


def to_fp16(
    model: onnx.ModelProto,
    feeds: Sequence[Mapping[str, np.ndarray]],
    keep_io: bool = True,
    geometry: Collection[str] = (),
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A graph with FP16 types wherever they hold its values; the argument is not changed. Same input, same bytes.

    Args:
        model: an FP32-typed graph.
        feeds: for each frame, the graph's inputs. Without frames only constants and operators decide.
        keep_io: whether inputs and outputs stay FP32; otherwise they become FP16, except those that do not fit.
        geometry: inputs (or tensors) that hold matrices or coordinates: they and what is computed only from them stay FP32.

    Returns:
        the graph, and the report: `frames`; `nodes` that compute in floats; `fp16` of them; `fp32`, for each of the others
        its node, operator, reason, tensor (the one that is the reason, if any), and max_abs, the largest
        magnitude of its inputs and outputs; `fp32_io`, inputs and outputs that keep_io=False could not make FP16; `casts`;
        `largest_fp16`, the largest magnitude of a tensor in FP16, with its name; `roundings` as `rounding_count` has it.

    Raises:
        UserError: an operator that is not ONNX's, a nested graph, an unknown geometry name, an input missing in a frame.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    del model.graph.value_info[:]
    store_constants(model.graph)
    plan = _Plan(model)
    unknown = sorted(set(geometry) - set(plan.types))
    if unknown:
        raise UserError(f"geometry: found {', '.join(unknown)}, expected names of the graph's tensors")
    ranges: dict[str, _Range] = defaultdict(_Range)
    for name, value in each_tensor(model, feeds):
        if value.dtype == np.float32:
            ranges[name].add(value)
    plan.operators()
    plan.softmax()
    plan.layer_norms()
    plan.from_geometry(geometry)
    plan.stored_values()
    plan.guarded_divisions()
    plan.seen_values(ranges)
    plan.full_codes()
    io = [v.name for v in (*model.graph.input, *model.graph.output) if plan.is_float(v.name)]
    misfits = {name for name in io if name in geometry or name in plan.constants or ranges[name].reason}
    full = set(io) if keep_io else misfits
    plan.between(full & {value.name for value in model.graph.output})

    def largest(names: Sequence[str]) -> float:
        stored = (float(np.abs(plan.constants[n]).max(initial=0)) for n in names if n in plan.constants)
        return max((*stored, *(ranges[n].max_abs for n in names if n in ranges)), default=0.0)

    kept = []
    halves: list[str] = []
    for k, node in enumerate(model.graph.node):
        if k in plan.reasons:
            reason, tensor = plan.reasons[k]
            entry = {"node": node_name(node), "operator": node.op_type, "reason": reason}
            floats = [name for name in (*node.input, *node.output) if plan.is_float(name)]
            kept.append({**entry, **({"tensor": tensor} if tensor else {}), "max_abs": largest(floats)})
        elif k in plan.half_inputs:
            halves += [name for name in node.output if plan.is_float(name)]
    top = max(halves, key=lambda name: largest([name]), default=None)
    computing = len(plan.half_inputs)
    rewriter = _Rewriter(plan, full)
    rewriter.write()
    onnx.checker.check_model(model, full_check=True)
    report = {
        "frames": len(feeds),
        "nodes": computing,
        "fp16": computing - len(kept),
        "fp32": kept,
        "fp32_io": [] if keep_io else sorted(misfits),
        "casts": rewriter.cast_count,
        "largest_fp16": None if top is None else {"tensor": top, "max_abs": largest([top])},
        "roundings": rounding_count(model),
    }
    return model, report
