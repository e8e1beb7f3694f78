"""Conditions that figures depend on: threads, clocks, how busy the machine is, versions, the GPU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from qat.core.machine import cpu_flags, machine_facts, read_text
from qat.core.versions import versions

# The CPU flags that decide how fast integers and floats are multiplied.
FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512", "amx", "asimd", "fphp", "i8mm", "bf16", "sve")
THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "TBB_NUM_THREADS",
)  # fmt: skip
GPU_FIELDS = {
    "name": "name", "driver": "driver_version", "graphics_clock_mhz": "clocks.gr", "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem", "most_sm_clock_mhz": "clocks.max.sm", "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu", "memory_mb": "memory.total",
}  # fmt: skip
_SYSTEM = Path("/sys/devices/system/cpu/cpu0/cpufreq")


def _nvidia_smi(*query: str) -> list[list[str]]:
    """Lines of nvidia-smi's CSV output; empty without nvidia-smi or a GPU."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *query, "--format=csv,noheader,nounits"],  # noqa: S607  # wherever the driver has put it
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [[v.strip() for v in line.split(",")] for line in done.stdout.splitlines()] if done.returncode == 0 else []


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def gpus() -> list[dict[str, Any]]:
    """Each GPU's name, driver, clocks now and at most, power limit and memory, by nvidia-smi; empty without one."""
    lines = _nvidia_smi(f"--query-gpu={','.join(GPU_FIELDS.values())}")
    return [dict(zip(GPU_FIELDS, map(_number, line), strict=True)) for line in lines if len(line) == len(GPU_FIELDS)]


def gpu_memory_mb(pid: int | None) -> float | None:
    """GPU memory of a process, by nvidia-smi; None if nvidia-smi does not list the process (it may not in a container)."""
    lines = _nvidia_smi("--query-compute-apps=pid,used_memory")
    held = [
        value
        for who, used in (line for line in lines if len(line) == 2)
        if who == str(pid)
        for value in [_number(used)]
    ]
    numbers = [value for value in held if isinstance(value, float)]
    return sum(numbers) if numbers else None


def load_average() -> float | None:
    """Load average of the last minute; None if the system does not report it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def environment(threads: int) -> dict[str, Any]:
    """Everything except the load, which changes while the benchmark runs. threads: 0 for one on each core."""
    flags = cpu_flags()
    most = read_text(_SYSTEM / "scaling_max_freq")
    facts = machine_facts(threads) | {
        "cpu_flags": sorted(flag for flag in flags if flag.startswith(FLAGS)),
        "governor": read_text(_SYSTEM / "scaling_governor") or None,
        "most_clock_mhz": int(most) / 1e3 if most.isdigit() else None,
        "thread_variables": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "gpus": gpus(),
    }
    facts["virtual"] = "hypervisor" in flags
    return facts | {"versions": versions()}
