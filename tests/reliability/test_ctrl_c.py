"""Ctrl-C, in every verb that takes long, while Python still imports, and in processes that a verb has started."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qat.core.processes import leaving_interrupts_to_us
from tests.reliability.killing import commands
from tests.reliability.stages import STAGES, Inputs, check_whole, failed

ROOT = Path(__file__).resolve().parents[2]
LINE = "interrupted; "
FIRST, LATER = 1, 4  # changes of files: the lock of the output, and something in the middle of the work
VERBS = ("synth", "calibrate", "sensitivity", "finetune", "train", "export", "build", "compare", "benchmark")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, make_config, make_detector) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"), commands(), make_config(), make_detector)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="counts files' changes as Linux does")
@pytest.mark.parametrize("stage", VERBS)
def test_ctrl_c_is_one_line_and_status_130(stage, inputs, tmp_path):
    """At its beginning and in its middle. What was finished is whole, and nothing half-written is left."""
    folder, log = tmp_path / "work", tmp_path / "log"
    folder.mkdir()
    for moment in (FIRST, LATER):
        ended = commands().run(STAGES[stage].argv(inputs, folder / STAGES[stage].out), folder, log, interrupt=moment)
        assert ended.status == 130, failed(ended)
        last = ended.said.splitlines()[-1]
        assert last.startswith(LINE) and "Traceback" not in ended.said and ended.said.count(LINE) == 1, failed(ended)
        check_whole(folder)
        assert not [path for path in folder.rglob("*") if path.name.endswith(".bevqat.tmp")]


WHILE_IMPORTING = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[1:] = ["doctor"]
from qat.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("name", ["qat.cli.parser", "qat.cli.doctor"])
def test_ctrl_c_while_python_imports_is_one_line(name):
    done = subprocess.run(
        [sys.executable, "-c", WHILE_IMPORTING.format(name=name)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (130, -signal.SIGINT)  # which a shell tells as 130
    assert done.stderr == "interrupted; what was finished is kept\n" and done.stdout == ""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signal masks")
def test_a_started_process_does_not_get_ctrl_c():
    """Not even before its first line: it would print a traceback beside its parent's one line."""
    with leaving_interrupts_to_us():
        process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0.2,))
        process.start()
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
