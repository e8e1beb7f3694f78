"""A small detector through every row: results.json, what it means, resuming, refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from qat.calibrate import load_ptq
from qat.cli import main
from qat.compare import CompareOptions, Sources, compare
from qat.compare.demo import demo
from qat.compare.rows import Row, load_rows
from qat.core.command import running
from qat.core.errors import UserError
from qat.core.files import sha256
from qat.core.tensors import compare_tensors
from qat.data import NuScenesDataset
from qat.data.synth import SynthOptions, generate
from qat.engine import Options
from qat.export import torch_parts
from qat.export.checkpoint import export_checkpoint
from qat.export.options import ExportOptions
from qat.lean.modes import quantizers
from qat.model.opening import Source
from qat.report import check_results
from qat.runtime import Pipeline
from tests.messages import refused


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = SynthOptions(
        scenes=6, keyframes=1, width=96, height=64, azimuths=60, sweeps=0, splits={"calib": 3, "eval": 3}
    )
    return generate(tmp_path_factory.mktemp("data") / "streets", options, quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, make_config, make_detector) -> Path:
    """A model's folder: config.yaml and a checkpoint of its name."""
    config = make_config()
    config["data"]["test"]["pipeline"][0]["resize_lim"] = [1.0, 1.0]
    folder = tmp_path_factory.mktemp("models") / "small"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save({"state_dict": make_detector(config).state_dict()}, folder / "small.pth")
    return folder


