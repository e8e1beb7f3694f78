"""The command line: help, exit statuses, launchers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qat.cli import VERBS, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_flag_and_gives_an_example(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert f"bevqat {verb}" in text
    assert re.search(r"examples?:", text)


@pytest.mark.parametrize("verb", VERBS)
def test_examples_use_flags_that_exist(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = capsys.readouterr().out
    usage, example = re.split(r"examples?:", text, maxsplit=1)
    for flag in re.findall(
        r"(--[a-z-]+)", "\n".join(line for line in example.splitlines() if f"bevqat {verb}" in line)
    ):
        assert flag in usage, flag


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("bevqat ")


def test_an_unknown_verb_is_bad_use(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["quantise"])
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["calibrate", "--ckpt", "nowhere.pth", "--config", str(ROOT / "model/camera-tiny/config.yaml")],
            "nowhere.pth: no such file",
        ),
        (["calibrate", "--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["synth", "--out", "x", "--scenes", "0"], "--scenes: found 0"),
        (["synth", "--out", "x", "--scenes", "1", "--native", "big"], "--native: found 'big'"),
        (["synth", "--out", "x", "--scenes", "1", "--splits", "a=b"], "--splits: found 'a=b'"),
        (
            ["train", "--data", "nowhere", "--config", str(ROOT / "model/camera-tiny/config.yaml")],
            "expected ROOT:SPLIT",
        ),
        (["train", "--data", "a:b", "--steps", "0"], "--steps: found 0"),
        (
            ["show", "--data", "nowhere", "--config", str(ROOT / "model/camera-tiny/config.yaml"), "--out", "x.png"],
            "nowhere: no such folder",
        ),
        (["export-camera", "--ckpt", "nowhere.pth"], "nowhere.pth"),
        (["export-camera", "--ckpt", "nowhere.pth", "--frames", "-1"], "--frames: found -1"),
        (["export-camera", "--ckpt", "nowhere.pth", "--version", "x"], "--version: only applies with --data"),
        (["build", "--onnx", "nowhere", "--backend", "openvino"], "nowhere/manifest.json: no such file"),
        (["build", "--onnx", "nowhere", "--backend", "openvino", "--threads", "-1"], "threads: found -1"),
        (["verify", "nowhere"], "nowhere/manifest.json: no such file"),
        (["verify", "nowhere", "--threads", "-1"], "threads: found -1"),
        (["report", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_index_beyond_the_split_is_told(capsys, tmp_path):
    out = tmp_path / "x.png"
    config = str(ROOT / "model/camera-tiny/config.yaml")
    assert (
        main(["show", "--config", config, "--data", str(ROOT / "example-data"), "--index", "999", "--out", str(out)])
        == 2
    )
    assert "keyframes 0 to 55" in capsys.readouterr().err and not out.exists()


def test_show_draws_a_sample_of_example_data(tmp_path):
    from PIL import Image

    out = tmp_path / "x.png"
    config = str(ROOT / "model/camera-tiny/config.yaml")
    assert (
        main(["show", "--config", config, "--data", str(ROOT / "example-data"), "--split", "eval", "--out", str(out)])
        == 0
    )
    assert Image.open(out).size == (3 * 352, 2 * 128)


@pytest.mark.parametrize("script", ["calibrate.py", "export-camera.py", "train.py"])
def test_launchers_run_from_anywhere(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "qat" / script), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "bevqat" in done.stdout


def test_the_runtimes_imports_do_not_bring_torch():
    script = "import sys; import qat.cli, qat.core.geometry, qat.boxes.centerhead; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
