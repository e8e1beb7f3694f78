"""The running command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_COMMAND: ContextVar[str] = ContextVar("bevqat_command", default="")


@contextmanager
def running(arguments: Sequence[str]) -> Iterator[None]:
    """Inside the block, `command_line` is `bevqat` with these arguments."""
    before = _COMMAND.set(shlex.join(["bevqat", *arguments]))
    try:
        yield
    finally:
        _COMMAND.reset(before)


def command_line() -> str:
    """The running verb's command line, ready to paste into a shell; "" if the function was called from Python."""
    return _COMMAND.get()
