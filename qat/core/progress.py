"""Progress of long work: a bar on a terminal, the means of a training run's losses, batches drawn ahead."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
LOG_EVERY = 25  # steps


class Done(Protocol):
    """Called with the total done so far, and a text to show next to the bar."""

    def __call__(self, completed: int, note: str = "") -> None: ...


@contextmanager
def progress_bar(what: str, total: int | None = None, start: int = 0, show: bool = True) -> Iterator[Done]:
    """A bar on stderr with the elapsed time and an ETA; nothing if stderr is not a terminal, or without `show`.

    total: None if unknown: the bar then moves, without an ETA. start: done before.
    """
    console = Console(stderr=True)
    counted = () if total is None else (MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=False))
    progress = Progress(
        TextColumn(what),
        BarColumn(),
        TimeElapsedColumn(),
        *counted,
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not (show and console.is_terminal),
        transient=True,
        # Lines printed meanwhile go above the bar, unless stdout is piped.
        redirect_stdout=sys.stdout.isatty(),
    )
    with progress:
        bar = progress.add_task("", total=total, completed=start, note="")

        def done(completed: int, note: str = "") -> None:
            progress.update(bar, completed=completed, note=note)

        yield done


def counted(what: str, items: Iterable[T], total: int, start: int = 0) -> Iterator[T]:
    """Yields the items, with a `progress_bar` of how many the caller has finished. start: number done before the first."""
    with progress_bar(what, total, start) as done:
        for number, item in enumerate(items, start):
            yield item
            done(number + 1)


def drawn_ahead(draw: Callable[[int], T], step: int, stop: int) -> Iterator[T]:
    """draw(step), draw(step + 1), … up to `stop`, each drawn while the one before it is used."""
    if step >= stop:
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(draw, step)
        while step < stop:
            batch = coming.result()
            step += 1
            if step < stop:
                coming = pool.submit(draw, step)
            yield batch


class StepLog:
    """Every LOG_EVERY steps, and at the last, records the losses' means since the previous entry in `history` and as a line.

    Args:
        history: gets {"step", "lr", and each loss}.
        log: called with the line.
        step, steps: where the run begins, and how many there are in all.
        digits: of the losses in a line.
        recent: losses of the steps since the latest entry; a resumed run gets them from the interrupted one. Changed in place.
    """

    def __init__(
        self,
        history: list[dict[str, float]],
        log: Callable[[str], None],
        step: int,
        steps: int,
        digits: int,
        recent: list[dict[str, float]],
    ) -> None:
        self.history, self.log, self.first, self.steps, self.digits = history, log, step, steps, digits
        self.recent = recent
        self.started = time.monotonic()

    def add(self, step: int, lr: float, losses: Mapping[str, float], now: bool = False) -> None:
        """Adds a step's losses; `step` is the number of finished steps. now: the run stops here."""
        self.recent.append(dict(losses))
        if not (step % LOG_EVERY == 0 or step == self.steps or now):
            return
        mean = {name: float(np.mean([r[name] for r in self.recent])) for name in losses}
        self.recent.clear()
        self.history.append({"step": step, "lr": lr, **mean})
        rate = (time.monotonic() - self.started) / (step - self.first)
        left = rate * (self.steps - step) / 60
        figures = " ".join(f"{name} {value:.{self.digits}f}" for name, value in mean.items())
        self.log(f"step {step}/{self.steps} {figures} | {rate:.2f} s/step, {left:.0f} min left")
