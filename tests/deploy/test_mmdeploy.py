"""`bevqat deploy` with MMDeploy's configs: what is written, that it computes what PyTorch does, and that each check can fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from lidar import CENTERPOINT, POINTPILLARS, changed_config, cloud, need_mmdet3d, write_cloud
from onnx import numpy_helper

from qat.cli import main
from qat.core.errors import UserError

need_mmdet3d()

from qat.deploy.mmdeploy import maps  # noqa: E402
from qat.deploy.mmdeploy.checks import compare, compare_boxes  # noqa: E402
from qat.deploy.mmdeploy.config import find, read  # noqa: E402
from qat.deploy.mmdeploy.detector import open_detector, pytorch_detector, voxels_in  # noqa: E402
from qat.engine.onnxruntime_backend import PlainGraph  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
VOXEL = ROOT / "configs" / "mmdet3d" / "voxel-detection"
MODELS = {"pointpillars": (POINTPILLARS, 4), "centerpoint": (CENTERPOINT, 5)}


def named(backend: str) -> Path:
    return VOXEL / f"voxel-detection_{backend}_dynamic{'-kitti-32x4' if backend.startswith('openvino') else ''}.py"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each model deployed in FP32 for ONNX Runtime and OpenVINO, once: (model, backend) → its folder and cloud."""
    kept = {}

    def deployed(model: str, backend: str = "onnxruntime") -> Path:
        if (model, backend) not in kept:
            folder = tmp_path_factory.mktemp(f"{model}-{backend}")
            config, columns = MODELS[model]
            file = write_cloud(folder / "cloud.bin", columns=columns)
            flags = ["--work-dir", str(folder), "--log-level", "ERROR"]
            assert main(["deploy", str(named(backend)), str(config), "random", str(file), *flags]) == 0
            kept[model, backend] = folder
        return kept[model, backend]

    return deployed


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return request.param


def points_of(model: str, seed: int = 0) -> np.ndarray:
    return cloud(seed, columns=4)


def larger(graph: onnx.ModelProto, name: str) -> None:
    """Makes one initializer 1 % larger."""
    value = next(value for value in graph.graph.initializer if value.name == name)
    value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value) * np.float32(1.01), name))


def graph_of(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "end2end.onnx")


def test_the_file_has_mmdeploys_tensors(files):
    graph = graph_of(files("pointpillars")).graph

    def described(value):
        kind = value.type.tensor_type
        return value.name, kind.elem_type, [d.dim_param or d.dim_value for d in kind.shape.dim]

    assert [described(value) for value in graph.input] == [
        ("voxels", 1, ["voxels_num", 8, 4]),
        ("num_points", 6, ["voxels_num"]),
        ("coors", 6, ["voxels_num", 4]),
    ]
    assert [described(value) for value in graph.output] == [
        ("cls_score0", 1, [1, 18, 32, 44]),
        ("bbox_pred0", 1, [1, 42, 32, 44]),
        ("dir_cls_pred0", 1, [1, 12, 32, 44]),
    ]
    tasks = graph_of(files("centerpoint"))
    assert [described(value)[2][1] for value in tasks.graph.output] == [10, 16, 4]
    assert tasks.opset_import[0].version == 11


def test_the_empty_grid_is_not_in_the_file(files, model):
    graph = graph_of(files(model)).graph
    largest = max(numpy_helper.to_array(value).size for value in graph.initializer if value.name.startswith("front/"))
    assert largest < 1000 and "ConstantOfShape" in {node.op_type for node in graph.node}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_both_backends_give_pytorchs_boxes(files, model, backend):
    folder = files(model, backend)
    expected = pytorch_detector(MODELS[model][0])
    given = folder / "end2end.onnx" if backend == "onnxruntime" else [folder / "end2end.xml", folder / "end2end.bin"]
    found = open_detector(named(backend), MODELS[model][0], given)
    for seed in range(3):
        points = points_of(model, seed)
        check = compare_boxes(found(points), expected(points))
        assert check.same and check.found > 0
        assert all(one.passed for one in compare(found.maps(points), expected.maps(points)))
    assert set(found.stages_ms) == {"voxelize", "network", "post"}


