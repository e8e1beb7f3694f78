"""Completion, in the shells themselves."""

import shutil
import subprocess

import pytest

from qat.cli.completion import SHELLS, script
from qat.cli.parser import VERBS


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """words → what bash offers for the last of them, in a folder with some files."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    folder = tmp_path_factory.mktemp("bash")
    (folder / "bevqat.bash").write_text(script("bash"))
    (folder / "runs").mkdir()
    (folder / "ptq.pth").touch()

    def complete(*words):
        body = """
source ./bevqat.bash
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
function=$(complete -p bevqat | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$function" bevqat "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
        done = subprocess.run(
            ["bash", "--norc", "-c", body, "bash", "bevqat", *words], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return set(done.stdout.split())

    return complete


def test_bash_completes_verbs(bash):
    assert bash("") >= set(VERBS)
    assert bash("ex") == {"export", "export-camera", "export-mmdet3d"}


def test_bash_completes_flags(bash):
    assert bash("calibrate", "--budget-d") == {"--budget-data"}
    assert {"--json", "--onnx", "--backends"} <= bash("compare", "--")


def test_old_spellings_are_not_offered(bash):
    assert "--int8" not in bash("compare", "--") and "--init" not in bash("train", "--")


def test_bash_completes_choices(bash):
    assert bash("build", "--backend", "onnxruntime-") == {"onnxruntime-cuda", "onnxruntime-tensorrt"}
    assert bash("calibrate", "--frames", "3", "--method", "m") == {"max", "mse"}
    assert bash("completion", "") == set(SHELLS)


def test_bash_completes_files_and_folders(bash):
    assert bash("inspect", "p") == {"ptq.pth"}
    assert bash("export-camera", "--ckpt", "p") == {"ptq.pth"}
    assert bash("verify", "--onnx", "") == {"runs"}
    assert bash("verify", "r") == {"runs"}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_reads_its_script_without_complaint(shell, tmp_path):
    text = script(shell)
    assert all(verb in text for verb in VERBS)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "bevqat"
    path.write_text(text)
    done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
