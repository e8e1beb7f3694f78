"""bevqat export-mmdet3d: files that are loaded again compute what PyTorch does, and a file that does not is found out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from lidar import CENTERPOINT, POINTPILLARS, cloud, need_mmdet3d, write_cloud

from qat.cli import main
from qat.core.errors import UserError
from qat.families.mmdet3d import exporter, iree
from qat.families.mmdet3d.config import read
from qat.families.mmdet3d.inputs import Reader, read_infos, read_points
from qat.families.mmdet3d.model import build, draw, load_weights

need_mmdet3d()

SHARED = Path("/work/shared/mmdet3d-data")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both small models, exported in one command on a cloud of a file."""
    out = tmp_path_factory.mktemp("exports")
    data = write_cloud(out / "cloud.bin")
    made = ["--data", str(data), "--output", str(out / "made"), "--json", str(out / "result.json")]
    # One checkpoint's worth of columns fits one config: nuScenes' five are another file.
    assert main(["export-mmdet3d", str(POINTPILLARS), *made]) == 0
    nus = write_cloud(out / "nus.bin", columns=5)
    assert (
        main(["export-mmdet3d", str(CENTERPOINT), "--data", str(nus), "--output", str(out / "centre"), "--verbose"])
        == 0
    )
    return out


@pytest.fixture(scope="module")
def metadata(folder):
    return json.loads((folder / "made" / "metadata.json").read_text())


def test_metadata_has_the_tools_fields(folder, metadata):
    assert metadata["config"] == str(POINTPILLARS) and metadata["checkpoint"] is None
    assert metadata["model_type"] == "VoxelNet"
    assert metadata["tensor_count"] == len(metadata["tensors"]) == 3
    assert metadata["export_success"] == {"pt2": True, "onnx": True}
    paths = {entry["path"]: entry for entry in metadata["tensors"]}
    assert set(paths) == {"inputs.voxels.num_points", "inputs.voxels.voxels", "inputs.voxels.coors"}
    assert paths["inputs.voxels.voxels"]["dtype"] == "float32" and paths["inputs.voxels.voxels"]["shape"][1:] == [8, 4]
    assert [entry["name"] for entry in metadata["tensors"]] == ["input_0", "input_1", "input_2"]
    assert {entry["path"] for entry in metadata["unused_inputs"]} == {"inputs.points[0]", "inputs.voxels.voxel_centers"}
    assert metadata["dynamic_axes"]["voxels"] == {
        "min": 2,
        "max": 2000,
        "example": paths["inputs.voxels.coors"]["shape"][0],
    }
    assert metadata["opset"] == 13 and metadata["packages"]["mmdet3d"]
    assert [entry["path"] for entry in metadata["constants"]] == ["data_samples[0]"]
    result = json.loads((folder / "result.json").read_text())
    assert result["passed"] and result["exports"][0]["metadata"]["files"] == metadata["files"]


@pytest.mark.parametrize("name", ["made", "centre"])
def test_files_take_what_metadata_says(folder, name):
    metadata = json.loads((folder / name / "metadata.json").read_text())
    rng = np.random.default_rng(0)
    count = 37  # a size that the export has not seen
    feeds = {}
    for entry in metadata["tensors"]:
        shape = [count if str(n) in entry.get("dynamic", {}) else size for n, size in enumerate(entry["shape"])]
        if entry["path"].endswith("coors"):
            value = np.stack(
                [np.zeros(count), np.zeros(count), rng.permutation(60)[:count], rng.permutation(80)[:count]], 1
            )
        elif entry["path"].endswith("num_points"):
            value = rng.integers(1, 8, shape)
        else:
            value = rng.normal(size=shape)
        feeds[entry["name"]] = value.astype(entry["dtype"])
    program = torch.export.load(str(folder / name / "model.pt2"))
    with torch.no_grad():
        ours = program.module()(*(torch.from_numpy(feeds[entry["name"]]) for entry in metadata["tensors"]))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / name / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == list(feeds)
    found = session.run([entry["name"] for entry in metadata["outputs"]], feeds)
    assert len(ours) == len(found) == len(metadata["outputs"])
    for a, b in zip(ours, found, strict=True):
        np.testing.assert_allclose(a.numpy(), b, atol=2e-3, rtol=1e-3)
    opsets = {o.domain: o.version for o in onnx.load(folder / name / "model.onnx").opset_import}
    assert set(opsets) == {""} and opsets[""] == metadata["opset"]


def test_every_size_was_compared_on_both_backends(folder):
    for name in ("made", "centre"):
        metadata = json.loads((folder / name / "metadata.json").read_text())
        found = metadata["verification"]
        assert all(row["passed"] and row["sqnr_db"] == 200 for row in found["pt2"]["samples"])
        assert set(found["onnx"]["backends"]) == {"onnxruntime", "openvino"}
        for entry in found["onnx"]["backends"].values():
            sizes = [row["sizes"]["voxels"] for row in entry["samples"]]
            assert len(set(sizes)) == 3 and all(row["sqnr_db"] > 80 for row in entry["samples"])
            assert all(row["boxes"]["count"] == row["boxes"]["found"] > 0 for row in entry["samples"])