def test_another_random_model_gives_other_boxes(files, model):
    """Boxes are compared: not any model's pass."""
    points, other = points_of(model), pytorch_detector(MODELS[model][0], "random:1")
    found = open_detector(named("onnxruntime"), MODELS[model][0], files(model) / "end2end.onnx")
    assert not compare_boxes(found(points), other(points)).same
    assert not any(check.passed for check in compare(found.maps(points), other.maps(points)))


def test_rows_without_points_change_nothing_and_give_no_nan(files, model):
    """Before the others, behind them, or alone: mmdet3d's encoder gives NaN for them."""
    detector = open_detector(named("onnxruntime"), MODELS[model][0], files(model) / "end2end.onnx")
    graph = PlainGraph(files(model) / "end2end.onnx")
    feeds = voxels_in(points_of(model), detector.flow)
    expected = graph.run(feeds)
    row = {"voxels": feeds["voxels"][:1] * 0 + 9, "num_points": np.zeros(1, np.int32), "coors": feeds["coors"][5:6]}
    assert feeds["num_points"][5] > 0
    for order in ([row, feeds], [feeds, row, row]):
        found = graph.run({name: np.concatenate([part[name] for part in order]) for name in feeds})
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-5)
    for name, value in graph.run(row).items():
        assert np.isfinite(value).all(), name
    empty = np.full((1, 4), 1e6, np.float32)
    reference = pytorch_detector(MODELS[model][0])
    assert compare_boxes(detector(empty), reference(empty)).same


def test_two_scans_of_a_batch_are_never_merged(files, model):
    """The graph answers NaN, which every reader refuses; `batch` computes each scan alone."""
    detector = open_detector(named("onnxruntime"), MODELS[model][0], files(model) / "end2end.onnx")
    one, two = points_of(model, 0), points_of(model, 1)
    alone = [detector(one), detector(two)]
    together = detector.batch([one, two])
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a.boxes, b.boxes)
    feeds = [voxels_in(points, detector.flow) for points in (one, two)]
    feeds[1]["coors"][:, 0] = 1
    merged = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    outputs = PlainGraph(files(model) / "end2end.onnx").run(merged)
    assert np.isnan(outputs["cls_score0"]).all()
    detector._network = lambda _: maps.split(detector.flow, outputs, "two scans")
    with pytest.raises(UserError, match="found NaN or infinity"):
        detector(one)


def test_a_damaged_file_is_found(files, model, tmp_path):
    """A weight that is 1 % too large, and two outputs in each other's place."""
    config = MODELS[model][0]
    graph, expected = graph_of(files(model)), pytorch_detector(config)
    first = next(node.input[1] for node in graph.graph.node if node.op_type == "Conv")
    larger(graph, first)
    onnx.save(graph, tmp_path / "end2end.onnx")
    found = open_detector(named("onnxruntime"), config, tmp_path / "end2end.onnx")
    points = points_of(model)
    assert not any(check.passed for check in compare(found.maps(points), expected.maps(points)))
    graph = graph_of(files(model))
    swapped = {"cls_score0": "dir_cls_pred0", "dir_cls_pred0": "cls_score0"}
    for value in graph.graph.output:
        value.name = swapped.get(value.name, value.name)
    for node in graph.graph.node:
        node.output[:] = [swapped.get(name, name) for name in node.output]
    onnx.save(graph, tmp_path / "swapped.onnx")
    with pytest.raises(UserError, match=r"cls_score0: found \[1, "):
        open_detector(named("onnxruntime"), config, tmp_path / "swapped.onnx")(points)


@pytest.mark.parametrize("int8", [False, True])
def test_a_wrong_graph_fails_the_command(tmp_path, capsys, monkeypatch, int8):
    """A weight of the encoder that is 1 % too large: exit status 1, and a line that says where. In INT8 the part is right, and the grid
    before it is compared by itself."""
    from qat.deploy.mmdeploy import deploy as module

    original = module.compose

    def damaged(front, *more):
        larger(front, next(node.input[1] for node in front.graph.node if node.op_type == "MatMul"))
        return original(front, *more)

    monkeypatch.setattr(module, "compose", damaged)
    file = write_cloud(tmp_path / "cloud.bin")
    flags = ["--work-dir", str(tmp_path / "out"), "--log-level", "ERROR"]
    flags += ["--quant", "--calib-dataset-cfg", str(file)] if int8 else []
    assert main(["deploy", str(named("onnxruntime")), str(POINTPILLARS), "random", str(file), *flags]) == 1
    what = "spatial_features" if int8 else "cls_score0"
    assert f"FAILED: end2end.onnx, cloud.bin: {what}: differs by" in capsys.readouterr().out


