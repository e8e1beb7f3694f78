"""Reads a pickled network (`torch.save(model)`) without running anything in it and without the packages it was made with.

Both of torch's formats are read: the zip of version 1.6 on (`data.pkl` and one entry a storage), and the older run of
pickles followed by the storages' bytes (formats: torch/serialization.py). The pickle goes through `qat.checkpoints.unpickle`.
`torch.load` is not used, because on the way to its unpickler it may hand a file to TorchScript, unpack a tar or write a
patch file into the working directory.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import struct
import zipfile
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qat.checkpoints.unpickle import Damaged, InertUnpickler, Record, Storage, is_integers
from qat.core.errors import UserError

# Like unpickle's bound: far above any real network.
MAX_PICKLE = 256 << 20
MAX_MODULES = 100_000
MAX_NAMES = 1_000_000
MAX_NAME = 1000
MAX_DEPTH = 100

LONGEST_WORD = (
    10_000  # bytes of a pickle without white space between them; the numbers in one have it by chance more often
)
DOS_FOLDER = 0x10  # among the attributes of a zip's entry

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
    "_UntypedStorage": torch.uint8,
}
STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage", "torch.cuda.storage")

# What parsing a damaged file can raise, apart from Damaged: a stack that is too short, an invalid number …
FAILURES = (
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    OverflowError,
    EOFError,
    OSError,
    MemoryError,
    AttributeError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


class _Storages:
    """Answers persistent ids: ("storage", class, key, device, elements[, view]) and, before 1.6, ("module", class, …).

    Args:
        read: returns the storage of a key, at least so many bytes.
        limit: bytes that all storages together can have.
    """

    def __init__(self, read: Callable[[str, int], torch.UntypedStorage], limit: int) -> None:
        self.read = read
        self.left = limit
        self.data: dict[str, torch.UntypedStorage] = {}
        self.elements: dict[str, int] = {}

    def __call__(self, identity: Any) -> Any:
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
            return identity[1]  # the class; its source code is not used
        if not (isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage"):
            raise Damaged("a persistent id that is not a storage")
        _, kind, key, _device, numel, *view = identity
        dtype = None
        if isinstance(kind, Record) and kind.args is None and kind.module in STORAGE_MODULES:
            dtype = DTYPES.get(kind.name)
        if not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise Damaged("a storage without key or size")
        if dtype is None:
            return Record("torch", "storage", (kind, key, numel))
        size = numel * dtype.itemsize
        if key not in self.data:
            self.left -= size
            if self.left < 0:
                raise Damaged(f"storage {key[:40]!r} of {size:,} bytes, more than the file has")
            self.data[key], self.elements[key] = self.read(key, size), numel
        data = self.data[key]
        if data.nbytes() < size:
            raise Damaged(f"storage {key[:40]!r} of {size:,} bytes; the file has {data.nbytes():,}")
        start, length = 0, numel
        if view and view[0] is not None:
            if not isinstance(view[0], tuple) or len(view[0]) != 3 or not is_integers(view[0][1:]):
                raise Damaged("a view of something that is not a storage")
            _, start, length = view[0]
            if min(start, length) < 0 or start + length > numel:
                raise Damaged("a view of a storage beyond its end")
        return Storage(data, dtype, length, start)


def _check_entries(archive: zipfile.ZipFile, path: Path) -> str:
    """The name of the pickle in a zip file written by torch.save; raises `Damaged` for any other zip file."""
    entries = archive.infolist()
    pickles = [entry.filename for entry in entries if re.fullmatch(r"([^/]+/)?data\.pkl", entry.filename)]
    if len(pickles) != 1:
        raise Damaged(f"a zip with {len(pickles)} data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in archive.namelist():
        raise Damaged("a TorchScript archive")
    # torch.save does not compress: a file that unpacks to more than its size is not a checkpoint.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Damaged("a zip with compressed entries")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise Damaged("a zip whose entries overlap")
    if archive.getinfo(pickles[0]).file_size > MAX_PICKLE:
        raise Damaged(f"a pickle of more than {MAX_PICKLE >> 20} MiB")
    return pickles[0]


def is_plainly_saved(path: Path) -> bool:
    """Whether `torch.load(weights_only=True)` is safe for a file from elsewhere: a zip file as torch.save writes it, in which
    no name is too long.

    torch.load unpacks compressed entries of any size, treats entries marked as folders as such (and then returns uninitialised
    memory), and builds its error messages with regular expressions whose time grows with the square of the refused
    name's length (torch 2.13: 5 s for 70,000 characters). It reads the older format no better than
    `read_pickled`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = archive.read(_check_entries(archive, path))
            entries = archive.infolist()
    except (Damaged, *FAILURES, NotImplementedError):
        return False
    sound = all(e.compress_size == e.file_size and not e.external_attr & DOS_FOLDER for e in entries)
    return sound and all(len(word) < LONGEST_WORD for word in pickled.split())


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        pickled = _check_entries(archive, path)
        root = pickled.removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise Damaged("tensors of a big-endian machine")

        def read(key: str, _size: int) -> torch.UntypedStorage:
            content = bytearray(archive.read(f"{root}data/{key}"))
            return (
                torch.frombuffer(content, dtype=torch.uint8).untyped_storage() if content else torch.UntypedStorage(0)
            )

        storages = _Storages(read, path.stat().st_size)
        return InertUnpickler(io.BytesIO(archive.read(pickled)), storages).load()


