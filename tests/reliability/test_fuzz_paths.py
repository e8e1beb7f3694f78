"""No name in a file from elsewhere leads out of the file's folder."""

import os
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qat.core.errors import UserError
from qat.core.files import is_inside
from qat.core.onnx_file import check_graph, load_graph
from qat.engine import CPU_BACKENDS, Options, build
from qat.manifest import check_inside

PIECES = [
    "..",
    ".",
    "",
    "a",
    "part.onnx",
    "link",
    "deep",
    "C:",
    "C:x",
    "~",
    "é",
    "．．",
    "..\u2044",
    "%2e%2e",
    " ..",
    "..\0",
    "x" * 300,
    "loop",
]
NAMES = st.one_of(
    st.text(max_size=40),
    st.builds("".join, st.lists(st.sampled_from([*PIECES, "/", "\\", "//"]), max_size=12)),
    st.builds("/".join, st.lists(st.sampled_from(PIECES), min_size=1, max_size=6)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a file, a folder, a link inside, links out, and a circle of links; secrets lie beside it."""
    root = tmp_path_factory.mktemp("paths")
    (root / "secret").write_text("secret")
    made = root / "parts"
    (made / "deep").mkdir(parents=True)
    (made / "part.onnx").write_text("part")
    (made / "inner").symlink_to("part.onnx")
    (made / "link").symlink_to(root)
    (made / "deep" / "link").symlink_to(root / "secret")
    (made / "loop").symlink_to("loop")
    return made


@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(name=NAMES)
@example(name="/etc/passwd")
@example(name="link/secret")
@example(name="deep/link")
@example(name="a/../../secret")
@example(name="..\\secret")
@example(name="\\\\server\\share\\x")
@example(name="C:\\secret")
@example(name="loop/x")
@example(name="")
def test_a_name_that_is_taken_opens_a_file_in_the_folder_or_none(folder, name):
    try:
        check_inside(folder / "manifest.json", name)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) <= 600 and "manifest.json" in str(error)
        return
    # Whatever the system itself makes of the name, it stays inside.
    opened = os.path.realpath(os.path.join(folder, name))
    assert os.path.commonpath([opened, os.path.realpath(folder)]) == os.path.realpath(folder)
    # Windows' separators count everywhere: a folder that was made here may be read there.
    assert is_inside(folder, name) and ".." not in name.replace("\\", "/").split("/") and name[0] not in "/\\"


@pytest.mark.parametrize("name", [None, 3, ["part.onnx"], {"a": 1}, b"part.onnx", True])
def test_what_is_no_text_is_no_name(folder, name):
    with pytest.raises(UserError, match="expected the name of a file in the manifest's folder"):
        check_inside(folder / "manifest.json", name)


def test_names_of_files_in_the_folder_are_taken(folder):
    for name in ("part.onnx", "inner", "deep/new.onnx", "./part.onnx", "é.onnx"):
        check_inside(folder / "manifest.json", name)


def _graph(path: Path, location: str, sparse: bool = False) -> Path:
    weight = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("length", "16")):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", shape[:1], shape[1:], [] if sparse else [weight])
    if sparse:
        graph.sparse_initializer.add(dims=[2, 2]).values.CopyFrom(weight)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


OUT = [
    "../secret",
    "/etc/passwd",
    "link/secret",
    "deep/link",
    "a/../../secret",
    "..\\secret",
    "C:\\secret",
    "",
    "\0",
    "loop",
]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("location", OUT)
def test_no_reader_follows_a_graph_to_data_outside_its_folder(folder, location, sparse):
    path = _graph(folder / "graph.onnx", location, sparse)
    (folder.parent / "secret").write_bytes(bytes(16))
    readers = [check_graph, load_graph, *(lambda p, b=b: build(p, b, "fp32", Options(1, None)) for b in CPU_BACKENDS)]
    for reader in readers:
        with pytest.raises(UserError, match=r"graph\.onnx") as refused:
            reader(path)
        assert "expected a file in the graph's folder" in str(refused.value) or "data in" in str(refused.value)


def test_data_in_the_graphs_own_folder_are_read(tmp_path):
    path = _graph(tmp_path / "graph.onnx", "weights.bin")
    with pytest.raises(UserError, match=r"'weights\.bin': no such file"):
        check_graph(path)
    (tmp_path / "weights.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    assert check_graph(path) == ["weights.bin"]
    found = onnx.numpy_helper.to_array(load_graph(path).graph.initializer[0])
    np.testing.assert_array_equal(found, [[0, 1], [2, 3]])
    for backend in CPU_BACKENDS:
        engine = build(path, backend, "fp32", Options(1, None))
        np.testing.assert_array_equal(engine.run({"x": np.eye(2, dtype=np.float32)})["y"], [[0, 1], [2, 3]])
    (tmp_path / "weights.bin").write_bytes(bytes(15))
    with pytest.raises(UserError, match=r"16 bytes of data at 0 of weights\.bin, which has 15"):
        check_graph(path)


@settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(name=NAMES)
def test_a_checkpoints_entries_are_read_and_never_unpacked(name):
    """Names in a zip choose no file on the disk."""
    import zipfile

    from qat.checkpoints.reading import load_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        inner = Path(scratch) / "in"
        inner.mkdir()
        before = os.getcwd()
        os.chdir(inner)
        try:
            path = inner / "zip.pth"
            try:
                with zipfile.ZipFile(path, "w") as archive:
                    archive.writestr("archive/data.pkl", b"}.")
                    archive.writestr(name, b"x")
            except (ValueError, UnicodeError, IndexError):  # no zip has such a name
                return
            with pytest.raises(UserError):
                load_checkpoint(path)
            assert sorted(os.listdir(scratch)) == ["in"] and os.listdir(inner) == ["zip.pth"]
        finally:
            os.chdir(before)
