"""Ctrl-C where no verb can handle it: while this package is being imported, and between a verb's end and the process's.

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
    """From here on an unhandled Ctrl-C is shown as one line; with False as Python shows it."""
    sys.excepthook = _one_line if always else _hook


def take_no_more() -> None:
    """For a program that has been told to end, and is about to: a second Ctrl-C would only break its leaving off."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


show_one_line(True)
