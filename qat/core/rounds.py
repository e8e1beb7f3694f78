"""Interleaved timing of rows."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def turned(rows: Sequence[T], turn: int) -> list[T]:
    """The rows in a round's order, which rotates by one place each round, so that a slow moment of the machine and the previous
    row's effect on the caches are shared by all rows."""
    start = turn % len(rows) if rows else 0
    return [*rows[start:], *rows[:start]]


@contextmanager
def no_collection() -> Iterator[None]:
    """Inside the block Python's garbage collector does not run; it runs before the block."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
