"""Bars: on a terminal with an ETA, nowhere else."""

import os
import pty
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import time
from qat.core.progress import counted, progress_bar
for number in counted("frames", range(3), 3):
    print(f"line {number}", flush=True)
    time.sleep(0.15)
with progress_bar("import"):
    time.sleep(0.15)
"""


def run(stdout, stderr):
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=environment,
        stdout=stdout,
        stderr=stderr,
        stdin=subprocess.DEVNULL,
    )


def drained(leader):
    found = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the other end is closed
            return found.decode()
        if not piece:
            return found.decode()
        found += piece


def test_a_terminal_has_a_bar_with_counts_and_an_eta_and_a_piped_stdout_its_lines():
    leader, follower = pty.openpty()
    child = run(subprocess.PIPE, follower)
    os.close(follower)
    told = drained(leader)
    assert child.stdout.read() == b"line 0\nline 1\nline 2\n" and child.wait() == 0
    child.stdout.close()
    os.close(leader)
    assert "frames" in told and "2/3" in told and "0:00:0" in told and "import" in told
    assert "line" not in told


def test_without_a_terminal_there_is_no_bar():
    child = run(subprocess.PIPE, subprocess.PIPE)
    assert child.communicate() == (b"line 0\nline 1\nline 2\n", b"")