def _no_persistent(_: Any) -> Any:
    raise Damaged("a persistent id before the checkpoint")


def _read_legacy(path: Path) -> Any:
    """Four pickles and the list of storages, also pickled; then, for each, its number of elements in 8 bytes and its values."""
    data = path.read_bytes()
    stream = io.BytesIO(data)
    if data[:1] != pickle.PROTO or InertUnpickler(stream, _no_persistent).load() != LEGACY_MAGIC:
        raise Damaged("the first bytes are not a checkpoint's")
    if InertUnpickler(stream, _no_persistent).load() != LEGACY_PROTOCOL:
        raise Damaged(
            "another format than torch's"
        )  # the message does not say which: printing a file's contents may never end
    system = InertUnpickler(stream, _no_persistent).load()
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise Damaged("tensors of a big-endian machine")
    storages = _Storages(lambda _key, size: torch.UntypedStorage(size), len(data))  # empty for now
    value = InertUnpickler(stream, storages).load()
    keys = InertUnpickler(stream, _no_persistent).load()
    listed = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not listed or set(keys) != set(storages.data):
        raise Damaged("a list of storages that differs from the pickle's")
    for key in keys:
        storage = storages.data[key]
        if struct.unpack("<q", stream.read(8))[0] != storages.elements[key]:
            raise Damaged(f"storage {key[:40]!r} of another size than the pickle says")
        content = stream.read(storage.nbytes())
        if len(content) < storage.nbytes():
            raise Damaged("the file ends early")
        if content:
            values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            torch.empty(0, dtype=torch.uint8).set_(storage).copy_(values)
    return value


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except (Damaged, *FAILURES) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        # It starts like a zip file, but the list of its entries, at the end, is missing.
        if reason == "File is not a zip file" or isinstance(error, EOFError):
            reason = "it ends early"
        raise UserError(f"{path}: not a torch checkpoint, or damaged ({reason}); save or fetch it again") from None


def read_pickled(path: str | Path) -> Any:
    """Reads what `torch.save` wrote, of any class: tensors (on the CPU, parameters too), numbers, text, plain containers,
    numpy arrays, and a `Record` for everything else. Nothing in the file is run or imported.

    A defaultdict and an OrderedDict are dicts. Tensors share storages as they did; an expanded one stays a view.

    Raises:
        UserError: not torch's format, damaged, compressed, or it claims more than the file holds.
    """
    path = Path(path)
    with _one_line(path):
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        return _read_zip(path) if zipped else _read_legacy(path)


def is_module(value: Any) -> bool:
    """Whether a record is an nn.Module."""
    return isinstance(value, Record) and all(
        isinstance(value.attributes.get(name), dict) for name in ("_parameters", "_buffers", "_modules")
    )


def _children(record: Record, kind: str) -> Iterator[tuple[str, Any]]:
    for name, value in record.attributes[kind].items():
        if isinstance(name, str) and value is not None:
            yield name, value


