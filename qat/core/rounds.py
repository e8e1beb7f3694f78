"""Interleaved timing, for everything that times rows in turn."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def turned(rows: Sequence[T], turn: int) -> list[T]:
    """The rows in a round's order, which is turned by one place a round: what slows the machine for a while, and what the row
    before leaves in the caches, is shared by all."""
    start = turn % len(rows) if rows else 0
    return [*rows[start:], *rows[:start]]


@contextmanager
def no_collection() -> Iterator[None]:
    """Inside the block Python's garbage collector does not run: it has run before."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
