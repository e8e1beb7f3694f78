"""One row in its own process, so that its memory can be measured and a crash affects no other row."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from qat.core.errors import UserError
from qat.core.machine import field, read_text
from qat.core.processes import leaving_interrupts_to_us
from qat.core.rounds import no_collection
from qat.engine.base import Options

WHOLE, REBUILD = "end to end", "pattern rebuild"
# Warm-up: two windows of WINDOW runs whose medians differ by no more than STABLE, or the caps.
WINDOW, STABLE, MOST_RUNS, MOST_SECONDS = 5, 0.03, 60, 30.0

Milliseconds = dict[str, float]


def memory_mb(name: str) -> float | None:
    """This process's memory in MB: "VmRSS" now, "VmHWM" the peak. None if Linux does not report it."""
    words = field(read_text("/proc/self/status"), name).split()
    return round(int(words[0]) * 1024 / 1e6, 1) if words else None


@dataclass(frozen=True)
class RowSpec:
    """A row to run. name: for messages. folder: exported parts, or engines. options: for engines, those that differ from the
    stored ones."""

    name: str
    folder: Path
    backend: str
    options: Options


def until_stable(
    run: Callable[[], float], most_runs: int = MOST_RUNS, most_seconds: float = MOST_SECONDS
) -> dict[str, Any]:
    """Runs until the medians of two windows in succession differ by no more than STABLE of the earlier one.

    Args:
        run: runs once and returns milliseconds.

    Returns:
        {"runs", "stable", "windows_ms": the windows' medians}; not stable where a cap ended it.
    """
    begin = time.monotonic()
    windows: list[float] = []
    runs = 0
    while True:
        times = []
        for _ in range(WINDOW):
            times.append(run())
            runs += 1
        windows.append(float(np.median(times)))
        stable = len(windows) > 1 and abs(windows[-1] / windows[-2] - 1) <= STABLE
        if stable or runs + WINDOW > most_runs or (len(windows) > 1 and time.monotonic() - begin > most_seconds):
            return {"runs": runs, "stable": stable, "windows_ms": [round(w, 4) for w in windows]}


class _Row:
    """The row's pipeline and its inputs."""

    def __init__(self, spec: RowSpec, frames: Sequence[Any]) -> None:
        from qat.runtime.pipeline import Pipeline

        self.frames = frames
        before = memory_mb("VmHWM")
        begin = time.perf_counter()
        self.pipeline = Pipeline.load(spec.folder, spec.backend, None, spec.options)
        self.described = {
            "build_seconds": round(time.perf_counter() - begin, 3),
            "memory_before_mb": before,
        }

    def _once(self, frame: Any) -> tuple[Milliseconds, Milliseconds]:
        begin = time.perf_counter()
        if frame.sample is None:
            self.pipeline(*frame.raw)
        else:
            self.pipeline.forward(frame.sample)
        total = (time.perf_counter() - begin) * 1e3
        stages = dict(self.pipeline.timing_ms)
        if (
            "depth" in stages and "preprocess" in stages
        ):  # preprocessing draws the depth map: its time is counted separately
            stages["preprocess"] -= stages["depth"]
        transfer = {n: float(getattr(part, "transfer_ms", 0.0)) for n, part in self.pipeline.parts.items()}
        return {WHOLE: total, **stages}, {WHOLE: sum(transfer.values()), **transfer}

    def warm_up(self) -> dict[str, Any]:
        """Runs `until_stable` on the first frame."""
        frame = self.frames[0].moved(0)
        with no_collection():
            return until_stable(lambda: self._once(frame)[0][WHOLE])

    def turn(self, number: int, repeats: int) -> dict[str, Any]:
        """One frame with a camera geometry that is new to the pipeline: one run that is not counted (it brings the row's
        weights back into the caches, and measures a new geometry's pattern), then `repeats` that are."""
        frame = self.frames[number % len(self.frames)].moved(number + 1)
        with no_collection():
            first, _ = self._once(frame)
            counted = [self._once(frame) for _ in range(repeats)]
        step = self.pipeline.flow.geometry_step
        return {
            **({} if step is None else {REBUILD: first[step]}),
            "times": [times for times, _ in counted],
            "transfers": [transfers for _, transfers in counted],
        }

    def finish(self) -> dict[str, Any]:
        """After the last run: memory of the process, and each part's engine size."""
        memory = {"memory_peak_mb": memory_mb("VmHWM"), "memory_resident_mb": memory_mb("VmRSS")}
        # Measured last: the engine may have to be written to find its size, which takes memory.
        return {"memory": memory, "parts": {name: _size(part) for name, part in self.pipeline.parts.items()}}


def _size(part: Any) -> dict[str, Any]:
    """An engine's size, and whether it is the size of the built engine or of the graph it was built from."""
    if (built := getattr(part, "size_bytes", None)) is not None:
        return {"size_mb": round(built / 1e6, 4), "size_of": "engine"}
    source = Path(part.source)
    return {"size_mb": round(stored_mb(source), 4), "size_of": source.suffix.lstrip(".") + " file"}


def stored_mb(file: Path) -> float:
    """Size of a graph's file, with the separate weights file of OpenVINO models."""
    return sum(f.stat().st_size for f in (file, file.with_suffix(".bin")) if f.is_file()) / 1e6


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Runs in the process: makes its object, then calls the requested methods until it receives a stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives the signal too, and ends this process
    target: Any = None
    try:
        target = make(*arguments)
        connection.send(("done", getattr(target, "described", None)))
        while (asked := connection.recv()) is not None:
            name, values = asked
            connection.send(("done", getattr(target, name)(*values)))
    except UserError as error:
        connection.send(("refused", str(error)))
    except EOFError:
        pass
    except Exception:
        connection.send(("failed", traceback.format_exc()))


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Hides the running script: a spawned process would otherwise import it first, and keep all its imports in memory."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Worker:
    """The parent's handle of such a process."""

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        """Starts the process; `described` waits for its object. make: a class that can be imported from its module by name."""
        self.name = name
        context = multiprocessing.get_context("spawn")  # a fork would share the parent's memory and its thread pools
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        with _no_main(), leaving_interrupts_to_us():
            self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        """The process's id."""
        return self._process.pid

    def described(self) -> Any:
        """Waits for the object and returns its description; raises like `ask`."""
        return self._answer()

    def ask(self, method: str, *values: Any) -> Any:
        """Calls a method of the process's object.

        Raises:
            UserError: the object raised one, or the process ended, for example because the machine ran out of memory.
            RuntimeError: the object raised anything else; has its traceback.
        """
        try:
            self._connection.send((method, values))
        except BrokenPipeError:
            raise self._ended() from None
        return self._answer()

    def _ended(self) -> UserError:
        self._process.join(5)
        code = self._process.exitcode
        why = "killed: the machine may be out of memory" if code == -signal.SIGKILL else "see its messages above"
        return UserError(f"{self.name}: its process ended with status {code} ({why}); run it alone, or omit it")

    def _answer(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._ended() from None
        if kind == "refused":
            raise UserError(value)
        if kind == "failed":
            raise RuntimeError(f"{self.name}:\n{value}")
        return value

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(1)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()
        self._connection.close()


def start_row(spec: RowSpec, frames: Sequence[Any]) -> Worker:
    """A process that builds a row; frames: `Flow.raw_frames`' or `recorded`'s."""
    return Worker(spec.name, _Row, spec, list(frames))