@pytest.mark.parametrize(("release", "first"), [("0.4", "scores"), ("1.0", "cls_score"), ("1.2", "cls_score0")])
def test_names_of_a_release(tmp_path, release, first):
    file = write_cloud(tmp_path / "cloud.bin", columns=5)
    flags = ["--work-dir", str(tmp_path), "--log-level", "ERROR", "--names", release]
    assert main(["deploy", str(named("onnxruntime")), str(CENTERPOINT), "random:2", str(file), *flags]) == 0
    assert graph_of(tmp_path).graph.output[0].name == first
    points = cloud()
    found = open_detector(named("onnxruntime"), CENTERPOINT, tmp_path / "end2end.onnx")(points)
    assert compare_boxes(found, pytorch_detector(CENTERPOINT, "random:2")(points)).same


@pytest.mark.parametrize("backend", ["onnxruntime-int8", "openvino-int8"])
def test_int8_on_each_cpu_backend(tmp_path, model, backend, capsys):
    config, columns = MODELS[model]
    clouds = tmp_path / "clouds"
    clouds.mkdir()
    for seed in range(3):
        write_cloud(clouds / f"{seed}.bin", seed=seed, columns=columns)
    out = tmp_path / "out"
    flags = ["--work-dir", str(out), "--calib-dataset-cfg", str(clouds), "--log-level", "INFO"]
    command = ["deploy", str(named(backend)), str(config), "random", str(clouds / "0.bin"), *flags]
    assert main([*command, "--calib-frames", "2", "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert "INT8: calibration on 2 frames" in capsys.readouterr().err
    assert result["beside_float"] and all(one["passed"] for one in result["beside_float"].values())
    counts = {node.op_type for node in graph_of(out).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= counts and graph_of(out).opset_import[0].version == 13
    assert (out / "ptq.pth").is_file()
    assert (out / "end2end.onnx").stat().st_size < 0.6 * 200_000 * (1 if model == "pointpillars" else 4)


def test_int8_with_scales_off_by_two_fails(tmp_path, monkeypatch, capsys):
    """The part's own verification sees it before anything is composed."""
    from qat.export import parts

    original = parts._graph

    def wrong(*args, **more):
        graph = original(*args, **more)
        known = {value.name: value for value in graph.graph.initializer}
        for node in graph.graph.node:
            if node.op_type == "QuantizeLinear" and node.input[1] in known:
                value = known[node.input[1]]
                value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value) * np.float32(2), value.name))
                break
        return graph

    monkeypatch.setattr(parts, "_graph", wrong)
    file = write_cloud(tmp_path / "cloud.bin")
    flags = ["--work-dir", str(tmp_path / "out"), "--calib-dataset-cfg", str(file), "--quant"]
    assert main(["deploy", str(named("onnxruntime")), str(POINTPILLARS), "random", str(file), *flags]) == 2
    assert "the part and PyTorch differ by more than the tolerance" in capsys.readouterr().err
    assert not (tmp_path / "out" / "end2end.onnx").exists()


def test_fp16_keeps_coordinates(tmp_path):
    file = write_cloud(tmp_path / "cloud.bin")
    flags = ["--work-dir", str(tmp_path), "--log-level", "ERROR"]
    assert main(["deploy", str(named("onnxruntime-fp16")), str(POINTPILLARS), "random", str(file), *flags]) == 0
    graph = graph_of(tmp_path).graph
    assert all(
        value.data_type != onnx.TensorProto.FLOAT16 for value in graph.initializer if value.name.startswith("front/")
    )
    assert any(value.data_type == onnx.TensorProto.FLOAT16 for value in graph.initializer)
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {1, 6}


