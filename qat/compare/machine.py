"""Facts about the machine that figures depend on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

INT8_FLAGS = ("avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def machine_facts(threads: int) -> dict[str, Any]:
    """The processor, its integer instructions, how much of it may be used.

    Args:
        threads: what the backends were told to take; 0 for all cores.
    """
    cpuinfo = _read("/proc/cpuinfo")
    flags = set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features")).split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = _field(_read("/proc/meminfo"), "MemTotal").split()
    return {
        "cpu": _field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": cores,
        "threads": threads or cores,
        "torch_threads": torch.get_num_threads(),
        "int8_instructions": [flag for flag in INT8_FLAGS if flag in flags],
        "memory_gb": round(int(memory[0]) / 1e6, 1) if memory else None,
        "os": platform.platform(),
    }
