"""What is read of an ONNX file where the onnx package is not installed: protobuf fields by their numbers in onnx.proto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qat.core.errors import UserError

FLOAT16 = 10  # TensorProto.DataType


def _number(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """A varint and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a varint of more than 64 bits")


def _fields(data: bytes | memoryview) -> list[tuple[int, Any]]:
    """A protobuf message's fields in their order: number and value, a memory view for what has a length."""
    view, at = memoryview(data), 0
    found: list[tuple[int, Any]] = []
    while at < len(data):
        key, at = _number(data, at)
        kind = key & 7
        value: Any
        if kind == 0:
            value, at = _number(data, at)
        else:
            if kind == 2:
                size, at = _number(data, at)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise ValueError(f"wire type {kind}")
            if at + size > len(data):
                raise ValueError("a field reaches beyond the end")
            value, at = view[at : at + size], at + size
        found.append((key >> 3, value))
    return found


def graph_opset(path: Path) -> int | None:
    """The opset of ONNX's own operators that a file asks for, read without the onnx package: ModelProto's opset_import
    (field 8) with an empty domain (1) and its version (2), from onnx.proto. None where there is none.

    Raises:
        UserError: not a protobuf message.
    """
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 8:
                entry = dict(_fields(value))
                if not bytes(entry.get(1, b"")):
                    return int(entry.get(2, 0))
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path}: not an ONNX file: {error}; export again") from None
    return None


def has_fp16(path: Path) -> bool:
    """Whether a graph computes in FP16 by its own types: an initializer of it, or a Cast to it. (ModelProto.graph 7; GraphProto's
    node 1 and initializer 5; TensorProto.data_type 2; NodeProto's op_type 4 and attribute 5; AttributeProto's name 1 and i 3.)

    Raises:
        UserError: not a protobuf message.
    """
    try:
        for number, graph in _fields(path.read_bytes()):
            if number != 7:
                continue
            for kind, value in _fields(graph):
                if kind == 5 and dict(_fields(value)).get(2) == FLOAT16:
                    return True
                if kind == 1 and _casts_to_fp16(_fields(value)):
                    return True
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path}: not an ONNX file: {error}; export again") from None
    return False


def _casts_to_fp16(node: list[tuple[int, Any]]) -> bool:
    if not any(number == 4 and bytes(value) == b"Cast" for number, value in node):
        return False
    attributes = [dict(_fields(value)) for number, value in node if number == 5]
    return any(bytes(a.get(1, b"")) == b"to" and a.get(3) == FLOAT16 for a in attributes)
