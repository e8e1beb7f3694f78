"""Python's unpickler, without anything that a pickle could call.

A pickle is a program, and `pickle.load` lets it import and call anything. Here a global is a `Record` of its name, and calling
it, or making or filling an object of it, only records the arguments. Only a fixed list of plain values (`_BUILDERS`) is
rebuilt: tensors, containers, numbers, numpy arrays.

The base class is the unpickler of the standard library that is written in Python (`torch.package` builds on it too): the one in
C calls `__setstate__` of whatever it filled and hashes whatever a file makes a key, where no subclass can interfere.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import IO, Any

import numpy as np
import torch

# A pickled BEVFusion has some 10⁵ opcodes. This bound on opcodes and copied elements keeps a hostile file to about a gigabyte.
MAX_OPCODES = 5_000_000

CONSTANTS = {
    ("torch", name): value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format | torch.qscheme)
}


class Damaged(Exception):
    """What is wrong with a file, without the file's name."""


@dataclass(eq=False, repr=False, slots=True)
class Record:
    """An object of a pickle that is not rebuilt: a class or function (`args` is None), or what calling it with
    `args` would have made.

    attributes: its `__dict__`; a state of another kind under "__state__". The contents of a subclass of dict or list are not
    kept. All of it comes from the file and cannot be trusted.
    """

    module: str
    name: str
    args: tuple[Any, ...] | None = None
    attributes: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:  # never its contents, which may be endless
        return f"<{self.module}.{self.name}{'' if self.args is None else ' object'}>"

    def append(self, _: Any) -> None:
        """Elements of a subclass of list."""

    extend = append


@dataclass(eq=False, slots=True)
class Storage:
    """Bytes that tensors view: `numel` elements of `dtype` from element `start` on."""

    data: torch.UntypedStorage
    dtype: torch.dtype
    numel: int
    start: int = 0


def is_integers(values: Any) -> bool:
    """Whether these are a list or tuple of integers that fit a tensor's sizes."""
    return isinstance(values, tuple | list) and all(type(v) is int and abs(v) < 1 << 62 for v in values)


def _tensor(
    storage: Storage, offset: int, size: Any, stride: Any, _grad: Any = None, _hooks: Any = None, *rest: Any
) -> Any:
    """rest: the metadata in version 2; the dtype and the metadata in version 3."""
    if rest and isinstance(rest[-1], dict) and rest[-1]:  # conjugated or negated: not used in networks
        return NotImplemented
    dtype = rest[0] if rest and isinstance(rest[0], torch.dtype) else storage.dtype
    have = storage.numel * storage.dtype.itemsize // dtype.itemsize
    numbers = (offset, *size, *stride)
    if not is_integers(numbers):
        raise Damaged("a tensor whose shape is not integers")
    shape = f"a tensor of shape {list(size)[:8]}, strides {list(stride)[:8]} from element {offset}"
    if len(size) != len(stride) or len(size) > 32 or min(numbers) < 0:
        raise Damaged(f"{shape}, which no tensor can have")
    if 0 in size:
        return torch.empty(tuple(size), dtype=dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= have:
        raise Damaged(f"{shape}, in a storage of {have} elements")
    start = storage.start * storage.dtype.itemsize // dtype.itemsize
    return torch.empty(0, dtype=dtype).set_(storage.data, start + offset, tuple(size), tuple(stride))


def _parameter(data: torch.Tensor, *_: Any) -> Any:
    return data


def _from_type(function: Record, _kind: Any, args: tuple[Any, ...], *_: Any) -> Any:
    """Returns only the tensor of a subclass of Tensor, or of a tensor with extra attributes."""
    builder, *_types = _BUILDERS.get((function.module, function.name), (None,))
    return _built(function, args) if builder in (_tensor, _parameter) else NotImplemented


def _pairs(items: Any = ()) -> dict[Any, Any]:
    if isinstance(items, dict):
        return dict(items)
    if not all(isinstance(item, list | tuple) for item in items):
        raise Damaged("entries of a dict that are not pairs")
    return {_key(key): value for key, value in items}


def _members(values: Any = ()) -> set[Any]:
    return {_key(value) for value in values}


def _encoded(text: str, encoding: str) -> Any:
    """How protocol 2 writes bytes."""
    return text.encode("latin1") if encoding in ("latin1", "latin-1") else NotImplemented


def _numpy_dtype(described: Any) -> np.dtype[Any] | None:
    """A number's dtype, from `numpy.dtype(code, …)` and its state (version, byte order, …)."""
    if not isinstance(described, Record) or (described.module, described.name) != ("numpy", "dtype"):
        return None
    code = described.args[0] if described.args else None
    state = described.attributes.get("__state__")
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "<"
    known = isinstance(code, str) and re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16", code)
    return np.dtype(str(order) + str(code)) if known and order in ("<", ">", "|", "=") else None


def _numbers(described: Any, data: Any) -> Any:
    """The numbers of a numpy array or scalar; NotImplemented for other contents."""
    dtype, raw = _numpy_dtype(described), data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype) if dtype is not None and isinstance(raw, bytes) else NotImplemented


