"""What fuzzing found, each in its smallest form."""

import copy
import json
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper

from qat.checkpoints.reading import load_checkpoint
from qat.core.errors import LONGEST, UserError
from qat.core.files import data_path, read_json
from qat.core.onnx_file import check_graph, read_outline
from qat.engine import CPU_BACKENDS, Options, build
from qat.families.bevfusion.config import load_config
from qat.families.bevfusion.detector import build_model
from qat.manifest import load_manifest
from qat.runtime.verify import verify_folder


def refused(reader, *arguments, seconds=2.0):
    """The message with which a reader refuses, in little time."""
    begin = time.process_time()
    with pytest.raises(UserError) as error:
        reader(*arguments)
    assert time.process_time() - begin < seconds
    return str(error.value)


# Messages


def test_a_message_is_one_printable_line_of_bounded_length_whatever_it_quotes():
    message = str(UserError(f"file.yaml: key: found {'x' * 10_000}\n\x1b[2J\u202e, expected a number; fix it so"))
    assert len(message) <= LONGEST and message.isprintable()
    assert message.startswith("file.yaml: key: found xxx") and message.endswith("expected a number; fix it so")
    short = "a.pth: found 118×256 pixels, „schön“, expected 3"
    assert str(UserError(short)) == short
    assert str(UserError("a\nb")) == "a\\nb"


# Configs


def config_file(tmp_path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "a: &a [1, 2]\n" + "".join(f"b{n}: &b{n} [*{'a' if n == 0 else f'b{n - 1}'}, *a, *a]\n" for n in range(3)),
            None,
        ),
        (
            "l0: &l0 [1, 2]\n" + "".join(f"l{n}: &l{n} [*l{n - 1}, *l{n - 1}]\n" for n in range(1, 40)),
            "check its anchors",
        ),
        ("self: &self [*self]\n", "check its anchors"),
        ("x: " + "[" * 20_000, "brackets 20,000 deep"),
        ("x: " + "9" * 5000, "not valid YAML: ValueError"),
        ("x: 2001-99-99", "not valid YAML: ValueError"),
        ("x: !!int z", "not valid YAML: ValueError"),
        ("".join("  " * n + "a:\n" for n in range(400)), "nested more than 100 deep"),
        ("x: " + "a" * 2_000_000, "expected a config of at most"),
        (
            "b0: ${1}\n" + "".join(f"b{n}: '${{[b{n - 1}, b{n - 1}]}}'\n" for n in range(1, 40)),
            "more than 100,000 steps",
        ),
    ],
    ids=lambda value: None if value is None or len(value) > 30 else value.replace(" ", "-"),
)
def test_yaml_that_stands_for_endless_values_is_refused_in_little_time(tmp_path, text, found):
    message = refused(load_config, config_file(tmp_path, text))
    assert "config.yaml" in message and (found or "missing") in message


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        ("model.heads", 3, "model.heads: found 3, expected a section"),
        ("model.heads.object.tasks", 5, "model.heads.object.tasks: found 5, expected a list of class names"),
        (
            "model.heads.object.tasks.0",
            [3],
            "model.heads.object.tasks: found [[3], ['pedestrian']], expected a list of class names",
        ),
        ("model.heads.object.common_heads.dim", [], "common_heads.dim: found [], expected [channels, convolutions]"),
        ("model.encoders.camera.vtransform.feature_size", [0, 12], "found [0, 12], expected 2 whole numbers from 1"),
        ("model.encoders.camera.vtransform.xbound", [0, 10**400, 1], "expected 3 numbers"),
        ("model.encoders.camera.vtransform.xbound", [0.0, float("nan"), 1.0], "nan, 1.0], expected 3 numbers"),
        ("model.encoders.camera.vtransform.dbound", [0.0, 1e6, 0.1], "with a whole number of steps"),
        (
            "model.decoder.backbone.blocks",
            [[10**9, 12, 1]],
            "expected a list of [layers up to 1,000, channels up to 65,536, stride]",
        ),
        ("model.encoders.camera.neck.out_channels", 10**12, "expected a whole number from 1 to 65,536"),
    ],
)
def test_a_config_of_wrong_kinds_and_sizes_is_refused_by_its_key(tmp_path, small_config, path, value, found):
    *above, last = path.split(".")
    target = small_config
    for key in above:
        target = target[int(key) if isinstance(target, list) else key]
    target[int(last) if isinstance(target, list) else last] = value
    assert found in refused(load_config, config_file(tmp_path, yaml.safe_dump(small_config)))


