"""Reads an ONNX file without the onnx package: types, opset, quantized nodes.

A Jetson with TensorRT and numpy has no onnx package, and needs none for building. This module reads the few required fields
from protobuf's wire format (varint keys: field number · 8 + wire type; https://protobuf.dev/programming-guides/encoding) with
the field numbers of onnx.proto. Tensor data is skipped, never copied.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qat.core.errors import UserError
from qat.core.files import is_inside

if TYPE_CHECKING:
    import onnx

FLOAT16, INT8, UINT8 = 10, 3, 2  # of onnx.TensorProto.DataType
MOST_OPSET = 1000  # any domain's; ONNX 1.23 is at 28
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators that do not change values: they may lie between a weight's Q/DQ pair and its consumer.
PASSES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast")


@dataclass
class Node:
    """An operator. name: may be empty. cast: the target type of a Cast, 0 elsewhere."""

    name: str = ""
    kind: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    cast: int = 0

    @property
    def label(self) -> str:
        """The node's name in TensorRT's parser: its own, or else its first output's."""
        return self.name or f"node_of_{self.outputs[0] if self.outputs else self.kind}"


@dataclass
class Outline:
    """A graph without its numbers.

    inputs: names in order, without initializers. types: of initializers and constants by name, as ONNX numbers them.
    dynamic: inputs with an axis that has no fixed size.
    """

    opset: int = 0
    nodes: list[Node] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    dynamic: list[str] = field(default_factory=list)
    types: dict[str, int] = field(default_factory=dict)
    io_types: dict[str, int] = field(default_factory=dict)

    @property
    def has_qdq(self) -> bool:
        """Whether anything is quantized explicitly."""
        return any(node.kind in ("QuantizeLinear", "DequantizeLinear") for node in self.nodes)

    @property
    def has_fp16(self) -> bool:
        """Whether the graph has FP16: in a weight, an input or output, or a cast."""
        types = {*self.types.values(), *self.io_types.values(), *(node.cast for node in self.nodes)}
        return FLOAT16 in types

    @property
    def stores_int8(self) -> bool:
        """Whether weights are integers followed by a DequantizeLinear, as in the `tensorrt-strong` flavour."""
        return any(
            node.kind == "DequantizeLinear" and node.inputs and self.types.get(node.inputs[0]) == INT8
            for node in self.nodes
        )

    @property
    def has_uint8(self) -> bool:
        """Whether anything is quantized to u8, as the CPU flavours do and TensorRT cannot."""
        return any(
            node.kind in ("QuantizeLinear", "DequantizeLinear")
            and len(node.inputs) > 2
            and self.types.get(node.inputs[2]) == UINT8
            for node in self.nodes
        )

    @property
    def typed(self) -> bool:
        """Whether the graph fixes each layer's precision: the `tensorrt-strong` flavour, except FP32.

        Its marks: FP16 types; weights stored as integers, which no other flavour for TensorRT has.
        """
        return self.has_fp16 or self.stores_int8

    @property
    def quantized(self) -> list[str]:
        """Labels of the convolutions, transposed convolutions and matrix products whose two operands come from Q/DQ."""
        made_by = {output: node for node in self.nodes for output in node.outputs}

        def dequantized(name: str) -> bool:
            node = made_by.get(name)
            for _ in self.nodes:  # no path back is longer, unless there is a cycle
                if node is None or node.kind not in PASSES or not node.inputs:
                    break
                node = made_by.get(node.inputs[0])
            return node is not None and node.kind == "DequantizeLinear"

        return [
            node.label
            for node in self.nodes
            if node.kind in WEIGHTED and len(node.inputs) > 1 and all(dequantized(name) for name in node.inputs[:2])
        ]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a varint of more than 64 bits")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message: integers, or the bytes of strings, messages and packed arrays."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire in (1, 2, 5):
            size = {1: 8, 5: 4}.get(wire)
            if size is None:
                size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field reaches beyond the end")
            yield number, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire}")


def _text(value: int | memoryview) -> str:
    return str(value, "utf-8") if isinstance(value, memoryview) else ""


def _messages(data: memoryview, number: int) -> list[memoryview]:
    return [value for found, value in _fields(data) if found == number and isinstance(value, memoryview)]


def _message(data: memoryview, number: int) -> memoryview:
    """The field's bytes; empty if it is absent, as in protobuf."""
    return next(iter(_messages(data, number)), memoryview(b""))


def _number(data: memoryview, number: int) -> int:
    return next((value for found, value in _fields(data) if found == number and isinstance(value, int)), 0)


def _read_node(data: memoryview) -> tuple[Node, int]:
    """The node, and the type of its constant; 0 without a constant."""
    node, constant = Node(), 0
    for number, value in _fields(data):
        if number == 1:
            node.inputs.append(_text(value))
        elif number == 2:
            node.outputs.append(_text(value))
        elif number == 3:
            node.name = _text(value)
        elif number == 4:
            node.kind = _text(value)
        elif number == 5 and isinstance(value, memoryview):
            name = _text(_message(value, 1))
            if name == "to":
                node.cast = _number(value, 3)
            elif name == "value":
                constant = _number(_message(value, 5), 2)
    return node, constant