def _scalar(described: Record, data: str | bytes) -> Any:
    numbers = _numbers(described, data)
    return numbers if numbers is NotImplemented else numbers[0]


def _filled(array: np.ndarray, state: Any) -> Any:
    """The array, filled in place, or a record if it does not hold plain numbers."""
    if isinstance(state, tuple) and len(state) == 5:
        _version, shape, described, fortran, data = state
        if (numbers := _numbers(described, data)) is not NotImplemented:
            if not is_integers(shape) or prod(shape) != numbers.size:
                raise Damaged(f"a numpy array of {numbers.size} numbers and another shape")
            numbers = numbers.reshape(shape, order="F" if fortran else "C")
            array.__setstate__((1, numbers.shape, numbers.dtype, False, numbers.tobytes()))
            return array
    return Record("numpy", "ndarray", (), {"__state__": state})


# The functions that rebuild values, with their arguments. They iterate only containers: a tensor of stride 0 has endless rows.
_LISTED = list | tuple
_REBUILT_TENSOR = (_tensor, Storage, int, _LISTED, _LISTED, object, object, object, object)
_REBUILT_PARAMETER = (_parameter, torch.Tensor, object, object, object)
_FROM_TYPE = (_from_type, Record, object, tuple, object)
_NUMPY_ARRAY = (lambda *_: np.empty(0, np.uint8), object, object, object)  # which its BUILD fills
_NUMPY_SCALAR = (_scalar, Record, str | bytes)
_BUILDERS: dict[tuple[str, str], tuple[Any, ...]] = {
    ("torch._utils", "_rebuild_tensor"): _REBUILT_TENSOR,
    ("torch._utils", "_rebuild_tensor_v2"): _REBUILT_TENSOR,
    ("torch._utils", "_rebuild_tensor_v3"): _REBUILT_TENSOR,
    ("torch._utils", "_rebuild_parameter"): _REBUILT_PARAMETER,
    ("torch._utils", "_rebuild_parameter_with_state"): _REBUILT_PARAMETER,
    ("torch.nn.parameter", "Parameter"): _REBUILT_PARAMETER,
    ("torch._tensor", "_rebuild_from_type"): _FROM_TYPE,
    ("torch._tensor", "_rebuild_from_type_v2"): _FROM_TYPE,
    ("torch.tensor", "_rebuild_from_type"): _FROM_TYPE,
    ("torch", "Size"): (torch.Size, _LISTED),
    ("torch", "device"): (torch.device, str, int),
    ("collections", "OrderedDict"): (_pairs, _LISTED | dict),
    ("collections", "defaultdict"): (lambda _factory=None, items=(): _pairs(items), object, _LISTED | dict),
    ("builtins", "dict"): (_pairs, _LISTED | dict),
    ("builtins", "list"): (list, _LISTED),
    ("builtins", "tuple"): (tuple, _LISTED),
    ("builtins", "set"): (_members, _LISTED | set | frozenset),
    ("builtins", "frozenset"): (lambda values=(): frozenset(_members(values)), _LISTED | set | frozenset),
    ("builtins", "bytearray"): (bytearray, bytes),
    ("builtins", "bytes"): (bytes,),
    ("builtins", "complex"): (complex, int | float, int | float),
    ("_codecs", "encode"): (_encoded, str, str),
    ("copyreg", "_reconstructor"): (  # how protocols 0 and 1 make an object
        lambda kind, *_: Record(kind.module, kind.name, ()),
        Record,
        object,
        object,
    ),
    ("numpy.core.multiarray", "_reconstruct"): _NUMPY_ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): _NUMPY_ARRAY,
    ("numpy.core.multiarray", "scalar"): _NUMPY_SCALAR,
    ("numpy._core.multiarray", "scalar"): _NUMPY_SCALAR,
}
PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # what protocol 2 calls them


def _built(function: Record, args: tuple[Any, ...]) -> Any:
    """The rebuilt object, or NotImplemented for one that is not rebuilt."""
    builder, *kinds = _BUILDERS.get((function.module, function.name), (None,))
    fits = builder and function.args is None and len(args) <= len(kinds)
    return builder(*args) if fits and all(map(isinstance, args, kinds)) else NotImplemented


def _key(value: Any) -> Any:
    """Checks a key of a dict or set: its hash must be quick, and the file must not be able to choose it. Nested tuples can
    take 2ⁿ steps to hash, and huge integers all collide."""
    if type(value) is int and value.bit_length() <= 60:
        return value
    if value is None or isinstance(
        value, str | bytes | bool | float | Record | torch.Tensor | torch.dtype | np.generic
    ):
        return value
    if isinstance(value, tuple) and len(value) <= 16 and not any(isinstance(v, tuple) for v in value):
        return tuple(_key(v) for v in value)
    raise Damaged(f"a {type(value).__name__} as the key of a dict")


