"""Make report.html, one self-contained page, from results.json.

example:
  bevqat report runs/demo/results.json
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="written by compare")
    parser.add_argument("--out", type=Path, metavar="HTML", help="default: report.html beside the results")


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints its verdict."""
    from qat.report import write_report

    out = args.out or args.results.with_name("report.html")
    verdict = write_report(args.results, out)
    print(f"{verdict.headline}. {' '.join(verdict.reasons)}")
    print(f"report: {out}")
    return 0