def _value_info(data: memoryview) -> tuple[str, int, bool]:
    """Name, element type, whether every axis has a size."""
    tensor = _message(_message(data, 2), 1)
    axes = _messages(_message(tensor, 2), 1)
    return _text(_message(data, 1)), _number(tensor, 1), all(_number(axis, 1) > 0 for axis in axes)


def _opset(imported: memoryview) -> int:
    """The version in an OperatorSetId. Raises `ValueError` if it is invalid, because OpenVINO 2026.4 counts down from it."""
    version = 0
    for number, value in _fields(imported):
        if number == 2 and isinstance(value, int):
            version = value  # the last one counts, as in protobuf
            if version > MOST_OPSET:
                raise ValueError(f"opset {version}")
    return version


def _read(data: memoryview) -> Outline:
    outline = Outline()
    graph: memoryview | None = None
    for number, value in _fields(data):
        if number == 7 and isinstance(value, memoryview):
            if graph is not None:  # protobuf would merge the two
                raise ValueError("two graphs")
            graph = value
        elif number == 8 and isinstance(value, memoryview):
            version = _opset(value)
            if not len(_message(value, 1)):  # the default domain is unnamed
                outline.opset = version
        elif number == 25 and isinstance(value, memoryview):  # a function defined in the model
            for imported in _messages(value, 9):
                _opset(imported)
    if graph is None:
        raise ValueError("no graph")
    declared: list[tuple[str, bool]] = []
    for number, value in _fields(graph):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            node, constant = _read_node(value)
            outline.nodes.append(node)
            if node.kind == "Constant" and node.outputs:
                outline.types[node.outputs[0]] = constant
        elif number == 5:
            outline.types[_text(_message(value, 8))] = _number(value, 2)
        elif number in (11, 12):
            name, kind, fixed = _value_info(value)
            outline.io_types[name] = kind
            if number == 11:
                declared.append((name, fixed))
    declared = [(name, fixed) for name, fixed in declared if name not in outline.types]
    outline.inputs = [name for name, _ in declared]
    outline.dynamic = [name for name, fixed in declared if not fixed]
    return outline


def read_outline(path: str | Path) -> Outline:
    """Reads an ONNX file's outline.

    Raises:
        UserError: no such file, or not an ONNX graph.
    """
    path = Path(path)
    try:
        return _read(memoryview(path.read_bytes()))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; write it with export-camera") from None
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path}: not an ONNX graph ({error}); expected a file written by export-camera") from None


def graph_opset(path: Path) -> int | None:
    """A file's opset of ONNX operators; None if it has none. Raises `UserError` like `read_outline`."""
    return read_outline(path).opset or None


def has_fp16(path: Path) -> bool:
    """Whether a graph has FP16 types: `Outline.has_fp16`. Raises `UserError` like `read_outline`."""
    return read_outline(path).has_fp16


MOST_NESTED = 32  # subgraphs in subgraphs
MOST_AXES = 64
# Bytes of an element; types with another storage (strings, 4 bits) are not checked.
_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 14: 8, 15: 16, 16: 2}


def _integers(value: int | memoryview) -> Iterator[int]:
    """Signed 64-bit numbers of a repeated field, single or packed."""
    if isinstance(value, int):
        yield value - (value >> 63 << 64)
        return
    at = 0
    while at < len(value):
        one, at = _varint(value, at)
        yield one - (one >> 63 << 64)


def _tensors(graph: memoryview, outer: set[str] | None, depth: int = 0) -> Iterator[memoryview]:
    """Every tensor in a graph: initializers, also sparse ones, attributes, and those of subgraphs.

    Raises `ValueError` if a node reads a tensor that no earlier node, input or initializer provides (this excludes cycles,
    which overflow OpenVINO 2026.4's stack), or if two tensors have the same name.

    Args:
        outer: names that the enclosing graphs provide; None if these are not known.
    """
    if depth > MOST_NESTED:
        raise ValueError(f"graphs nested more than {MOST_NESTED} deep")
    found: dict[int, list[memoryview]] = defaultdict(list)
    for number, value in _fields(graph):
        if isinstance(value, memoryview):
            found[number].append(value)
    yield from found[5]
    for sparse in found[15]:
        yield from _messages(sparse, 1) + _messages(sparse, 2)
    given = {_text(_message(tensor, 8)) for tensor in (*found[5], *(_message(sparse, 1) for sparse in found[15]))}
    given |= {_text(_message(value, 1)) for value in found[11]}
    known, made = given | (outer or set()), set()

    def check(names: list[str], what: str) -> None:
        if outer is not None and (missing := [name for name in names if name not in known]):
            raise ValueError(f"{what} {missing[0][:80]!r}, which nothing before it computes")

    for data in found[1]:
        node, _ = _read_node(data)
        check([name for name in node.inputs if name], f"{node.kind[:40]} reads")
        yield from _tensors_of_node(data, known if outer is not None else None, depth)
        for name in filter(None, node.outputs):
            if name in made or name in given:
                raise ValueError(f"two tensors named {name[:80]!r}")
            made.add(name)
            known.add(name)
    check([_text(_message(value, 1)) for value in found[12]], "it has the output")


