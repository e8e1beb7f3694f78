"""Every command that the documentation or a verb's help tells people to type is run, in a small checkout.

A page is one test: its commands run in their order, in this process. Of each kind of program `PROGRAMS` says what is done;
a program, script or verb that no table here names fails the test, as does a code block that is neither shell, nor Python,
nor marked as text. What takes hours runs with the smaller figures of `SMALLER`, behind the command's own.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from docs_pages import PYTHON, ROOT, SHELL, Command, blocks, commands, examples_of, kind_of, pages, read_arguments

from qat.cli import BAD_USE, FAILED, OK, VERBS, main
from qat.cli.parser import module_of
from qat.core.files import sha256

# Flags behind the command's own, of which argparse takes the last.
SMALLER = {
    "synth": ["--keyframes", "2", "--native", "96x54", "--azimuths", "60", "--sweeps", "0", "--workers", "1"],
    "train": ["--steps", "1", "--batch", "1", "--variants", "1"],
    "finetune": ["--steps", "1", "--batch", "1", "--warmup", "0"],
    "benchmark": ["--frames", "1", "--rounds", "1", "--repeats", "1"],
    "compare": ["--rounds", "1", "--repeats", "1", "--resamples", "20"],
    "demo": ["--rounds", "1", "--frames", "1"],
    "make_recording.py": ["--drives", "2", "--keyframes", "1", "--size", "192", "128", "--azimuths", "60"],
    "convert.py": ["--calib", "1"],
}
# Backends of other machines: their one-line error is what must come.
ELSEWHERE = ("tensorrt", "onnxruntime-tensorrt", "onnxruntime-cuda", "openvino-gpu", "openvino-npu")
# Parsed by the script's own parser and not run. Their measurements run on tiny networks in tests/benchmarks.
ONLY_PARSED = {
    "backbones.py": "an hour for sixty networks",
    "flavour_accuracy.py": "minutes on 500 keyframes",
    "mmdeploy_peer.py": "needs MMDeploy, and minutes of an idle machine",
    "kitti_accuracy.py": "minutes on 600 frames; tests/pointpillars/test_tiny.py has its parts",
    "mmdet3d_latency.py": "minutes of an idle machine",
    "peers_networks.py": "needs the peers, and minutes of an idle machine",
    "calibration.py": "minutes on the full-size camera part",
    "corrections.py": "minutes on camera-tiny",
    "engine_settings.py": "a process for every setting, minutes",
    "flavours.py": "a peer's search, minutes",
    "peers_accuracy.py": "needs the peers (pip install -e '.[peers]') and hours",
    "peers_latency.py": "needs the peers, and minutes of an idle machine",
    "pooling.py": "full size, minutes of an idle machine",
    "soak.py": "minutes; tests/reliability/test_soak.py runs it on a tiny detector",
    "tests.reliability.fuzz": "minutes; tests/reliability/test_fuzz.py runs its campaigns",
}
# What the pages assume to be there from an earlier page, and how it was made.
EARLIER = """
bevqat synth --out example-data --scenes 14 --seed 7 --splits calib=4,eval=10 --jpeg-quality 70
bevqat synth --out data/fit1 --scenes 450 --seed 101 --splits fit=450
bevqat synth --out data/fit2 --scenes 300 --seed 102 --splits fit=300
bevqat calibrate --out runs/ptq.pth
bevqat calibrate --out runs/goal/ptq.pth
bevqat export-camera --ckpt runs/ptq.pth
bevqat export-camera --ckpt runs/ptq.pth --fp32
bevqat export-camera --ckpt runs/ptq.pth --flavour openvino
bevqat export-camera --ckpt runs/ptq.pth --flavour onnxruntime
"""


def smaller(name: str, words: list[str]) -> list[str]:
    """The command with its smaller figures: at most two frames; of a generated set, at most one scene a split, two of eval."""
    words = [*words, *SMALLER.get(name, [])]
    for i, word in enumerate(words[1:]):
        if words[i] == "--frames":
            words[i + 1] = str(min(int(word), 2))
    if name == "benchmark" and "--onnx" in words:  # one folder, for every row is a process; the others must be there
        first, *others = itertools.takewhile(lambda word: not word.startswith("--"), words[words.index("--onnx") + 1 :])
        assert all((Path(folder) / "manifest.json").is_file() for folder in others), others
        words = [word for word in words if word not in others]
        if "--backends" not in words:
            words += ["--backends", "openvino" if "openvino" in first else "onnxruntime"]
    if name == "export-camera" and after("--format", words) == "pt2":
        words += ["--parts", "head.bbox"]
    if name == "synth":
        if after("--format", words) == "kitti":  # which has no sweeps
            at = len(words) - 1 - words[::-1].index("--sweeps")
            del words[at : at + 2]
        given = dict(item.split("=") for item in words[words.index("--splits") + 1].split(","))
        splits = {split: 2 if split == "eval" else 1 for split in given}
        if after("--out", words) != "example-data":
            words += ["--keyframes", "1"]
        words += ["--scenes", str(sum(splits.values())), "--splits", ",".join(f"{k}={v}" for k, v in splits.items())]
    return words


def after(flag: str, words: list[str]) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


def is_elsewhere(words: list[str], error: str) -> bool:
    """Whether the command asks for a backend of other machines, and the one line that came says that this is what is missing."""
    named = ",".join(after(flag, words) or "" for flag in ("--backend", "--backends")).split(",")
    missing = re.fullmatch(r"error: [^\n]*(is not installed|found the (providers|devices))[^\n]*\n", error)
    return missing is not None and any(name in ELSEWHERE for name in named)


def is_untrained(printed: str) -> bool:
    """Whether all that `agree` holds against its pairs is that this checkout's untrained detector has no boxes to compare."""
    return all("boxes: nothing to compare" in line for line in printed.splitlines() if line.startswith("FAILED"))


