"""Runs cases in a process of their own, with bounds on time and memory, and says which case did what.

A case is text: `KIND/SEED/MUTATION:NUMBER,MUTATION:NUMBER…`, the number being the seed of the mutation's `Random`. The same text
gives the same bytes on every machine with the same seeds.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import hypothesis
from hypothesis import strategies as st

from tests.reliability.fuzz.mutations import CANARY, MUTATIONS, STRUCTURE
from tests.reliability.fuzz.targets import READ, REFUSED, TARGETS, Finding, Target

DEADLINE = 5.0  # seconds of the processor in one case: a busy machine makes none slower
STUCK = 120.0  # seconds without a new case after which a worker that sleeps, or is in native code, is killed
GROWTH = 512 << 20  # bytes that the peak may rise in one case beyond 16 times the file: a network is built of some
HEADROOM = 3 << 30  # bytes of address space beyond what the libraries take
MOST = 2 << 20  # bytes of a file: what is repeated again and again stays small enough to be tried often
PRINTED = 4000  # bytes on stdout and stderr in one case


@dataclass
class Result:
    """What came of a campaign. findings: by what went wrong, the shortest case and the account of it."""

    kind: str
    cases: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    findings: dict[str, dict[str, str]] = field(default_factory=dict)
    slowest: tuple[float, str] = (0.0, "")
    seconds: float = 0.0


class _Hang(BaseException):
    """Not an Exception: nothing on the way may catch it."""


def _raise_hang(*_: Any) -> None:
    raise _Hang


def spelled(kind: str, name: str, steps: Sequence[tuple[str, int]]) -> str:
    """A case as text."""
    return f"{kind}/{name}/{','.join(f'{mutation}:{number}' for mutation, number in steps)}"


def understood(case: str) -> tuple[str, str, list[tuple[str, int]]]:
    """`spelled`'s arguments."""
    kind, name, steps = case.split("/")
    pairs = [step.split(":") for step in steps.split(",") if step]
    return kind, name, [(mutation, int(number)) for mutation, number in pairs]


