"""`bevqat benchmark` over a tiny exported detector; no time is asserted."""

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from qat.benchmark.plan import asked_backends, plan
from qat.benchmark.worker import Worker
from qat.cli import main
from qat.cli.benchmark import add_arguments
from qat.cli.engine_flags import engine_options
from qat.core.errors import UserError
from qat.families.bevfusion.inputs import made_up, native_size, recorded
from qat.manifest import load_manifest
from tests.messages import refused

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["camera.backbone", "camera.vtransform", "fuser", "head.bbox"]
ABSENT = ("torch", "torchvision", "timm", "onnx", "yaml", "nuscenes", "pytorch_quantization", "matplotlib")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, exported_fp32):
    """A folder with the three results of a short run on both CPU backends."""
    out = tmp_path_factory.mktemp("measured")
    flags = ["--onnx", exported_fp32, "--rounds", 2, "--repeats", 2, "--frames", 2, "--threads", 1, "--out", out]
    assert main(["benchmark", *map(str, flags)]) == 0
    return out


@pytest.fixture
def results(measured):
    return json.loads((measured / "benchmark.json").read_text())


def test_every_row_has_every_part_and_stage(results, exported_fp32):
    assert [row["name"] for row in results["rows"]] == ["openvino fp32", "onnxruntime fp32"]
    for row in results["rows"]:
        assert set(row["sections"]) == {
            *("end to end", "preprocess", "depth", "pattern", "pooling", "decode", "pattern rebuild"),
            *PARTS,
        }
        for name, section in row["sections"].items():
            assert [len(times) for times in section["rounds_ms"]] == ([1, 1] if name == "pattern rebuild" else [2, 2])
            assert section["latency_ms"]["samples"] == sum(map(len, section["rounds_ms"]))
        assert row["memory_peak_mb"] >= row["memory_resident_mb"] > row["memory_before_mb"] > 10
        assert row["ends_with"] == "boxes" and row["warm_up"]["runs"] >= 10
    size = sum((exported_fp32 / f"{name}.onnx").stat().st_size for name in PARTS) / 1e6
    for row in results["rows"]:
        if row["size_of"] == "onnx file":
            assert row["sections"]["end to end"]["size_mb"] == pytest.approx(size, abs=1e-3)


def test_stages_fill_the_whole(results):
    for row in results["rows"]:
        sections = row["sections"]
        for turn in range(2):
            for sample in range(2):
                stages = sum(
                    section["rounds_ms"][turn][sample]
                    for name, section in sections.items()
                    if name not in ("end to end", "pattern rebuild")
                )
                assert 0 < stages <= sections["end to end"]["rounds_ms"][turn][sample] + 1e-2


def test_speed_ups_are_ratios_of_medians(results):
    medians = {
        row["backend"]: {name: s["latency_ms"]["median"] for name, s in row["sections"].items()}
        for row in results["rows"]
    }
    for row in results["rows"]:
        for name in ("end to end", *PARTS):
            section, own = row["sections"][name], medians[row["backend"]][name]
            assert section["speedup_vs_fp32"] == 1
            best = min(by[name] for by in medians.values())
            assert section["speedup_vs_best_fp32"] == pytest.approx(best / own, abs=1e-3)


