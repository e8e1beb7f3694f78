"""Exit statuses, and what gets to stdout, stderr and --json."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from qat.cli import VERBS, main
from qat.cli.json_output import plain
from qat.data.synth import SynthOptions, generate

ROOT = Path(__file__).resolve().parents[2]


def python(script, **options):
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, timeout=60, **options)


def test_bevqat_alone_lists_the_verbs_and_is_bad_use(capsys):
    assert main([]) == 2
    told = capsys.readouterr()
    assert not told.out and all(f"\n    {verb}" in told.err for verb in VERBS)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["calibrat"], "unknown verb 'calibrat'; did you mean calibrate?"),
        (["xyzzy"], "unknown verb 'xyzzy'; `bevqat --help` lists them"),
        (["synth", "--out", "x", "--scenes", "1", "--sed", "1"], "unknown: --sed 1; did you mean --seed?"),
        (["inspect", "a", "b"], "unknown: b"),
        (["doctor", "--jsn=x"], "unknown: --jsn=x; did you mean --json?"),
        (["--json", "doctor"], "unknown: --json; did you mean --json?"),
    ],
)
def test_what_is_not_understood_is_status_2_with_what_is_near(words, told, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert not output.out and output.err.splitlines()[-1].endswith(told) and output.err.startswith("usage: bevqat")


def test_json_in_the_place_of_a_folder_is_told_before_the_work(tmp_path, capsys):
    assert main(["calibrate", "--json", str(tmp_path)]) == 2
    assert "--json: found the folder" in capsys.readouterr().err


def test_json_on_stdout_is_alone_though_libraries_and_child_processes_print_there():
    script = """
import argparse, ctypes, os, subprocess
from qat.cli.json_output import emit_json, json_output
with json_output("-"):
    print("for people")
    os.write(1, b"from C\\n")
    ctypes.CDLL(None).printf(b"from C's buffer\\n")
    subprocess.run(["echo", "from a child"])
    emit_json(argparse.Namespace(json="-"), {"a": 1})
print("after")
"""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = python(script, capture_output=True, env=buffered)
    body, after, rest = done.stdout.partition("after\n")
    assert json.loads(body) == {"a": 1} and after and not rest, done
    assert all(line in done.stderr for line in ("for people", "from C", "from C's buffer", "from a child"))


def test_json_values_are_plain_and_what_is_not_finite_is_null():
    found = plain({"p": Path("a/b"), "n": float("nan"), "i": np.int64(3), "f": np.float32(0.5), "t": (1, {2})})
    assert found == {"p": "a/b", "n": None, "i": 3, "f": 0.5, "t": [1, [2]]}
    json.dumps(found, allow_nan=False)
    with pytest.raises(TypeError):
        plain({"x": object()})


@pytest.mark.parametrize("words", ["['completion', 'bash']", "['completion', 'fish']"])
def test_a_reader_that_is_gone_ends_the_command_quietly(words):
    read, write = os.pipe()
    os.close(read)
    done = python(
        f"import sys; from qat.cli import main; sys.exit(main({words}))", stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_table_tells_of_a_reader_that_is_gone():
    """rich by itself would end the process with status 1, which means that checks failed."""
    read, write = os.pipe()
    os.close(read)
    script = """
import sys
from qat.cli.pipes import reader_gone
from qat.core.console import results_console
try:
    results_console().print("x")
except BrokenPipeError:
    sys.exit(7 if reader_gone() else 8)
