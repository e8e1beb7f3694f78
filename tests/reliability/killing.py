"""Runs bevqat's commands in forks of one process that has imported everything, and kills or stops them at a chosen moment.

As a script it takes requests as lines of JSON and answers so; `Commands` is what asks. A request is {"argv", "log", "root"} and
at most one of
    "event": n   it kills itself right before its n-th change of a file under "root"
    "tear": n    from there on no file may grow beyond TORN bytes: the kernel ends it in the middle of the write that would
    "stop": n    it stops there instead (SIGSTOP); the answer is {"pid"}, and {"go": pid} lets it go on to its end
    "interrupt": n   it gets there what Ctrl-C sends
    "cpu": s     it is killed after s seconds of its own processor time
    "start": true   the answer is {"pid"} at once, and {"join": pid} waits for its end.
The answer is {"status" (negative: the signal that ended it), "cpu", "events" (changes of files), "pid"}.

A fork of a process that has run nothing is as good as a new one, and takes milliseconds instead of seconds: the process imports
what a command that came to its end had imported, and the next forks have it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod", "os.truncate"}
SIGNALS = {"stop": signal.SIGSTOP, "interrupt": signal.SIGINT, "event": signal.SIGKILL}
TORN = 100
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MODULES = (
    "matplotlib.figure", "matplotlib.backends.backend_agg", "onnxruntime", "openvino", "onnxsim", "torch.optim.adamw",
    "torch._dynamo", "nuscenes.eval.detection.evaluate", "qat.benchmark.run", "qat.calibrate.finetune", "qat.calibrate.foreign",
    "qat.calibrate.job", "qat.compare.demo", "qat.evaluate", "qat.export.checkpoint", "qat.families.bevfusion.training", "qat.data.synth",
    "qat.engine.onnxruntime_backend", "qat.engine.openvino_backend", "qat.runtime", "qat.boxes._nms_kernel",
)  # fmt: skip


def tear() -> None:
    """Lets the next write of any length be the last."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (TORN, TORN))


def watch(root: str, moment: str | None, at: int, told: int) -> None:
    """Counts what changes files under `root` and tells the count; before change number `at` it does what `moment` says."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = args
            if not (isinstance(flags, int) and flags & WRITING):
                return
        elif event in CHANGES:
            path = args[0]
        else:
            return
        if isinstance(path, int) or not os.path.abspath(os.fsdecode(path)).startswith(root):
            return
        count += 1
        os.pwrite(told, b"%8d" % count, 0)
        if count == at and moment == "tear":
            tear()
        elif count == at and moment is not None:
            os.kill(os.getpid(), SIGNALS[moment])

    sys.addaudithook(hook)


def start(request: dict, counts: int) -> int:
    """The pid of a fork that runs the command."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        from qat.cli import main

        sys.argv = ["bevqat", *request["argv"]]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have the script ignore it
        moment = next((name for name in (*SIGNALS, "tear") if name in request), None)
        watch(request["root"], moment, request.get(moment or "", 0), counts)
        status = main(request["argv"])
        os.pwrite(counts, " ".join(sys.modules).encode(), 8)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def learn(modules: list[str]) -> None:
    """Imports them, as far as that can be done."""
    for name in modules:
        if name not in sys.modules and not name.startswith(("__", "qat.cli.")):
            with suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork that collects garbage would copy every page


def used(pid: int) -> float:
    """Seconds of processor time of a process that has not been waited for; its clock's number is its own, negated."""
    return time.clock_gettime(~pid << 3 | 2)


def end(pid: int, counts: int, cpu: float | None = None, stops: bool = False) -> dict:
    """Waits for a fork's end, or its stop, or brings its end about."""
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG | (os.WUNTRACED if stops else 0))
        if found and os.WIFSTOPPED(status):
            return {"pid": pid}
        if found:
            events = int(os.pread(counts, 8, 0).strip(b"\0") or b"0")
            learn(os.pread(counts, 1 << 20, 8).decode().split())
            os.close(counts)
            seconds = usage.ru_utime + usage.ru_stime
            return {"status": os.waitstatus_to_exitcode(status), "cpu": seconds, "events": events, "pid": pid}
        if cpu is not None and used(pid) >= cpu:
            os.kill(pid, signal.SIGKILL)
            cpu = None
        time.sleep(0.001 if cpu is not None else 0.005)


def serve() -> None:
    for name in MODULES:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    running: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if pid := request.get("go") or request.get("join"):
            if "go" in request:
                os.kill(pid, signal.SIGCONT)
            answer = end(pid, running.pop(pid))
        else:
            counts = os.memfd_create("counts")
            pid = start(request, counts)
            running[pid] = counts
            answer = {"pid": pid} if "start" in request else end(pid, counts, request.get("cpu"), "stop" in request)
            if "status" in answer:
                del running[pid]
        print(json.dumps(answer), file=answers, flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


@dataclass
class Ended:
    """How a command ended. status: negative for the signal. cpu: seconds. events: changes of files. said: what it printed."""

    status: int
    cpu: float
    events: int
    pid: int
    said: str


class Commands:
    """The other side of `serve`."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._logs: dict[int, Path] = {}
        assert self._answer()["ready"]

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def _ask(self, request: dict) -> dict:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _ended(self, answer: dict, log: Path) -> Ended:
        return Ended(**answer, said=log.read_text(errors="replace"))

    def run(self, argv: list[str], root: Path, log: Path, **moment: float) -> Ended:
        """Runs a command to its end, or to "event" or "cpu"."""
        return self._ended(self._ask({"argv": argv, "root": str(root), "log": str(log), **moment}), log)

    def begin(self, argv: list[str], root: Path, log: Path, **moment: int) -> int:
        """Starts a command and returns its pid; with "stop", when it has stopped there."""
        answer = self._ask({"argv": argv, "root": str(root), "log": str(log), **(moment or {"start": 1})})
        assert "status" not in answer, f"it did not come so far:\n{log.read_text()}"
        self._logs[answer["pid"]] = log
        return answer["pid"]

    def finish(self, pid: int, stopped: bool = False) -> Ended:
        """Waits for what `begin` started."""
        return self._ended(self._ask({"go" if stopped else "join": pid}), self._logs.pop(pid))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@cache
def commands() -> Commands:
    """One for all tests of this process."""
    made = Commands()
    atexit.register(made.close)
    return made


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    serve()
