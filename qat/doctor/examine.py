"""All checks, and their results as findings."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qat.doctor import packages, probes, system
from qat.doctor.finding import MISSING, OK, PROBLEM, Finding, one_line

IMPORTS = {"numpy": "numpy", "torch": "torch", "onnx": "onnx", "numba": "numba", "rich": "rich", "yaml": "PyYAML"}
Ask = Callable[[Sequence[str]], Mapping[str, probes.Answer]]


@dataclass
class Report:
    """findings: for people, in order. facts: the same for scripts; docs/commands.md lists the keys."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the main job, from calibrate to compare on the CPU, works here."""
        return all(found.state == OK for found in self.findings if found.needed)

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        return {"passed": self.passed, "findings": [asdict(found) for found in self.findings], **self.facts}


def cache_folder() -> Path:
    """The folder of cached engines, as in `qat.engine.Options`, which needs numpy."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("BEVQAT_CACHE") or Path(base) / "bevqat")


def _backend_names() -> tuple[Sequence[str], Sequence[str], str]:
    """(all, those that the main job needs, reason if they are unknown)."""
    try:
        from qat.engine import BACKENDS, CPU_BACKENDS
    except Exception as error:  # numpy is missing or broken, in whatever way
        return (), (), one_line(error)
    return tuple(BACKENDS), CPU_BACKENDS, ""


def _backend_finding(name: str, told: Mapping[str, Any], needed: bool, gpu: bool, want: packages.Wanted) -> Finding:
    """A backend's answer, with the command that installs what it needs."""
    if told["state"] == OK:
        return Finding("backends", name, OK, told["found"], needed=needed)
    package = told.get("package", "")
    fix = told.get("fix", "").removeprefix("fix by: ")
    extra = next(
        (extra for extra, wanted in want.extras.items() if package in (packages.name_of(each) for each in wanted)), ""
    )
    if extra:
        # Except for ONNX Runtime: the extra does not work next to the CPU build, which has the same modules.
        if package not in packages.STANDS_FOR.values():
            fix = packages.pip_line(extra=extra)
        if not gpu:
            fix = f"an NVIDIA GPU with its driver, then: {fix}"
    elif needed and package:
        fix = packages.pip_line(*(each for each in want.core if packages.name_of(each) == package))
    return Finding("backends", name, told["state"], told["found"], fix, needed)


def examine(out: Path = Path("runs"), ask: Ask = probes.ask) -> Report:
    """Examines this machine. Missing or broken packages never raise.

    Args:
        out: where results will go.
        ask: runs the checks of `probes`; `ask` runs them in their own processes.
    """
    want = packages.wanted()
    names, needed, unknown = _backend_names()
    modules = [f"import:{name}" for name in IMPORTS if name != "torch"]
    # Side by side: torch takes as long as all the others.
    batches = (["import:torch"], [*modules, *(f"backend:{name}" for name in names), "tensorrt", "cuda"], ["nvidia-smi"])
    with ThreadPoolExecutor(len(batches)) as pool:
        asked = [pool.submit(ask, batch) for batch in batches]
        facts = system.system_facts()
        findings = system.system_findings(facts)
        told = {question: each for batch in asked for question, each in batch.result().items()}
    gpu = told["nvidia-smi"]
    has_gpu = OK in (gpu["state"], told["cuda"]["state"])
    words = gpu["found"] if gpu["state"] != MISSING or not has_gpu else told["cuda"]["found"]
    findings.append(
        Finding(
            system.GROUP,
            "GPU",
            OK if has_gpu else gpu["state"],
            words if has_gpu else f"{words}; the CPU backends need none",
            "NVIDIA's driver: nvidia-smi must list the GPU" if gpu["state"] == PROBLEM else "",
        )
    )
    findings += [system.disk_finding("runs", out), system.disk_finding("cache", cache_folder())]
    findings += packages.package_findings(want)
    for module, package in IMPORTS.items():
        answer = told[f"import:{module}"]
        fix = packages.pip_line("--force-reinstall", *(e for e in want.core if packages.name_of(e) == package))
        if answer["state"] != OK:
            state = answer["state"]
            fix = fix.replace("--force-reinstall ", "") if state == MISSING else fix
            findings.append(Finding("imports", module, state, answer["found"], fix, needed=True))
        else:
            findings.append(Finding("imports", module, OK, answer["found"], needed=True))
    if unknown:
        findings.append(
            Finding("backends", "all", PROBLEM, f"could not be checked: {unknown}", "fix the packages above", True)
        )
    for name in names:
        findings.append(_backend_finding(name, told[f"backend:{name}"], name in needed, has_gpu, want))
    tensorrt = told["tensorrt"]
    if tensorrt["state"] != MISSING:  # otherwise the backend's line reports it
        findings.append(Finding("backends", "TensorRT", tensorrt["state"], tensorrt["found"], tensorrt.get("fix", "")))
    return Report(
        findings,
        {
            "machine": facts,
            "gpus": gpu.get("gpus", []),
            "torch_cuda": told["import:torch"].get("cuda"),
            "tensorrt": {key: tensorrt.get(key) for key in ("version", "flavours")},
            "packages": {packages.name_of(each): packages.installed(packages.name_of(each)) for each in want.core},
            "backends": {
                name: {
                    "available": (each := told[f"backend:{name}"])["state"] == OK,
                    "version": each.get("version") or None,
                    "device": each.get("device"),
                    "why_not": None if each["state"] == OK else each["found"],
                }
                for name in names
            },
        },
    )
