"""Processes that end with the one that started them, and leave Ctrl-C to it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def die_with_parent() -> None:
    """Called first in a pool's worker, so that it ends when its parent is killed. Otherwise it would wait for work forever.

    On Linux; elsewhere it does nothing.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # the parent was killed earlier
        os._exit(1)


@contextmanager
def leaving_interrupts_to_us() -> Iterator[None]:
    """Processes started inside the block never receive a Ctrl-C.

    A terminal sends it to all processes: each would print a traceback, especially while it still imports. A Ctrl-C inside
    the block reaches this process at the end of the block. On Windows it does nothing.
    """
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # which multiprocessing starts first, and which unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
