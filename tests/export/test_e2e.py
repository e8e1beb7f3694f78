import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from qat.core.errors import UserError
from qat.core.tensors import compare_tensors
from qat.engine import Options, build
from qat.export import export_parts
from qat.export.e2e import MATRICES, export_e2e, merge_detector, verify_detector
from qat.families.bevfusion.frames import random_frame
from qat.families.bevfusion.pooling.geometry import depth_bins
from qat.families.bevfusion.settings import pipeline_settings
from qat.lean.modes import quantizers_off
from qat.manifest import FILE, load_manifest
from qat.model.quantized import QuantizedModel
from qat.runtime import Pipeline


def calibrated(detector, settings):
    """A quantized detector whose ranges are the largest magnitudes on one made-up frame."""
    quantized = QuantizedModel(detector)
    seen = {}

    def hook(name):
        return lambda _, args: seen.__setitem__(name, args[0].abs().max().clamp(min=1e-3))

    own = quantized.activation_quantizers()
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in own.items()]
    frame = random_frame(settings, seed=7)
    with quantizers_off(quantized), torch.inference_mode():
        patterns = quantized.patterns(*(getattr(frame, name)[None] for name in MATRICES))
        quantized(torch.from_numpy(frame.img[None]), torch.from_numpy(frame.depth[None]), patterns)
    for handle in handles:
        handle.remove()
    for name, module in own.items():
        module.set_range(seen[name].clone())
    return quantized


def lively(detector):
    """With PyTorch's own initialisation the signal shrinks at every layer, and maps would hardly depend on the images."""
    for module in detector.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return detector


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_detector, fresh_config, small_cameras):
    """Folders with detector.onnx, by precision and flavour."""
    detector = lively(make_detector(fresh_config()))
    quantized = calibrated(detector, pipeline_settings(fresh_config()))
    root = tmp_path_factory.mktemp("e2e")
    found = {}
    for flavour in ("tensorrt", "onnxruntime"):
        found[f"int8 {flavour}"] = root / flavour
        export_parts(quantized, root / flavour, "int8", flavour=flavour)
    found["fp32"] = root / "fp32"
    export_parts(detector, root / "fp32", "fp32")
    for folder in found.values():
        export_e2e(folder)
    return found


@pytest.fixture(scope="module")
def opened(folders):
    """(merged graph, parts, settings) of a folder, by precision and flavour."""

    def read(folder):
        manifest = load_manifest(folder)
        parts = {name: onnx.load(folder / part["file"]) for name, part in manifest["parts"].items()}
        return onnx.load(folder / "detector.onnx"), parts, manifest["pipeline"]

    return {name: read(folder) for name, folder in folders.items()}


def turned(axis, angle):
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.eye(4)
    a, b = [i for i in range(3) if i != axis]
    matrix[[a, a, b, b], [a, b, a, b]] = c, -s, s, c
    return matrix


def moved(settings, seed):
    """A frame of cameras that were moved and tilted, resized, turned and mirrored images, and a turned, scaled lidar frame."""
    frame = random_frame(settings, seed)
    random = np.random.default_rng(seed)
    for n in range(len(frame.img)):
        tilt = turned(0, random.normal(0, 0.05)) @ turned(1, random.normal(0, 0.3)) @ turned(2, random.normal(0, 0.05))
        frame.camera2lidar[n] = frame.camera2lidar[n] @ tilt
        frame.camera2lidar[n, :3, 3] = random.normal(0, 0.7, 3)
        frame.camera_intrinsics[n, :2] *= random.uniform(0.8, 1.2, (2, 1))
        image = turned(2, random.normal(0, 0.05)) @ np.diag([random.choice([-0.9, 1.1]), 1.1, 1, 1])
        image[:2, 3] = random.normal(0, 5, 2) + (100 if image[0, 0] < 0 else 0, 0)
        frame.img_aug_matrix[n] = image
    lidar = turned(2, 0.3) @ np.diag([1.05, 1.05, 1.05, 1])
    lidar[:3, 3] = 0.4, -0.3, 0.2
    frame.lidar_aug_matrix = lidar.astype(np.float32)
    return frame


