"""Pickled networks are read, whatever is in the file, and nothing of it runs."""

import collections
import contextlib
import copyreg
import io
import pickle
import re
import resource
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qat.checkpoints import pickled as reader
from qat.checkpoints import unpickle
from qat.checkpoints.pickled import module_state, read_pickled
from qat.checkpoints.reading import load_checkpoint
from qat.checkpoints.unpickle import Record
from qat.core.errors import UserError

HERE = Path(__file__).parent

# Made where `acme` exists, read where it does not.
ELSEWHERE = """
import sys, types
import torch
from torch import nn

acme = types.ModuleType("acme")
sys.modules["acme"] = acme

def make(name, base):
    made = type(name, (base,), {"__module__": "acme", "__qualname__": name})
    setattr(acme, name, made)
    return made

class TensorQuantizer(nn.Module):
    def __init__(self, amax, disabled=False):
        super().__init__()
        self._num_bits, self._axis, self._disabled, self._if_quant, self._unsigned = 8, None, disabled, True, False
        if amax is not None:
            self.register_buffer("_amax", torch.tensor(amax))

TensorQuantizer.__module__, acme.TensorQuantizer = "acme", TensorQuantizer
torch.manual_seed(0)
net = make("Net", nn.Module)()
net.conv = make("Conv", nn.Conv2d)(3, 4, 3)
net.bn = nn.BatchNorm2d(4)
net.layers = nn.ModuleList([nn.Linear(2, 2, bias=False)])
net.register_buffer("passing", torch.zeros(3), persistent=False)
net.register_parameter("nothing", None)
net.conv._input_quantizer = net.conv._weight_quantizer = TensorQuantizer(1.5)
net.layers[0]._input_quantizer = TensorQuantizer(None, disabled=True)
expected = {k: v for k, v in net.state_dict().items() if "quantizer" not in k}
torch.save({"state_dict": expected}, sys.argv[1] + "/expected.pth")
for kind in ("zip", "legacy"):
    for name, value in {"bare": net, "dict": {"epoch": 3, "model": net, "hook": make("Hook", object)()},
                        "wrapped": make("MMDataParallel", nn.DataParallel)(net)}.items():
        torch.save(value, f"{sys.argv[1]}/{name}-{kind}.pth", _use_new_zipfile_serialization=kind == "zip")
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder with a network of classes that this process does not have, saved in six ways."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(folder)], check=True, timeout=120)
    return folder


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("name", ["bare", "dict", "wrapped"])
def test_a_network_of_unknown_classes_gives_its_state_dict_and_quantizers(elsewhere, name, kind):
    found = load_checkpoint(elsewhere / f"{name}-{kind}.pth")
    expected = torch.load(elsewhere / "expected.pth")["state_dict"]
    assert list(found["state_dict"]) == list(expected)
    assert all(torch.equal(found["state_dict"][key], value) for key, value in expected.items())
    assert set(found["quantizers"]) == {f"conv._{k}_quantizer" for k in ("input", "weight")} | {
        "layers.0._input_quantizer"
    }
    one, off = found["quantizers"]["conv._weight_quantizer"], found["quantizers"]["layers.0._input_quantizer"]
    assert float(one["amax"]) == 1.5 and not one["disabled"] and one["num_bits"] == 8 and one["axis"] is None
    assert off["amax"] is None and off["disabled"]
    assert "acme" not in sys.modules
    assert ("epoch" in found) == (name == "dict") and "hook" not in found


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_back_equal(tmp_path, zipped, protocol):
    base = torch.arange(12, dtype=torch.float64)
    value = {
        "view": base[1:11:3],
        "matrix": base.view(3, 4).t(),
        "half": torch.tensor([1.5, -2], dtype=torch.bfloat16),
        "bits": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "parameter": nn.Parameter(torch.ones(2)),
        "expanded": torch.ones(1, 3).expand(5, 3),
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(list, {"x": [1, (2, None)]}),
        "sets": [{1, "a"}, frozenset({2.5})],
        "numbers": [0, -1, 255, 65536, -(2**40), 10**30, 2.5, float("inf"), True, 1 + 2j],
        "text": ["", "é\n\U0001f600", b"\xff\x00", bytearray(b"ab")],
        "number": np.float32(2.25),
        "types": [torch.float16, torch.Size([2, 3]), torch.device("cuda", 1)],
    }
    if protocol < 5:  # protocol 5's arrays come from a buffer, and stay records
        value["array"] = np.arange(6, dtype=">i4").reshape(2, 3)
    torch.save(value, tmp_path / "v.pth", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found = read_pickled(tmp_path / "v.pth")
    assert list(found) == list(value)
    for key, expected in value.items():
        if isinstance(expected, torch.Tensor):
            assert found[key].dtype == expected.dtype and torch.equal(found[key], expected), key
        elif isinstance(expected, np.ndarray):
            assert np.array_equal(found[key], expected)
        else:
            assert found[key] == expected, key
    assert found["view"].untyped_storage().data_ptr() == found["matrix"].untyped_storage().data_ptr()


def archive(data: bytes, path: Path, storages: dict[str, bytes] | None = None, **how) -> Path:
    """A file in torch's zip format with this pickle."""
    with zipfile.ZipFile(path, "w", **how) as out:
        out.writestr("a/data.pkl", data)
        for key, content in (storages or {}).items():
            out.writestr(f"a/data/{key}", content)
        out.writestr("a/version", "3\n")
    return path