def test_the_page_shows_the_tree(folder):
    page = (folder / "made" / "inputs.html").read_text()
    for words in ("VoxelNet", "coors", "input_2", "unused", "voxels</span>", "Det3DDataSample", "passed"):
        assert words in page, words
    assert "http" not in page.replace('lang="en"', "")


def started(config: Path, data: Path, seed: int = 0) -> exporter.Export:
    """An export on its way, traced."""
    settings = read(config)
    model = build(settings)
    draw(model, seed)
    reader = Reader(settings, model)
    samples = [reader.read(data, share) for share in (1.0, 0.5)]
    export = exporter.Export(model, config.name, None, samples, exporter.Options())
    export.refer()
    export.trace()
    return export


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    return started(POINTPILLARS, write_cloud(tmp_path_factory.mktemp("cloud") / "cloud.bin", seed=3))


@pytest.mark.parametrize("damage", ["scale", "swapped outputs", "bias lost", "NaN"])
def test_a_damaged_graph_is_found_out(traced, folder, tmp_path, damage):
    """Negative controls: the same comparison, on a graph that computes something else."""
    model = onnx.load(folder / "made" / "model.onnx")
    from onnx import numpy_helper

    weights = {i.name: i for i in model.graph.initializer}
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    if damage == "swapped outputs":
        shape = model.graph.output[0].type.tensor_type.shape
        assert shape is not None
        names = [o.name for o in model.graph.output]
        renamed = dict(zip(names, names[1:] + names[:1], strict=True))
        for node in model.graph.node:
            node.output[:] = [renamed.get(name, name) for name in node.output]
        for output in list(model.graph.output):
            output.type.tensor_type.ClearField("shape")
    else:
        biased = [node.input[2] for node in convs if numpy_helper.to_array(weights[node.input[2]]).any()]
        which = convs[3].input[1] if damage != "bias lost" else biased[-1]
        value = numpy_helper.to_array(weights[which]).copy()
        if damage == "scale":
            value[0] *= 2
        elif damage == "bias lost":
            value[:] = 0
        else:
            value.flat[0] = np.nan
        weights[which].CopyFrom(numpy_helper.from_array(value, which))
    file = tmp_path / "model.onnx"
    onnx.save(model, file)
    found = traced._verify_onnx(file)
    assert not found["passed"] and found["worst"], found
    for entry in found["backends"].values():
        assert not entry["passed"]


def test_an_unharmed_graph_passes_the_same_comparison(traced, folder):
    assert traced._verify_onnx(folder / "made" / "model.onnx")["passed"]


def test_iree_says_why_it_has_no_file(metadata, folder, tmp_path):
    """Without its packages, and with a program that cannot be read (also where they are installed)."""
    if not iree.versions():
        assert "pip install iree-turbine" in metadata["iree"]["failed"]
        assert not (folder / "made" / "model.vmfb").exists()
    (tmp_path / "model.pt2").write_bytes(b"no program")
    with pytest.raises(iree.Failed, match=r"Error|BadZipFile"):
        iree.compile_and_run(tmp_path / "model.pt2", tmp_path / "model.vmfb", [], 1)
    assert list(tmp_path.iterdir()) == [tmp_path / "model.pt2"]


@pytest.mark.skipif(not iree.versions(), reason="IREE is not installed (pip install iree-turbine)")
def test_irees_file_is_compared(traced, folder, tmp_path, monkeypatch):
    """And a negative control: outputs of another program are found out."""
    found = traced.offer_to_iree(folder / "made" / "model.pt2", tmp_path / "model.vmfb")
    assert found["passed"] and (tmp_path / "model.vmfb").stat().st_size > 100_000
    honest = iree.compile_and_run
    monkeypatch.setattr(iree, "compile_and_run", lambda *a: [[2 * v for v in row] for row in honest(*a)])
    assert not traced.offer_to_iree(folder / "made" / "model.pt2", tmp_path / "model.vmfb")["passed"]


def test_several_configs_have_a_folder_each_and_one_table(tmp_path, capsys):
    data = write_cloud(tmp_path / "cloud.bin")
    status = main(
        ["export-mmdet3d", str(POINTPILLARS), str(tmp_path / "gone.py"), "--data", str(data), "--format", "onnx"]
        + ["--output", str(tmp_path / "out")]
    )
    printed = capsys.readouterr()
    assert status == 2 and "gone.py: found no such file" in printed.err
    assert (tmp_path / "out" / "pointpillars_small" / "model.onnx").is_file()
    assert not (tmp_path / "out" / "pointpillars_small" / "model.pt2").exists()
    assert "pointpillars_small" in printed.out and "yes (13)" in printed.out


