"""Handles Ctrl-C outside a verb: while this package is imported, and between the end of a verb and the end of the process.

Python then ends with the signal's own status, which a shell reports as 130.
"""

from __future__ import annotations

import signal
import sys
from types import TracebackType

LINE = "interrupted; what was finished is kept"

_hook = sys.excepthook


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(LINE, file=sys.stderr)
    else:
        _hook(kind, error, trace)


def show_one_line(always: bool) -> None:
    """Shows an unhandled Ctrl-C as one line from now on; with False, as Python does."""
    sys.excepthook = _one_line if always else _hook


def take_no_more() -> None:
    """Ignores Ctrl-C in a program that is already ending: a second one would only interrupt its cleanup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


show_one_line(True)