def test_the_csv_says_what_the_json_says(measured, results):
    with (measured / "benchmark.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == sum(len(row["sections"]) for row in results["rows"])
    for line in lines:
        row = next(row for row in results["rows"] if row["name"] == line["row"])
        section = row["sections"][line["section"]]
        for key in ("median", "p90", "p99", "mean"):
            assert float(line[f"{key}_ms"]) == section["latency_ms"][key]
        assert int(line["samples"]) == section["latency_ms"]["samples"]
        assert int(line["outliers"]) == section["latency_ms"]["outliers"]["count"]
        for key in ("per_second", "transfer_ms", "speedup_vs_fp32", "speedup_vs_best_fp32", "size_mb"):
            assert line[key] == ("" if section.get(key) is None else str(section[key]))
        assert line["memory_peak_mb"] == (str(row["memory_peak_mb"]) if line["section"] == "end to end" else "")


def test_the_picture_is_well_formed_and_names_every_row(measured, results):
    picture = ElementTree.fromstring((measured / "benchmark.svg").read_text())
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {row["name"] for row in results["rows"]} <= set(texts)
    assert "camera.backbone" in texts


def test_the_machine_is_written_down(results):
    machine = results["machine"]
    assert machine["cpu"] and machine["threads"] == 1 and machine["cores"] >= 1
    assert set(machine["load"]) == {"before", "after"}
    assert {"bevqat", "python", "numpy"} <= set(machine["versions"])
    assert {"cpu_flags", "governor", "gpus", "thread_variables", "virtual"} <= set(machine)


def test_a_run_compared_with_itself_has_not_changed(measured, capsys):
    assert main(["benchmark", "--out", str(measured), "--compare", str(measured / "benchmark.json")]) == 0
    assert capsys.readouterr().out.startswith("0 of ")


def test_it_runs_where_only_numpy_and_the_backends_are(tmp_path, exported_fp32):
    """As on a robot: in the command and in the rows' processes nothing else can be imported."""
    for name in ABSENT:
        (tmp_path / "absent").mkdir(exist_ok=True)
        (tmp_path / "absent" / f"{name}.py").write_text(
            f"raise ModuleNotFoundError('No module named {name}', name='{name}')"
        )
    flags = ["--onnx", exported_fp32, "--backends", "onnxruntime", "--rounds", 1, "--repeats", 1, "--threads", 1]
    done = subprocess.run(
        [sys.executable, ROOT / "qat" / "benchmark.py", *map(str, flags), "--out", tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'absent'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]
    assert rows[0]["name"] == "onnxruntime fp32"


def test_an_interrupted_run_leaves_the_earlier_results(tmp_path, exported_fp32, monkeypatch, capsys):
    (tmp_path / "benchmark.json").write_text("earlier")
    ask = Worker.ask

    def interrupted(self, method, *values):
        if method == "turn":
            raise KeyboardInterrupt
        return ask(self, method, *values)

    monkeypatch.setattr(Worker, "ask", interrupted)
    flags = ["--onnx", str(exported_fp32), "--backends", "onnxruntime", "--threads", "1", "--out", str(tmp_path)]
    assert main(["benchmark", *flags]) == 130
    assert f"interrupted; {tmp_path / 'benchmark.json'} is unchanged" in capsys.readouterr().err
    assert (tmp_path / "benchmark.json").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]
    assert not multiprocessing.active_children()


@pytest.fixture
def folders(tmp_path, exported_fp32):
    """name → a copy of the parts whose manifest says another precision, flavour or engine."""

    def make(name, **changes):
        folder = shutil.copytree(exported_fp32, tmp_path / name)
        manifest = json.loads((folder / "manifest.json").read_text()) | changes
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return make


def test_each_backend_gets_its_own_flavour_and_what_has_none(folders):
    chosen = [
        folders("fp32"),
        folders("int8", precision="int8"),
        folders("int8_openvino", precision="int8", flavour="openvino"),
    ]
    rows, skipped = plan(chosen, ["openvino", "onnxruntime"])
    assert [(row.name, row.folder.name) for row in rows] == [
        ("openvino fp32", "fp32"),
        ("openvino int8", "int8_openvino"),
        ("onnxruntime fp32", "fp32"),
        ("onnxruntime int8", "int8"),
    ]
    assert [s["name"] for s in skipped] == ["int8 on openvino", "int8_openvino on onnxruntime"]


def test_rows_that_differ_in_the_folder_alone_are_named_after_it(folders):
    rows, _ = plan([folders("one"), folders("two")], ["openvino"])
    assert [row.name for row in rows] == ["openvino fp32 (one)", "openvino fp32 (two)"]


@pytest.fixture
def engines_of(folders, exported_fp32):
    """(backend, precision, options, more of the section) → a folder whose manifest says that it holds engines."""

    def make(backend, precision, options=None, **more):
        noted = dict.fromkeys(("version", "device", "device_fingerprint"), "here")
        noted |= {"backend": backend, "precision": precision, "options": options or {}, **more}
        parts = json.loads((exported_fp32 / "manifest.json").read_text())["parts"]
        parts = {name: {**part, "built_for": precision, "onnx": part} for name, part in parts.items()}
        return folders("engines", format_of_parts="engine", engine=noted, parts=parts)

    return make


def test_flags_of_a_backend_that_engines_were_built_for_are_taken(engines_of, exported_fp32, tmp_path):
    built = engines_of("tensorrt", "int8")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--onnx", str(built), "--plugins", __file__])
    backends = asked_backends(args.onnx, None)
    assert backends == ["openvino", "onnxruntime", "tensorrt"]
    assert engine_options(args, backends).tensorrt.plugins == (Path(__file__),)
    with pytest.raises(UserError, match="expected tensorrt for --plugins"):
        engine_options(args, asked_backends([exported_fp32], None))


def test_a_damaged_section_of_engines_is_refused(engines_of):
    with refused("engines/manifest.json: engine: options", "found 'none of it'", "expected a section"):
        plan([engines_of("openvino", "fp32", "none of it")], None)


def test_engines_run_where_they_were_built_for(engines_of):
    built = engines_of("onnxruntime", "fp16")
    rows, skipped = plan([built], None)
    assert [(row.name, row.built) for row in rows] == [("onnxruntime fp16 built", True)]
    assert skipped == [{"name": "engines on openvino", "why": "engines of onnxruntime"}]
    with pytest.raises(UserError, match="found nothing to run, expected a folder for openvino"):
        plan([built], ["openvino"])


def test_a_row_that_a_backend_refuses_is_left_out_and_told(folders, tmp_path, capsys):
    half = folders("fp16", precision="fp16")
    manifest = json.loads((half / "manifest.json").read_text())
    for part in manifest["parts"].values():
        part["precision"] = "fp16"
    (half / "manifest.json").write_text(json.dumps(manifest))
    flags = ["--onnx", half, "--backends", "onnxruntime", "--threads", 1, "--out", tmp_path / "out"]
    assert main(["benchmark", *map(str, flags)]) == 2
    assert "takes no precision flag" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_row_that_fails_in_its_warm_up_is_left_out_and_the_others_go_on(exported_fp32, tmp_path, monkeypatch):
    ask = Worker.ask

    def failing(self, method, *values):
        if method == "warm_up" and self.name.startswith("openvino"):
            raise UserError("openvino fp32: its process ended")
        return ask(self, method, *values)

    monkeypatch.setattr(Worker, "ask", failing)
    flags = ["--onnx", exported_fp32, "--rounds", 1, "--repeats", 1, "--threads", 1, "--out", tmp_path]
    assert main(["benchmark", *map(str, flags)]) == 0
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["onnxruntime fp32"]
    assert results["skipped"] == [{"name": "openvino fp32", "why": "openvino fp32: its process ended"}]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--onnx", "FOLDER", "--backends", "onnxruntime", "--bfloat16"], "found onnxruntime, expected openvino for"),
        (["--onnx", "nowhere"], "nowhere/manifest.json: no such file"),
        (["--onnx", "FOLDER", "--rounds", "0"], "--rounds: found 0, expected at least 1"),
        (["--onnx", "FOLDER", "--threads", "-1"], "threads: found -1"),
        (["--onnx", "FOLDER", "--backends", "abacus"], "backend: found 'abacus'"),
        (["--onnx", "FOLDER", "--split", "eval"], "add --data ROOT"),
        (["--onnx", "FOLDER", "--threshold", "0.1"], "add --compare OLD.json"),
        (["--onnx", "FOLDER", "--compare", "nowhere.json"], "nowhere.json: cannot be read"),
        ([], "--onnx: found none"),
    ],
)
def test_bad_flags_are_one_line(flags, message, exported_fp32, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *(str(exported_fp32) if flag == "FOLDER" else flag for flag in flags)]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