def test_a_checkpoint_is_loaded_and_another_models_refused(tmp_path, capsys):
    model = build(read(POINTPILLARS))
    draw(model, 5)
    torch.save({"state_dict": model.state_dict(), "meta": {"mmdet3d_version": "0.17.1"}}, tmp_path / "own.pth")
    again = build(read(POINTPILLARS))
    load_weights(again, tmp_path / "own.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert "0.17.1" in capsys.readouterr().err  # boxes of before 1.0
    with pytest.raises(UserError, match=r"own.pth: found no pts_.*expected.*CenterPoint"):
        load_weights(build(read(CENTERPOINT)), tmp_path / "own.pth")


def test_seeded_weights_are_the_same_again():
    first, second, other = (build(read(POINTPILLARS)) for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        draw(model, seed)
    states = [model.state_dict() for model in (first, second, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["backbone.blocks.0.0.weight"], states[2]["backbone.blocks.0.0.weight"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("empty point cloud",)),
        (cloud(columns=5, count=41).tobytes(), ("found 820 bytes", "points of 4 float32", "5 columns")),
        (np.full((8, 4), np.nan, np.float32).tobytes(), ("NaN or infinity in 8 of 8",)),
        # Five columns whose bytes fit four.
        (cloud(columns=5).tobytes(), ("found points of 5 values each",)),
    ],
)
def test_bad_points_are_one_line(tmp_path, content, words):
    path = tmp_path / "points.bin"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_points(path, 4)
    assert all(word in str(refused.value) for word in (str(path), "expected", *words)), refused.value


def test_bad_use_ends_with_status_2(tmp_path, capsys):
    far = cloud()
    far[:, 0] += 500
    (tmp_path / "far.bin").write_bytes(far.tobytes())
    for words, expected in (
        ([], "kitti_infos_val.pkl is not on this disk; name a file with --data, or take --use-random-data"),
        (["--data", str(tmp_path / "gone.bin")], "gone.bin: found no such file"),
        (["--data", str(tmp_path / "far.bin")], "no point in the config's point_cloud_range"),
        (["--use-random-data", "--opset", "9"], "--opset: found 9, expected 13 to 20"),
        (["--use-random-data", "--calib", "x.bin"], "--calib: found without --int8"),
        (["--use-random-data", "--device", "cuda:7"], "--device: found 'cuda:7'"),
    ):
        if "--device" in words and torch.cuda.is_available():
            continue
        assert main(["export-mmdet3d", str(POINTPILLARS), "--output", str(tmp_path / "out"), *words]) == 2
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_infos_are_read_without_running_them(tmp_path):
    import pickle

    class Bad:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "infos.pkl"
    path.write_bytes(pickle.dumps({"data_list": [{"images": Bad()}]}))
    read_infos(path)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(pickle.dumps([{"image": 1}]))
    with pytest.raises(UserError, match=r"infos.pkl: found a list, as 0.x wrote them, expected mmdet3d 1.x infos"):
        read_infos(path)


def test_random_data_gives_a_sample(tmp_path):
    model = build(read(CENTERPOINT))
    reader = Reader(read(CENTERPOINT), model)
    first, again, fewer = reader.random(), reader.random(), reader.random(0.05)
    assert torch.equal(first.inputs["voxels"]["voxels"], again.inputs["voxels"]["voxels"])
    assert len(fewer.inputs["voxels"]["coors"]) < len(first.inputs["voxels"]["coors"])


def test_a_model_that_cannot_be_exported_says_where_and_why(tmp_path, capsys):
    """SECOND's sparse convolutions: the module and the operator are named, nothing is half written."""
    status = main(
        [
            "export-mmdet3d",
            "second_hv_secfpn_8xb6-80e_kitti-3d-car.py",
            "--use-random-data",
            "--output",
            str(tmp_path / "out"),
        ]
    )
    errors = capsys.readouterr().err
    assert status == 1
    assert "middle_encoder.conv_input.0 (SubMConv3d)" in errors and "sparse convolution" in errors
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["export_success"] == {"pt2": False, "onnx": False} and not metadata["files"]


@pytest.mark.nightly
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
@pytest.mark.parametrize(
    ("config", "file", "least", "megabytes"),
    [
        ("hv_pointpillars_secfpn_6x8_160e_kitti-3d-3class.py", "kitti/000008.bin", 100, 19.4),
        ("centerpoint_02pillar_second_secfpn_4x8_cyclic_20e_nus.py", "nuscenes/*.bin", 100, 24.1),
        ("votenet_16x8_sunrgbd-3d-10class.py", "sunrgbd/000017.bin", 75, 8.0),
    ],
)
def test_the_three_commands_of_the_tool(tmp_path, config, file, least, megabytes):
    data = next(SHARED.glob(file))
    assert main(["export-mmdet3d", config, "--data", str(data), "--output", str(tmp_path)]) == 0
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert metadata["export_success"] == {"pt2": True, "onnx": True}
    found = metadata["verification"]
    assert all(row["sqnr_db"] == 200 for row in found["pt2"]["samples"])
    for entry in found["onnx"]["backends"].values():
        assert min(row["sqnr_db"] for row in entry["samples"]) >= least
        assert all(row["boxes"]["count"] == row["boxes"]["found"] > 0 for row in entry["samples"])
    assert metadata["files"]["model.onnx"]["bytes"] < megabytes * 1e6
