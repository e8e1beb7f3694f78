"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def die_with_parent() -> None:
    """For the beginning of a pool's worker: it ends when its parent is killed. It would wait for work for ever otherwise.

    On Linux; elsewhere it does nothing.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it was killed before
        os._exit(1)
