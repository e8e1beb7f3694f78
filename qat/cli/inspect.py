"""Print what a PTQ checkpoint quantizes, with scales and shared groups, and what stays float and by which rule.

example:
  bevqat calibrate --out runs/calibrate/ptq.pth
  bevqat inspect runs/calibrate/ptq.pth
"""

from __future__ import annotations

import argparse

from qat.cli.flags import add_checkpoint, checkpoint_of
from qat.cli.json_output import add_json_flag, emit_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    add_checkpoint(parser, "a checkpoint of calibrate")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the tables."""
    from qat.calibrate.inspection import inspect_checkpoint, print_inspection

    path = checkpoint_of(args)
    found = inspect_checkpoint(path)
    print_inspection(found, path.name)
    emit_json(args, found.to_json())
    return 0
