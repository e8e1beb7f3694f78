"""Checks that could crash or hang their process: imports of native libraries, backends, drivers.

`ask` runs them one after the other in separate processes; if a process dies, the check that it was running fails, and
the others run in a new process.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qat.doctor.finding import MISSING, OK, PROBLEM, one_line

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 60.0  # seconds for one process; a cold disk takes half a minute to load torch
START = f"import sys; sys.path[0] = {str(ROOT)!r}; from qat.doctor.probes import main; main(sys.argv[1:])"
Answer = dict[str, Any]  # "state", "found", and more results of a check


def _import(name: str) -> Answer:
    """Whether a package imports, and its version."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name or f"import of {name} halted" in str(error):
            return {"state": MISSING, "found": "not installed"}
        return {"state": PROBLEM, "found": f"does not import: {one_line(error)}"}
    answer: Answer = {"state": OK, "found": f"{getattr(module, '__version__', '')} imports".strip()}
    if name == "torch":
        answer["cuda"] = module.version.cuda
        answer["found"] += f", built for CUDA {module.version.cuda}" if module.version.cuda else ", built for the CPU"
    return answer


def _backend(name: str) -> Answer:
    """Whether a backend of `qat.engine` runs here, on which device, or why not."""
    from qat.core.errors import UserError
    from qat.engine import BACKENDS, identify

    backend = BACKENDS[name]
    answer: Answer = {"version": backend.version, "device": None, "package": backend.install}
    try:
        device = identify(name).name
    except UserError as error:
        found, _, fix = str(error).partition("; ")
        return {**answer, "state": MISSING, "found": found, "fix": fix}
    return {**answer, "state": OK, "found": f"{backend.version} on {device}", "device": device}


def _tensorrt(_: str) -> Answer:
    """TensorRT's version, and the export flavours that it accepts."""
    from qat.core.errors import UserError
    from qat.engine.tensorrt_capabilities import Capabilities, tensorrt_module

    try:
        has = Capabilities(tensorrt_module())
    except UserError as error:
        state = MISSING if "is not installed" in str(error) else PROBLEM
        found, _, fix = str(error).partition("; ")
        return {"state": state, "found": found, "fix": fix}
    flavours = [
        name for name, takes in (("tensorrt", has.weak_typing), ("tensorrt-strong", has.strong_typing)) if takes
    ]
    return {
        "state": OK if flavours else PROBLEM,
        "found": f"{has.version} accepts the flavours {', '.join(flavours) or 'none'}",
        "version": has.version,
        "flavours": flavours,
    }


def _cuda(_: str) -> Answer:
    """The GPU as CUDA's runtime reports it, through cuda-bindings."""
    from qat.core.errors import UserError
    from qat.engine.cuda import use_device

    try:
        device = use_device(0)
    except UserError as error:
        found, _, fix = str(error).partition("; ")
        return {"state": MISSING, "found": found, "fix": fix}
    return {
        "state": OK,
        "found": f"{device.name}, compute capability {device.capability}, driver for CUDA {device.driver}",
        "capability": device.capability,
    }


def _nvidia_smi(_: str) -> Answer:
    """The GPUs as NVIDIA's driver reports them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"state": MISSING, "found": "no nvidia-smi: no NVIDIA driver is installed", "gpus": []}
    keys = ("name", "driver_version", "compute_cap", "memory.total")
    done = subprocess.run(
        [tool, f"--query-gpu={','.join(keys)}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    if done.returncode:
        words = " ".join((done.stdout + done.stderr).split())[:200]
        return {"state": PROBLEM, "found": f"nvidia-smi: {words or f'exit status {done.returncode}'}", "gpus": []}
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    gpus = [dict(zip(("name", "driver", "capability", "memory_mib"), row, strict=False)) for row in rows]
    if not gpus:
        return {"state": MISSING, "found": "the driver finds no GPU", "gpus": []}
    words = "; ".join(
        f"{gpu['name']}, compute capability {gpu.get('capability', '?')}, driver {gpu.get('driver', '?')}"
        for gpu in gpus
    )
    return {"state": OK, "found": words, "gpus": gpus}


KINDS: dict[str, Callable[[str], Answer]] = {
    "import": _import,
    "backend": _backend,
    "tensorrt": _tensorrt,
    "cuda": _cuda,
    "nvidia-smi": _nvidia_smi,
}


def answer(question: str) -> Answer:
    """Runs a check in this process. question: a key of KINDS, with ":" and a name if required. Never raises an `Exception`."""
    kind, _, name = question.partition(":")
    try:
        return KINDS[kind](name)
    except Exception as error:
        return {"state": PROBLEM, "found": one_line(error)}


def main(questions: Sequence[str]) -> None:
    """The child's side: writes one answer per line to the original stdout; output of libraries goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for question in questions:
        json.dump({"question": question, **answer(question)}, answers)
        answers.write("\n")
        answers.flush()
    answers.close()
    os._exit(0)  # a library that crashes during shutdown has already answered


def _died(code: int, words: str) -> str:
    name = f"status {code}"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
    return f"crashes the process that uses it: {name}{': ' + words if words else ''}"


def ask(questions: Sequence[str], timeout: float = TIMEOUT) -> dict[str, Answer]:
    """The results of all checks, run in their own processes. timeout: seconds for all checks of one process."""
    found: dict[str, Answer] = {}
    left = list(questions)
    while left:
        blame = ""
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            child = subprocess.Popen([sys.executable, "-c", START, *left], stdout=output, stderr=errors)
            try:
                child.wait(timeout)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                blame = f"timed out after {timeout:.0f} s"
            except BaseException:
                child.kill()
                child.wait()
                raise
            output.seek(0)
            errors.seek(0)
            lines = output.read().decode(errors="replace").splitlines()
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
        for line in lines:
            try:
                told = json.loads(line)
            except ValueError:  # cut off
                continue
            found[told.pop("question")] = told
        left = [question for question in left if question not in found]
        if left:
            words = blame or _died(child.returncode, " ".join(last)[:200])
            found[left.pop(0)] = {"state": PROBLEM, "found": words}
    return found
