"""Hundreds of frames in one process, thousands by night, leave its memory, threads and files as they were, and change no result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOAK = ROOT / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def int8(tmp_path_factory, make_detector, fresh_config, small_cameras):
    """A folder of the small detector's INT8 parts for ONNX Runtime."""
    from qat.export import ExportOptions, export_parts
    from qat.model.quantized import QuantizedModel

    quantized = QuantizedModel(make_detector(fresh_config()))
    for module in quantized.activation_quantizers().values():
        module.set_range(torch.tensor(4.0))
    folder = tmp_path_factory.mktemp("soak") / "int8"
    export_parts(quantized, folder, ExportOptions("int8", flavour="onnxruntime"))
    return folder


def soak(tmp_path, folder, backend, frames):
    out = tmp_path / "soak.json"
    command = [sys.executable, str(SOAK), "--onnx", str(folder), "--backend", backend, "--threads", "1"]
    done = subprocess.run(
        [*command, "--frames", str(frames), "--json", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())[0]


def check(run, frames):
    assert run["frames"] == frames and run["differing"] == 0
    assert run["growth_mb"] <= 20
    assert run["threads"][1] <= run["threads"][0] and run["files"][1] <= run["files"][0]
    assert run["boxes"] > 20  # or equal results would say nothing
    assert run["patterns"] > frames / 2  # the cache of patterns turned over all the time


FEW_AND_MANY = [400, pytest.param(2000, marks=pytest.mark.nightly)]


@pytest.mark.parametrize("frames", FEW_AND_MANY)
def test_int8_frames_on_onnx_runtime_leave_memory_and_results_as_they_were(tmp_path, int8, frames):
    check(soak(tmp_path, int8, "onnxruntime", frames), frames)


@pytest.mark.parametrize("frames", FEW_AND_MANY)
def test_fp32_frames_on_openvino_leave_memory_and_results_as_they_were(tmp_path, exported_fp32, frames):
    check(soak(tmp_path, exported_fp32, "openvino", frames), frames)


def test_what_grows_or_differs_is_said():
    sys.path.insert(0, str(SOAK.parent))
    try:
        from soak import Soak
    finally:
        sys.path.remove(str(SOAK.parent))
    fine = Soak("f", "openvino", "fp32", 2000, 200.0, 20.0, (2, 2), (5, 5), 0, 40, 2000, 9.0)
    assert fine.problems(20.0) == []
    bad = Soak("f", "openvino", "fp32", 2000, 200.0, 20.5, (2, 3), (5, 9), 7, 40, 2000, 9.0)
    assert bad.problems(20.0) == [
        "memory rose by 20.5 MB, expected at most 20",
        "threads rose from 2 to 3",
        "open files rose from 5 to 9",
        "7 results differ from those of the first time",
    ]
