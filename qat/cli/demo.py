"""Calibrate, export, build, compare and report with the shipped model and data, on the CPU, in a few minutes.

example:
  bevqat demo --out runs/demo
  bevqat demo --model lidar-tiny --out runs/demo-lidar
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qat.cli import FAILED, OK
from qat.cli.flags import EXAMPLE, MODEL, add_out_flag, add_rounds_flags
from qat.cli.json_output import add_json_flag, emit_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument(
        "--model",
        type=Path,
        default=MODEL,
        metavar="DIR",
        help=f"a model's folder, or its name in model/ (default {MODEL})",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="ROOT",
        help=f"nuScenes-format data with splits calib and eval (default {EXAMPLE}; for lidar-tiny generated scenes)",
    )
    parser.add_argument(
        "--frames", type=int, metavar="N", help="evaluate N keyframes spread over the split (default all)"
    )
    add_rounds_flags(parser, 5, None)
    add_out_flag(parser, "DIR", Path("runs/demo"))
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Runs every stage; prints the table, the verdict and where the report is."""
    from qat.cli.compare import comparison_json
    from qat.compare import print_summary
    from qat.compare.demo import GENERATED, demo

    shipped = MODEL.parent / args.model
    model = shipped if not args.model.is_dir() and shipped.is_dir() else args.model
    data = args.data or (None if model.name in GENERATED else EXAMPLE)
    result = demo(model, data, args.out, args.frames, args.rounds, lambda line: print(line, flush=True))
    print_summary(result.comparison)
    emit_json(args, {"passed": result.verified, **comparison_json(result.comparison)})
    if result.verified:
        return OK
    print(
        f"error: {args.out}: a part and PyTorch differ by more than its tolerance; see manifest.json", file=sys.stderr
    )
    return FAILED