def legacy(data: bytes, path: Path) -> Path:
    """A file in the format before 1.6 with this pickle and no storages."""
    header = [reader.LEGACY_MAGIC, reader.LEGACY_PROTOCOL, {"little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(v, 2) for v in header) + data + pickle.dumps([], 2))
    return path


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


def programs(command: str) -> dict[str, bytes]:
    """Pickles that run a shell command, if anything runs them."""
    line = b"X" + struct.pack("<I", len(command)) + command.encode()
    system = b"cos\nsystem\n"
    nested = b"cos\nsystem\n(" + line + b"tR"
    expression = f"__import__('os').system({command!r})".encode()
    return {
        "reduce": system + b"(" + line + b"tR.",
        "eval": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93(X"
        + struct.pack("<I", len(expression))
        + expression
        + b"tR.",
        "inst": b"(" + line + b"ios\nsystem\n.",
        "obj": b"(" + system + line + b"o.",
        "newobj": b"\x80\x02" + system + b"(" + line + b"t\x81.",
        "newobj_ex": b"\x80\x04" + system + b"(" + line + b"t}\x92.",
        "popen": b"\x80\x02csubprocess\nPopen\n((" + line + b"l\x89K\x00tR.",
        "build setstate": b"\x80\x02cfunctools\npartial\n(" + system + b"t\x81(" + system + b"(" + line + b"t}Ntb)R.",
        "build on a class": b"\x80\x02cos\nsystem\n}X\x01\x00\x00\x00x" + nested + b"sb.",
        "call of a result": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(X\x02\x00\x00\x00ostRX\x06\x00\x00\x00systemtR("
        + line
        + b"tR.",
        "map": b"cbuiltins\nlist\n(cbuiltins\nmap\n(" + system + b"(" + line + b"ttRtR.",
        "set of a map": b"cbuiltins\nset\n(cbuiltins\nmap\n(" + system + b"(" + line + b"ttRtR.",
        "defaultdict": b"ccollections\ndefaultdict\n(" + system + b"(" + line + b"tR}tR.",
        "tensor hooks": b"ctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE
        + b"K\x00K\x04\x85K\x01\x85\x89"
        + nested
        + b"tR.",
        "tensor type": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + system + b"cos\nsystem\n(" + line + b"t}tR.",
        "subclass": b"ctorch._utils\n_rebuild_wrapper_subclass\n(" + nested + b"tR.",
        "odd arguments": b"ctorch._utils\n_rebuild_tensor_v2\n(" + nested + b"NNNNNtR.",
        "storage class": b"(X\x07\x00\x00\x00storage" + nested + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ.",
        "dotted name": b"ctorch._utils\n_import_dotted_name\n(X\x09\x00\x00\x00os.systemtR(" + line + b"tR.",
        "load": b"ctorch\nload\n(X\x05\x00\x00\x00x.pthtR.",
        "numpy": b"cnumpy.core.multiarray\n_reconstruct\n("
        + system
        + b"K\x00\x85C\x01btR(K\x01K\x01\x85"
        + nested
        + b"\x89"
        b"C\x01xtb.",
        "reconstructor": b"ccopy_reg\n_reconstructor\n("
        + system
        + b"c__builtin__\nobject\n"
        + line
        + b"tR"
        + line
        + b"b.",
        "extension": b"\x82\xf0(" + line + b"tR.",
        "module id": b"(X\x06\x00\x00\x00module" + nested + b"X\x01\x00\x00\x00fX\x01\x00\x00\x00stQ.",
        "key": b"}" + nested + b"K\x01s.",
        "frozen": b"\x80\x04(" + nested + b"\x91.",
    }


@pytest.mark.parametrize("name", programs(""))
def test_a_malicious_pickle_runs_nothing(tmp_path, name):
    canary = tmp_path / "canary"
    program = programs(f"touch {canary}")[name]
    if name == "extension":
        copyreg.add_extension("os", "system", 0xF0)
    try:
        for make in (archive, legacy):
            path = make(program, tmp_path / "x.pth")
            for read in (read_pickled, load_checkpoint):
                try:
                    read(path)
                except UserError as error:
                    assert str(error).startswith(str(path)) and "\n" not in str(error)
    finally:
        if name == "extension":
            copyreg.remove_extension("os", "system", 0xF0)
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["reduce", "eval", "inst", "obj", "set of a map", "build setstate", "dotted name", "build on a class"]
)
def test_the_same_bytes_do_run_in_pickle_itself(tmp_path, name):
    canary = tmp_path / "canary"
    program = programs(f"touch {canary}")[name]
    with contextlib.suppress(Exception):
        pickle.loads(program)
    assert canary.exists()


def test_calling_an_unknown_name_is_noted_and_not_done(tmp_path):
    found = read_pickled(archive(programs("echo")["reduce"], tmp_path / "x.pth"))
    assert isinstance(found, Record) and (found.module, found.name, found.args) == ("os", "system", ("echo",))


def _tensor(offset: bytes, size: bytes, stride: bytes) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + offset + size + stride + b"\x89}tR."


@pytest.mark.parametrize(
    "pickled",
    [
        _tensor(b"K\x01", b"K\x04\x85", b"K\x01\x85"),  # one element beyond the end
        _tensor(b"K\x00", b"K\x04\x85", b"M\x00\x10\x85"),  # strides that leap out
        _tensor(b"J\xff\xff\xff\xff", b"K\x01\x85", b"K\x01\x85"),  # before the beginning
        _tensor(b"K\x00", b"K\x02K\x02\x86", b"K\x01\x85"),  # fewer strides than sizes
        _tensor(b"K\x03", b"K\x02\x85", b"J\xff\xff\xff\xff\x85"),  # backwards
        _tensor(b"K\x00", b"\x8a\x08" + b"\xff" * 7 + b"\x3f\x85", b"\x8a\x08" + b"\xff" * 7 + b"\x3f\x85"),
        STORAGE.replace(b"K\x04", b"J\xff\xff\xff\x7f") + b".",  # 8 GB of storage
        STORAGE.replace(b"K\x04", b"J\xff\xff\xff\xff") + b".",  # −1 elements
    ],
)
def test_tensors_beyond_their_storage_are_damage(tmp_path, pickled):
    path = archive(pickled, tmp_path / "x.pth", {"0": bytes(16)})
    with pytest.raises(UserError, match="not a torch checkpoint, or damaged"):
        read_pickled(path)
    read_pickled(archive(_tensor(b"K\x00", b"K\x04\x85", b"K\x01\x85"), path, {"0": bytes(16)}))


ENDLESS = STORAGE + b"K\x00\x8a\x06\x00\x00\x00\x00\x00\x01\x85K\x00\x85\x89}tR"


def _bombs() -> dict[str, bytes]:
    doubling = b"".join(b"2\x86" for _ in range(60))  # t = (t, t), sixty times over
    thousand = b"(" + b"N" * 1000 + b"lq\x00"
    return {
        "a key that takes 2⁶⁰ steps to hash": b"}N" + doubling + b"Ns.",
        "a list copied again and again": thousand
        + b"0"
        + b"c__builtin__\nlist\nq\x010" * 1
        + b"h\x01h\x00\x85R0" * 500
        + b"N.",
        "a state copied again and again": b"\x80\x02}q\x00("
        + b"".join(b"X\x04\x00\x00\x00%04dN" % k for k in range(1000))
        + b"u0cx\nY\nq\x010"
        + b"h\x01)\x81h\x00b0" * 500
        + b"N.",
        "containers by the million": b"\x80\x04" + b"\x8f" * 600_000 + b".",
        "endless opcodes": b"N0" * 300_000 + b"N.",
        "an integer of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
        "a string beyond the end": b"\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
        "members of an expanded tensor": b"c__builtin__\nset\n(ctorch._utils\n_rebuild_tensor_v2\n(" + ENDLESS + b"tR.",
        "a pair that is an expanded tensor": b"c__builtin__\ndict\n((ctorch._utils\n_rebuild_tensor_v2\n("
        + ENDLESS
        + b"ltR.",
        "a byte array beyond the end": b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b"x.",
        "a memo of any number": b"Nr\xff\xff\xff\x7f0" * 100_000 + b"N",
    }


@pytest.mark.parametrize("name", _bombs())
def test_a_bomb_is_refused_or_read_in_little_time_and_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(unpickle, "MAX_OPCODES", 500_000)  # a tenth, to be a tenth of the time here
    path = archive(_bombs()[name], tmp_path / "x.pth", {"0": bytes(16)})
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    if name.startswith("members"):
        assert isinstance(read_pickled(path), Record)
    elif name.startswith("a state"):  # nothing is copied
        assert read_pickled(path) is None
    else:
        with pytest.raises(UserError, match="not a torch checkpoint, or damaged"):
            read_pickled(path)
    assert time.monotonic() - start < 10 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


MANIFOLD = b"]" + b"".join(b"q\x000](" + b"h\x00" * 10 + b"e" for _ in range(40))  # 10⁴⁰ lists to print


def test_what_a_file_holds_is_not_printed(tmp_path):
    format_number = pickle.dumps(reader.LEGACY_MAGIC, 2) + b"\x80\x02" + MANIFOLD + b"."
    (tmp_path / "x.pth").write_bytes(format_number)
    shape = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00" + MANIFOLD + b"\x85K\x01\x85\x89}tR."
    array = b"cnumpy.core.multiarray\n_reconstruct\n(N(K\x00tC\x01btR(K\x01" + MANIFOLD + b"\x85"
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4tR"
    key = STORAGE.replace(b"X\x01\x00\x00\x000", MANIFOLD)
    archive(shape, tmp_path / "y.pth", {"0": bytes(16)})
    archive(array + dtype + b"\x89C\x04aaaatb.", tmp_path / "z.pth")
    archive(key + b".", tmp_path / "k.pth")
    for name in "xyzk":
        with pytest.raises(UserError, match="not a torch checkpoint, or damaged"):
            read_pickled(tmp_path / f"{name}.pth")


def test_a_list_of_storages_whose_keys_take_2_to_the_60_steps_to_hash_is_damage(tmp_path):
    header = [reader.LEGACY_MAGIC, reader.LEGACY_PROTOCOL, {}, None]
    key = b"N" + b"2\x86" * 60
    (tmp_path / "x.pth").write_bytes(b"".join(pickle.dumps(v, 2) for v in header) + b"(" + key + b"l.")
    with pytest.raises(UserError, match="not a torch checkpoint, or damaged"):
        read_pickled(tmp_path / "x.pth")


def test_a_deep_nest_is_read_without_recursion(tmp_path):
    depth = 200_000
    path = archive(b"]" * depth + b"a" * (depth - 1) + b".", tmp_path / "x.pth")
    assert len(read_pickled(path)) == 1


def _module(children: bytes) -> bytes:
    """Pickles a module whose `_modules` is what `children` leaves on the stack, memo 0 being the module."""
    names = (b"X\x0b\x00\x00\x00_parameters", b"X\x08\x00\x00\x00_buffers", b"X\x08\x00\x00\x00_modules")
    return b"cacme\nNet\n)\x81q\x00}(" + names[0] + b"}" + names[1] + b"}" + names[2] + children + b"ub."


def test_a_network_that_contains_itself_is_refused(tmp_path):
    path = archive(b"\x80\x02" + _module(b"}X\x01\x00\x00\x00mh\x00s"), tmp_path / "x.pth")
    with pytest.raises(UserError, match="deep"):
        load_checkpoint(path)


def test_modules_shared_by_the_power_of_two_are_refused(elsewhere):
    record = Record("acme", "Net", (), attributes={"_parameters": {}, "_buffers": {}, "_modules": {}})
    for _ in range(40):
        both = {"a": record, "b": record}
        record = Record("acme", "Net", (), attributes={"_parameters": {}, "_buffers": {}, "_modules": both})
    with pytest.raises(UserError, match="100,000 modules"):
        module_state(record, "x.pth")


@pytest.mark.parametrize("how", ["compressed", "overlapping", "TorchScript", "two pickles", "big-endian"])
def test_zips_that_torch_does_not_write_are_refused(tmp_path, how):
    path = tmp_path / "x.pth"
    plain = pickle.dumps({"state_dict": {}}, 2)
    if how == "compressed":
        archive(plain, path, {"0": bytes(1 << 20)}, compression=zipfile.ZIP_DEFLATED)
    elif how == "TorchScript":
        archive(plain, path)
        with zipfile.ZipFile(path, "a") as out:
            out.writestr("a/constants.pkl", plain)
    elif how == "two pickles":
        archive(plain, path)
        with zipfile.ZipFile(path, "a") as out:
            out.writestr("b/data.pkl", plain)
    elif how == "big-endian":
        archive(plain, path)
        with zipfile.ZipFile(path, "a") as out:
            out.writestr("a/byteorder", "big")
    else:  # the directory names one entry of 1 MB five times
        archive(plain, path, {str(k): bytes(1 << 20 if k == 0 else 0) for k in range(5)})
        content = bytearray(path.read_bytes())
        entries = [match.start() for match in re.finditer(b"PK\x01\x02", content)]
        for entry in entries[2:6]:  # behind data.pkl and the whole one: checksum, sizes and place of that
            for field in (slice(16, 28), slice(42, 46)):
                content[entry + field.start : entry + field.stop] = content[
                    entries[1] + field.start : entries[1] + field.stop
                ]
        path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="not a torch checkpoint, or damaged"):
        read_pickled(path)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_damaged_files_are_one_line_or_a_result(elsewhere, tmp_path, kind):
    whole = (elsewhere / f"dict-{kind}.pth").read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / "x.pth"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = collections.Counter()
    for k in range(150):
        content = bytearray(whole)
        if k % 5 == 0:
            del content[int(random.integers(len(content))) :]
        else:
            for at in random.integers(len(content), size=int(random.integers(1, 12))):
                content[at] = int(random.integers(256))
        path.write_bytes(bytes(content))
        start = time.monotonic()
        try:
            load_checkpoint(path)
            outcomes["read"] += 1
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith(str(path))
            outcomes["refused"] += 1
        assert time.monotonic() - start < 10
    assert outcomes["refused"] > 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_the_pickle_itself_damaged_is_one_line_or_a_result(elsewhere, tmp_path):
    # In a zip a changed byte is caught by its checksum; here the checksum is right and the pickle is not.
    with zipfile.ZipFile(elsewhere / "bare-zip.pth") as source:
        root = source.namelist()[0].partition("/")[0]
        data = source.read(f"{root}/data.pkl")
        storages = {Path(n).name: source.read(n) for n in source.namelist() if "/data/" in n}
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        content = bytearray(data)
        for at in random.integers(len(content), size=int(random.integers(1, 4))):
            content[at] = int(random.integers(256))
        try:
            load_checkpoint(archive(bytes(content), tmp_path / "x.pth", storages))
        except UserError:
            refused += 1
    assert 30 < refused < 300


def test_objects_beside_a_state_dict_do_not_hide_it(tmp_path):
    torch.save(
        {
            "meta": {"when": np.datetime64("2021-01-01"), "log": io.BytesIO},
            "config": {"depth": 50},
            "state_dict": {"w": torch.ones(2)},
        },
        tmp_path / "x.pth",
    )
    found = load_checkpoint(tmp_path / "x.pth")
    assert set(found) == {"config", "state_dict"} and torch.equal(found["state_dict"]["w"], torch.ones(2))


@pytest.mark.parametrize("key", ["model", "model_state_dict", "net"])
def test_a_state_dict_under_another_name_is_found(tmp_path, key):
    torch.save({key: {"w": torch.ones(2)}, "epoch": 1}, tmp_path / "x.pth")
    found = load_checkpoint(tmp_path / "x.pth")
    assert set(found) == {"state_dict", "epoch"} and list(found["state_dict"]) == ["w"]


def test_quantizers_in_a_plain_state_dict_are_split_off(tmp_path):
    state = {
        "conv.weight": torch.ones(2, 1, 1, 1),
        "conv._input_quantizer._amax": torch.tensor(3.0),
        "conv._weight_quantizer._amax": torch.ones(2, 1, 1, 1),
        "layer.input_quantizer._amax": torch.tensor(2.0),
        "layer.input_quantizer._pre_quant_scale": torch.ones(4),
        "codes.quantizer.embedding": torch.zeros(3),  # a network's own
    }
    torch.save(state, tmp_path / "x.pth")
    found = load_checkpoint(tmp_path / "x.pth")
    assert list(found["state_dict"]) == ["conv.weight", "codes.quantizer.embedding"]
    assert float(found["quantizers"]["conv._input_quantizer"]["amax"]) == 3
    assert found["quantizers"]["conv._weight_quantizer"]["amax"].shape == (2, 1, 1, 1)
    assert "SmoothQuant" in found["quantizers"]["layer.input_quantizer"]["special"]


def test_what_modelopt_saved_is_read_without_it():
    found = load_checkpoint(HERE / "modelopt.pth")  # made by make_modelopt.py
    assert list(found["state_dict"]) == [f"{k}.{what}" for k in (0, 2, 4) for what in ("weight", "bias")]
    on = {path for path, quantizer in found["quantizers"].items() if not quantizer["disabled"]}
    assert on == {f"{k}.{kind}_quantizer" for k in (0, 2) for kind in ("input", "weight")}
    weights = found["quantizers"]["0.weight_quantizer"]
    expected = found["state_dict"]["0.weight"].abs().amax((1, 2, 3), keepdim=True)
    assert torch.equal(weights["amax"], expected) and weights["axis"] == (0,)
