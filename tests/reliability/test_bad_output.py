"""Outputs that cannot be written, flags that say nothing sensible, the machine's refusals, and Ctrl-C."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qat.cli import main
from qat.cli.failures import one_line_of
from qat.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--rounds", "1", "--repeats", "1"]
MODEL, DATA = ["--config", "config.yaml", "--ckpt", "float.pth"], ["--data", "data"]
WRITING = {
    "calibrate": ["calibrate", *MODEL, *DATA, "--out"],
    "export-camera": ["export-camera", *MODEL, "--frames", "0", "--out"],
    "build": ["build", "--onnx", "fp32", "--backend", "onnxruntime", "--out"],
    "show": ["show", "--config", "config.yaml", *DATA, "--out"],
    "inspect": ["inspect", "ptq.pth", "--json"],
    "verify": ["verify", "fp32", "--part", "fuser", "--json"],
}


@pytest.mark.parametrize("verb", WRITING)
@pytest.mark.parametrize("where", ["under a file", "read-only"])
def test_a_place_that_cannot_be_written(verb, where, work, refused):
    """/proc is read-only for root too."""
    (work / "file").write_text("earlier")
    out = "file/out" if where == "under a file" else "/proc/out/out"
    refused([*WRITING[verb], out], out)


@pytest.mark.parametrize("verb", ["calibrate", "show", "inspect", "verify"])
def test_a_folder_where_a_file_is_written(verb, work, refused):
    (work / "folder").mkdir()
    (work / "folder" / "earlier").write_text("earlier")
    refused(
        [*WRITING[verb], "folder"],
        *(("folder: ", "directory") if WRITING[verb][-1] == "--out" else ("the folder folder",)),
    )


def test_a_file_where_a_folder_is_written(work, refused):
    (work / "file").write_text("earlier")
    refused([*WRITING["build"], "file"], "file: found something other than built engines, expected a new folder")


def _limited(arguments: list[str], size: int, limit: int = resource.RLIMIT_FSIZE) -> subprocess.CompletedProcess[str]:
    """A verb in a forked child whose files cannot grow beyond `size` bytes, as on a full disk: a write gives EFBIG. Or, by
    RLIMIT_NOFILE, with so many descriptors left."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if limit == resource.RLIMIT_NOFILE:  # it bounds their numbers, of which some below the highest are free
            lowest = os.dup(2)
            os.close(lowest)
            size += lowest
        resource.setrlimit(limit, (size, size))
        try:
            status = main(arguments)
        except BaseException as error:
            print(f"Traceback: {error!r}", file=sys.stderr)
            status = 1
        sys.stderr.flush()
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as stream:
        said = stream.read()
    return subprocess.CompletedProcess(arguments, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "", said)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "arguments", [["show", "--config", "config.yaml", "--data", "data", "--out", "out.png"],
                  ["verify", "fp32", "--part", "fuser", "--threads", "1", "--json", "out.json"]]
)  # fmt: skip
def test_a_disk_that_is_full(arguments, work):
    """The earlier result is as it was, and nothing is left beside it."""
    earlier = work / arguments[-1]
    earlier.write_text("earlier")
    before = sorted(path.name for path in work.iterdir())
    done = _limited(arguments, 200)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert os.strerror(errno.EFBIG).lower() in done.stderr.lower()
    assert earlier.read_text() == "earlier"
    assert sorted(path.name for path in work.iterdir()) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("verb", ["calibrate"])
def test_too_few_open_files(verb, work):
    before = sorted(path.name for path in work.iterdir())
    done = _limited([*WRITING[verb], "out"], 1, resource.RLIMIT_NOFILE)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and os.strerror(errno.EMFILE).lower() in line.lower(), done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in work.iterdir()) == before