def unwrapped(record: Record) -> Record:
    """The network inside a DataParallel, MMDataParallel, DistributedDataParallel."""
    for _ in range(MAX_DEPTH):
        inner = record.attributes["_modules"].get("module")
        if not (record.name.endswith("DataParallel") and is_module(inner)):
            break
        record = inner
    return record


def _quantizer(record: Record) -> dict[str, Any]:
    """A TensorQuantizer's settings, pytorch-quantization's or ModelOpt's, by the names of its attributes."""
    kept = (record.attributes["_parameters"], record.attributes["_buffers"], record.attributes)
    have: ChainMap[str, Any] = ChainMap({}, *kept)  # not a copy: many records may share huge ones
    clip = record.attributes["_modules"].get("clip")
    if is_module(clip) and have.get("_learn_amax") is True:
        learned = ChainMap(clip.attributes["_parameters"], clip.attributes)
        low, high = learned.get("clip_value_min"), learned.get("clip_value_max")
        if isinstance(low, torch.Tensor) and isinstance(high, torch.Tensor) and low.shape == high.shape:
            have["_amax"] = torch.maximum(-low, high)
    return quantizer_settings(have)


def quantizer_settings(have: Mapping[str, Any]) -> dict[str, Any]:
    """A TensorQuantizer's attributes and buffers by name → {"amax": tensor or None, "disabled", "num_bits", "axis": tuple or
    None, "unsigned", "special": why amax/127 is not its scale, or None}. Untrusted values of other types count as absent."""
    amax, scaled = have.get("_amax"), have.get("_scale_amax")
    amax = amax if isinstance(amax, torch.Tensor) and amax.is_floating_point() else None
    if amax is not None and isinstance(scaled, int | float):
        amax = amax * scaled
    axis = have.get("_axis")
    axes = (
        (axis,) if type(axis) is int else tuple(axis) if isinstance(axis, tuple | list) and is_integers(axis) else None
    )
    bits = have.get("_num_bits", 8)
    special = None
    if isinstance(have.get("_pre_quant_scale"), torch.Tensor):
        special = "it divides its input's channels first (SmoothQuant)"
    elif have.get("_block_sizes") is not None:
        special = "it has one scale for each block of values"
    elif type(bits) is not int:
        special = "its numbers are floating-point"
    return {
        "amax": amax,
        "disabled": have.get("_disabled") is True or have.get("_if_quant") is False,
        "num_bits": bits if type(bits) is int else 8,
        "axis": axes,
        "unsigned": have.get("_unsigned") is True,
        "special": special,
    }


def module_state(record: Record, source: str) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """A pickled network's state dict, by the names of `nn.Module.state_dict`, without its quantizers; and the quantizers by
    their paths (as `quantizer_settings`). A module at several paths is listed at each.

    Raises:
        UserError: too deep or too many modules for a network, which includes one that contains itself.
    """
    state: dict[str, torch.Tensor] = {}
    quantizers: dict[str, dict[str, Any]] = {}
    waiting = [("", 0, unwrapped(record))]
    count = names = 0
    while waiting:
        prefix, depth, module = waiting.pop()
        count += 1
        children = module.attributes["_modules"]
        big = count + len(waiting) + len(children) > MAX_MODULES or depth > MAX_DEPTH or len(prefix) > MAX_NAME
        names += sum(len(module.attributes[kind]) for kind in ("_parameters", "_buffers"))
        if big or names > MAX_NAMES:
            raise UserError(
                f"{source}: not a torch checkpoint, or damaged (a network of more than {MAX_MODULES:,} modules or "
                f"{MAX_NAMES:,} tensors, or {MAX_DEPTH} deep)"
            )
        if module.name == "TensorQuantizer":
            quantizers[prefix.removesuffix(".")] = _quantizer(module)
            continue
        passing = module.attributes.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, set) else set()
        for name, value in _children(module, "_parameters"):
            if isinstance(value, torch.Tensor):
                state[prefix + name] = value
        for name, value in _children(module, "_buffers"):
            if isinstance(value, torch.Tensor) and name not in passing:
                state[prefix + name] = value
        inner = [(f"{prefix}{n}.", depth + 1, child) for n, child in _children(module, "_modules") if is_module(child)]
        waiting.extend(reversed(inner))  # in the network's order
    return state, quantizers
