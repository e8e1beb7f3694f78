"""A pickle's stack machine that calls nothing.

A pickle is a program, and `pickle.load` lets it import and call anything. The machine here knows the same opcodes, but a
global is a `Record` of its name, and calling it, or making or filling an object of it, only notes the arguments. What is
rebuilt is a fixed list of plain things (`_BUILDERS`): tensors, containers, numbers, numpy arrays. Opcodes: Lib/pickletools.py.
"""

from __future__ import annotations

import re
import struct
from codecs import escape_decode  # undocumented; what pickle itself reads quoted strings with
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch

# A pickled BEVFusion has some 10⁵ opcodes and 10⁴ objects. These bounds keep a hostile file to about a gigabyte.
MAX_OPCODES = 5_000_000
MAX_OBJECTS = 1_000_000

CONSTANTS = {
    ("torch", name): value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format | torch.qscheme)
}


class Damaged(Exception):
    """What is wrong with the file, without its name."""


@dataclass(eq=False, repr=False, slots=True)
class Record:
    """Something that a pickle names and that is not rebuilt: a class or function (`args` is None), or what calling it with
    `args` and `keywords` would have made.

    attributes: its `__dict__` and slots; a state of another kind under "__state__". entries, elements: what a subclass
    of dict or list holds. All of them are as the file says, and hence not to be trusted.
    """

    module: str
    name: str
    args: tuple[Any, ...] | None = None
    keywords: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    entries: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:  # never its contents, which may be endless
        return f"<{self.module}.{self.name}{'' if self.args is None else ' object'}>"


@dataclass(eq=False, slots=True)
class Storage:
    """Bytes that tensors view: `numel` elements of `dtype` from element `start` on."""

    data: torch.UntypedStorage
    dtype: torch.dtype
    numel: int
    start: int = 0


@dataclass(eq=False, slots=True)
class _Array:
    """A numpy array between its REDUCE, which says only that there is one, and its BUILD. keys: where the memo has it."""

    keys: list[int] = field(default_factory=list)


