"""camera.backbone and camera.vtransform out of a camera+lidar model, as CUDA-BEVFusion's users need them."""

import shutil

import numpy as np
import onnx
import pytest
import torch

from qat.calibrate import calibrate, save_ptq
from qat.cli import main
from qat.compare.rows import Sources, load_rows
from qat.core.errors import UserError
from qat.core.tensors import compare_tensors
from qat.engine import Options
from qat.export import ExportOptions, export_parts, torch_parts
from qat.export.checkpoint import export_checkpoint
from qat.families.bevfusion.config import CAMERAS, load_config
from qat.families.bevfusion.detector import build_model
from qat.families.bevfusion.frames import random_frame
from qat.families.bevfusion.settings import pipeline_settings
from qat.families.bevfusion.state import load_float_branch
from qat.manifest import load_manifest
from qat.model.opening import Source
from qat.model.runners import run_frame
from qat.runtime import Calibration, Pipeline
from tests.messages import refused, says

PARTS = {
    "camera.backbone": (
        {"img": [1, 6, 3, 64, 96], "depth": [1, 6, 1, 64, 96]},
        {"camera_feature": [6, 8, 12, 10], "camera_depth_weights": [6, 12, 8, 12]},
    ),
    "camera.vtransform": ({"feat_in": [1, 10, 32, 32]}, {"feat_out": [1, 10, 16, 16]}),
}


@pytest.fixture(scope="module")
def ptq(fusion_files, tiny_frames, tmp_path_factory):
    """A branch's PTQ checkpoint."""
    path = tmp_path_factory.mktemp("branch") / "ptq.pth"
    config = load_config(fusion_files["config"], "camera")
    branch, left_out = load_float_branch(config, fusion_files["checkpoint"], "encoders.camera")
    quantized, _ = calibrate(branch, tiny_frames, "mse")
    assert left_out == 6
    save_ptq(path, quantized, branch, {"method": "mse"})
    return path


@pytest.fixture(scope="module")
def int8(ptq):
    """Its INT8 parts and their manifest."""
    return export_checkpoint(Source(ptq))


@pytest.fixture(scope="module")
def fp32(fusion_files, tmp_path_factory):
    """Folder of the branch's FP32 parts, by the command; nothing may change it."""
    folder = tmp_path_factory.mktemp("branch") / "onnx_fp32"
    arguments = ["--ckpt", fusion_files["checkpoint"], "--config", fusion_files["config"], "--out", folder]
    assert main(["export-camera", *map(str, arguments), "--prefix", "encoders.camera"]) == 0
    return folder


def shapes(values):
    return {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def check_folder(folder, manifest, precision):
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [*(f"{name}.onnx" for name in PARTS), "manifest.json", "verification.npz"]
    )
    assert manifest["pipeline"]["branch"] == "camera" and manifest["pipeline"]["head"] is None
    assert manifest["precision"] == precision and manifest["verification"]["passed"]
    for name, (inputs, outputs) in PARTS.items():
        model = onnx.load(folder / f"{name}.onnx")
        assert list(shapes(model.graph.input).items()) == list(inputs.items())
        assert list(shapes(model.graph.output).items()) == list(outputs.items())
        assert all(entry["passed"] for entry in manifest["parts"][name]["verification"].values())


def test_int8_parts_of_a_branchs_checkpoint(int8):
    folder, manifest = int8
    check_folder(folder, manifest, "int8")
    backbone, vtransform = (manifest["parts"][name] for name in PARTS)
    assert backbone["operators"]["QuantizeLinear"] > 20 and backbone["scales"]["passed"]
    assert "QuantizeLinear" not in vtransform["operators"] and vtransform["precision"] == "fp32"
    assert load_manifest(folder)["calibration"]["method"] == "mse"


def test_the_onnxruntime_flavour_of_a_branch(ptq):
    folder, manifest = export_checkpoint(Source(ptq), ExportOptions(flavour="onnxruntime"))
    check_folder(folder, manifest, "int8")


def renamed(path):
    """The graph's bytes with its tensors and nodes renamed in their order. torch numbers those that it makes (such as a
    folded convolution's weights) after the parameters of the whole module, used or not."""
    graph = onnx.load(path).graph
    names = {}
    for node in graph.node:
        node.name = ""
        for field in (node.input, node.output):
            for n, name in enumerate(field):
                field[n] = names.setdefault(name, f"t{len(names)}")
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names[value.name]
    tensors = sorted(tensor.SerializeToString(deterministic=True) for tensor in graph.initializer)
    del graph.initializer[:], graph.value_info[:]
    return graph.SerializeToString(deterministic=True), tensors


