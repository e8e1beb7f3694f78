"""What is done to a valid file: bytes, and the structure of JSON, YAML, zip, pickle and protobuf.

A mutation takes the file's bytes, a `Random` of its own and other valid files of the kind, and gives bytes. One that cannot
read its structure (an earlier mutation destroyed it) changes bytes instead, so every step does something.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import yaml

Mutation = Callable[[bytes, Random, Sequence[bytes]], bytes]

CANARY = "canary"  # a file of this name in the working directory means that something in a file was run
LONG = "A" * 70_000
DEEP = 100_000
TEXTS = (
    "", " ", "\0", "\n", "a\nb", "\x1b[2J", "é", "\u202e", "\ufeff", "．．/", "../../etc/passwd", "..\\..\\x", "/etc/passwd",
    "C:\\x", "//server/x", "~", "manifest.json", ".", "..", "file:///etc/passwd", "%s%n", "${model}", "${a.b}", "nan", "1e999",
    "null", "fp32", "int8", "onnx", "pt2", "engine", "!!python/object/apply:os.system ['touch canary']", LONG,
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 65535, 2**31 - 1, -(2**31), 2**32, 2**53, 2**63, -(2**63), 10**30, 10**4000,
    0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 10**9, 10**6, 100_000,
)  # fmt: skip


# Bytes


def _span(size: int, random: Random) -> tuple[int, int]:
    start = random.randrange(size + 1)
    return start, min(size, start + random.choice((1, 2, 4, 8, 16, 64, 256, 4096)))


def flip(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def byte(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    changed = bytearray(data or b"\0")
    changed[random.randrange(len(changed))] = random.choice((0, 1, 0x7F, 0x80, 0xFF, 0x0A, random.randrange(256)))
    return bytes(changed)


def truncate(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    return data[: random.choice((0, random.randrange(len(data) + 1), max(0, len(data) - random.randrange(1, 64))))]


def remove(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    start, end = _span(len(data), random)
    return data[:start] + data[end:]


def duplicate(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    start, end = _span(len(data), random)
    return data[:end] + data[start:end] * random.choice((1, 1, 2, 100)) + data[end:]


def fill(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    start, end = _span(len(data), random)
    return data[:start] + random.choice((b"\0", b"\xff", b"A")) * (end - start) + data[end:]


def splice(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    other = random.choice(others) if others else data
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other) + 1) :]


def token(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    start, end = _span(len(data), random)
    new = random.choice(
        (random.choice(TEXTS).encode("utf-8", "surrogatepass"), struct.pack("<q", random.randrange(-(2**40), 2**40)))
    )
    return data[:start] + new + data[random.choice((start, end)) :]


BYTES: dict[str, Mutation] = {f.__name__: f for f in (flip, byte, truncate, remove, duplicate, fill, splice, token)}


# Trees: JSON and YAML


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything inside a tree. Raises `ValueError` where it is endless, by anchors."""
    found, waiting = [], [tree]
    while waiting:
        if len(found) > 20_000:
            raise ValueError("too much to edit")
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            waiting.append(node[key])
    return found