class _Counted(dict[int, Any]):
    """An unpickler's table of opcodes, looked up once for each opcode."""

    left = 0

    def __getitem__(self, opcode: int) -> Any:
        self.spend(1)
        return super().__getitem__(opcode)

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise Damaged(f"a pickle of more than {MAX_OPCODES:,} opcodes and copied elements")


class InertUnpickler(pickle._Unpickler):
    """Reads one pickle from a stream without calling anything that it names; leaves the stream after it."""

    # The base class has them, but mypy's stub of it does not.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(self, stream: IO[bytes], persistent: Callable[[Any], Any]) -> None:
        super().__init__(stream, encoding="latin1")
        self.persistent = persistent
        self.globals: dict[tuple[str, str], Any] = {}
        self.counted = self.dispatch = _Counted(_HANDLERS)  # type: ignore[misc]
        self.counted.left = MAX_OPCODES

    def persistent_load(self, pid: Any) -> Any:
        return self.persistent(pid)

    def find_class(self, module: str, name: str) -> Any:
        key = (PYTHON2.get(module, module), name)
        if key not in self.globals:
            self.globals[key] = CONSTANTS.get(key) or Record(*key)
        return self.globals[key]

    def get_extension(self, code: int) -> None:
        raise Damaged(f"extension {code} of a registry")  # this process's registry, which may hold functions

    def spend_copy(self, *values: Any) -> None:
        """Counts a value that may be copied: one list that is used again and again would otherwise fill the memory."""
        for value in values:
            if isinstance(value, str | bytes | bytearray):
                self.counted.spend(len(value) >> 10)
            elif isinstance(value, list | tuple | dict | set | frozenset):
                self.counted.spend(len(value))

    def called(self, function: Any, args: Any) -> Any:
        """Builds what is on the list, and records everything else."""
        if not isinstance(function, Record) or not isinstance(args, tuple):
            raise Damaged(f"a call of a {type(function).__name__}")
        if (function.module, function.name) in _BUILDERS:
            self.spend_copy(*args)
        made = _built(function, args)
        return Record(function.module, function.name, args) if made is NotImplemented else made

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.called(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments
        self.load_reduce()

    def _instantiate(self, klass: Any, args: list[Any]) -> None:  # of load_inst and load_obj
        self.append(self.called(klass, tuple(args)))

    def load_build(self) -> None:
        """Sets an object's state without calling its `__setstate__`."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, np.ndarray):
            self.spend_copy(*(state if isinstance(state, tuple) else ()))
            self.stack[-1] = _filled(target, state)
        elif isinstance(target, Record) and target.args is not None:
            if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
                state = state[0] or {}  # without slots
            if state is not None:
                target.attributes = state if isinstance(state, dict) else {"__state__": state}
        elif not isinstance(target, dict):  # an OrderedDict's attributes: a state dict's `_metadata`
            raise Damaged(f"the state of a {type(target).__name__}")

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            return
        if not isinstance(target, dict):
            raise Damaged(f"entries of a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def load_setitem(self) -> None:
        self.set_items([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    def load_dict(self) -> None:
        values = self.pop_mark()
        self.append({})
        self.set_items(values)

    def load_additems(self) -> None:
        values = self.pop_mark()
        target = self.stack[-1]
        if not isinstance(target, set | Record):
            raise Damaged(f"members of a {type(target).__name__}")
        if isinstance(target, set):
            target.update(_members(values))

    def load_frozenset(self) -> None:
        values = self.pop_mark()
        self.append(frozenset(_members(values)))

    def load_bytearray8(self) -> None:
        self.append(
            bytearray(self.read(int.from_bytes(self.read(8), "little")))
        )  # the base class takes the memory first


_HANDLERS: dict[int, Any] = {
    **pickle._Unpickler.dispatch,
    pickle.REDUCE[0]: InertUnpickler.load_reduce,
    pickle.NEWOBJ[0]: InertUnpickler.load_reduce,  # class and arguments lie as function and arguments do
    pickle.NEWOBJ_EX[0]: InertUnpickler.load_newobj_ex,
    pickle.BUILD[0]: InertUnpickler.load_build,
    pickle.SETITEM[0]: InertUnpickler.load_setitem,
    pickle.SETITEMS[0]: InertUnpickler.load_setitems,
    pickle.DICT[0]: InertUnpickler.load_dict,
    pickle.ADDITEMS[0]: InertUnpickler.load_additems,
    pickle.FROZENSET[0]: InertUnpickler.load_frozenset,
    pickle.BYTEARRAY8[0]: InertUnpickler.load_bytearray8,
}