def mutated(target: Target, kind: str, name: str, steps: Sequence[tuple[str, int]]) -> bytes:
    """The bytes of a case."""
    data = target.files[name]
    for mutation, number in steps:
        data = MUTATIONS[kind][mutation](data, Random(number), target.others)[:MOST]
    return data


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    before = signal.signal(signal.SIGPROF, _raise_hang)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _where(error: BaseException) -> str:
    """The error's type and the innermost line of this package: what tells one failure from another."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/qat/" in frame.filename] or list(frames)
    last = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
    return f"{type(error).__name__} at {last}"


class Worker:
    """Runs cases of one kind in this process."""

    def __init__(self, kind: str, seeds: Path, work: Path, printed: int) -> None:
        """printed: file descriptor that stdout and stderr were sent to."""
        self.kind, self.work, self.printed = kind, work, printed
        work.mkdir(parents=True)
        self.target = TARGETS[kind](seeds, work)
        self.there = self.files()

    def files(self) -> set[str]:
        """Everything in the working directory, before which anything new was written by a case."""
        return {entry.name for entry in os.scandir(self.work)} | {f"{CANARY}: {Path(CANARY).exists()}"}

    def attempt(self, name: str, steps: Sequence[tuple[str, int]]) -> tuple[str, str, float]:
        """(REFUSED, READ or what went wrong, an account of it, seconds)."""
        data = mutated(self.target, self.kind, name, steps)
        before, printed = _peak(), os.fstat(self.printed).st_size
        begin = time.process_time()
        account = ""
        try:
            with warnings.catch_warnings(record=True) as warned, _deadline(DEADLINE):
                warnings.simplefilter("always")
                outcome = self.target.read(name, data)
            if len(warned) > 20:
                outcome, account = f"{len(warned)} warnings", str(warned[0].message)
        except _Hang as error:
            outcome, account = f"more than {DEADLINE:g} s: {_where(error)}", traceback.format_exc()
        except Finding as error:
            outcome, account = f"finding: {str(error)[:60]!r}", str(error)
        except Exception as error:
            outcome, account = _where(error), traceback.format_exc()
        seconds = time.process_time() - begin
        grown = _peak() - before
        if grown > GROWTH + 16 * len(data):
            outcome, account = (
                f"memory: {outcome}",
                f"the peak rose by {grown >> 20} MiB for a file of {len(data)} bytes; {account}",
            )
        if (said := os.fstat(self.printed).st_size - printed) > PRINTED:
            outcome, account = f"prints {said} bytes", f"{os.pread(self.printed, 2000, printed)!r}"
        if new := self.files() - self.there - {f"fuzzed.{end}" for end in ("pth", "yaml", "onnx")}:
            outcome, account = f"leaves {sorted(new)}", account
            self.there |= new
        return outcome, account, seconds

    def shorter(self, name: str, steps: list[tuple[str, int]], outcome: str) -> list[tuple[str, int]]:
        """The steps without those that are not needed for the same outcome."""
        for at in reversed(range(len(steps))):
            fewer = steps[:at] + steps[at + 1 :]
            if fewer and self.attempt(name, fewer)[0] == outcome:
                steps = fewer
        return steps


def strategy(kind: str, target: Target) -> Any:
    """Draws (seed, steps): small seeds more often than large ones, structure more often than bytes."""
    names = [name for name in target.files for _ in range(1 if name in target.large else 6)]
    operations = [*STRUCTURE[kind]] * 5 + [*MUTATIONS[kind]]
    step = st.tuples(st.sampled_from(operations), st.integers(0, 2**32 - 1))
    return st.tuples(st.sampled_from(names), st.lists(step, min_size=1, max_size=3))


def _child(kind: str, seeds: Path, work: Path, cases: int, seed: int, journal: int, printed: int) -> None:
    """The life of a worker's process; its result and the case on the way are in the journal's file."""
    os.chdir(work.parent)
    worker = Worker(kind, seeds, work, printed)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, resource.RLIM_INFINITY))
    result = Result(kind)
    outcomes: Counter[str] = Counter()
    begin = time.process_time()

    def note(case: str) -> None:
        result.seconds = time.process_time() - begin
        result.outcomes = dict(outcomes)
        text = json.dumps({**asdict(result), "case": case}).encode()
        os.pwrite(journal, len(text).to_bytes(8, "little") + text, 0)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy(kind, worker.target))
    def campaign(drawn: tuple[str, list[tuple[str, int]]]) -> None:
        name, steps = drawn
        case = spelled(kind, name, steps)
        note(case)
        outcome, account, seconds = worker.attempt(name, steps)
        result.cases += 1
        if seconds > result.slowest[0]:
            result.slowest = (seconds, case)
        if outcome in (READ, REFUSED):
            outcomes[outcome] += 1
        else:
            outcomes["wrong"] += 1
            if outcome not in result.findings and len(result.findings) < 200:
                note(case)
                steps = worker.shorter(name, list(steps), outcome)
                result.findings[outcome] = {"case": spelled(kind, name, steps), "account": account[-1500:]}
        if not result.cases % 500:
            gc.collect()

    campaign()
    note("")


def _read(journal: int) -> dict[str, Any]:
    size = int.from_bytes(os.pread(journal, 8, 0) or b"\0", "little")
    return dict(json.loads(os.pread(journal, size, 8))) if size else {}


def _forked(function: Any, *arguments: Any) -> int:
    """Runs it in a child, which takes the place of a fork of this process; its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # dies with its parent
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _quietly(printed: int, function: Any, *arguments: Any) -> None:
    for stream in (1, 2):
        os.dup2(printed, stream)
    faulthandler.enable()
    function(*arguments)