def test_a_network_beyond_any_memory_is_refused_before_it_is_built(small_config):
    small_config["model"]["decoder"]["backbone"]["blocks"] = [[100, 20_000, 1], [1, 24, 2]]
    small_config["model"]["decoder"]["neck"]["in_channels"] = [24, 20_000]
    assert "expected at most 4,000,000,000" in refused(build_model, small_config, seconds=5)


@pytest.mark.parametrize("name", ["hf-hub:someone/something", "local-dir:/etc", "../resnet18"])
def test_a_backbones_name_is_no_address(small_config, name):
    small_config["model"]["encoders"]["camera"]["backbone"]["model_name"] = name
    assert "expected the name of a timm model" in refused(build_model, small_config)


# Manifests


@pytest.fixture
def parts(tmp_path, exported_fp32):
    return shutil.copytree(exported_fp32, tmp_path / "parts")


def test_json_nested_without_end_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100_000)
    assert "not valid JSON" in refused(read_json, tmp_path / "x.json")


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        ("cameras", [], "pipeline: cameras: found list [], expected a list of 1 or more"),
        ("image.size", [64, 10**9], "pipeline: image: size[1]: found int 1000000000, expected a whole number"),
        ("image.std", [0, 1, 1], "pipeline: image: std[0]"),
        ("vtransform.dbound", [1, 13, 0], "pipeline: vtransform: dbound: found list [1, 13, 0]"),
        ("vtransform.xbound", [-1e6, 1e6, 1e-3], "expected [lower, upper, step]"),
        ("vtransform.image_size", [64, 97], "expected image: size, [64, 96]"),
        ("head.test_cfg.nms_type", ["square", "circle"], "expected circle or rotate"),
        ("head.test_cfg.min_radius", [1.0], "expected one for each of 2 tasks"),
        ("head.tasks", [["car"]], "expected the classes in their order"),
        ("head_maps", ["heatmap_0"], "pipeline: head_maps"),
        ("head", None, "only a camera branch alone has no head"),
    ],
)
def test_a_manifest_of_wrong_kinds_and_sizes_is_refused_by_its_key(parts, path, value, found):
    file = parts / "manifest.json"
    manifest = json.loads(file.read_text())
    target = manifest["pipeline"]
    *above, last = path.split(".")
    for key in above:
        target = target[key]
    target[last] = value
    file.write_text(json.dumps(manifest))
    message = refused(load_manifest, parts)
    assert found in message and message.endswith("damaged; export again") and "manifest.json" in message


@pytest.mark.parametrize("key", ["frames", "stored", "seed"])
def test_verify_says_what_its_section_of_the_manifest_lacks(parts, key):
    file = parts / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["verification"][key]
    file.write_text(json.dumps(manifest))
    assert f"verification: {key}: found none" in refused(verify_folder, parts)


# Checkpoints


def saved(tmp_path) -> Path:
    path = tmp_path / "model.pth"
    torch.save({"state_dict": {"w": torch.arange(600.0), "n": torch.tensor(7)}}, path)
    return path


