"""Make report.html, one self-contained page, from results.json; from two of them, a page that compares the runs.

example:
  bevqat demo --out runs/demo
  bevqat report runs/demo/results.json

For two runs, the second from `bevqat compare --help`:
  bevqat report runs/demo/results.json runs/tiny/results.json --out runs/comparison.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.cli.json_output import add_json_flag, emit_json
from qat.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULTS.json",
        help="written by compare; one, or two to compare",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="HTML",
        help="file to write (default report.html next to the results, comparison.html for two)",
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints its verdict."""
    from qat.report import write_comparison, write_report

    if len(args.results) > 2:
        raise UserError(f"report: found {len(args.results)} results, expected one, or two to compare")
    first = args.results[0]
    out = args.out or first.with_name("report.html" if len(args.results) == 1 else "comparison.html")
    if len(args.results) == 1:
        verdict = write_report(first, out)
        print(f"{verdict.headline}. {' '.join(verdict.reasons)}")
        told = {"verdict": {"headline": verdict.headline, "reasons": verdict.reasons, "ship": verdict.ship}}
    else:
        found = write_comparison(first, args.results[1], out)
        print(f"A: {first}\nB: {args.results[1]}")
        print(f"{found.headline}. {' '.join(found.reasons)}".rstrip())
        for warning in found.warnings:
            print(f"warning: {warning}")
        told = {"comparison": {"headline": found.headline, "reasons": found.reasons, "warnings": found.warnings}}
    print(f"report: {out}")
    emit_json(args, {"out": out, **told})
    return 0