"""
    assert python(script, stdout=write).returncode == 7
    os.close(write)


@pytest.mark.parametrize(
    ("package", "words"),
    [("torch", "['calibrate']"), ("numpy", "['build', '--help']"), ("shtab", "['completion', 'bash']")],
)
def test_a_package_that_is_not_installed_is_one_line(package, words):
    script = f"import sys; sys.modules[{package!r}] = None; from qat.cli import main; sys.exit(main({words}))"
    done = python(script, capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: the package {package} is not installed; fix by: ")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    options = SynthOptions(scenes=1, seed=5, keyframes=2, width=192, height=128, azimuths=60, sweeps=0, splits={"a": 1})
    return generate(tmp_path_factory.mktemp("cli") / "set", options)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_config, make_tiny_model):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.yaml").write_text(yaml.safe_dump(tiny_config))
    torch.save({"state_dict": make_tiny_model().state_dict()}, folder / "float.pth")
    return folder


@pytest.fixture(scope="module")
def ptq(files, data):
    out = files / "ptq.pth"
    words = ["--config", files / "config.yaml", "--ckpt", files / "float.pth", "--data", data, "--split", "a"]
    assert main(["calibrate", *map(str, words), "--out", str(out), "--json", str(files / "calibrate.json")]) == 0
    return out


@pytest.fixture
def run(capfd):
    """Runs a verb; its status, what it says to people and, of --json -, the result."""

    def run(*words):
        capfd.readouterr()
        status = main([*map(str, words)])
        told = capfd.readouterr()
        assert "\x1b" not in told.out + told.err, "escape codes where nothing is a terminal"
        assert "\r" not in told.out + told.err, "a bar where nothing is a terminal"
        return status, told

    return run


def test_calibrate_tells_a_script_what_it_tells_people(ptq, files):
    found = json.loads((files / "calibrate.json").read_text())
    assert {"out", "method", "frames", "int8_share_of_macs", "quantizers", "parts", "float", "warnings"} <= set(found)
    assert found["out"] == str(ptq) and found["frames"] == 2
    assert found["warnings"][-1].startswith("2 frames are few")
    assert sum(part["quantizers"] for part in found["parts"].values()) == found["quantizers"] > 0
    assert found["parts"]["vtransform"]["off"]


def test_inspect_by_itself_by_ckpt_and_as_json(ptq, run):
    by_itself, by_flag = run("inspect", ptq)[1].out, run("inspect", "--ckpt", ptq)[1].out
    assert by_itself == by_flag and "activations" in by_itself
    assert max(map(len, by_itself.splitlines())) <= 160
    status, told = run("inspect", ptq, "--json", "-")
    assert status == 0 and {"recipe", "groups", "layers", "floats"} == set(json.loads(told.out))
    assert by_itself == told.err


def test_health_exits_with_1_and_says_so_in_json_where_a_layer_is_not_finite(files, data, run, tmp_path):
    words = ("--data", data, "--split", "a", "--frames", "1", "--config", files / "config.yaml", "--json", "-")
    status, told = run("health", files / "float.pth", *words)
    found = json.loads(told.out)
    assert status == 0 and found["passed"] and found["first"] is None and found["frames"] == 1
    checkpoint = torch.load(files / "float.pth", weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if name.endswith("layer1.0.conv1.weight"))
    checkpoint["state_dict"][name][0] = float("inf")
    torch.save(checkpoint, tmp_path / "broken.pth")
    status, told = run("health", "--ckpt", tmp_path / "broken.pth", *words)
    found = json.loads(told.out)
    assert status == 1 and not found["passed"] and "layer1" in found["first"]["where"]


def test_export_build_and_verify_tell_a_script_where_and_whether(ptq, run, tmp_path):
    out, engines = tmp_path / "onnx", tmp_path / "engines"
    words = (
        "--ckpt",
        ptq,
        "--precision",
        "fp32",
        "--parts",
        "camera.backbone",
        "camera.vtransform",
        "fuser",
        "head.bbox",
    )
    status, told = run("export-camera", *words, "--frames", 0, "--out", out, "--json", "-")
    found = json.loads(told.out)
    assert status == 0 and found["passed"] and found["out"] == str(out)
    assert found["manifest"] == json.loads((out / "manifest.json").read_text())
    status, told = run("verify", "--onnx", out, "--parts", "fuser", "--json", tmp_path / "found.json")
    assert status == 0 and told.out.splitlines()[-1] == str(tmp_path / "found.json")
    assert list(json.loads((tmp_path / "found.json").read_text())["parts"]) == ["fuser"]
    status, told = run("build", "--onnx", out, "--backend", "onnxruntime", "--out", engines, "--json", "-")
    assert status == 0 and json.loads(told.out)["manifest"]["engine"]["backend"] == "onnxruntime"
    (out / "fuser.onnx").write_bytes(b"changed")
    status, told = run("verify", out, "--parts", "fuser", "--json", "-")
    assert status == 1 and json.loads(told.out)["passed"] is False and "error: fuser.onnx" in told.err


def test_a_refusal_leaves_stdout_empty(run):
    status, told = run("inspect", "nowhere.pth", "--json", "-")
    assert status == 2 and told.out == "" and told.err.startswith("error: nowhere.pth")


def test_train_takes_a_split_for_all_its_data(files, data, run, tmp_path):
    words = ("--config", files / "config.yaml", "--data", data, "--split", "a", "--stage", "image", "--steps", 1)
    status, told = run("train", *words, "--batch", 1, "--out", tmp_path / "run", "--json", "-")
    found = json.loads(told.out)
    assert status == 0 and found == {"out": str(tmp_path / "run" / "model.pth"), "steps": 1, "metrics": None}