def make_seeds(folder: Path, kinds: Sequence[str]) -> Path:
    """The seeds, made by a child: threads that libraries start while they are made are not there for later forks."""

    def make() -> None:
        from tests.reliability.fuzz import seeds

        warnings.simplefilter("ignore")
        seeds.make_configs(folder / "config")
        if "checkpoint" in kinds:
            seeds.make_checkpoints(folder / "checkpoint")
        if "manifest" in kinds or "onnx" in kinds:
            seeds.make_manifests(folder / "manifest")
            seeds.make_onnx(folder / "onnx", folder / "manifest")

    _, status = os.waitpid(_forked(make), 0)
    if status:
        raise RuntimeError("the seeds could not be made")
    return folder


def run(kind: str, seeds: Path, cases: int, seed: int) -> Result:
    """A campaign. A worker that dies is told by its signal, with the case it died of, and another one goes on."""
    total = Result(kind)
    outcomes: Counter[str] = Counter()
    while total.cases < cases:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            journal = stack.enter_context(open(Path(folder) / "journal", "w+b")).fileno()
            printed = stack.enter_context(open(Path(folder) / "printed", "w+b")).fileno()
            arguments = (kind, seeds, Path(folder) / "work" / "in", cases - total.cases, seed, journal, printed)
            (Path(folder) / "work").mkdir()
            pid = _forked(_quietly, printed, _child, *arguments)
            last, since, status = {}, time.monotonic(), None
            while status is None:
                done, code = os.waitpid(pid, os.WNOHANG)
                if done:
                    status = code
                    break
                time.sleep(0.1)
                if (now := _read_safely(journal)) != last:
                    last, since = now, time.monotonic()
                elif time.monotonic() - since > STUCK:
                    os.kill(pid, signal.SIGKILL)
            found = _read_safely(journal)
            said = os.pread(printed, 4000, max(0, os.fstat(printed).st_size - 4000)).decode(errors="replace")
        if status and not found.get("case"):
            raise RuntimeError(f"the worker for {kind} did not start: {said}")
        total.cases += found["cases"]
        total.seconds += found["seconds"]
        total.slowest = max(total.slowest, tuple(found["slowest"]))
        outcomes.update(found["outcomes"])
        for outcome, finding in found["findings"].items():
            total.findings.setdefault(outcome, finding)
        if status:
            how = f"dies of signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"leaves with {status >> 8}"
            outcomes["wrong"] += 1
            total.cases += 1
            total.findings.setdefault(f"{how}: {found['case']}", {"case": found["case"], "account": said})
        elif found["cases"] == 0:
            break
        seed += 1
    total.outcomes = dict(outcomes)
    return total


def _read_safely(journal: int) -> dict[str, Any]:
    try:
        return _read(journal)
    except ValueError:  # it is just being written
        return {}


def one(case: str, seeds: Path, save: Path | None = None) -> tuple[str, str, float]:
    """A single case in this process, as `Worker.attempt`. save: where its bytes go too."""
    kind, name, steps = understood(case)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "printed", "w+b") as printed:
        os.chdir(folder)
        worker = Worker(kind, seeds, Path(folder) / "work" / "in", printed.fileno())
        if save is not None:
            save.write_bytes(mutated(worker.target, kind, name, steps))
        found = worker.attempt(name, steps)
        os.chdir("/")
    return found


def keep(result: Result, seeds: Path, folder: Path) -> None:
    """Writes the bytes of every finding, and its account beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "work").mkdir()
        target = TARGETS[result.kind](seeds, _made(Path(scratch) / "work" / "in"))
        for number, (outcome, finding) in enumerate(result.findings.items()):
            kind, name, steps = understood(finding["case"])
            stem = folder / f"{kind}-{number:03d}"
            stem.with_suffix(".bin").write_bytes(mutated(target, kind, name, steps))
            stem.with_suffix(".txt").write_text(f"{outcome}\n{finding['case']}\n\n{finding['account']}\n")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