# calibrate and export-camera give the same for the same flags and checkpoint: (these) → what they wrote, and where from there
# the next one's goes when it does not say. Repeated, they are copied: pages begin alike.
MADE: dict[tuple[object, ...], Path] = {}


def recipe_of(words: list[str]) -> tuple[object, ...]:
    checkpoint = Path(after("--ckpt", words) or "model/camera-tiny/camera-tiny.pth")
    rest = [w for i, w in enumerate(words) if not {w, words[i - 1]} & {"--out", "--ckpt"}]
    return (*rest, sha256(checkpoint) if checkpoint.is_file() else None)


def remember(words: list[str], printed: str) -> None:
    if words[0] == "calibrate":
        MADE[recipe_of(words)] = Path(after("--out", words) or "runs/calibrate/ptq.pth")
    elif folder := re.search(r"^(\S+)/camera\.backbone\.onnx:", printed, re.MULTILINE):
        MADE[recipe_of(words)] = Path(folder[1])


def made_before(words: list[str]) -> bool:
    """Whether the command's result was there already, and is now where this command would have put it."""
    source = MADE.get(recipe_of(words))
    if source is None or not source.exists() or (words[0] == "export-camera" and "--ckpt" not in words):
        return False
    out = after("--out", words)
    if words[0] == "calibrate":
        target = Path(out or "runs/calibrate/ptq.pth")
        if target != source:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        return True
    target = Path(out) if out else Path(str(after("--ckpt", words))).parent / source.name
    if target != source:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    return True


