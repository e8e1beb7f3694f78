"""The benchmarks that are cheap on a tiny network run to their end, and refuse bad flags."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper

from qat.boxes.detections import Detections
from tests.messages import says

ROOT = Path(__file__).parents[2]


def run(monkeypatch, name, *flags):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # they take from each other
    spec.loader.exec_module(module)
    return module.main()


def test_calibration_compares_costs_and_errors(monkeypatch, capsys, tmp_path, tiny_config):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_config))
    flags = ("--config", tmp_path / "tiny.yaml", "--frames", 2, "--peer-search", 1)
    assert run(monkeypatch, "calibration", *flags) == 0
    printed = capsys.readouterr().out
    assert "ours / plain:" in printed
    assert "searched 1 of" in printed
    assert "squared rounding error" in printed


def test_calibration_refuses_a_search_of_nothing(monkeypatch, capsys):
    assert run(monkeypatch, "calibration", "--peer-search", "none") == 2
    assert says(capsys.readouterr().err, "error: --peer-search: found 'none'", "expected all or a number above 0")


def test_corrections_measure_every_variant(monkeypatch, capsys, tmp_path, tiny_config, tiny_model):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config))
    torch.save({"state_dict": tiny_model.state_dict()}, tmp_path / "float.pth")
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    flags = ("--ckpt", tmp_path / "float.pth", "--frames", 1)
    assert run(monkeypatch, "corrections", *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = {line[2:40].strip(): float(line.split("│")[2]) for line in lines if line.startswith("│")}
    assert len(figures) == 7 and min(figures.values()) > 0
    assert figures["activations left float"] < figures["equalized inputs (calibrate)"]


def test_flavours_are_timed_beside_quantize_static(monkeypatch, capsys, tmp_path, tiny_config):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_config))
    flags = ("--config", tmp_path / "tiny.yaml", "--frames", 3, "--held-out", 1, "--rounds", 2)
    assert run(monkeypatch, "flavours", *flags, "--peers", "quantize_static", "--out", tmp_path / "found.json") == 0
    assert "onnxruntime: ours / quantize_static (goal at most 1.0)" in capsys.readouterr().out
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    layers = {(row["backend"], row["graph"]): row["int8_layers"] for row in rows}
    for backend in ("onnxruntime", "openvino"):
        int8, every = layers[backend, "ours"]
        assert layers[backend, "fp32"][0] == 0 and int8 == every  # the first over the depth map is a product, no layer
        assert layers[backend, "ours, all INT8"] == [every + 1, every + 1]


def test_flavours_need_frames_to_calibrate_on(monkeypatch, capsys, tmp_path, tiny_config):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_config))
    assert run(monkeypatch, "flavours", "--config", tmp_path / "tiny.yaml", "--frames", 2) == 2
    assert capsys.readouterr().err.endswith("error: --frames: found 2, expected more than the 2 that are held out\n")


def test_engine_settings_are_timed_beside_the_default(monkeypatch, capsys, tmp_path):
    linear = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8])],
    )
    onnx.save(helper.make_model(linear, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "g.onnx")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the settings' own processes import from here too
    names = ("not spinning", "parallel branches", "arena shrunk after a run", "bfloat16")
    flags = ("--onnx", tmp_path / "g.onnx", "--rounds", 2, "--repeats", 1, "--pause", 0, "--only", *names)
    assert run(monkeypatch, "engine_settings", *flags, "--out", tmp_path / "found.json") == 0
    rows = {(row["backend"], row["name"]): row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert list(rows) == [
        ("openvino", "default"),
        ("openvino", "bfloat16"),
        ("onnxruntime", "default"),
        ("onnxruntime", "not spinning"),
        ("onnxruntime", "arena shrunk after a run"),
        ("onnxruntime", "parallel branches"),
    ]
    for (_, name), row in rows.items():
        assert row["ms"] > 0 and row["peak_rss_mb"] > 20 and len(row["rounds_ms"]) == 2
        assert name != "default" or row["ratio"] == 1
    assert "peak RSS MB" in capsys.readouterr().out


def test_engine_settings_refuse_no_rounds(monkeypatch, capsys):
    assert run(monkeypatch, "engine_settings", "--rounds", 0) == 2
    assert says(capsys.readouterr().err, "error: --rounds: found 0", "expected at least 1")


def test_pooling_is_timed_beside_torch_and_the_naive_sum(monkeypatch, capsys, tmp_path, tiny_config):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_config))
    flags = ("--config", tmp_path / "tiny.yaml", "--rounds", 2, "--threads", 2, "--json", tmp_path / "found.json")
    assert run(monkeypatch, "pooling", *flags) == 0
    assert "ours / torch CSR (goal at most 0.5): " in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    errors = {row["name"]: row["max_abs_error"] for row in found["rows"]}
    assert len(errors) == 5 and max(errors.values()) < 1e-5
    assert found["pattern"]["wall_ms"] > 0 and [len(row["seconds"]) for row in found["rows"]] == [2] * 5


def test_pooling_needs_rounds(monkeypatch, capsys):
    assert run(monkeypatch, "pooling", "--rounds", 0) == 2
    assert says(capsys.readouterr().err, "error: --rounds: found 0", "expected at least 1")


def test_mmdet3d_latency_prints_every_row(monkeypatch, capsys, tmp_path):
    from lidar import POINTPILLARS, need_mmdet3d, write_cloud

    need_mmdet3d()
    points = write_cloud(tmp_path / "cloud.bin")
    flags = ("--points", points, "--rounds", 1, "--peers", "quantize_static")
    assert run(monkeypatch, "mmdet3d_latency", POINTPILLARS, *flags) == 0
    printed = capsys.readouterr().out
    rows = (
        "whole, PyTorch",
        "whole, FP32, openvino",
        "FP32, PyTorch",
        "FP32, onnxruntime",
        "INT8, quantize_static, openvino",
    )
    assert all(row in printed for row in (*rows, "INT8, ours, onnxruntime", "INT8, plain QDQ, openvino"))


def test_kept_boxes_are_the_ones_that_were_found(monkeypatch, tmp_path):
    """Also of another convention, whose sizes and headings would be read wrongly; what is there is not computed again."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from kept_boxes import kept_boxes

    boxes = Detections(np.ones((2, 9), np.float32), np.float32([0.5, 0.25]), np.int64([0, 1]), "mmdet3d")
    for frames in ({"a": lambda: boxes}, {"a": lambda: 1 / 0}):
        (found,) = kept_boxes("row", "key", frames, tmp_path).values()
        np.testing.assert_allclose(found.converted("mmdet3d").boxes, boxes.boxes, atol=1e-6)
        np.testing.assert_array_equal(found.scores, boxes.scores)
        np.testing.assert_array_equal(found.labels, boxes.labels)
    with pytest.raises(ZeroDivisionError):
        kept_boxes("row", "another key", frames, tmp_path)