def test_fp32_parts_are_the_whole_detectors_byte_for_byte(fp32, tmp_path, make_tiny_model):
    check_folder(fp32, load_manifest(fp32), "fp32")
    export_parts(make_tiny_model(), tmp_path / "whole", ExportOptions("fp32"))
    for name in PARTS:
        own, other = (renamed(folder / f"{name}.onnx") for folder in (fp32, tmp_path / "whole"))
        assert own == other, name


def test_the_config_inside_or_beside_a_float_checkpoint_serves_too(fusion_files, fusion_config, tmp_path):
    inside = tmp_path / "inside.pth"
    torch.save({**torch.load(fusion_files["checkpoint"], weights_only=True), "config": fusion_config}, inside)
    export_checkpoint(Source(inside, prefix="encoders.camera"), out=tmp_path / "a")
    beside = tmp_path / "beside" / "bevfusion.pth"
    beside.parent.mkdir()
    shutil.copy(fusion_files["config"], beside.parent / "config.yaml")
    shutil.copy(fusion_files["checkpoint"], beside)
    export_checkpoint(Source(beside, prefix="encoders.camera"), out=tmp_path / "b")
    one, two = (load_manifest(tmp_path / name)["parts"] for name in "ab")
    assert one == two


def test_a_pipeline_of_a_branch_gives_tensors_and_refuses_boxes(fp32, fusion_files):
    pipeline = Pipeline.load(fp32, "onnxruntime")
    frame = random_frame(pipeline.settings, 3)
    tensors = pipeline.forward(frame)
    assert list(tensors) == ["camera_feature", "camera_depth_weights", "feat_in", "feat_out"]
    config = load_config(fusion_files["config"], "camera")
    reference, _ = load_float_branch(config, fusion_files["checkpoint"], "encoders.camera")
    with torch.inference_mode():
        maps = run_frame(reference, frame)
    assert compare_tensors(maps["feat_out"].numpy(), tensors["feat_out"])["sqnr_db"] > 80
    calibration = Calibration(frame.camera_intrinsics, frame.camera2lidar)
    images = [np.zeros((64, 96, 3), np.uint8)] * 6
    for call in (
        lambda: pipeline(images, np.zeros((0, 5), np.float32), calibration),
        lambda: pipeline.detect_sample(frame),
        lambda: pipeline.decode(tensors),
    ):
        with refused("onnx_fp32", "found a camera branch, which computes BEV features but no boxes"):
            call()
    with pytest.raises(UserError, match="found a camera branch"):
        load_rows(Sources(fusion_files["checkpoint"], None, [fp32], []), ["onnxruntime"], Options())


def test_a_branch_that_does_not_downsample_is_one_part(fusion_files, tmp_path):
    config = load_config(fusion_files["config"], "camera")
    config["model"]["encoders"]["camera"]["vtransform"] |= {"type": "LSSTransform", "downsample": 1}
    torch.manual_seed(0)
    branch = build_model(config).eval()
    assert list(torch_parts(branch)) == ["camera.backbone"]
    manifest = export_parts(branch, tmp_path / "out", ExportOptions("fp32"))
    assert list(manifest["parts"]) == ["camera.backbone"] and manifest["verification"]["passed"]
    assert list(manifest["parts"]["camera.backbone"]["inputs"]) == ["img"]


def test_health_reads_data_for_a_branchs_parts_by_the_whole_models_config(int8, fusion_files, tmp_path, capsys):
    """The config's lidar encoder, which is not known here, is no hindrance; missing data are."""
    folder, _ = int8
    command = ["health", str(folder), "--config", str(fusion_files["config"]), "--data", str(tmp_path / "none")]
    assert main(command) == 2
    assert "none: no such folder" in capsys.readouterr().err
    assert main([*command, "--prefix", "encoders.camera"]) == 2
    assert says(capsys.readouterr().err, "camera branch", "omit --prefix")


def test_settings_say_that_they_are_of_a_branch(fusion_files, tiny_config):
    config = load_config(fusion_files["config"], "camera")
    branch, whole = pipeline_settings(config), pipeline_settings(tiny_config)
    assert (branch["branch"], branch["classes"], branch["head_maps"]) == ("camera", [], [])
    assert whole["branch"] is None and branch["cameras"] == list(CAMERAS)
    for name in ("image", "points", "vtransform", "depth_input"):
        assert branch[name] == whole[name]


def test_a_ptq_checkpoint_needs_no_prefix(ptq):
    with refused("PTQ checkpoint", "omit --prefix"):
        export_checkpoint(Source(ptq, prefix="encoders.camera"))