@pytest.fixture(scope="module")
def demonstration(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("runs") / "demo"
    said: list[str] = []
    with running(["demo", "--out", "runs/demo"]):
        result = demo(model, data, out, rounds=2, say=said.append)
    return out, result, said


def _sources(model: Path, out: Path, **changes) -> Sources:
    values = {
        "ckpt": model / "small.pth",
        "ptq": out / "ptq.pth",
        "fp32": [out / "onnx_fp32"],
        "int8": [out / "onnx_int8", out / "onnx_int8_openvino", out / "onnx_int8_onnxruntime"],
    }
    return Sources(**{**values, **changes})


def test_demo_leaves_results_and_a_report_of_every_row(demonstration) -> None:
    out, result, said = demonstration
    results = check_results(json.loads((out / "results.json").read_text()))
    assert result.verified
    assert len(said) == 8
    assert [(row["backend"], row["precision"], row["flavour"]) for row in results["rows"]] == [
        ("pytorch", "fp32", "float"), ("pytorch", "int8-fake", "tensorrt"), ("pytorch", "int8-fake", "openvino"),
        ("pytorch", "int8-fake", "onnxruntime"), ("openvino", "fp32", "tensorrt"), ("openvino", "int8", "openvino"),
        ("onnxruntime", "fp32", "tensorrt"), ("onnxruntime", "int8", "onnxruntime"),
    ]  # fmt: skip
    assert results["model"] == "small"
    assert results["dataset"]["samples"] == 3
    assert results["dataset"]["split"] == "eval"
    assert "<h1>" in (out / "report.html").read_text()
    assert result.comparison.report_file == out / "report.html"


def test_fp32_engines_agree_with_pytorch_and_int8_with_its_simulation(demonstration) -> None:
    rows = demonstration[1].comparison.results["rows"]
    reference = rows[0]
    simulated = {row["flavour"]: row for row in rows if row["precision"] == "int8-fake"}
    for row in rows:
        if row["precision"] == "fp32":
            assert min(row["sqnr_db"].values()) > 70
            assert row["map"] == pytest.approx(reference["map"], abs=1e-6)
        else:
            assert 5 < row["sqnr_db"]["heads"] < 60
            expected = simulated[row["flavour"]]["sqnr_db"]["camera_feature"]
            assert row["sqnr_db"]["camera_feature"] == pytest.approx(expected, abs=1.5)


def test_every_row_but_the_reference_has_intervals_of_its_difference(demonstration) -> None:
    results = demonstration[1].comparison.results
    reference, *others = results["rows"]
    assert "change" not in reference
    for row in others:
        for metric in ("map", "nds"):
            interval = row["change"][metric]
            assert interval["difference"] == pytest.approx(row[metric] - reference[metric], abs=1e-6)
            assert interval["low"] <= interval["high"]
    assert results["measurement"]["resamples"] == 1000


def test_latency_and_speed_up_are_of_the_same_backend(demonstration) -> None:
    rows = demonstration[1].comparison.results["rows"]
    for row in rows:
        own = next(r for r in rows if r["backend"] == row["backend"] and r["precision"] == "fp32")
        if row["precision"] == "int8-fake":
            assert row["latency_ms"]["samples"] == 1 and row["speedup_vs_fp32"] is None
            continue
        assert row["latency_ms"]["samples"] == 4
        assert row["latency_ms"]["median"] <= row["latency_ms"]["p99"]
        ratio = own["latency_ms"]["median"] / row["latency_ms"]["median"]
        assert row["speedup_vs_fp32"] == pytest.approx(ratio, rel=1e-3)
        assert set(row["stages_ms"]) >= {"camera.backbone", "pooling", "fuser", "head.bbox", "decode"}


def test_sqnr_equals_the_one_of_all_keyframes_put_together(demonstration, data: Path, model: Path) -> None:
    out, result, _ = demonstration
    dataset = NuScenesDataset(data, "eval", yaml.safe_load((model / "config.yaml").read_text()))
    tensors = {}
    for precision, folder in (("fp32", "onnx_fp32"), ("int8", "onnx_int8_onnxruntime")):
        pipeline = Pipeline.load(out / folder, "onnxruntime", precision)
        tensors[precision] = np.concatenate([pipeline.forward(sample)["middle"] for sample in dataset])
    expected = compare_tensors(tensors["fp32"], tensors["int8"])["sqnr_db"]
    row = result.comparison.results["rows"][7]
    assert row["sqnr_db"]["middle"] == pytest.approx(expected, abs=0.05)


def test_the_files_and_their_hashes_are_recorded(demonstration, model: Path) -> None:
    out, result, _ = demonstration
    provenance = result.comparison.results["provenance"]
    hashes = {entry["file"]: entry["sha256"] for entry in provenance["files"]}
    assert hashes["small.pth"] == sha256(model / "small.pth")
    assert hashes["onnx_int8/fuser.onnx"] == sha256(out / "onnx_int8" / "fuser.onnx")
    assert provenance["calibration"]["frames"] == 3
    assert provenance["versions"]["torch"] == torch.__version__


def test_every_artifacts_command_and_the_data_sets_tables_are_recorded(demonstration, data: Path) -> None:
    provenance = demonstration[1].comparison.results["provenance"]
    folders = ["onnx_fp32", "onnx_int8", "onnx_int8_openvino", "onnx_int8_onnxruntime"]
    assert [entry["what"] for entry in provenance["commands"]] == ["ptq.pth", *folders, "sensitivity", "these results"]
    assert {entry["command"] for entry in provenance["commands"]} == {"bevqat demo --out runs/demo"}
    assert not any("versions" in entry for entry in provenance["commands"])  # the same as in this process
    assert "made" not in provenance["calibration"]
    entry = provenance["files"][-1]
    assert entry["file"] == "streets/v1.0-synth/*.json"
    printed = subprocess.run("sha256sum *.json | sha256sum", shell=True, cwd=data / "v1.0-synth", capture_output=True,
                             text=True, check=True, env={**os.environ, "LC_ALL": "C"}).stdout  # fmt: skip
    assert entry["sha256"] == printed.split()[0]


def test_the_sensitivity_of_the_compared_checkpoint_is_in_the_results(demonstration) -> None:
    out, result, _ = demonstration
    section = result.comparison.results["sensitivity"]
    measured = json.loads((out / "sensitivity.json").read_text())
    assert section["checkpoint"] == {"file": "ptq.pth", "sha256": sha256(out / "ptq.pth")}
    assert section["units"] == measured["units"][:20] and section["units_in_all"] == len(measured["units"]) > 20
    assert section["histograms"] == measured["histograms"] and len(section["histograms"]) == 8
    assert sum(group["macs_share"] for group in section["floats"]) > 0
    assert "Accuracy loss by layer" in (out / "report.html").read_text()


def _simulated(model: Path, out: Path, **changes) -> list[Row]:
    rows, _ = load_rows(_sources(model, out, config=model / "config.yaml", **changes), (), Options())
    return [row for row in rows if row.simulated]


def test_a_simulated_row_computes_in_its_flavour(demonstration, data: Path, model: Path) -> None:
    out = demonstration[0]
    quantized, _ = load_ptq(out / "ptq.pth")
    quantized.to(memory_format=torch.channels_last)
    sample = NuScenesDataset(data, "eval", quantized.config)[0]
    rows = _simulated(model, out)
    assert [row.flavour for row in rows] == ["tensorrt", "openvino", "onnxruntime"]
    maps = []
    for row in rows:
        with quantized.in_flavour(row.flavour):
            expected = Pipeline(torch_parts(quantized), row.pipeline.settings).forward(sample)
        found = row.pipeline.forward(sample)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
        maps.append(found["middle"])
    assert np.abs(maps[0] - maps[1]).max() > 1e-3


def test_flavours_that_round_alike_share_a_detector_and_what_it_finds(
    demonstration, model: Path, tmp_path: Path
) -> None:
    out = demonstration[0]
    export_checkpoint(Source(out / "ptq.pth"), ExportOptions("int8", "tensorrt-strong"), tmp_path / "strong")
    folders = [out / "onnx_int8", tmp_path / "strong", out / "onnx_int8_openvino"]
    tensorrt, strong, openvino = _simulated(model, out, int8=folders)
    assert tensorrt.pipeline is strong.pipeline and tensorrt.key == strong.key
    assert tensorrt.pipeline is not openvino.pipeline and tensorrt.key != openvino.key


def test_without_int8_folders_the_default_flavour_is_simulated(demonstration, model: Path) -> None:
    out = demonstration[0]
    (row,) = _simulated(model, out, int8=[])
    assert row.flavour == "tensorrt"
    assert row.key == _simulated(model, out)[0].key


def test_parts_that_the_folder_has_in_int8_are_simulated_so(demonstration, model: Path, tmp_path: Path) -> None:
    out = demonstration[0]
    _, manifest = export_checkpoint(
        Source(out / "ptq.pth"), ExportOptions("int8", parts_int8=["vtransform"]), tmp_path / "more"
    )
    assert manifest["parts"]["camera.vtransform"]["precision"] == "int8"
    usual, more = _simulated(model, out, int8=[out / "onnx_int8", tmp_path / "more"])
    assert usual.flavour == more.flavour == "tensorrt" and usual.key != more.key
    assert [_on(row) for row in (usual, more)] == [False, True]


def _on(row: Row) -> bool:
    """Whether the view transform's part is rounded."""
    return any(
        not quantizer._disabled
        for quantizer in quantizers(row.pipeline.parts["camera.vtransform"].wrapper.core).values()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["checkpoint"].update(sha256="0" * 64), r"measured on a checkpoint with sha256 000000000000…"),
        (lambda s: s.pop("units"), r"units: missing, expected a list; run `bevqat sensitivity .*ptq\.pth` again"),
        (lambda s: s["histograms"][0].update(amax=-1), r"histograms\[0\]\.amax: found -1"),
    ],
)
def test_a_sensitivity_that_does_not_fit_is_refused_before_the_work(
    demonstration, data: Path, model: Path, tmp_path: Path, change, message: str
) -> None:
    out = demonstration[0]
    measured = json.loads((out / "sensitivity.json").read_text())
    change(measured)
    file = tmp_path / "sensitivity.json"
    file.write_text(json.dumps(measured))
    sources = _sources(model, out, config=model / "config.yaml")
    with pytest.raises(UserError, match=message):
        compare(CompareOptions(sources, data, tmp_path / "out", sensitivity=file))
    with pytest.raises(UserError, match="--sensitivity: found no --ptq"):
        compare(CompareOptions(_sources(model, out, ptq=None), data, tmp_path / "out", sensitivity=file))
    assert not (tmp_path / "out").exists()