SENSITIVITIES = {
    "cut": ('{"format": ', "not valid JSON"),
    "another file": (
        '{"schema": 1}',
        "not a sensitivity of format 'bevqat-sensitivity'; write it with bevqat sensitivity",
    ),
    "of another checkpoint": (
        '{"format": "bevqat-sensitivity", "schema": 1, "checkpoint": {"sha256": "0123456789ab"}}',
        "measured on a checkpoint with sha256 0123456789ab…, ptq.pth has",
    ),
}


@pytest.mark.parametrize("kind", SENSITIVITIES)
def test_a_sensitivity_that_compare_cannot_use(kind, work, refused):
    content, words = SENSITIVITIES[kind]
    (work / "sensitivity.json").write_text(content)
    line = refused([*COMPARE, "--ptq", "ptq.pth", "--sensitivity", "sensitivity.json"], "sensitivity.json: ")
    assert words in line.replace("`", "")


TRAINED = ["--data", "data:calib", "--steps", "1", "--batch", "1", "--save-seconds", "0", "--out", "out"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "arguments", [["train", "--config", "config.yaml", *TRAINED], ["finetune", "--ckpt", "ptq.pth", "--no-augment", *TRAINED]],
    ids=["train", "finetune"],
)  # fmt: skip
@pytest.mark.parametrize("size", [200, 60_000])
def test_a_run_on_a_disk_that_gets_full(arguments, size, work):
    """At the first bytes of a checkpoint or in the middle of one, of which nothing stays."""
    (work / "out").mkdir()
    done = _limited(arguments, size)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: out/") and ": cannot write here: " in line and "Traceback" not in done.stderr, (
        done.stderr
    )
    assert os.strerror(errno.EFBIG) in line
    assert not [path.name for path in (work / "out").iterdir() if path.suffix in (".tmp", ".pth")]


