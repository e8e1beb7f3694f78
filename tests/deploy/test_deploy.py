"""`bevqat deploy` with configs of components: what it writes, checks and compares, and contradictions in one line."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from lidar import AWML, changed_awml, changed_config, need_mmdet3d
from onnx import numpy_helper

from qat.cli import main
from qat.core.files import sha256

need_mmdet3d()

ROOT = Path(__file__).resolve().parents[2]
SMALL = Path(__file__).resolve().parent / "deploy_small.py"
MODEL = ROOT / "model" / "lidar-tiny"
TINY = [str(MODEL / "config.py"), str(MODEL / "lidar-tiny.pth"), "--data", str(ROOT / "example-data")]
# The same for lidar-tiny, which has no sizes to contradict.
NO_PROFILES = """
export = dict(mode="{mode}", work_dir="{work_dir}")
components = dict(pts_voxel_encoder=dict(), pts_backbone_neck_head=dict())
evaluation = dict(enabled={evaluate}, num_samples=2)
verification = dict(enabled=True, num_verify_samples=1)
quantization = dict(enabled={int8}, mode="ptq", sensitive_layers=["pts_neck.deblocks.*"])
"""


def tiny(folder, **values):
    path = folder / "deploy.py"
    usual = {"mode": "both", "work_dir": folder / "work", "evaluate": False, "int8": False}
    path.write_text(NO_PROFILES.format(**(usual | values)))
    return path


def test_random_weights_for_autoware(tmp_path, capsys):
    flags = ["--work-dir", str(tmp_path / "out"), "--rot-y-axis-reference", "--replace-onnx-models"]
    assert main(["deploy", str(SMALL), str(AWML), "random", *flags]) == 0
    shown = capsys.readouterr()
    assert "--replace-onnx-models: not needed" in shown.err and "tensorrt: left out: " in shown.err
    manifest = json.loads((tmp_path / "out" / "onnx" / "manifest.json").read_text())
    assert manifest["opset"] == 16 and manifest["pipeline"]["head"]["layout"] == "autoware"
    assert (tmp_path / "out" / "onnx" / "ml_package.param.yaml").is_file()
    assert not (tmp_path / "out" / "tensorrt").exists()


def test_verified_and_evaluated_on_every_backend(tmp_path, capsys):
    """And a damaged part is found when it is looked at again."""
    config = tiny(tmp_path, evaluate=True)
    assert main(["deploy", str(config), *TINY, "--json", str(tmp_path / "result.json")]) == 0
    assert "all 3 pairs of backends agree" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    rows = json.loads(Path(result["results"]).read_text())["rows"]
    assert [(row["backend"], row["precision"]) for row in rows] == [
        ("pytorch", "fp32"),
        ("onnxruntime", "fp32"),
        ("openvino", "fp32"),
    ]
    assert all(row["map"] == rows[0]["map"] for row in rows) and set(result["missing"]) == {"tensorrt"}
    folder = tmp_path / "work" / "onnx"
    file = folder / "pts_backbone_neck_head.onnx"
    model = onnx.load(file)
    weight = next(value for value in model.graph.initializer if len(value.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.05, weight.name))
    onnx.save(model, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parts"]["pts_backbone_neck_head"]["sha256"] = sha256(file)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(["deploy", str(tiny(tmp_path, mode="none")), *TINY]) == 1
    assert "FAILED: pytorch fp32 and onnxruntime fp32: " in capsys.readouterr().out


def test_int8_is_calibrated_and_written_for_every_backend(tmp_path, capsys):
    assert main(["deploy", str(tiny(tmp_path, int8=True)), *TINY]) == 0
    work = tmp_path / "work"
    assert "pairs of backends agree" in capsys.readouterr().out
    forms = {}
    for name in ("onnx", "float", "onnxruntime", "openvino"):
        manifest = json.loads((work / name / "manifest.json").read_text())
        forms[name] = manifest["flavour"], manifest["precision"]
    assert forms == {
        "onnx": ("tensorrt-strong", "int8"),
        "float": ("tensorrt", "fp32"),
        "onnxruntime": ("onnxruntime", "int8"),
        "openvino": ("openvino", "int8"),
    }
    kept = json.loads((work / "openvino" / "manifest.json").read_text())["calibration"]["keep_float"]
    assert any("deblocks" in str(rule) for rule in kept)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("[1, 32, 64, 96]", "[1, 32, 200, 200]", "profile of spatial_features: found 1 × 32 × 200 × 200, expected B × 32 × 64 × 96"),
        ("max_shape=[2000, 32, 10]", "max_shape=[96000, 32, 10]", "profile of input_features: found 96000 × 32 × 10"),
        ("max_shape=[2000, 32, 10]", "max_shape=[2000, 32, 11]", "found 2000 × 32 × 11, expected voxels (1 to 2000) × points_a_voxel (1 to 32) × 10"),
        ('"heatmap", "reg", "height"', '"reg", "heatmap", "height"', "outputs: found reg, heatmap, height"),
        ('mode="both"', 'mode="all"', "export: mode: found 'all', expected one of onnx, trt, both, none"),
        ('mode="both"', 'mode="trt"', "export: onnx_path: found None"),
        ('onnx_file="pts_voxel_encoder.onnx"', 'onnx_file="encoder.onnx"', "components: pts_voxel_encoder: found 'encoder.onnx"),
        ("components = dict(", "codebase_config = dict(", "codebase_config: type: found None, expected 'mmdet3d'"),
        ("components = dict(", "parts = dict(", "parts: found 'a section that is not known'"),
        ('precision_policy="auto"', 'precision_policy="int4"', "precision_policy: found 'int4', expected one of auto"),
        ("pytorch=dict(", "torch=dict(", "evaluation: backends: found 'torch', expected some of pytorch, onnx, tensorrt"),
        ("onnx_config = dict(", "onnx_config = dict(,", "SyntaxError"),
    ],
)  # fmt: skip
def test_contradictions_are_one_line(tmp_path, capsys, before, after, words):
    config = changed_config(SMALL, tmp_path, before, after)
    assert main(["deploy", str(config), str(AWML), "random", "--work-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith(f"error: {config}")
    assert not (tmp_path / "out").exists()


def test_classes_against_the_head(tmp_path, capsys):
    config = changed_awml(tmp_path, ("metainfo = dict(classes=class_names)", 'metainfo = dict(classes=["car", "van"])'))
    assert main(["deploy", str(SMALL), str(config), "random", "--work-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "class_names: found car, van, expected those of the head's tasks: car, truck" in error
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_are_not_there(tmp_path, capsys):
    out = ["--work-dir", str(tmp_path / "out")]
    assert main(["deploy", str(SMALL), str(AWML), *out]) == 2  # the config's own
    assert "work_dirs/centerpoint/best_checkpoint.pth" in capsys.readouterr().err
    assert main(["deploy", str(SMALL), str(AWML), "random", "--verify", *out]) == 2
    assert "CKPT: found random with verification" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
