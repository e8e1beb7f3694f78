"""Flags that several verbs have."""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.core.errors import UserError


def add_data_flags(parser: argparse.ArgumentParser, split: str, what: str) -> None:
    """--data, --version, --split and --frames: which keyframes of a data set. what: the verb for --frames' help."""
    parser.add_argument("--data", type=Path, default=Path("example-data"), metavar="ROOT", help="nuScenes-format data")
    parser.add_argument("--version", metavar="NAME", help="needed where ROOT holds several, such as v1.0-mini")
    parser.add_argument("--split", default=split, help=f"default {split}")
    parser.add_argument("--frames", type=int, metavar="N", help=f"{what} N frames spread over the split (default all)")


def root_and_split(text: str, flag: str) -> tuple[Path, str]:
    """ROOT:SPLIT as its two parts.

    Raises:
        UserError: there are not two.
    """
    root, _, split = text.rpartition(":")
    if not (root and split):
        raise UserError(f"{flag}: found {text!r}, expected ROOT:SPLIT such as data/fit:fit")
    return Path(root), split