def feeds(frame, settings):
    names = ("img", "depth") if settings["depth_input"] else ("img",)
    arrays = {name: getattr(frame, name)[None] for name in names}
    return arrays | {name: getattr(frame, name) for name in MATRICES}


@pytest.mark.parametrize("kind", ["fp32", "int8 tensorrt", "int8 onnxruntime"])
def test_the_file_computes_what_the_pipeline_does_wherever_the_cameras_are(folders, opened, kind):
    model, parts, settings = opened[kind]
    engine = build(folders[kind] / "detector.onnx", "onnxruntime", "fp32" if kind == "fp32" else "int8")
    pipeline = Pipeline.load(folders[kind], "onnxruntime")
    results = []
    for frame in (random_frame(settings, 3), moved(settings, 4), moved(settings, 5)):
        report = verify_detector(model, parts, settings, frame)
        assert report["passed"], report
        expected = pipeline.forward(frame)
        found = engine.run(feeds(frame, settings))
        assert list(found) == settings["head_maps"]
        for name, value in found.items():
            # Optimized, the whole and the parts may be fused differently at their borders; the tolerance is the same.
            assert compare_tensors(expected[name], value)["sqnr_db"] >= report["tensors"][name]["tolerance_db"]
        results.append(found["heatmap_0"])
    assert compare_tensors(results[0], results[1])["sqnr_db"] < 20  # the matrices do matter


def test_points_lie_where_double_precision_has_them(opened):
    model, _, settings = opened["fp32"]
    frame = moved(settings, 6)
    double = SimpleNamespace(**{name: getattr(frame, name).astype(np.float64) for name in MATRICES})
    report = verify_detector(*opened["fp32"], frame)["geometry"]
    assert report["passed"] and report["cells_differ"] <= 2
    # The tolerance is far below a cell (1 m here), or it would excuse anything.
    assert report["tolerance_m"] < 1e-3
    geometry = build_geometry(model)
    found = geometry.run({name: getattr(frame, name) for name in MATRICES})["geometry/points"]
    transform = settings["vtransform"]
    (height, width), (fh, fw) = transform["image_size"], transform["feature_size"]
    for camera, depth, row, column in ((0, 0, 0, 0), (1, 11, 7, 11), (2, 5, 3, 4)):
        pixel = [(width - 1) * column / (fw - 1), (height - 1) * row / (fh - 1), depth_bins(transform["dbound"])[depth]]
        ray = np.linalg.solve(double.img_aug_matrix[camera, :3, :3], pixel - double.img_aug_matrix[camera, :3, 3])
        ray = np.linalg.solve(double.camera_intrinsics[camera, :3, :3], [*(ray[:2] * ray[2]), ray[2]])
        point = double.lidar_aug_matrix @ (double.camera2lidar[camera] @ [*ray, 1])
        where = (depth * fh + row) * fw + column
        np.testing.assert_allclose(found[camera, :, where], point[:3], atol=report["tolerance_m"])


def build_geometry(model):
    from qat.export.e2e import _geometry_alone, _plain

    return _plain(_geometry_alone(model))


def test_a_wrong_cell_is_not_taken_for_one_at_a_border(opened):
    _, parts, settings = opened["fp32"]
    shifted = json.loads(json.dumps(settings))
    shifted["vtransform"]["xbound"] = [-15.0, 17.0, 1.0]
    report = verify_detector(merge_detector(parts, shifted), parts, settings, random_frame(settings, 0))
    assert report["geometry"]["cells_unexplained"] > 1000 and not report["geometry"]["passed"] and not report["passed"]