def run_verb(command: Command, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    verb = words[0]
    assert verb in VERBS, f"{command.where}: there is no verb {verb!r}"
    if verb in ("finetune", "train"):  # another page's run, from another checkpoint, is not to be resumed
        shutil.rmtree(after("--out", words) or f"runs/{verb}", ignore_errors=True)
    capsys.readouterr()
    if verb in ("calibrate", "export-camera") and made_before(words):
        return
    try:
        status = main(smaller(verb, words))
    except SystemExit as exit_:  # argparse's own, which has printed why; --help and --version end with 0
        status = exit_.code or 0
    shown = capsys.readouterr()
    if status == BAD_USE and is_elsewhere(words, shown.err):
        return
    if verb == "agree" and status == FAILED and is_untrained(shown.out):
        return
    assert status == OK, f"{command.where}: {shlex.join(words)}: exit status {status}: {shown.err or shown.out}"
    if verb in ("calibrate", "export-camera"):
        remember(words, shown.out)


def run_python(command: Command, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[:2] == ["-m", "pytest"]:
        for path in (word for word in words[2:] if not word.startswith("-")):
            assert Path(path).exists(), f"{command.where}: no {path}"
    elif (verb := re.fullmatch(r"qat/([\w-]+)\.py", words[0])) and (ROOT / words[0]).is_file():
        run_verb(command, [verb[1], *words[1:]], capsys)
    elif launcher := re.fullmatch(r"tools/(deploy|test)\.py", words[0]):
        run_verb(command, [launcher[1], *words[1:]], capsys)
    elif words[0].startswith("examples/") and Path(words[0]).is_file():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [words[0], *smaller(Path(words[0]).name, words[1:])])
            runpy.run_path(words[0], run_name="__main__")
    elif words[0] == "-m" and words[1] in ONLY_PARSED:
        read_arguments(ROOT / words[1].replace(".", "/") / "__main__.py", words[2:])
    elif words[0].startswith("benchmarks/") and Path(words[0]).name in ONLY_PARSED:
        read_arguments(ROOT / words[0], words[1:])
    else:
        raise AssertionError(
            f"{command.where}: python {words[0]}: not a script that this test knows; run it or see ONLY_PARSED"
        )


def run_torchrun(command: Command, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As one process: tests/calibrate runs two."""
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert set(words[:script:2]) <= {"--nproc-per-node", "--nnodes"}, f"{command.where}: {words[:script]}"
    run_python(command, words[script:], capsys)


def run_pip(command: Command, words: list[str], _: pytest.CaptureFixture[str]) -> None:
    """Not run: nothing is installed by a test. Its extras must be ours."""
    known = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))
    assert words[0] == "install", command.where
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= known, f"{command.where}: extras {extras}, setup.py has {sorted(known)}"


def run_make(command: Command, words: list[str], _: pytest.CaptureFixture[str]) -> None:
    """Not run (`bevqat demo` is, and the rest is this test suite). Its targets must be there."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(words) <= targets, f"{command.where}: make {words}, Makefile has {sorted(targets)}"


def not_ours(command: Command, words: list[str], _: pytest.CaptureFixture[str]) -> None:
    """Not run: git clone and cd, which begin a page; trtexec, which is TensorRT's; ruff, which `make lint` runs."""


RUNNERS: dict[str, Callable[[Command, list[str], pytest.CaptureFixture[str]], None]] = {
    "bevqat": run_verb,
    "python": run_python,
    "torchrun": run_torchrun,
    "pip": run_pip,
    "make": run_make,
    "git": not_ours,
    "cd": not_ours,
    "trtexec": not_ours,
    "ruff": not_ours,
}
DONE: set[str] = set()  # the same command on two pages, with the same files, is run once


def run(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    runner = RUNNERS.get(command.program)
    assert runner is not None, (
        f"{command.where}: {command.program!r} is not a program that this test knows; see RUNNERS"
    )
    words = [word.replace("/data/nuscenes", "data/nuscenes") for word in command.words[1:]]
    same = shlex.join([command.program, *words])
    same = re.sub(r"^python qat/([\w-]+)\.py", r"bevqat \1", same)
    if same not in DONE:
        runner(command, words, capsys)
        DONE.add(same)


def shell_of(page: Path) -> list[Command]:
    name = page.relative_to(ROOT).as_posix()
    return [
        command
        for block in blocks(page.read_text())
        if kind_of(block) == SHELL
        for command in commands(block.text, name, block.line)
    ]


@functools.cache
def help_of(verb: str) -> str:
    text = importlib.import_module(module_of(verb)).__doc__ or ""
    return re.split(r"\nexamples?:\n", text, maxsplit=1)[1]


@pytest.mark.nightly
def test_every_command_runs(checkout, monkeypatch, capsys):
    """One test, so that one process makes what they share; it tells of every page that fails, by its first bad command."""
    monkeypatch.chdir(checkout)
    sources = [commands(EARLIER.strip(), "EARLIER"), *(shell_of(page) for page in pages())]
    for verb in VERBS:
        examples = examples_of(help_of(verb), f"bevqat {verb} --help")
        assert any({verb, module_of(verb).rsplit(".", 1)[-1]} & set(command.words[:2]) for command in examples)
        sources.append(examples)
    failures = []
    for source in sources:
        try:
            for command in source:
                run(command, capsys)
        except (AssertionError, SystemExit) as error:
            failures.append(str(error))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_pages_blocks_are_shell_python_or_said_to_be_text(page):
    for block in blocks(page.read_text()):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        kind = kind_of(block)
        assert kind is not None, f"{where}: neither shell nor Python; fence it as ```bash, ```python or ```text"
        if kind == PYTHON:
            code = compile(block.text, where, "exec")
            imports = [line for line in block.text.splitlines() if re.match(r"(from|import) ", line)]
            assert code and all(exec(line, {}) is None for line in imports)


@pytest.mark.nightly
def test_the_library_example_runs_by_itself(tmp_path):
    """In a process of its own: the order of its imports matters."""
    (block,) = (block for block in blocks((ROOT / "docs" / "quantize.md").read_text()) if kind_of(block) == PYTHON)
    done = subprocess.run([sys.executable, "-c", block.text], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "{'fc': 'the classifier'}"


def test_launchers_are_the_verbs():
    """`python qat/calibrate.py` is what `bevqat calibrate` is; one process for one of them, for it imports everything anew."""
    scripts = [path for path in (ROOT / "qat").glob("*.py") if "__main__" in path.read_text()]
    launchers = {path.stem for path in scripts}
    assert "calibrate" in launchers
    assert launchers <= set(VERBS)
    done = subprocess.run([sys.executable, "qat/benchmark.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: bevqat benchmark")