def is_integers(values: Any) -> bool:
    """Whether these are a list or tuple of integers that fit a tensor's sizes."""
    return isinstance(values, tuple | list) and all(type(v) is int and abs(v) < 1 << 62 for v in values)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> Any:
    if not (isinstance(storage, Storage) and is_integers([offset]) and is_integers(size) and is_integers(stride)):
        return NotImplemented
    dtype = dtype or storage.dtype
    have = storage.numel * storage.dtype.itemsize // dtype.itemsize
    shape = f"a tensor of shape {list(size)[:8]}, strides {list(stride)[:8]} from element {offset}"
    if len(size) != len(stride) or len(size) > 32 or min((offset, *size, *stride)) < 0:
        raise Damaged(f"{shape}, which no tensor can have")
    if 0 in size:
        return torch.empty(tuple(size), dtype=dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= have:
        raise Damaged(f"{shape}, in a storage of {have} elements")
    start = storage.start * storage.dtype.itemsize // dtype.itemsize
    return torch.empty(0, dtype=dtype).set_(storage.data, start + offset, tuple(size), tuple(stride))


def _tensor_v2(storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, metadata: Any = None) -> Any:
    # metadata: bits that say conjugated or negated; nothing that a network keeps has them.
    return NotImplemented if metadata else _tensor(storage, offset, size, stride)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> Any:
    if metadata or not isinstance(dtype, torch.dtype):
        return NotImplemented
    return _tensor(storage, offset, size, stride, dtype)


def _parameter(data: Any, *_: Any) -> Any:
    return data if isinstance(data, torch.Tensor) else NotImplemented


def _from_type(function: Any, _kind: Any, args: Any, *_: Any) -> Any:
    """A subclass of Tensor, or one with attributes of its own: the tensor alone."""
    builder = _builder(function)
    tensor = builder(*args) if builder in _TENSORS and isinstance(args, tuple) else NotImplemented
    return tensor if isinstance(tensor, torch.Tensor) else NotImplemented


def _device(*args: Any) -> Any:
    plain = args and isinstance(args[0], str) and re.fullmatch(r"(cpu|cuda|mps|xpu|meta)(:\d{1,3})?", args[0])
    return torch.device(*args) if plain and len(args) < 3 and is_integers(args[1:]) else NotImplemented


def _pairs(*args: Any) -> Any:
    if not args or isinstance(args[0], dict):
        return dict(*args)
    return {_key(key): value for key, value in args[0]} if isinstance(args[0], list | tuple) else NotImplemented


def _is_sequence(args: tuple[Any, ...]) -> bool:
    return not args or (len(args) == 1 and isinstance(args[0], list | tuple))


def _members(*args: Any) -> Any:
    known = not args or isinstance(args[0], list | tuple | set | frozenset | dict)
    return {_key(value) for value in (args[0] if args else ())} if known else NotImplemented


def _frozen(*args: Any) -> Any:
    made = _members(*args)
    return made if made is NotImplemented else frozenset(made)


def _encoded(text: Any, encoding: Any) -> Any:
    """How protocol 2 writes bytes."""
    known = isinstance(text, str) and encoding in ("latin1", "latin-1")
    return text.encode("latin1") if known else NotImplemented


def _reconstructed(kind: Any, base: Any, state: Any) -> Any:
    """How protocols 0 and 1 make an object."""
    made = Record(kind.module, kind.name, ())
    if isinstance(state, dict):
        made.entries.update({_key(k): v for k, v in state.items()})
    elif isinstance(state, list):
        made.elements.extend(state)
    return made


def _numpy_dtype(described: Any) -> np.dtype[Any] | None:
    """A number's dtype, from `numpy.dtype(code, …)` and its state (version, byte order, …)."""
    if not isinstance(described, Record) or (described.module, described.name) != ("numpy", "dtype"):
        return None
    code = described.args[0] if described.args else None
    state = described.attributes.get("__state__")
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "<"
    known = isinstance(code, str) and re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16", code)
    return np.dtype(str(order) + str(code)) if known and order in ("<", ">", "|", "=") else None


def _raw(data: Any) -> bytes | None:
    return data.encode("latin1") if isinstance(data, str) else data if isinstance(data, bytes) else None


def _scalar(described: Any, data: Any) -> Any:
    dtype, raw = _numpy_dtype(described), _raw(data)
    return NotImplemented if dtype is None or raw is None else np.frombuffer(raw, dtype, count=1)[0]


def _filled_array(state: Any) -> Any:
    """The array, or a record of it where it does not hold plain numbers."""
    if isinstance(state, tuple) and len(state) == 5 and isinstance(state[1], tuple):
        _version, shape, described, fortran, data = state
        dtype, raw = _numpy_dtype(described), _raw(data)
        if dtype is not None and raw is not None:
            if not is_integers(shape) or prod(shape) * dtype.itemsize != len(raw):
                raise Damaged(f"a numpy array of shape {list(shape)[:8]} with {len(raw)} bytes of data")
            return np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C").copy()
    return Record("numpy", "ndarray", (), attributes={"__state__": state})


_TENSORS = (_tensor, _tensor_v2, _tensor_v3, _parameter)
_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch._tensor", "_rebuild_from_type"): _from_type,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.tensor", "_rebuild_from_type"): _from_type,
    ("torch", "Size"): lambda *args: torch.Size(args[0]) if args and is_integers(args[0]) else NotImplemented,
    ("torch", "device"): _device,
    ("collections", "OrderedDict"): _pairs,
    ("collections", "defaultdict"): lambda *args: _pairs(*args[1:]),
    ("builtins", "dict"): _pairs,
    ("builtins", "list"): lambda *args: list(*args) if _is_sequence(args) else NotImplemented,
    ("builtins", "tuple"): lambda *args: tuple(*args) if _is_sequence(args) else NotImplemented,
    ("builtins", "set"): _members,
    ("builtins", "frozenset"): _frozen,
    ("builtins", "bytearray"): lambda *args: (
        bytearray(args[0]) if args and isinstance(args[0], bytes) else bytearray() if not args else NotImplemented
    ),
    ("builtins", "bytes"): lambda *args: b"" if not args else NotImplemented,
    ("builtins", "complex"): lambda *args: (
        complex(*args) if len(args) == 2 and all(type(v) in (int, float) for v in args) else NotImplemented
    ),
    ("_codecs", "encode"): _encoded,
    ("copyreg", "_reconstructor"): lambda *args: (
        _reconstructed(*args) if len(args) == 3 and isinstance(args[0], Record) else NotImplemented
    ),
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}
PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # what protocol 2 calls them