def test_a_lost_part_of_the_geometry_fails_verification_and_is_written_with_it(tmp_path, folders, monkeypatch):
    import qat.export.e2e as e2e

    honest = e2e.merge_detector

    def loses_the_shift(parts, settings):
        model = honest(parts, settings)
        for node in model.graph.node:
            if node.output[0] == "geometry/points":
                node.op_type = "Sub"
        return model

    monkeypatch.setattr(e2e, "merge_detector", loses_the_shift)
    monkeypatch.setattr(e2e, "random_frame", moved)
    entry = export_e2e(folders["fp32"], tmp_path / "out")
    assert not entry["verification"]["passed"] and not entry["verification"]["geometry"]["passed"]
    assert load_manifest(tmp_path / "out")["e2e"] == entry


def test_int8_tolerance_is_that_of_roundings_that_have_become_independent(folders):
    for kind in ("int8 tensorrt", "int8 onnxruntime"):
        for figures in load_manifest(folders[kind])["e2e"]["verification"]["tensors"].values():
            assert 10 < figures["quantization_db"] < 80
            assert figures["tolerance_db"] == figures["quantization_db"] - 3


def test_several_threads_lose_nothing(folders, opened):
    _, _, settings = opened["fp32"]
    frame = random_frame(settings, 1)
    frame.camera2lidar[:, :3, :3] *= 0.05  # all points in a few cells: what a race would lose
    results = [
        build(folders["fp32"] / "detector.onnx", "onnxruntime", "fp32", Options(threads=threads)).run(
            feeds(frame, settings)
        )
        for threads in (1, 4, 4, 4)
    ]
    expected = Pipeline.load(folders["fp32"], "onnxruntime").forward(frame)
    for name in settings["head_maps"]:
        assert compare_tensors(expected[name], results[0][name])["sqnr_db"] >= 80
        for result in results[1:]:
            assert compare_tensors(results[0][name], result[name])["sqnr_db"] >= 80


def test_no_tensor_holds_features_for_every_depth(opened):
    model, _, settings = opened["fp32"]
    cameras, bins = len(settings["cameras"]), len(depth_bins(settings["vtransform"]["dbound"]))
    pixels = int(np.prod(settings["vtransform"]["feature_size"]))
    # In a session's own words: a graph's tensors with their shapes as ONNX infers them, the Scan's body among them.
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    sizes = {
        value.name: np.prod([d.dim_value for d in value.type.tensor_type.shape.dim])
        for value in inferred.graph.value_info
        if value.name.startswith(("geometry/", "pooling/"))
    }
    assert len(sizes) > 40 and min(sizes.values()) > 0
    grid = settings["vtransform"]["out_channels"] * 32 * 24
    assert max(sizes.values()) <= max(3 * cameras * bins * pixels, grid)
    (scan,) = [node for node in model.graph.node if node.op_type == "Scan"]
    assert [node.op_type for node in scan.attribute[0].g.node] == ["Mul", "Reshape", "ScatterElements", "Slice"]


def test_stacked_cells_and_no_depth_input_and_no_downsampling(tmp_path, make_detector, fresh_config, small_cameras):
    config = fresh_config()
    vtransform = config["model"]["encoders"]["camera"]["vtransform"]
    vtransform.update(type="LSSTransform", downsample=1, zbound=[-10.0, 10.0, 10.0])
    config["model"]["decoder"]["backbone"]["in_channels"] = 20
    config["model"]["heads"]["object"]["bbox_coder"]["out_size_factor"] = 4
    export_parts(lively(make_detector(config)), tmp_path / "parts", "fp32")
    entry = export_e2e(tmp_path / "parts")
    assert entry["verification"]["passed"]
    assert list(entry["inputs"]) == ["img", *MATRICES]
    manifest = load_manifest(tmp_path / "parts")
    parts = {name: onnx.load(tmp_path / "parts" / part["file"]) for name, part in manifest["parts"].items()}
    assert list(parts) == ["camera.backbone", "fuser", "head.bbox"]
    model = onnx.load(tmp_path / "parts" / "detector.onnx")
    report = verify_detector(model, parts, manifest["pipeline"], moved(manifest["pipeline"], 8))
    assert report["passed"], report


