"""Cuts a quantized ONNX graph at its activations' codes, so that each piece can run alone.

    before   … ─► Q ─► DQ ─► Conv ─► Relu ─► Q ─► DQ ─► …      after   codes ─► DQ ─► Conv ─► Relu ─► Q ─► codes found

A segment lies between the codes before a QuantizeLinear and its own codes, or between the last codes and an output of the
graph. Segments start from integers, so that no error passes from one to the next.

The pieces are cut from protobuf's wire format, without the onnx package, which `bevqat verify` does not need: nodes and
initializers are copied byte for byte; only the output of a QuantizeLinear is renamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qat.core.errors import UserError
from qat.core.onnx_file import Node, _fields, _integers, _message, _read_node, _text

_DTYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 10: "<f2", 11: "<f8"}
_CODES = {"uint8": 2, "int8": 3}
SCALED = "_input_dq"  # one whose input is also multiplied by a constant (`qat.export.hard_sigmoid`)
FOUND = "/found"  # suffix of the name of a segment's codes


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, data: bytes | memoryview) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + bytes(data)


def _array(tensor: memoryview) -> np.ndarray | None:
    """A small tensor's values; None for a type that scales and zero points do not have."""
    dims: list[int] = []
    kind, raw = 0, b""
    numbers: list[float] = []
    for number, value in _fields(tensor):
        if number == 1:
            dims += _integers(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 9 and isinstance(value, memoryview):
            raw = bytes(value)
        elif number == 4 and isinstance(value, memoryview):
            numbers += np.frombuffer(value, "<f4").tolist()
        elif number in (5, 7):
            numbers += _integers(value)
    if kind not in _DTYPES:
        return None
    dtype = np.dtype(_DTYPES[kind])
    if raw:
        return np.frombuffer(raw, dtype).reshape(dims)
    if dtype == np.float16:  # stored as bits, in integers
        return np.array(numbers, np.uint16).view(dtype).reshape(dims)
    return np.array(numbers).astype(dtype).reshape(dims)


@dataclass(frozen=True)
class Pair:
    """A QuantizeLinear of an activation. codes: its output's name. node: its own. source: what it rounds.

    scale: float32[] or float32[channels], from the graph (FP16 scales are widened). zero: int64 of the same shape.
    """

    codes: str
    node: str
    source: str
    dtype: str
    scale: np.ndarray
    zero: np.ndarray

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        info = np.iinfo(self.dtype)
        return int(info.min), int(info.max)


class Cut:
    """The pieces of one graph.

    pairs: by the codes' names, in the graph's order. back: each DequantizeLinear that reads codes, (codes, scale, zero).
    inputs, outputs: the graph's names.
    """

    def __init__(self, graph: bytes) -> None:
        """Reads it.

        Raises:
            UserError: it is not an ONNX graph, or the scale of an activation is not a constant in it.
        """
        try:
            self._read(memoryview(graph))
        except (ValueError, IndexError) as error:
            raise UserError(f"the graph: not an ONNX graph ({error}); expected one that export-camera wrote") from None

    def _read(self, data: memoryview) -> None:
        self._head = b""
        body = memoryview(b"")
        for number, value in _fields(data):
            if number == 7 and isinstance(value, memoryview):
                body = value
            elif number in (8, 25) and isinstance(value, memoryview):
                self._head += _field(number, value)
            elif number == 1 and isinstance(value, int):
                self._head += _varint(1 << 3) + _varint(value)
        self._raw: list[memoryview] = []
        self._nodes: list[Node] = []
        self._stored: dict[str, memoryview] = {}
        self._inputs: dict[str, memoryview] = {}
        self.outputs: list[str] = []
        constants: dict[str, memoryview] = {}
        for number, value in _fields(body):
            if not isinstance(value, memoryview):
                continue
            if number == 1:
                node, _ = _read_node(value)
                self._raw.append(value)
                self._nodes.append(node)
                if node.kind == "Constant" and node.outputs:
                    for attribute, content in _fields(value):
                        if (
                            attribute == 5
                            and isinstance(content, memoryview)
                            and _text(_message(content, 1)) == "value"
                        ):
                            constants[node.outputs[0]] = _message(content, 5)
            elif number == 5:
                self._stored[_text(_message(value, 8))] = value
            elif number == 11:
                self._inputs[_text(_message(value, 1))] = value
            elif number == 12:
                self.outputs.append(_text(_message(value, 1)))
        constants |= self._stored
        self.inputs = [name for name in self._inputs if name not in self._stored]
        self._producer = {name: at for at, node in enumerate(self._nodes) for name in node.outputs if name}
        live = set(self.inputs)
        self.pairs: dict[str, Pair] = {}
        self.back: list[tuple[str, np.ndarray, np.ndarray]] = []
        for node in self._nodes:
            if not live.intersection(node.inputs):
                continue
            live.update(node.outputs)
            if node.kind == "QuantizeLinear":
                scale, zero, dtype = self._grid(node, constants)
                self.pairs[node.outputs[0]] = Pair(node.outputs[0], node.name, node.inputs[0], dtype, scale, zero)
            elif node.kind == "DequantizeLinear" and not node.name.endswith(SCALED):
                scale, zero, _ = self._grid(node, constants)
                self.back.append((node.inputs[0], scale, zero))

    @staticmethod
    def _grid(node: Node, constants: dict[str, memoryview]) -> tuple[np.ndarray, np.ndarray, str]:
        known = [constants.get(name) for name in node.inputs[1:3]]
        arrays = [None if tensor is None else _array(tensor) for tensor in known]
        if not arrays or any(array is None for array in arrays):
            raise UserError(f"{node.label}: found a computed scale or zero point, expected constants; export it again")
        scale = arrays[0]
        assert scale is not None
        zero = arrays[1] if len(arrays) > 1 else np.zeros(scale.shape, np.uint8)
        assert zero is not None
        return scale.astype(np.float32), zero.astype(np.int64), zero.dtype.name

    @property
    def sites(self) -> list[str]:
        """All sites: codes by their names, then the graph's outputs."""
        return [*self.pairs, *self.outputs]

    def takes(self, site: str) -> list[str]:
        """The codes and the graph's inputs that a site is computed from."""
        return self._closure([site])[1]

    def _closure(self, sites: Sequence[str]) -> tuple[list[int], list[str]]:
        stack, nodes, takes = [], set(), []
        for site in sites:
            if site in self.pairs:
                nodes.add(self._producer[site])
                stack += self._nodes[self._producer[site]].inputs
            else:
                stack.append(site)
        seen: set[str] = set()
        while stack:
            name = stack.pop()
            if not name or name in seen:
                continue
            seen.add(name)
            if name in self.pairs or (name in self._inputs and name not in self._stored):
                takes.append(name)
            elif name in self._producer:
                nodes.add(self._producer[name])
                stack += self._nodes[self._producer[name]].inputs
        return sorted(nodes), sorted(takes)

    def segments(self, sites: Sequence[str]) -> tuple[bytes, list[str], dict[str, str]]:
        """A graph of these sites' segments.

        Returns:
            its bytes, the names of its inputs (codes and graph inputs), and the name of its output for each site.
        """
        nodes, takes = self._closure(sites)
        body: list[bytes] = []
        used: set[str] = set()
        for at in nodes:
            node, raw = self._nodes[at], self._raw[at]
            used.update(node.inputs)
            if node.kind == "QuantizeLinear" and node.outputs[0] in self.pairs:
                body.append(_field(1, b"".join(_renamed(raw, node.outputs[0] + FOUND))))
            else:
                body.append(_field(1, raw))
        body.append(_field(2, b"segments"))
        body += [_field(5, tensor) for name, tensor in self._stored.items() if name in used]
        for name in takes:
            if name in self.pairs:
                kind = _field(1, _varint(1 << 3) + _varint(_CODES[self.pairs[name].dtype]))
                body.append(_field(11, _field(1, name.encode()) + _field(2, kind)))
            else:
                body.append(_field(11, self._inputs[name]))
        names = {site: site + FOUND if site in self.pairs else site for site in sites}
        body += [_field(12, _field(1, name.encode())) for name in names.values()]
        return self._head + _field(7, b"".join(body)), takes, names


def _renamed(node: memoryview, output: str) -> Iterator[bytes]:
    for number, value in _fields(node):
        if number == 2:
            yield _field(2, output.encode())
        elif isinstance(value, memoryview):
            yield _field(number, value)
        else:
            yield _varint(number << 3) + _varint(value)
