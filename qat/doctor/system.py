"""Python, the processor, memory and disk."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from qat.core.machine import INT8_FLAGS, cores, cpu_flags, field, machine_facts, read_text
from qat.doctor.finding import MISSING, OK, PROBLEM, Finding, one_line

GROUP = "machine"
OLDEST_PYTHON = (3, 10)
LITTLE_DISK = 2 * 2**30  # bytes; a full-size model's checkpoint, exports and engines take about as much
UNLIMITED = 2**60  # bytes; version 1 of control groups has no value for "no limit"
SUMS_IN_32_BITS = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
SPOKEN = {"asimddp": "neon dotprod"}


def _numbers(path: Path) -> list[int]:
    return [int(word) for word in read_text(path).split() if word.lstrip("-").isdigit()]


def limits(root: Path = Path("/sys/fs/cgroup"), membership: str | None = None) -> tuple[float | None, int | None]:
    """The limits of the process's control group and its parents: processors (all of their time) and bytes of memory.

    None for no limit. root: where control groups are mounted. membership: the lines of /proc/self/cgroup.
    """
    processors: list[float] = []
    memory: list[int] = []
    for line in (read_text("/proc/self/cgroup") if membership is None else membership).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        own = Path(path.lstrip("/"))
        for part in (own, *own.parents):
            if not controllers:  # version 2: one hierarchy
                quota = _numbers(root / part / "cpu.max")
                memory += _numbers(root / part / "memory.max")
            else:
                quota = [
                    number
                    for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                    if "cpu" in controllers.split(",")
                    for number in _numbers(root / "cpu" / part / name)
                ]
                if controllers == "memory":
                    memory += _numbers(root / "memory" / part / "memory.limit_in_bytes")
            if len(quota) == 2 and quota[0] > 0:
                processors.append(quota[0] / quota[1])
    limit = min(memory, default=UNLIMITED)
    return min(processors, default=None), None if limit >= UNLIMITED else limit


def _physical_cores() -> int:
    """The whole machine's cores; the number of processors if the kernel does not say."""
    count = os.cpu_count() or 1
    siblings = {
        read_text(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") or f"processor {number}"
        for number in range(count)
    }
    return len(siblings)


def system_facts() -> dict[str, Any]:
    """Figures for scripts: `machine_facts`, and the share of the machine that may be used. Memory in bytes, None if unknown."""
    memory = read_text("/proc/meminfo")
    sizes = {
        key: int(words[0]) * 1024 if (words := field(memory, name).split()) else None
        for key, name in (("memory", "MemTotal"), ("memory_available", "MemAvailable"))
    }
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processor_limit, memory_limit = limits()
    facts = machine_facts(0)
    return {
        "python": platform.python_version(),
        "os": facts["os"],
        "cpu": facts["cpu"],
        "architecture": facts["architecture"],
        "cores_physical": _physical_cores(),
        "processors": os.cpu_count() or 1,
        "processors_allowed": allowed,
        "processors_limit": processor_limit,
        "cores_usable": len(cores()),
        **sizes,
        "memory_limit": memory_limit,
        "int8_instructions": [flag for flag in INT8_FLAGS if flag in cpu_flags()],
    }


def _gigabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**30:.1f} GiB"


def system_findings(facts: dict[str, Any]) -> list[Finding]:
    """`system_facts` in words."""
    old = sys.version_info[:2] < OLDEST_PYTHON
    wanted = ".".join(map(str, OLDEST_PYTHON))
    found = [
        Finding(
            GROUP,
            "Python",
            PROBLEM if old else OK,
            facts["python"] + (f", expected {wanted} or later" if old else f" in {sys.prefix}"),
            f"an environment of Python {wanted} or 3.11" if old else "",
            needed=True,
        ),
        Finding(GROUP, "system", OK, facts["os"]),
    ]
    used = [f"{facts['cores_physical']} cores, {facts['processors']} processors"]
    if facts["processors_allowed"] < facts["processors"]:
        used.append(f"this process may run on {facts['processors_allowed']}")
    if facts["processors_limit"] is not None:
        used.append(f"its control group limits it to {facts['processors_limit']:.2g}")
    found.append(Finding(GROUP, "processor", OK, f"{facts['cpu']}: {'; '.join(used)}"))
    has = facts["int8_instructions"]
    words = ", ".join(SPOKEN.get(flag, flag) for flag in has)
    if any(flag in SUMS_IN_32_BITS for flag in has):
        found.append(Finding(GROUP, "INT8", OK, words))
    elif facts["architecture"] in ("x86_64", "AMD64") or has:
        found.append(
            Finding(
                GROUP,
                "INT8",
                MISSING,
                f"{words or 'no INT8 instructions known of'}: without VNNI or dot products INT8 gains little, and u8·s8 "
                "sums saturate",
                "bevqat export-camera --reduce-range, for --flavour openvino and onnxruntime",
            )
        )
    else:
        found.append(Finding(GROUP, "INT8", MISSING, "cannot read the processor's instruction sets on this system"))
    memory = f"{_gigabytes(facts['memory'])}, {_gigabytes(facts['memory_available'])} of it free"
    if facts["memory_limit"] is not None and facts["memory_limit"] < (facts["memory"] or UNLIMITED):
        memory += f"; its control group limits this process to {_gigabytes(facts['memory_limit'])}"
    found.append(Finding(GROUP, "memory", OK, memory))
    return found


def disk_finding(name: str, folder: Path) -> Finding:
    """Whether a folder, which need not exist yet, can be written, and its free space."""
    place = folder.absolute()
    while not os.path.exists(place) and place != place.parent:  # Path.exists raises without permission
        place = place.parent
    fix = "choose another with --out" if name == "runs" else "choose another: export BEVQAT_CACHE=DIR"
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"bevqat")
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Finding(GROUP, name, PROBLEM, f"{folder}: cannot be written: {one_line(error)}", fix, needed=True)
    if free < LITTLE_DISK:
        return Finding(
            GROUP, name, PROBLEM, f"{folder}: {_gigabytes(free)} free, which may not be enough", fix, needed=True
        )
    return Finding(GROUP, name, OK, f"{folder}: {_gigabytes(free)} free", needed=True)
