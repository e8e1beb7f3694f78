"""Calibrate, export, build, compare and report with the shipped model and data, on the CPU, in a few minutes.

example:
  bevqat demo --out runs/demo
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qat.cli import FAILED, OK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("--model", type=Path, default=Path("model/camera-tiny"), metavar="DIR", help="a model's folder")
    parser.add_argument(
        "--data", type=Path, default=Path("example-data"), metavar="ROOT", help="with splits calib and eval"
    )
    parser.add_argument(
        "--frames", type=int, metavar="N", help="evaluate N keyframes spread over the split (default all)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="latency rounds (default 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """Runs every stage; prints the table, the verdict and where the report is."""
    from qat.compare import print_summary
    from qat.compare.demo import demo

    result = demo(args.model, args.data, args.out, args.frames, args.rounds, lambda line: print(line, flush=True))
    print_summary(result.comparison)
    if result.verified:
        return OK
    print(
        f"error: {args.out}: a part and PyTorch differ by more than its tolerance; see manifest.json", file=sys.stderr
    )
    return FAILED