def test_parts_for_any_batch_size_are_merged_for_one_sample(opened):
    _, parts, settings = opened["fp32"]
    free = {name: onnx.ModelProto.FromString(part.SerializeToString()) for name, part in parts.items()}
    for name in ("fuser", "head.bbox"):
        for value in (*free[name].graph.input, *free[name].graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    model = merge_detector(free, settings)
    assert all(value.type.tensor_type.shape.dim[0].dim_value == 1 for value in model.graph.output)
    assert verify_detector(model, free, settings, random_frame(settings, 2))["passed"]


def test_the_manifest_lists_the_file_beside_the_parts(folders, opened):
    _, _, settings = opened["int8 onnxruntime"]
    manifest = load_manifest(folders["int8 onnxruntime"])
    entry = manifest["e2e"]
    assert entry["file"] == "detector.onnx" and entry["opset"] == 16 and entry["precision"] == "int8"
    assert entry["operators"]["QuantizeLinear"] == sum(
        part["operators"].get("QuantizeLinear", 0) for part in manifest["parts"].values()
    )
    assert {name: spec["shape"] for name, spec in entry["inputs"].items()} == {
        "img": [1, 3, 3, 64, 96],
        "depth": [1, 3, 1, 64, 96],
        "camera_intrinsics": [3, 4, 4],
        "camera2lidar": [3, 4, 4],
        "img_aug_matrix": [3, 4, 4],
        "lidar_aug_matrix": [4, 4],
    }
    assert list(entry["outputs"]) == settings["head_maps"]
    assert entry["outputs"]["heatmap_0"]["shape"] == manifest["parts"]["head.bbox"]["outputs"]["heatmap_0"]["shape"]


def test_the_same_parts_give_the_same_bytes(tmp_path, folders):
    entry = export_e2e(folders["int8 tensorrt"], tmp_path / "alone")
    assert entry == load_manifest(folders["int8 tensorrt"])["e2e"]
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == ["detector.onnx", FILE]
    with pytest.raises(UserError, match=r"alone: found the whole detector in one file, expected its parts"):
        Pipeline.load(tmp_path / "alone", "onnxruntime")


def test_an_export_that_fails_leaves_the_folder_as_it_was(tmp_path, folders, monkeypatch):
    import qat.export.e2e as e2e

    folder = tmp_path / "parts"
    folder.mkdir()
    for path in folders["fp32"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(e2e, "write_json", full)
    with pytest.raises(OSError, match="no space"):
        export_e2e(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "detector.onnx").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"detector\.onnx: found sha256"):
        load_manifest(folder)


def test_what_cannot_be_merged_is_told_in_one_line(tmp_path, folders, opened):
    _, parts, settings = opened["fp32"]
    with pytest.raises(UserError, match=r"fuser: no such part among camera\.backbone"):
        merge_detector({"camera.backbone": parts["camera.backbone"]}, settings)
    pair = onnx.ModelProto.FromString(parts["fuser"].SerializeToString())
    pair.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(UserError, match="fuser: camera: found 2 for its first dimension, expected 1"):
        merge_detector(parts | {"fuser": pair}, settings)
    half = onnx.ModelProto.FromString(parts["fuser"].SerializeToString())
    half.graph.input[0].CopyFrom(helper.make_tensor_value_info("camera", TensorProto.FLOAT16, [1, 10, 16, 12]))
    with pytest.raises(UserError, match="fuser: camera: found float16, expected float32"):
        merge_detector(parts | {"fuser": half}, settings)
    with pytest.raises(UserError, match="found the parts inside it"):
        export_e2e(folders["fp32"], folders["fp32"].parent)
