"""Output to a closed pipe."""

from __future__ import annotations

import os
import select
import sys


def reader_gone() -> bool:
    """Whether the other end of stdout's pipe is closed. If so, redirects stdout, because Python flushes it at its end and
    would print an error."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):
        return False
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(number, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
    return True