def rewritten(path: Path, change) -> None:
    """The zip again, each entry after `change(entry, content)`."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries:
            archive.writestr(entry, change(entry, content))


def test_an_entry_marked_as_a_folder_is_read_as_it_is_and_not_as_stray_memory(tmp_path):
    path = saved(tmp_path)

    def mark(entry, content):
        entry.external_attr = 0x10
        return content

    rewritten(path, mark)
    found = load_checkpoint(path)["state_dict"]
    assert torch.equal(found["w"], torch.arange(600.0)) and int(found["n"]) == 7


def test_a_compressed_entry_is_refused_before_it_is_unpacked(tmp_path):
    path = saved(tmp_path)

    def pack(entry, content):
        entry.compress_type = zipfile.ZIP_DEFLATED
        return content if entry.filename.endswith("pkl") else bytes(2_000_000)

    rewritten(path, pack)
    assert "compressed entries" in refused(load_checkpoint, path)


def test_a_name_of_endless_length_is_refused_in_little_time(tmp_path):
    path = saved(tmp_path)
    rewritten(
        path,
        lambda entry, content: b"c" + b"A" * 300_000 + b"\nx\n." if entry.filename.endswith("data.pkl") else content,
    )
    assert "model.pth" in refused(load_checkpoint, path)


def test_names_of_one_hash_are_put_into_a_dictionary_once(tmp_path):
    """Each dictionary of n of them takes n²/2 comparisons."""
    torch.save({n * (2**61 - 1): None for n in range(16_000)}, tmp_path / "model.pth")
    assert "model.pth" in refused(load_checkpoint, tmp_path / "model.pth", seconds=4.0)


# ONNX


def model(nodes, initializers=(), shape=(2, 2)):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def written(tmp_path, made: onnx.ModelProto) -> Path:
    path = tmp_path / "graph.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def test_a_circle_of_nodes_reaches_no_runtime(tmp_path):
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    path = written(tmp_path, model([*nodes, helper.make_node("Relu", ["b"], ["y"])]))
    for backend in CPU_BACKENDS:
        message = refused(build, path, backend, "fp32", Options(1, None))
        assert "Add reads 'b', which nothing before it computes" in message and "graph.onnx" in message


@pytest.mark.parametrize("name", ["", "z"])
def test_an_output_that_nothing_gives_is_refused(tmp_path, name):
    made = model([helper.make_node("Relu", ["x"], ["y"])])
    made.graph.output[0].name = name
    assert f"output {name!r}, which nothing" in refused(check_graph, written(tmp_path, made))


def test_a_circle_of_transposes_does_not_hang_the_outline(tmp_path):
    nodes = [helper.make_node("Transpose", ["b"], ["a"]), helper.make_node("Transpose", ["a"], ["b"])]
    path = written(tmp_path, model([*nodes, helper.make_node("MatMul", ["x", "a"], ["y"])]))
    assert read_outline(path).quantized == []


def test_a_shape_that_overflows_reaches_no_runtime(tmp_path):
    weight = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    weight.dims[:] = [2**31, 2**31, 2**31]
    path = written(tmp_path, model([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight]))
    assert "a tensor of shape [2147483648, 2147483648, 2147483648]" in refused(build, path, "openvino", "fp32")


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw * 2, lambda raw: raw[:1]])
def test_a_tensor_whose_data_do_not_fill_its_shape_is_refused(tmp_path, change):
    weight = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    weight.raw_data = change(weight.raw_data)
    path = written(tmp_path, model([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight]))
    assert "a tensor of shape [2, 2] with " in refused(check_graph, path)


@pytest.mark.parametrize("domain", ["", "ai.onnx.ml"])
def test_an_opset_without_end_reaches_no_runtime(tmp_path, domain):
    made = model([helper.make_node("Relu", ["x"], ["y"])])
    made.opset_import.append(helper.make_opsetid(domain, 2**31 - 1))
    path = written(tmp_path, made)
    for backend in CPU_BACKENDS:
        assert "opset 2147483647" in refused(build, path, backend, "fp32", Options(1, None))


def test_two_graphs_in_one_file_are_refused(tmp_path):
    path = written(tmp_path, model([helper.make_node("Relu", ["x"], ["y"])]))
    path.write_bytes(path.read_bytes() * 2)
    assert "two graphs" in refused(read_outline, path)


def test_graphs_in_graphs_are_looked_over_with_what_lies_around_them(tmp_path):
    inner = [helper.make_tensor_value_info("t", TensorProto.FLOAT, [2, 2])]
    branch = helper.make_graph([helper.make_node("Neg", ["x"], ["t"])], "b", [], inner)
    wrong = copy.deepcopy(branch)
    wrong.node[0].input[0] = "nothing"
    constant = helper.make_node("Constant", [], ["k"], value=helper.make_tensor("v", TensorProto.BOOL, [], [True]))
    sound = helper.make_node("If", ["k"], ["y"], then_branch=branch, else_branch=branch)
    assert check_graph(written(tmp_path, model([constant, sound]))) == []
    damaged = helper.make_node("If", ["k"], ["y"], then_branch=branch, else_branch=wrong)
    assert "Neg reads 'nothing'" in refused(check_graph, written(tmp_path, model([constant, damaged])))


# Data sets


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "C:\\x.jpg", "samples\\..\\..\\x", "", None, 3])
def test_a_table_names_no_file_outside_its_data_set(tmp_path, name):
    message = refused(data_path, tmp_path, name, "sample_data.json")
    assert "sample_data.json: found file" in message and "in the data set's folder" in message


def test_a_data_sets_folders_may_be_links(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.jpg").write_bytes(b"x")
    root = tmp_path / "nuscenes"
    root.mkdir()
    (root / "samples").symlink_to(tmp_path / "disk")
    assert data_path(root, "samples/a.jpg", "sample_data.json").read_bytes() == b"x"