def test_pictures_and_infos(tmp_path, capsys):
    file, second = write_cloud(tmp_path / "a.bin"), write_cloud(tmp_path / "b.bin", seed=1)
    out = tmp_path / "out"
    flags = ["--work-dir", str(out), "--dump-info", "--test-img", str(file), str(second), "--show"]
    assert main(["deploy", str(named("openvino")), str(POINTPILLARS), "random", str(file), *flags]) == 0
    shown = capsys.readouterr()
    assert "--show: found no display; the picture is" in shown.err
    for name in ("output_openvino", "output_openvino_1", "output_pytorch", "output_pytorch_1"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and f"{name}.png" in shown.out
    deploy, pipeline, detail = (
        json.loads((out / f"{name}.json").read_text()) for name in ("deploy", "pipeline", "detail")
    )
    assert deploy["models"] == [
        {
            "name": "pointpillars", "net": "end2end.xml", "weights": "end2end.bin", "backend": "openvino",
            "precision": "FP32", "batch_size": 1, "dynamic_shape": True,
        }
    ]  # fmt: skip
    before, network, after = pipeline["pipeline"]["tasks"]
    assert before["transforms"][-1]["type"] == "Voxelize" and network["input_map"]["coors"] == "coors"
    assert after["params"]["class_names"] == ["Pedestrian", "Cyclist", "Car"]
    assert detail["codebase"]["pth"] == "random" and detail["backend_config"]["type"] == "openvino"


def test_old_names_of_configs():
    found = find("configs/mmdet3d/voxel-detection/voxel-detection_tensorrt_dynamic-kitti.py")
    assert found.name == "voxel-detection_tensorrt_dynamic-kitti-32x4.py"
    config = read(found)
    assert (config.backend, config.voxels, config.workspace) == ("tensorrt", (2000, 9000), 1 << 30)
    assert find(VOXEL / "voxel-detection_openvino_dynamic_nus.py").name.endswith("dynamic-nus-20x5.py")
    with pytest.raises(UserError, match="found no such file, expected a deploy config"):
        find(VOXEL / "voxel-detection_ncnn.py")


def test_every_config_of_ours_is_read():
    configs = sorted(
        set(VOXEL.glob("*.py")) - {VOXEL / "voxel-detection_static.py", VOXEL / "voxel-detection_dynamic.py"}
    )
    read_ones = [read(path) for path in configs]
    assert len(configs) == 18
    assert {(one.backend, one.precision) for one in read_ones} == {
        *((backend, precision) for backend in ("onnxruntime", "tensorrt") for precision in ("fp32", "fp16", "int8")),
        ("openvino", "fp32"),
        ("openvino", "int8"),
    }
    strong = read(VOXEL / "voxel-detection_tensorrt-int8_dynamic-nus-20x5.py")
    assert (strong.flavour, strong.opset) == ("tensorrt-strong", 13)
    with pytest.raises(UserError, match="backend_config: type: found 'none: this is a base"):
        read(VOXEL / "voxel-detection_dynamic.py")


def test_tensorrt_without_a_gpu_is_one_line(tmp_path, capsys):
    from qat.engine import identify

    try:
        identify("tensorrt")
    except UserError:
        pass
    else:
        pytest.skip("there is a GPU")
    file = write_cloud(tmp_path / "cloud.bin")
    config = "configs/mmdet3d/voxel-detection/voxel-detection_tensorrt_dynamic-kitti.py"
    assert main(["deploy", config, str(POINTPILLARS), "random", str(file), "--work-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ": tensorrt: " in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--uri", "10.0.0.1:60000"], "--uri names a remote device"),
        (["--quant-image-dir", "images"], "--quant-image-dir is ncnn's"),
        (["--verify"], "found --verify, which is for AWML's configs"),
        (["--split", "eval"], "found --split, which is for AWML's configs"),
        (["--calib-frames", "2"], "found --calib-frames with fp32, expected INT8"),
        (["--device", "tpu"], "--device: found 'tpu'"),
        (
            ["--quant", "--calib-dataset-cfg", str(ROOT / "example-data"), "--calib-frames", "999"],
            "--calib-frames: found 999",
        ),
        (["--quant"], "found no val_dataloader, expected the data set that INT8 is calibrated on"),
        (["--names", "1.0", "--quant", "--calib-dataset-cfg", "nothing"], "nothing: found no .bin file"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(tmp_path, capsys, flags, words):
    file, out = write_cloud(tmp_path / "cloud.bin"), tmp_path / "out"
    command = ["deploy", str(named("onnxruntime")), str(POINTPILLARS), "random", str(file), "--work-dir", str(out)]
    assert main([*command, "--log-level", "ERROR", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not list(out.glob("end2end*"))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('type="mmdet3d"', 'type="mmdet"', "codebase_config: type: found 'mmdet', expected 'mmdet3d'"),
        ('"VoxelDetection"', '"MonoDetection"', "expected 'VoxelDetection'; export the model whole"),
        ('"VoxelDetection"', '"Segmentation"', "task: found 'Segmentation'"),
        ('model_type="end2end"', 'model_type="sdk"', "model_type: found 'sdk'"),
        ('"voxels", "num_points"', '"num_points", "voxels"', "input_names: found"),
        ('"cls_score0", "bbox_pred0", "dir_cls_pred0"', '"a", "b"', "output_names: found a, b"),
        ("onnx_config = dict(", "onnx_config = dict(opset_version=9, ", "opset_version: found 9, expected 11 to 20"),
        ("onnx_config = dict(", "backend_config = dict(type='ncnn')\nonnx_config = dict(", "type: found 'ncnn'"),
        ("onnx_config = dict(", "backend_config = dict(precision='int4')\nonnx_config = dict(", "precision: found 'int4'"),
        ("onnx_config = dict(", "onnx_config = dict(,", "SyntaxError"),
    ],
)  # fmt: skip
def test_contradictions_of_a_config_are_one_line(tmp_path, capsys, before, after, words):
    base = (VOXEL / "voxel-detection_static.py").read_text().replace("../../_base_", str(ROOT / "configs" / "_base_"))
    base = base.replace('onnx_config.py"]', f'onnx_config.py", "{ROOT}/configs/_base_/backends/onnxruntime.py"]')
    config = tmp_path / "config.py"
    config.write_text(base)
    config = changed_config(config, tmp_path, before, after)
    file = write_cloud(tmp_path / "cloud.bin")
    assert (
        main(["deploy", str(config), str(POINTPILLARS), "random", str(file), "--work-dir", str(tmp_path / "out")]) == 2
    )
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_profiles_of_another_model_are_refused():
    from qat.deploy.mmdeploy.deploy import check_profiles
    from qat.model.opening import read_config

    family, described = read_config(POINTPILLARS)
    config = read(VOXEL / "voxel-detection_tensorrt_dynamic-nus-20x5.py")
    with pytest.raises(UserError, match="voxels: found 5000 × 20 × 5, expected voxels × 8 × 4"):
        check_profiles(config, family.flow(described))


def test_more_voxels_than_the_profile_takes_are_told():
    """And fewer are filled up with rows that change nothing."""
    found = pytorch_detector(POINTPILLARS)
    points, flow = cloud(), found.flow
    count = len(voxels_in(points, flow)["voxels"])
    expected = found(points)
    found.voxels = (count + 7, None)
    assert len(voxels_in(points, flow, count + 7)["voxels"]) == count + 7
    assert compare_boxes(found(points), expected).same
    found.voxels = (1, count - 1)
    with pytest.raises(UserError, match=f"voxels: found {count:,} in a cloud, expected at most {count - 1:,}"):
        found(points)


def test_clouds_that_are_none(tmp_path, capsys):
    command = ["deploy", str(named("onnxruntime")), str(POINTPILLARS), "random"]
    picture = tmp_path / "demo.png"
    picture.write_bytes(b"\x89PNG")
    for given, words in (
        (picture, "found the ending '.png', expected points (.bin) or mmdet3d infos (.pkl)"),
        (tmp_path / "nothing.bin", "nothing.bin"),
    ):
        assert main([*command, str(given), "--work-dir", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert main([*command, "--work-dir", str(tmp_path / "out")]) == 2
    assert "found no IMG" in capsys.readouterr().err
