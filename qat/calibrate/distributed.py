"""Calibration by several processes that torchrun started: each runs a share of the frames, and all end with the same result.

A histogram's bins do not depend on the order of its values and its counts are integers, so the sum over the processes is
exactly the histogram of a single process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from qat.core.errors import UserError
from qat.core.locks import only_writer
from qat.lean.calibrators import HistogramCalibrator


def place() -> tuple[int, int]:
    """This process's rank and the number of processes: torchrun's environment, (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def device() -> torch.device:
    """This process's GPU; the CPU if this machine has fewer GPUs than processes, so that all use the same kind."""
    local, size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return torch.device("cuda", local) if size <= torch.cuda.device_count() else torch.device("cpu")


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Joins the other processes (nccl with a GPU for each, gloo otherwise); does nothing in a single process."""
    rank, size = place()
    if size == 1:
        yield rank, size
        return
    where = device()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    distributed.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield rank, size
    finally:
        distributed.destroy_process_group()


def agree(error: UserError | None) -> None:
    """Ends every process if any of them finds bad input; rank 0 reports it.

    (If only one process stopped, the others would wait for it.)

    Raises:
        UserError: on rank 0, or in a single process. Others exit silently with status 2.
    """
    rank, size = place()
    if size == 1:
        if error is not None:
            raise error
        return
    found: list[tuple[type[UserError], str] | None] = [None] * size
    distributed.all_gather_object(found, None if error is None else (type(error), str(error)))
    first = next((one for one in found if one is not None), None)
    if first is not None:
        if rank == 0:
            kind, text = first
            raise kind(text)
        raise SystemExit(2)


@contextmanager
def only_writers(target: Path, inside: bool = False) -> Iterator[None]:
    """`only_writer` for all processes together: rank 0, which writes, holds the lock.

    Raises:
        UserError: like `only_writer` and `agree`.
    """
    error = None
    with ExitStack() as lock:
        try:
            if place()[0] == 0:
                lock.enter_context(only_writer(target, inside))
        except UserError as found:
            error = found
        agree(error)
        yield


def merge_calibrators(calibrators: dict[str, HistogramCalibrator]) -> None:
    """Adds the other processes' histograms to each process's own; all end with the same."""
    rank, size = place()
    if size == 1:
        return
    own = {
        name: (
            *(None if x is None else x.cpu() for x in (c.counts, c.channels, c.squares)),
            *(c.values, c.log2_range, c.largest, c.least, c.most),
        )
        for name, c in calibrators.items()
    }
    gathered: list[dict[str, Any]] = [{}] * size
    distributed.all_gather_object(gathered, own)
    for other_rank, others in enumerate(gathered):
        if other_rank == rank:
            continue
        for name, (counts, channels, squares, values, log2_range, largest, least, most) in others.items():
            other = HistogramCalibrator(name)
            other.least, other.most = least, most
            other.counts, other.log2_range, other.largest = counts, log2_range, largest
            other.channels, other.squares, other.values = channels, squares, values
            if counts is not None:
                mine = calibrators[name].counts
                other.counts = counts.to(counts.device if mine is None else mine.device)
            calibrators[name].merge(other)


def total(count: int) -> int:
    """The sum over all processes."""
    _, size = place()
    if size == 1:
        return count
    counts: list[int] = [0] * size
    distributed.all_gather_object(counts, count)
    return sum(counts)