def test_a_second_run_takes_accuracy_from_the_first_and_gives_the_same(
    demonstration, data: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, result, _ = demonstration
    shutil.copytree(out / "cache", tmp_path / "cache")
    # Those of the sensitivity, which lie there too, have the measurement's name before the keyframe's.
    lost = sorted(file for file in (tmp_path / "cache").iterdir() if "-" not in file.stem)[0]
    lost.unlink()
    ran = []
    forward = Pipeline.forward
    monkeypatch.setattr(Pipeline, "forward", lambda self, sample: ran.append(sample.token) or forward(self, sample))
    sources = _sources(model, out, config=model / "config.yaml")
    again = compare(CompareOptions(sources, data, tmp_path, rounds=1, repeats=1, pictures=0))
    # The keyframe whose cache was lost, through every row; what is timed does not come by here.
    assert len(ran) == 8
    assert lost.exists()
    for before, after in zip(result.comparison.results["rows"], again.results["rows"], strict=True):
        assert {key: before[key] for key in ("map", "nds", "per_class_ap", "sqnr_db")} == {
            key: after[key] for key in ("map", "nds", "per_class_ap", "sqnr_db")
        }


def test_files_of_another_training_are_refused(demonstration, data: Path, model: Path, tmp_path: Path) -> None:
    out = demonstration[0]
    other = tmp_path / "other.pth"
    state = torch.load(model / "small.pth", weights_only=True)["state_dict"]
    torch.save({"state_dict": {name: value + 0 for name, value in state.items()}, "meta": {"run": 2}}, other)
    with refused("ptq.pth: calibrated from a checkpoint with sha256", "calibrate again"):
        compare(CompareOptions(_sources(model, out, ckpt=other, config=model / "config.yaml"), data, tmp_path))
    with refused("onnx_fp32: exported from ptq.pth with sha256", "export again"):
        sources = _sources(model, out, ckpt=other, ptq=None, config=model / "config.yaml")
        compare(CompareOptions(sources, data, tmp_path))
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds: found 0, expected at least 1"),
        (["--backends", "openvino,tpu"], "--backends: found 'tpu', expected some of openvino,"),
        (["--ckpt", "none.pth"], "none.pth: no such file"),
        (["--fp32", "nowhere"], "nowhere/manifest.json: no such file"),
        (["--split", "fit"], "split 'fit' not found; there is calib, eval, all"),
        (["--frames", "9"], "--frames: found 9"),
    ],
)
def test_bad_use_is_one_line_and_status_2(
    flags: list[str], message: str, data: Path, model: Path, tmp_path: Path, capsys
) -> None:
    given = ["--ckpt", str(model / "small.pth"), "--data", str(data), "--out", str(tmp_path / "out"), "--backends", ""]
    assert main(["compare", *given, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not (tmp_path / "out" / "results.json").exists()
