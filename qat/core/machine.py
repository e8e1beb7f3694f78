"""Facts about the machine that figures depend on."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

INT8_FLAGS = ("avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def read_text(path: str | Path) -> str:
    """A file's text without its last line end; "" if it cannot be read, such as /proc on another system."""
    try:
        return Path(path).read_text().rstrip("\n")
    except OSError:
        return ""


def field(text: str, name: str) -> str:
    """The value of the first `name: value` line; "" if there is none."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def cores() -> list[int]:
    """One processor number for each core that this process may run on: the first of its hyper-threads."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return list(_first_of_each(tuple(sorted(allowed))))


@cache
def _first_of_each(processors: tuple[int, ...]) -> tuple[int, ...]:
    """The first processor of each core. Cached: it does not change while the machine runs, and costs one file read each."""
    first: dict[str, int] = {}
    for number in processors:
        siblings = read_text(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        first.setdefault(siblings or f"processor {number}", number)
    return tuple(first.values())


def threads_of(asked: int) -> int:
    """The number of threads for a setting: 0 means one on each core, for engines, pooling and reports."""
    return asked or len(cores())


def cpu_flags() -> set[str]:
    """The processor's instruction sets, by Linux's names; empty on other systems."""
    cpuinfo = read_text("/proc/cpuinfo")
    return set((field(cpuinfo, "flags") or field(cpuinfo, "Features")).split())


def machine_facts(threads: int) -> dict[str, Any]:
    """The processor, its integer instructions, and the number of cores that may be used.

    Args:
        threads: the backends' setting; 0 for one on each core.
    """
    cpuinfo, flags = read_text("/proc/cpuinfo"), cpu_flags()
    memory = field(read_text("/proc/meminfo"), "MemTotal").split()
    return {
        "cpu": field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(cores()),
        "threads": threads_of(threads),
        "int8_instructions": [flag for flag in INT8_FLAGS if flag in flags],
        "memory_gb": round(int(memory[0]) / 1e6, 1) if memory else None,
        "os": platform.platform(),
    }
