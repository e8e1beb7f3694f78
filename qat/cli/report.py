"""Make report.html, one self-contained page, from results.json.

example:
  bevqat report runs/demo/results.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.cli.json_output import add_json_flag, emit_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="written by compare")
    parser.add_argument(
        "--out", type=Path, metavar="HTML", help="file to write (default report.html beside the results)"
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints its verdict."""
    from qat.report import write_report

    out = args.out or args.results.with_name("report.html")
    verdict = write_report(args.results, out)
    print(f"{verdict.headline}. {' '.join(verdict.reasons)}")
    print(f"report: {out}")
    emit_json(
        args, {"out": out, "verdict": {"headline": verdict.headline, "reasons": verdict.reasons, "ship": verdict.ship}}
    )
    return 0