def _builder(function: Any) -> Callable[..., Any] | None:
    named = isinstance(function, Record) and function.args is None
    return _BUILDERS.get((function.module, function.name)) if named else None


def _key(value: Any) -> Any:
    """A key of a dict or set, if its hash is quick and not of the file's choosing: nested tuples can take 2ⁿ steps to hash
    and huge integers all collide."""
    if type(value) is int and value.bit_length() <= 60:
        return value
    if value is None or isinstance(
        value, str | bytes | bool | float | Record | torch.Tensor | torch.dtype | np.generic
    ):
        return value
    if isinstance(value, tuple) and len(value) <= 16 and not any(isinstance(v, tuple) for v in value):
        return tuple(_key(v) for v in value)
    raise Damaged(f"a {type(value).__name__} as the key of a dict")


class Machine:
    """Runs one pickle, from `position` in `data` on, and calls nothing that it names."""

    def __init__(self, data: bytes, persistent: Callable[[Any], Any], position: int = 0) -> None:
        self.data = data
        self.position = position
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[tuple[str, str], Any] = {}
        self.objects = 0

    def run(self) -> Any:
        """What the pickle describes; `position` is then behind it."""
        handlers = _HANDLERS
        for _ in range(MAX_OPCODES):
            opcode = self.byte()
            if opcode == ord("."):
                return self.stack.pop()
            handler = handlers.get(opcode)
            if handler is None:
                raise Damaged(f"opcode {opcode:#04x} at byte {self.position - 1}")
            handler(self)
        raise Damaged(f"a pickle of more than {MAX_OPCODES:,} opcodes")

    def byte(self) -> int:
        return self.take(1)[0]

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data) or count < 0:
            raise Damaged("the pickle ends early")
        return self.data[start : self.position]

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise Damaged("the pickle ends early")
        start, self.position = self.position, end + 1
        return self.data[start:end].decode("utf-8")

    def number(self) -> int:
        text = self.line().removesuffix("L")
        if len(text) > 4000:
            raise Damaged("an integer of more than 4000 digits")
        return int(text)

    def push(self, value: Any) -> None:
        """Puts something on the stack that takes memory of its own."""
        self.charge(1)
        self.stack.append(value)

    def charge(self, count: int) -> None:
        """Counts objects made or copied."""
        self.objects += count
        if self.objects > MAX_OBJECTS:
            raise Damaged(f"a pickle of more than {MAX_OBJECTS:,} objects")

    def charge_copy(self, value: Any) -> None:
        """Before something that may be copied: one list, named again and again, would otherwise fill the memory."""
        if isinstance(value, str | bytes | bytearray):
            self.charge(len(value) >> 10)
        elif isinstance(value, list | tuple | dict | set | frozenset):
            self.charge(len(value))

    def since_mark(self) -> list[Any]:
        found = self.stack
        self.stack = self.marks.pop()
        return found

    def named(self, module: Any, name: Any) -> Any:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Damaged("a global whose name is no text")
        key = (PYTHON2.get(module, module), name)
        if key not in self.globals:
            self.globals[key] = CONSTANTS.get(key) or Record(*key)
        return self.globals[key]

    def call(self, function: Any, args: Any, keywords: Any = None) -> None:
        """REDUCE and its kin: builds what is on the list, and notes everything else."""
        if not isinstance(function, Record) or not isinstance(args, tuple):
            raise Damaged(f"a call of a {type(function).__name__}")
        builder = _builder(function)
        made: Any = NotImplemented
        if builder is not None and not keywords:
            for value in args:
                self.charge_copy(value)
            made = builder(*args)
        if made is NotImplemented:
            made = Record(function.module, function.name, args)
            if isinstance(keywords, dict):
                made.keywords = keywords
        self.push(made)

    def build(self) -> None:
        """BUILD: an object's state, of which `__setstate__` knows nothing."""
        state = self.stack.pop()
        target = self.stack[-1]
        for part in state if isinstance(state, tuple) else (state,):
            self.charge_copy(part)
        if isinstance(target, _Array):
            self.stack[-1] = array = _filled_array(state)
            for key in target.keys:
                self.memo[key] = array
        elif isinstance(target, Record) and target.args is not None:
            slots = None
            if isinstance(state, tuple) and len(state) == 2 and all(v is None or isinstance(v, dict) for v in state):
                state, slots = state
            for part in (state, slots):
                if isinstance(part, dict):
                    target.attributes.update({str(k): v for k, v in part.items() if isinstance(k, str)})
            if state is not None and not isinstance(state, dict):
                target.attributes["__state__"] = state
        elif not isinstance(target, dict):  # an OrderedDict's attributes: a state dict's `_metadata`
            raise Damaged(f"the state of a {type(target).__name__}")

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record) and target.args is not None:
            target = target.elements
        if not isinstance(target, list):
            raise Damaged(f"elements of a {type(target).__name__}")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record) and target.args is not None:
            target = target.entries
        if not isinstance(target, dict) or len(values) % 2:
            raise Damaged(f"entries of a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def add_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record) and target.args is not None:
            target.elements.extend(values)
        elif isinstance(target, set):
            target.update(_key(value) for value in values)
        else:
            raise Damaged(f"members of a {type(target).__name__}")

    def remember(self, key: int) -> None:
        value = self.stack[-1]
        if isinstance(value, _Array):
            value.keys.append(key)
        self.memo[key] = value

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise Damaged("a tuple of more than there is")
        values = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.push(values)

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def string(self) -> None:
        text = self.line().encode("utf-8")
        if len(text) < 2 or text[0] != text[-1] or text[:1] not in (b'"', b"'"):
            raise Damaged("a string without quotes")
        self.push(escape_decode(text[1:-1])[0].decode("latin1"))

    def instance(self) -> None:
        module, name = self.line(), self.line()
        self.call(self.named(module, name), tuple(self.since_mark()))

    def object(self) -> None:
        kind, *args = self.since_mark()
        self.call(kind, tuple(args))

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.call(function, args)

    def new_object_ex(self) -> None:
        keywords, args, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.call(kind, args, keywords)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(self.named(module, name))

    def line_int(self) -> None:
        flags = {b"00\n": False, b"01\n": True}
        start = self.position
        value = self.number()
        self.stack.append(flags.get(self.data[start : self.position], value))

    def literal(self, value: Any) -> None:
        self.stack.append(value)


def _signed(machine: Machine, size: int) -> int:
    return int.from_bytes(machine.take(size), "little", signed=True)


def _text(machine: Machine, size: int) -> str:
    return machine.take(machine.integer(size)).decode("utf-8", "surrogatepass")


def _latin(machine: Machine, count: int) -> str:
    return machine.take(count).decode("latin1")


_HANDLERS: dict[int, Callable[[Machine], Any]] = {
    ord(opcode): handler
    for opcode, handler in {
        "\x80": lambda m: m.byte(),  # PROTO
        "\x95": lambda m: m.take(8),  # FRAME
        "(": lambda m: m.mark(),
        "0": lambda m: m.pop(),
        "1": lambda m: m.since_mark(),  # POP_MARK
        "2": lambda m: m.literal(m.stack[-1]),  # DUP
        "N": lambda m: m.literal(None),
        "\x88": lambda m: m.literal(True),
        "\x89": lambda m: m.literal(False),
        "I": lambda m: m.line_int(),
        "L": lambda m: m.literal(m.number()),
        "J": lambda m: m.literal(_signed(m, 4)),
        "K": lambda m: m.literal(m.integer(1)),
        "M": lambda m: m.literal(m.integer(2)),
        "\x8a": lambda m: m.literal(_signed(m, m.integer(1))),  # LONG1
        "\x8b": lambda m: m.literal(_signed(m, m.integer(4))),  # LONG4
        "F": lambda m: m.literal(float(m.line())),
        "G": lambda m: m.literal(struct.unpack(">d", m.take(8))[0]),
        "S": lambda m: m.string(),
        "T": lambda m: m.push(_latin(m, m.integer(4))),  # BINSTRING
        "U": lambda m: m.push(_latin(m, m.integer(1))),  # SHORT_BINSTRING
        "V": lambda m: m.push(m.line().encode("latin1", "backslashreplace").decode("raw-unicode-escape")),
        "X": lambda m: m.push(_text(m, 4)),
        "\x8c": lambda m: m.push(_text(m, 1)),
        "\x8d": lambda m: m.push(_text(m, 8)),
        "B": lambda m: m.push(m.take(m.integer(4))),
        "C": lambda m: m.push(m.take(m.integer(1))),
        "\x8e": lambda m: m.push(m.take(m.integer(8))),
        "\x96": lambda m: m.push(bytearray(m.take(m.integer(8)))),
        ")": lambda m: m.literal(()),
        "\x85": lambda m: m.tuple_of(1),
        "\x86": lambda m: m.tuple_of(2),
        "\x87": lambda m: m.tuple_of(3),
        "t": lambda m: m.push(tuple(m.since_mark())),
        "]": lambda m: m.push([]),
        "l": lambda m: m.push(m.since_mark()),
        "}": lambda m: m.push({}),
        "\x8f": lambda m: m.push(set()),
        "a": lambda m: m.append([m.stack.pop()]),
        "e": lambda m: m.append(m.since_mark()),
        "s": lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
        "u": lambda m: m.set_items(m.since_mark()),
        "\x90": lambda m: m.add_items(m.since_mark()),
        "\x91": lambda m: m.push(frozenset(_key(value) for value in m.since_mark())),
        "g": lambda m: m.literal(m.memo[m.number()]),
        "h": lambda m: m.literal(m.memo[m.integer(1)]),
        "j": lambda m: m.literal(m.memo[m.integer(4)]),
        "p": lambda m: m.remember(m.number()),
        "q": lambda m: m.remember(m.integer(1)),
        "r": lambda m: m.remember(m.integer(4)),
        "\x94": lambda m: m.remember(len(m.memo)),
        "c": lambda m: m.literal(m.named(m.line(), m.line())),
        "\x93": lambda m: m.stack_global(),
        "R": lambda m: m.reduce(),
        "\x81": lambda m: m.reduce(),  # NEWOBJ: class and arguments lie as function and arguments do
        "\x92": lambda m: m.new_object_ex(),
        "i": lambda m: m.instance(),
        "o": lambda m: m.object(),
        "b": lambda m: m.build(),
        # Numbers of a registry that is empty here.
        "\x82": lambda m: m.push(Record("copyreg", f"extension {m.integer(1)}")),
        "\x83": lambda m: m.push(Record("copyreg", f"extension {m.integer(2)}")),
        "\x84": lambda m: m.push(Record("copyreg", f"extension {m.integer(4)}")),
        "Q": lambda m: m.push(m.persistent(m.stack.pop())),
    }.items()
}


def _dict_from_mark(machine: Machine) -> None:
    values = machine.since_mark()
    machine.push({})
    machine.set_items(values)


_HANDLERS[ord("d")] = _dict_from_mark