def _number(random: Random, value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and random.random() < 0.5:
        return random.choice((-value, value + 1, value - 1, value * 2, float(value), value * 1000, value / 2))
    return random.choice(NUMBERS)


def _kind(random: Random) -> Any:
    return random.choice(
        (None, True, False, 0, 1.5, "", "text", [], {}, [1, 2, 3], {"a": 1}, [[]], [None], {"type": "x"})
    )


def edit_tree(tree: Any, random: Random) -> Any:
    """One change somewhere in a tree of dicts and lists, which is changed in place."""
    places = _places(tree)
    if not places:
        return _kind(random)
    container, key = random.choice(places)
    value = container[key]
    what = random.randrange(12)
    if what == 0:
        del container[key]
    elif what in (1, 2):
        container[key] = _kind(random)
    elif what in (3, 4):
        container[key] = _number(random, value)
    elif what == 5:
        container[key] = random.choice(TEXTS)
    elif what == 6:
        other, its = random.choice(places)
        container[key] = copy.deepcopy(other[its])
    elif what == 7 and isinstance(container, dict):
        new = random.choice((*TEXTS, f"{key}_", *(k for c, k in places if isinstance(k, str))))
        container[new] = container.pop(key)
    elif what == 8 and isinstance(value, list) and value:
        container[key] = random.choice((value * 2, value[:-1], value[:1], value * 1000, [value], value[::-1]))
    elif what == 9 and isinstance(value, str) and value:
        container[key] = random.choice(
            (value[:-1], value + "x", value.upper(), value + "\0", "../" + value, "/" + value, "./" + value)
        )
    elif what == 10:
        container[key] = [value] * random.choice((1, 2, 1000))
    else:
        container[key] = {"a": value} if random.random() < 0.5 else [value]
    return tree


@functools.lru_cache(maxsize=64)
def _parsed_json(data: bytes) -> Any:
    return json.loads(data)


def json_tree(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    try:
        tree = copy.deepcopy(_parsed_json(data))
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            tree = edit_tree(tree, random)
        return json.dumps(tree).encode()
    except (ValueError, RecursionError, OverflowError):
        return token(data, random, others)


def json_text(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """What no tree gives: nests, numbers as text, keys twice."""
    # fmt: off
    new = random.choice(
        (
            b"[" * DEEP,
            b'{"a":' * DEEP,
            b"[" * 500 + b"]" * 500,
            b"1" * 5000,
            b"1e400",
            b"-",
            b"NaN",
            b"Infinity",
            b"'",
            b"\xff\xfe",
            b'{"format": "x"}',
            b'"parts": {}, ',
            b'"file": "../x", ',
            b'"sha256": "0", ',
            b"/* */",
            b"\\ud800",
            b'"\\ud800"',
        )
    )
    # fmt: on
    starts = [i for i, c in enumerate(data) if c in b':,[{"'] or [0]
    at = random.choice(starts) + 1
    end = at if random.random() < 0.5 else next((i for i in range(at, len(data)) if data[i] in b",}]\n"), len(data))
    return data[:at] + new + data[end:]


@functools.lru_cache(maxsize=64)
def _parsed_yaml(data: bytes) -> Any:
    return yaml.load(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def yaml_tree(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    try:
        tree = _parsed_yaml(data)
        _places(tree)
        tree = copy.deepcopy(tree)
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            tree = edit_tree(tree, random)
        return yaml.dump(tree, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False).encode()
    except (yaml.YAMLError, ValueError, RecursionError, UnicodeError):
        return token(data, random, others)


def _laughs(levels: int, width: int) -> bytes:
    lines = ["l0: &l0 [1, 2]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines).encode() + b"\n"


YAML_LINES = (
    b"x: !!python/object/apply:os.system ['touch canary']\n", b"x: !!python/name:os.system\n", b"x: !!binary 'AA=='\n",
    b"self: &self [*self]\n", b"model: &m {encoders: *m}\n", b"<<: {model: null}\n", b"<<: *nothing\n", b"? [a, b]\n: c\n",
    b"? {a: b}\n: c\n", b"%YAML 9.9\n---\n", b"---\nsecond: 1\n", b"\t- x\n", b"x: 0x10\n", b"x: 1_000\n", b"x: 12:30:45\n", b"x: 2001-01-01\n",
    b"x: .nan\n", b"x: ${__import__('os').system('touch canary')}\n", b"image_size: ${image_size}\n", b"x: ${'a' * 10 ** 9}\n",
    b"x: ${9 ** 9 ** 9}\n", b"x: ${" + b"(" * 900 + b"1" + b")" * 90 + b"}\n", b"x: ${" + b"-" * 900 + b"1}\n", b"image_size: ${[1] + [2]}\n",
    b"x: ${" + b"9" * 400 + b" * " + b"9" * 400 + b"}\n", b"x: ${model}\n", b"x: ${1 / 0}\n", b"x: " + b"[" * 20_000 + b"\n", b"x: " + b"[" * 900 + b"]" * 900 + b"\n",
    b"x: " + b"{a: " * 20_000 + b"\n", b"x: !!int 'z'\n", b"x: !!timestamp '9'\n", b"x: 1e5000\n", b"x: " + b"9" * 5000 + b"\n", b"x: !!set {a, b}\n",
    b"b0: ${[image_size, image_size]}\n" + b"".join(b"b%d: ${[b%d, b%d]}\n" % (n, n - 1, n - 1) for n in range(1, 30)),
    _laughs(30, 2), _laughs(9, 9), _laughs(40, 9), b"\xff\xfe\n", b"x: '\n", b"x: |\n" + b"  a\n" * 1000,
)  # fmt: skip


def yaml_text(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Lines put in at the top level or below it, lines moved, doubled and dropped, indented otherwise."""
    lines = data.splitlines(keepends=True) or [b""]
    at = random.randrange(len(lines) + 1)
    what = random.randrange(6)
    if what <= 2:
        tops = [i for i, line in enumerate(lines) if line[:1] not in (b" ", b"-", b"\n", b"#")] or [0]
        at = random.choice(tops) if what else at
        lines.insert(at, random.choice(YAML_LINES))
    elif what == 3:
        lines[at : at + random.choice((1, 1, 5))] = []
    elif what == 4:
        lines[at:at] = lines[at : at + random.choice((1, 1, 5))]
    elif at < len(lines):
        lines[at] = random.choice(
            (b"  " + lines[at], lines[at].lstrip(), lines[at].replace(b":", b""), lines[at].replace(b"- ", b"-"))
        )
    return b"".join(lines)


def expression(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """A value replaced by an expression over the config's keys, well formed or not."""
    pieces = (
        "image_size", "model", "model.encoders.camera", "point_cloud_range", "image_size[0]", "image_size[9]", "image_size[::0]", "point_cloud_range[-1]",
        "nothing", "object_classes", "1", "0", "1e308", "'a'", "[1, 2]", "__class__", "model.heads.object.tasks", "10 ** 10", "lambda: 0", "x for x in y",
        "image_size[0] // 0", "point_cloud_range[0:9999999999]", "{'a': 1}", "not 1", "f''", "image_size[1.5]", "image_size['a']", "[*image_size]",
    )  # fmt: skip
    text = random.choice(pieces)
    for _ in range(random.randrange(3)):
        text = f"{text} {random.choice('+-*/%@|,.')} {random.choice(pieces)}"
    lines = data.splitlines()
    at = random.choice([i for i, line in enumerate(lines) if b": " in line] or [0])
    if lines:
        lines[at] = lines[at].split(b": ")[0] + b": ${" + text.encode() + b"}"
    return b"\n".join(lines)


# Zip archives


def _entries(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def _zipped(entries: Sequence[tuple[str, bytes]], compressed: Sequence[int] = ()) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for index, (name, content) in enumerate(entries):
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED if index in compressed else zipfile.ZIP_STORED
            archive.writestr(entry, content)
    return stream.getvalue()


NAMES = (
    "../data.pkl",
    "/etc/passwd",
    "archive/data/../../x",
    "constants.pkl",
    "a\\b",
    "",
    "é",
    "archive/data/0",
    "code/x.py",
    "data.pkl",
    "A" * 3000,
)


def zip_entries(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Entries renamed, dropped, doubled, exchanged, compressed, or unpacking to far more than there is."""
    try:
        entries = _entries(data)
        at = random.randrange(len(entries))
    except (
        zipfile.BadZipFile,
        ValueError,
        KeyError,
        OSError,
        NotImplementedError,
        RuntimeError,
        EOFError,
        struct.error,
    ):
        return flip(data, random, others)
    name, content = entries[at]
    root = name.split("/")[0]
    what = random.randrange(10)
    compressed: list[int] = []
    if what == 0:
        entries[at] = (random.choice((*NAMES, f"{root}/constants.pkl", name.upper(), f"x/{name}")), content)
    elif what == 1:
        del entries[at]
    elif what == 2:
        entries.append((name, random.choice((content, b"", content[::-1]))))
    elif what == 3:
        other = random.randrange(len(entries))
        entries[at], entries[other] = (name, entries[other][1]), (entries[other][0], content)
    elif what == 4:
        compressed = [at]
    elif what == 5:
        entries[at] = (name, bytes(random.choice((10**5, 10**6, 10**7))))
        compressed = [at]
    elif what == 6:
        entries[at] = (name, content[: random.randrange(len(content) + 1)])
    elif what == 7:
        entries[at] = (f"{root}/byteorder", random.choice((b"big", b"little", b"", b"x" * 100)))
    elif what == 8:
        entries.insert(0, (random.choice(NAMES), b"x"))
    else:
        entries.append((f"{root}/.format_version", b"9"))
        random.shuffle(entries)
    return _zipped(entries, compressed)


def zip_header(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """A field of a local header, of the directory or of its end says something else: sizes, offsets, methods, flags."""
    marks = {b"PK\x03\x04": 30, b"PK\x01\x02": 46, b"PK\x05\x06": 22, b"PK\x06\x06": 56, b"PK\x06\x07": 20}
    places = []
    for mark, size in marks.items():
        at = data.find(mark)
        while at >= 0:
            places.append((at, size))
            at = data.find(mark, at + 1)
    if not places:
        return flip(data, random, others)
    at, size = random.choice(places)
    changed = bytearray(data)
    where = at + 4 + 2 * random.randrange((size - 4) // 2)
    width = random.choice((2, 4))
    old = int.from_bytes(changed[where : where + width], "little")
    new = random.choice((0, 1, 0xFFFF, 0xFFFFFFFF, 0x7FFFFFFF, old + 1, old - 1, old * 2, random.randrange(1 << 31)))
    changed[where : where + width] = (new % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(changed[: len(data)])


# Pickles


def _bombs() -> tuple[bytes, ...]:
    system = b"cos\nsystem\n(S'touch canary'\ntR"
    lists = b"]q\x00" + b"".join(b"]q%c(" % (n + 1) + b"h%c" % n * 10 + b"e" for n in range(40))
    tuples = b")" + b"2\x86" * 60
    return (
        system + b".",
        b"c__builtin__\neval\n(S\"open('canary','w')\"\ntR.",
        b"cposix\nsystem\n\x8c\x0ctouch canary\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch canary\x85R.",
        b"ctorch.serialization\nload\n(S'canary'\ntR.",
        b"cnumpy\nload\n(S'canary'\ntR.",
        b"(S'touch canary'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch canary'\no.",
        lists + b".",
        tuples + b".",
        b"(" * 100_000 + b".",
        b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x8b\xff\xff\xff\x7f" + b"\1" * 100,
        b"\x8a\xff" + b"\1" * 255 + b".",
        b"I" + b"9" * 100_000 + b"\n.",
        b"X\xff\xff\xff\x7fabc.",
        b"\x8e" + b"\xff" * 7 + b"\x7f.",
        b"\x96" + b"\xff" * 8 + b".",
        b"Vx\n" + b"2\x86" * 40 + b"}" + b"2s.",
        b"}(" + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 20_000)) + b"u.",
        b"c__builtin__\nbytearray\n(\x8a\x05\xff\xff\xff\xff\x0ftR.",
        b"ccollections\nOrderedDict\n" + b"]" * 10 + b"\x85R.",
        b"ctorch\nSize\n(K\xff" + b"2" * 2000 + b"ltR.",
        b"h\xff.", b"0.", b"1.", b"R.", b"b.", b"e.", b"u.", b"t.", b".", b"", b"N", b"\x80\xff.", b"\x82\x01.", b"P1\n.", b"NQ.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I999999999\ntNI00\nS''\ntb.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.",
        b"c" + b"A" * 70_000 + b"\nx\n.",
        b"cos\nsystem\n" + b"\x81" * 5 + b".",
        b"Nq\xff0h\xff\x94.", b"\x95" + b"\xff" * 8 + b".", b"S'" + b"\\x41" * 5000 + b"'\n.", b"V\\ud800\n.", b"F1e999\n.", b"Fx\n.",
    )  # fmt: skip


BOMBS = _bombs()


@functools.lru_cache(maxsize=32)
def _opcodes(pickled: bytes) -> tuple[tuple[int, int], ...]:
    """Start and end of each opcode, as far as they can be read."""
    starts: list[int] = []
    with contextlib.suppress(Exception):  # it stumbles over what earlier mutations left, in any way
        for _, _, position in pickletools.genops(pickled):
            starts.append(position or 0)
    return tuple(zip(starts, [*starts[1:], len(pickled)][: len(starts)], strict=True))


def edit_pickle(pickled: bytes, random: Random) -> bytes:
    """Opcodes dropped, doubled, exchanged, moved, given other arguments; a hostile program put in or in place of it."""
    what = random.randrange(9)
    if what == 0:
        return random.choice(BOMBS)
    places = _opcodes(pickled)
    if not places:
        return flip(pickled, random, ())
    start, end = random.choice(places)
    one = pickled[start:end]
    if what == 1:
        return pickled[:start] + pickled[end:]
    if what == 2:
        return pickled[:end] + one * random.choice((1, 2, 1000)) + pickled[end:]
    if what == 3:
        return (
            pickled[:start]
            + bytes([random.choice(pickletools.opcodes).code.encode("latin1")[0]])
            + pickled[start + 1 :]
        )
    if what == 4:
        return pickled[:start] + random.choice(BOMBS).removesuffix(b".") + pickled[start:]
    if what == 5 and len(one) > 1:
        at = start + 1 + random.randrange(len(one) - 1)
        return (
            pickled[:at] + bytes([random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))]) + pickled[at + 1 :]
        )
    if what == 6:
        a, b = random.choice(places)
        return pickled[:start] + pickled[a:b] + pickled[end:]
    if what == 7:
        name = random.choice(
            (
                b"cos\nsystem\n",
                b"ctorch\nFloatStorage\n",
                b"ctorch._utils\n_rebuild_tensor_v2\n",
                b"cbuiltins\nexec\n",
                b"ctorch\nint8\n",
            )
        )
        return pickled[:start] + name + pickled[end:]
    value = random.choice(
        (
            None,
            10**100,
            -1,
            "x" * 3000,
            b"y",
            (),
            [],
            {},
            {1: 2},
            (1, (2,)),
            1.5,
            float("nan"),
            {"a": [1]},
            ("storage", 1, "0", "cpu", 2**60),
        )
    )
    return pickled[:start] + pickle.dumps(value, protocol=2)[2:-1] + pickled[end:]


def pickled_part(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """`edit_pickle` of a checkpoint's data.pkl, with the right checksum around it; or, in the older format, of the run of
    pickles at its start."""
    if data[:2] == b"PK":
        try:
            entries = _entries(data)
        except Exception:  # a damaged zip, in whatever way
            return flip(data, random, others)
        entries = [
            (name, edit_pickle(content, random) if name.endswith("data.pkl") else content) for name, content in entries
        ]
        return _zipped(entries)
    end = 0
    for _ in range(4):
        places = _opcodes(data[end:])
        if not places:
            break
        start, end = end, end + places[-1][0] + 1
        if random.random() < 0.4:
            return data[:start] + edit_pickle(data[start:end], random) + data[end:]
    return edit_pickle(data[:end], random) + data[end:]


# Protobuf


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        one = data[at]
        at += 1
        value |= (one & 0x7F) << shift
        shift += 7
        if one < 0x80 or shift > 63:
            return value, at


def _encoded(value: int) -> bytes:
    value %= 1 << 64
    out = bytearray()
    while True:
        out.append((value & 0x7F) | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(out)


def _fields(data: bytes) -> list[tuple[int, int, Any]]:
    """(number, wire type, value) of each field; raises where it is no message."""
    found: list[tuple[int, int, Any]] = []
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if not number:
            raise ValueError("field 0")
        if wire == 0:
            value, at = _varint(data, at)
            found.append((number, wire, value))
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError("no message")
        found.append((number, wire, data[at : at + size]))
        at += size
    return found


def _joined(fields: Sequence[tuple[int, int, Any]]) -> bytes:
    out = []
    for number, wire, value in fields:
        out.append(_encoded(number << 3 | wire))
        if wire == 0:
            out.append(_encoded(value))
        elif wire == 2:
            out += [_encoded(len(value)), value]
        else:
            out.append(value)
    return b"".join(out)


VARINTS = (0, 1, 2, 3, 7, 10, 16, 17, 127, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def edit_message(data: bytes, random: Random, depth: int = 0) -> bytes:
    """One change in a message or, more often, in one inside it; lengths around it stay right."""
    fields = _fields(data)
    if not fields:
        return data
    at = random.randrange(len(fields))
    number, wire, value = fields[at]
    if wire == 2 and depth < 12 and random.random() < 0.8:
        try:
            fields[at] = (number, wire, edit_message(value, random, depth + 1))
            return _joined(fields)
        except (ValueError, IndexError):
            pass
    what = random.randrange(8)
    if what == 0:
        del fields[at]
    elif what == 1:
        fields.insert(at, fields[at])
    elif what == 2:
        other = random.choice(fields)
        fields[at] = (number, other[1], other[2])
    elif what == 3:
        fields[at] = (random.randrange(1, 30), wire, value)
    elif what == 4:
        random.shuffle(fields)
    elif wire == 0:
        fields[at] = (number, wire, random.choice((*VARINTS, value + 1, value - 1)))
    elif wire == 2:
        texts = [v for _, w, v in fields if w == 2 and len(v) < 100]
        new = random.choice(
            (
                b"",
                value[:-1],
                value + b"\0",
                value * 2,
                value[: len(value) // 2],
                *texts,
                random.choice(TEXTS).encode(),
                b"/etc/passwd",
            )
        )
        fields[at] = (number, wire, new)
    else:
        fields[at] = (number, wire, random.choice((b"\xff", b"\0", b"\x7f")) * len(value))
    return _joined(fields)


def message(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    try:
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            data = edit_message(data, random)
        return data
    except (ValueError, IndexError):
        return flip(data, random, others)


def graph(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """What is still protobuf and no longer a graph, or no longer a sound one."""
    import onnx

    try:
        model = onnx.ModelProto.FromString(data)
        tensors, nodes = model.graph.initializer, model.graph.node
        if not nodes:
            return flip(data, random, others)
        what = random.randrange(14)
        node = random.choice(nodes)
        tensor = random.choice(tensors) if tensors else None
        if what == 0:  # a circle
            node.input[:] = [*node.output]
        elif what == 1:
            nodes[0].input[:] = [nodes[-1].output[0]] if nodes[-1].output else []
        elif what == 2 and tensor is not None:
            tensor.dims[:] = random.choice(([2**62, 4], [-1], [], [0], [2**31] * 3, [1] * 100, [2**63 - 1]))
        elif what == 3 and tensor is not None:
            raw = tensor.raw_data
            tensor.raw_data = random.choice((raw[:-1], raw + b"\0", raw * 3, b""))
        elif what == 4 and tensor is not None:
            tensor.data_type = random.choice((0, 1, 2, 3, 8, 10, 14, 16, 17, 23, 99, -1))
        elif what in (5, 6) and tensor is not None:
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.ClearField("raw_data")
            del tensor.external_data[:]
            place = (
                "../secret.bin",
                "/etc/passwd",
                "link.bin",
                "weights.bin",
                "missing.bin",
                "",
                ".",
                "\0",
                "folder/../../secret.bin",
                "graph.onnx",
                "//etc/passwd",
            )
            for key, value in (
                ("location", random.choice(place)),
                ("offset", random.choice(("0", "-1", "999999999999", "x", str(2**63)))),
                ("length", random.choice(("432", "0", "-1", "99999999999999", "x", str(2**64)))),
            ):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, value
        elif what == 7:
            node.op_type = random.choice(
                (
                    "",
                    "Conv",
                    "Reshape",
                    "Loop",
                    "If",
                    "Scan",
                    "NoSuchOp",
                    "Expand",
                    "ConstantOfShape",
                    "Resize",
                    "Tile",
                    LONG,
                )
            )
        elif what == 8:
            node.domain = random.choice(("x", "com.microsoft", "ai.onnx.ml", "\n", "ai.onnx"))
        elif what == 9:
            deep = onnx.GraphProto()
            for _ in range(random.choice((1, 5, 60))):
                outer = onnx.GraphProto()
                inner = outer.node.add(op_type="If")
                attribute = inner.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
                attribute.g.CopyFrom(deep)
                deep = outer
            node.attribute.add(name="body", type=onnx.AttributeProto.GRAPH).g.CopyFrom(deep)
        elif what == 10:
            for value in model.graph.input:
                value.type.tensor_type.shape.dim.add().dim_value = random.choice((0, -1, 2**40, 2**62, 1000))
        elif what == 11:
            del model.opset_import[:]
            for _ in range(random.randrange(3)):
                model.opset_import.add(
                    domain=random.choice(("", "x", "ai.onnx")), version=random.choice((0, 1, 13, 999, -1, 2**62))
                )
        elif what == 12:
            model.graph.output.add().CopyFrom(random.choice([*model.graph.input, *model.graph.output]))
        else:
            attribute = node.attribute.add(
                name=random.choice(("pads", "group", "strides", "to", "axis", "value", "perm", "shape"))
            )
            attribute.type = random.choice((1, 2, 6, 7))
            attribute.i = random.choice((0, -1, 2**31, 2**62))
            attribute.ints.extend(random.choice(([0] * 4, [-1] * 4, [2**31] * 4, [2**62, 2**62], [])))
        return bytes(model.SerializeToString())
    except (
        Exception
    ):  # what earlier mutations left is no model, or cannot be one after this: protobuf's own errors differ
        return flip(data, random, others)


# By kind of file; a name stands for itself as often as it is to be drawn.
STRUCTURE: dict[str, dict[str, Mutation]] = {
    "manifest": {"json_tree": json_tree, "json_text": json_text},
    "config": {"yaml_tree": yaml_tree, "yaml_text": yaml_text, "expression": expression},
    "checkpoint": {"pickled_part": pickled_part, "zip_entries": zip_entries, "zip_header": zip_header},
    "onnx": {"message": message, "graph": graph},
}
MUTATIONS = {kind: {**own, **BYTES} for kind, own in STRUCTURE.items()}
