import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from qat.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def away_from_example_data(tmp_path, monkeypatch):
    """Exports here are verified on the made-up frame alone; tests/export/test_verification.py has the real ones."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def checkpoint(tmp_path, small_config, make_detector):
    detector = make_detector(small_config)
    path = tmp_path / "float.pth"
    torch.save({"state_dict": detector.state_dict(), "config": small_config}, path)
    return path


def test_a_float_checkpoint_gives_fp32_parts_beside_it(checkpoint, capsys):
    assert main(["export-camera", "--ckpt", str(checkpoint)]) == 0
    assert (checkpoint.parent / "onnx_fp32" / "manifest.json").is_file()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("dB SQNR" in line for line in lines)


def test_fp16_and_out_choose_the_folder(checkpoint, tmp_path):
    assert main(["export-camera", "--ckpt", str(checkpoint), "--fp16"]) == 0
    assert (tmp_path / "onnx_fp16" / "fuser.onnx").is_file()
    assert main(["export-camera", "--ckpt", str(checkpoint), "--out", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "fuser.onnx").is_file()


def test_a_bare_state_dict_takes_the_config_beside_it_or_named(checkpoint, tmp_path, small_config, capsys):
    bare = tmp_path / "bare" / "state.pth"
    bare.parent.mkdir()
    torch.save(torch.load(checkpoint, weights_only=True)["state_dict"], bare)
    assert main(["export-camera", "--ckpt", str(bare)]) == 2
    assert "give the run's configs.yaml with --config" in capsys.readouterr().err
    (tmp_path / "named.yaml").write_text(yaml.safe_dump(small_config))
    assert main(["export-camera", "--ckpt", str(bare), "--config", str(tmp_path / "named.yaml")]) == 0


def test_int8_of_a_float_checkpoint_says_to_calibrate(checkpoint, capsys):
    assert main(["export-camera", "--ckpt", str(checkpoint), "--int8"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {checkpoint}: a float checkpoint") and "calibrate" in error
    assert error.count("\n") == 1


def test_a_part_out_of_tolerance_gives_exit_status_1(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("qat.core.verification.FP32_DB", 190.0)  # more than float32 can give
    monkeypatch.setattr("qat.core.verification.NOISIER_DB", 100.0)  # and so much more than PyTorch itself gives
    assert main(["export-camera", "--ckpt", str(checkpoint)]) == 1
    assert "dB SQNR, expected 190.0 dB or more" in capsys.readouterr().err


def test_the_script_beside_the_package_runs_the_same_command(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "qat" / "export-camera.py", "--ckpt", tmp_path / "none.pth"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error:") and "none.pth: no such file" in done.stderr


def test_a_ptq_checkpoint_gives_int8_and_on_request_fp16_parts(checkpoint, small_config, small_cameras, make_detector):
    from qat.calibrate import calibrate, save_ptq
    from qat.families.bevfusion.frames import random_frame
    from qat.families.bevfusion.settings import pipeline_settings
    from qat.manifest import load_manifest

    detector = make_detector(small_config)
    frame = random_frame(pipeline_settings(small_config), seed=3)
    frame.token = "made up"
    quantized, report = calibrate(detector, [frame], "max")
    path = checkpoint.parent / "ptq.pth"
    save_ptq(path, quantized, detector, {"method": "max", "frames": report.frames})
    assert main(["export-camera", "--ckpt", str(path)]) == 0
    manifest = load_manifest(path.parent / "onnx_int8")
    assert manifest["calibration"]["method"] == "max" and manifest["checkpoint"]["file"] == "ptq.pth"
    assert manifest["parts"]["fuser"]["operators"]["QuantizeLinear"] > 0
    assert main(["export-camera", "--ckpt", str(path), "--fp16"]) == 0
    manifest = load_manifest(path.parent / "onnx_fp16")
    assert manifest["calibration"] is None and "QuantizeLinear" not in manifest["parts"]["fuser"]["operators"]