def _tensors_of_node(node: memoryview, outer: set[str] | None, depth: int = 0) -> Iterator[memoryview]:
    """Every tensor in a node's attributes, like `_tensors`."""
    for attribute in _messages(node, 5):
        for number, content in _fields(attribute):
            if not isinstance(content, memoryview):
                continue
            if number in (5, 10):
                yield content
            elif number in (22, 23):
                yield from _messages(content, 1) + _messages(content, 2)
            elif number in (6, 11):
                yield from _tensors(content, outer, depth + 1)


def _check_tensor(tensor: memoryview) -> int:
    """The number of bytes of a tensor by its shape. Raises `ValueError` if the shape is invalid, or the data have another size:
    runtimes compute addresses with these numbers, and not all of them check."""
    dims: list[int] = []
    kind, raw, outside = 0, None, False
    for number, value in _fields(tensor):
        if number == 1:
            dims += _integers(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 9 and isinstance(value, memoryview):
            raw = value
        elif number == 13:
            outside = True
    if len(dims) > MOST_AXES or any(size < 0 for size in dims) or math.prod(dims) >= 1 << 40:
        raise ValueError(f"a tensor of shape {str(dims)[:80]}")
    expected = math.prod(dims) * _BYTES.get(kind, 0)
    if raw is not None and len(raw) and not outside and kind in _BYTES and len(raw) != expected:
        raise ValueError(f"a tensor of shape {str(dims)[:80]} with {len(raw):,} bytes of data, not {expected:,}")
    return expected


def _check_place(entries: list[memoryview], size: int, path: Path) -> str:
    """The name of the file with a tensor's data. Raises `ValueError` if the data are not in it: beyond its end, or fewer than
    the shape's `size`."""
    place = [(_text(_message(entry, 1)), _text(_message(entry, 2))) for entry in entries]
    names = [value for key, value in place if key == "location"]
    if len(names) != 1:
        raise ValueError(f"data in {len(names)} files")
    if not is_inside(path.parent, names[0]):
        raise UserError(f"{path}: found its data in {names[0]!r}, expected a file in the graph's folder")
    file = path.parent / names[0]
    if not file.is_file():
        raise UserError(f"{path}: {names[0]!r}: no such file, expected the graph's data there; copy it with the graph")
    numbers = {key: dict(place).get(key, "") for key in ("offset", "length")}
    if any(text and not re.fullmatch(r"[0-9]{1,18}", text) for text in numbers.values()):
        raise ValueError(f"data at {numbers!r:.80}")
    have, begin = file.stat().st_size, int(numbers["offset"] or 0)
    length = int(numbers["length"] or max(0, have - begin))
    if begin + length > have or length < size:
        raise ValueError(f"{size:,} bytes of data at {begin:,} of {names[0]}, which has {have:,}; copy its data again")
    return names[0]


def check_graph(path: str | Path) -> list[str]:
    """Checks an untrusted graph before a runtime reads it, because some runtimes compute addresses from unchecked values: the
    shapes and sizes of tensors, the order of the nodes, and the places of data. (`onnx.checker` checks most of this too, but
    a robot has no onnx package.)

    Returns:
        the names of separate files with tensors' data; most graphs have none.

    Raises:
        UserError: the file does not exist, is not a valid ONNX graph, or a tensor's data are missing or outside the graph's
            folder: a graph could otherwise read any file of this machine as weights.
    """
    path = Path(path)
    read_outline(path)  # reports errors of the file as a whole
    names: dict[str, None] = {}
    try:
        data = memoryview(path.read_bytes())
        for tensor in _tensors(_message(data, 7), set()):
            size = _check_tensor(tensor)
            if entries := _messages(tensor, 13):
                names[_check_place(entries, size, path)] = None
        for function in _messages(data, 25):  # a function of the model, whose nodes are field 7
            for node in _messages(function, 7):
                for tensor in _tensors_of_node(node, None):
                    _check_tensor(tensor)
                    if _messages(tensor, 13):
                        raise ValueError("data in another file for a function's constant")
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path}: not an ONNX graph ({error}); expected a file written by export-camera") from None
    return list(names)


def load_graph(path: str | Path) -> onnx.ModelProto:
    """The whole graph, by the onnx package, after `check_graph`.

    Raises:
        UserError: the file does not exist, is not a valid ONNX graph, or its data are outside its folder.
    """
    import onnx

    path = Path(path)
    check_graph(path)
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's and onnx's errors have no base class below Exception
        raise UserError(f"{path}: onnx cannot read it: {' '.join(str(error).split())[:300]}") from None
