"""What every benchmark's `main` does alike with flags and errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from qat.core.errors import UserError

P = ParamSpec("P")


def one_line_errors(main: Callable[P, int]) -> Callable[P, int]:
    """A `main` for which bad use ends with one line on stderr and status 2."""

    @wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return wrapped


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raises `UserError` for the first flag below the least that it may be; by the flags' names in `args`."""
    for name, low in least.items():
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')}: found {getattr(args, name)}, expected at least {low}")
