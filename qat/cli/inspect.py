"""Print what a PTQ checkpoint quantizes, with scales and shared groups, and what stays float and by which rule.

example:
  bevqat calibrate --out runs/calibrate/ptq.pth
  bevqat inspect runs/calibrate/ptq.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("ckpt", type=Path, metavar="CKPT", help="a checkpoint that calibrate wrote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it there too")


def run(args: argparse.Namespace) -> int:
    """Prints the tables."""
    from qat.calibrate.inspection import inspect_checkpoint, print_inspection
    from qat.core.files import write_json

    found = inspect_checkpoint(args.ckpt)
    print_inspection(found, args.ckpt.name)
    if args.json:
        write_json(args.json, found.to_json())
        print(args.json)
    return 0