def test_a_checkpoint_on_a_full_disk(work):
    """torch tells it as a RuntimeError of its own; what the system said is told instead."""
    from qat.checkpoints.reading import save_plain

    with open("/dev/full", "wb"), pytest.raises(OSError) as error:
        import torch

        save_plain({"a": torch.zeros(1000)}, "/dev/full")
    line = one_line_of(error.value)
    assert line is not None and "no space left on device" in line and "free some space" in line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x", "runs/a.pth"), ("runs/a.pth: found no space left on device", "free some space")),
        (OSError(errno.EROFS, "x", "a"), ("a: found read-only file system", "write to another folder")),
        (PermissionError(errno.EACCES, "x", "a"), ("a: found permission denied", "fix its permissions")),
        (OSError(errno.EDQUOT, "x", "a"), ("a: found disk quota exceeded", "free some of the quota")),
        (OSError(errno.EMFILE, "x", "a"), ("a: found too many open files", "ulimit -n")),
        (IsADirectoryError(errno.EISDIR, "x", "a"), ("a: found is a directory", "name a file in it")),
        (MemoryError(), ("memory: found too little", "close other programs")),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            ("memory: found too little", "close other programs"),
        ),
    ],
)
def test_the_machines_refusals_are_one_line(error, words, monkeypatch, capsys, work):
    """Wherever they are raised."""
    import qat.cli.report as verb

    def run(args):
        raise error

    monkeypatch.setattr(verb, "run", run)
    assert main(["report", "results.json"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(word in said for word in words), said


@pytest.mark.parametrize("error", [TypeError("ours"), RuntimeError("ours"), KeyError("ours"), OSError("ours")])
def test_mistakes_of_ours_keep_their_traceback(error, monkeypatch, work):
    import qat.cli.report as verb

    def run(args):
        raise error

    monkeypatch.setattr(verb, "run", run)
    with pytest.raises(type(error), match="ours"):
        main(["report", "results.json"])


CALIBRATE = ["calibrate", *MODEL, *DATA]
COMPARE = ["compare", *MODEL, "--fp32", "fp32", *DATA, "--out", "compared"]
BENCHMARK = ["benchmark", "--onnx", "fp32", "--backends", "onnxruntime", "--out", "timed"]
TRAIN = ["train", "--config", "config.yaml", "--data", "data:calib", "--out", "trained"]
FINETUNE = ["finetune", "--ckpt", "ptq.pth", "--data", "data:calib", "--out", "tuned"]
DEMO = ["demo", "--model", "model", "--data", "data", "--out", "shown"]
NUMBERS = [
    (CALIBRATE, "--percentile", ("200", "nan", "50")),
    (CALIBRATE, "--budget", ("nan", "-1", "inf")),
    (CALIBRATE, "--frames", ("0", "-1")),
    (COMPARE, "--rounds", ("0", "-1")),
    (COMPARE, "--repeats", ("0",)),
    (COMPARE, "--resamples", ("-1",)),
    (COMPARE, "--threads", ("-1",)),
    (COMPARE, "--frames", ("0",)),
    (BENCHMARK, "--rounds", ("0", "-1")),
    (BENCHMARK, "--repeats", ("0",)),
    (BENCHMARK, "--frames", ("0", "-1")),
    (BENCHMARK, "--threads", ("-1",)),
    (["build", "--onnx", "fp32", "--backend", "onnxruntime"], "--threads", ("-1",)),
    (["verify", "fp32"], "--threads", ("-1",)),
    (["health", "ptq.pth", *DATA], "--saturation", ("nan", "-1", "2")),
    (["show", "--config", "config.yaml", *DATA, "--out", "x.png"], "--index", ("-1", "9")),
    (["sensitivity", "ptq.pth", *DATA], "--frames", ("0", "-2")),
    (["export-camera", *MODEL, *DATA], "--batch", ("0", "-1")),
    (["export-camera", *MODEL, *DATA], "--opset", ("7", "99")),
    (["export-camera", *MODEL, *DATA], "--frames", ("-1",)),
    (DEMO, "--rounds", ("0",)),
    (DEMO, "--frames", ("0", "-1")),
    (TRAIN, "--steps", ("0", "-1")),
    (TRAIN, "--batch", ("0",)),
    (TRAIN, "--lr", ("nan", "-1", "inf")),
    (TRAIN, "--decay", ("nan", "2")),
    (FINETUNE, "--steps", ("0",)),
    (FINETUNE, "--lr", ("nan", "0")),
    (FINETUNE, "--clip", ("nan",)),
    (FINETUNE, "--ema", ("nan", "1")),
    (FINETUNE, "--image-weight", ("nan", "-1")),
    (["synth", "--out", "set", "--scenes", "1"], "--azimuths", ("0",)),
    (["synth", "--out", "set", "--scenes", "1"], "--jpeg-quality", ("0", "101")),
    (["synth", "--out", "set"], "--scenes", ("0", "-1")),
]


@pytest.mark.parametrize(
    ("arguments", "flag", "value"),
    [pytest.param(a, flag, value, id=f"{a[0]} {flag} {value}") for a, flag, values in NUMBERS for value in values],
)
def test_a_number_that_means_nothing(arguments, flag, value, refused):
    line = refused([*arguments, flag, value], "found")
    assert flag in line or flag.removeprefix("--") in line
    assert "expected" in line


REPORTS = {
    "missing": (None, "results.json: cannot be read: No such file"),
    "cut": ('{"schema": 1, "rows": [', "results.json: not valid JSON"),
    "newer": ('{"schema": 9}', "schema: found 9, expected 1; write it again with compare"),
    "another kind": ('{"units": []}', "schema: missing, expected 1"),
    "a list": ("[]", "the document: found [], expected a section"),
}


@pytest.mark.parametrize("kind", REPORTS)
def test_results_that_no_report_can_be_made_of(kind, work, refused):
    content, words = REPORTS[kind]
    if content is not None:
        (work / "results.json").write_text(content)
    (work / "report.html").write_text("earlier")
    refused(["report", "results.json"], "results.json", words)


def test_errors_are_one_line_whatever_they_quote():
    assert one_line_of(UserError("a\nb")) == "a\\nb"