class _Crashing:
    """Ends its process at once, as the kernel ends one that uses up the memory."""

    def die(self):
        os.kill(os.getpid(), 9)


def test_a_row_whose_process_dies_is_told():
    worker = Worker("openvino fp32", _Crashing)
    worker.described()
    with refused("openvino fp32: its process ended with status -9 (killed:", "memory"):
        worker.ask("die")
    worker.close()


def test_a_rows_process_does_not_run_the_command_again(tmp_path):
    """What a script imports at its top is not in its rows' memory."""
    script = tmp_path / "script.py"
    script.write_text(
        "print('imported')\n"
        "from qat.benchmark.worker import Worker\n"
        "if __name__ == '__main__':\n"
        "    worker = Worker('a', dict)\n"
        "    worker.described()\n"
        "    worker.close()\n"
    )
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr


def test_made_up_frames_are_the_same_each_time_and_not_flat(exported_fp32):
    settings = load_manifest(exported_fp32)["pipeline"]
    first, again = (made_up(settings, 2) for _ in range(2))
    height, width = native_size(settings)
    assert (height, width) == (128, 192)
    for a, b in zip(first, again, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True))
        assert np.array_equal(a.points, b.points)
        assert all(image.shape == (height, width, 3) and image.std() > 20 for image in a.images)
    assert not np.array_equal(first[0].points, first[1].points)


def test_every_turn_has_a_camera_geometry_of_its_own(exported_fp32):
    frame = made_up(load_manifest(exported_fp32)["pipeline"], 1)[0]
    places = {frame.moved(n).calibration.camera2lidar.tobytes() for n in range(50)}
    assert len(places) == 50
    assert np.abs(frame.moved(50).calibration.camera2lidar - frame.calibration.camera2lidar).max() == pytest.approx(
        0.05
    )


def test_recorded_frames_are_those_of_the_data_set(exported_fp32):
    settings = load_manifest(exported_fp32)["pipeline"] | {"cameras": ["CAM_FRONT", "CAM_BACK"]}
    frames = recorded(settings, ROOT / "example-data", "eval", None, 2)
    assert len({frame.name for frame in frames}) == 2
    for frame in frames:
        assert len(frame.images) == 2 and frame.images[0].dtype == np.uint8
        assert frame.points.shape[0] > 1000 and frame.calibration.camera2lidar.shape == (2, 4, 4)
    with pytest.raises(UserError, match="--frames: found 9999"):
        recorded(settings, ROOT / "example-data", "eval", None, 9999)
