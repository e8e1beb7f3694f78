"""Show what this machine can run, and what to install for the rest.

Each line is ok, missing (a problem only if you need it) or a problem, with the command that fixes it. Exit status 1 if
something is not ok that calibrating, exporting, building and comparing on the CPU needs.

example:
  bevqat doctor
  bevqat doctor --json -
"""

from __future__ import annotations

import argparse
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from qat.cli import FAILED, OK
from qat.cli.json_output import add_json_flag, emit_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs"), metavar="DIR", help="folder for results (default runs)"
    )
    add_json_flag(parser)


def _bar() -> AbstractContextManager[Any]:
    """Shows a progress bar; nothing if a package for the bar is missing."""
    try:
        from qat.core.progress import progress_bar
    except Exception:  # a broken package may raise anything
        return nullcontext()
    return progress_bar("examine")


def run(args: argparse.Namespace) -> int:
    """Examines and prints."""
    from qat.doctor import describe, examine

    with _bar():
        report = examine(args.out)
    for line in describe(report.findings, shutil.get_terminal_size((120, 24)).columns):
        print(line)
    print()
    wrong = [found.name for found in report.findings if found.needed and found.state != "ok"]
    if wrong:
        print(f"calibrate, export, build and compare do not work here until these are fixed: {', '.join(wrong)}")
    else:
        print("calibrate, export, build and compare work here, on the CPU")
    emit_json(args, report.to_json())
    return OK if report.passed else FAILED
