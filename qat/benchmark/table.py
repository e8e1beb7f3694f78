"""Prints the results as tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qat.benchmark.worker import REBUILD, WHOLE
from qat.core.console import results_console

BUSY = 0.5  # processes per core above which a machine counts as busy


def console() -> Console:
    """The terminal's width; piped output has none, and rich's 80 columns would cut the names."""
    return results_console(200)


def _table(title: str, *headings: str, left: int = 1) -> Table:
    table = Table(title=title)
    for n, heading in enumerate(headings):
        table.add_column(heading, justify="left" if n < left else "right", no_wrap=n < left)
    return table


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"


def _mb(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _times(section: Mapping[str, Any]) -> tuple[str, str, str]:
    latency = section["latency_ms"]
    return _ms(latency["median"]), _ms(latency["p90"]), _ms(latency["p99"])


def print_results(results: Mapping[str, Any]) -> None:
    """Prints two tables, end to end and by section, then the conditions that the figures depend on."""
    rows, machine, measured = results["rows"], results["machine"], results["measurement"]
    out = console()
    ends = " and ".join(dict.fromkeys(row["ends_with"] for row in rows))
    whole = _table(
        f"images to {ends}: {measured['rounds']} interleaved rounds of {measured['repeats']}, milliseconds",
        *("", "median", "p90", "p99", "frames/s", "copies", "outliers", "FP32 / it", "best FP32 / it"),
        *("peak MB", "before MB", "size MB", "build s"),
    )
    for row in rows:
        section = row["sections"][WHOLE]
        outliers = section["latency_ms"]["outliers"]
        whole.add_row(
            row["name"] + ("" if row["warm_up"]["stable"] else " *"),
            *_times(section),
            f"{section['per_second']:.2f}",
            _ms(section["transfer_ms"]),
            f"{outliers['count']} to {_ms(outliers['longest'][0])}" if outliers["count"] else "0",
            _ratio(section["speedup_vs_fp32"]),
            _ratio(section["speedup_vs_best_fp32"]),
            _mb(row["memory_peak_mb"]),
            _mb(row["memory_before_mb"]),
            _mb(section["size_mb"]),
            f"{row['build_seconds']:.1f}",
        )
    out.print(whole)
    parts = _table(
        "by section, inside the whole",
        *("section", "row", "median", "p90", "p99", "a second", "copies", "outliers", "FP32 / it", "best FP32 / it"),
        "size MB",
        left=2,
    )
    names = dict.fromkeys(name for row in rows for name in row["sections"] if name not in (WHOLE, REBUILD))
    for name in (*names, REBUILD):
        shown = [(row, row["sections"][name]) for row in rows if name in row["sections"]]
        for n, (row, section) in enumerate(shown):
            parts.add_row(
                name if n == 0 else "",
                row["name"],
                *_times(section),
                f"{section['per_second']:.1f}" if "transfer_ms" in section else "",
                _ms(section.get("transfer_ms")),
                str(section["latency_ms"]["outliers"]["count"]),
                _ratio(section["speedup_vs_fp32"]) if "transfer_ms" in section else "",
                _ratio(section["speedup_vs_best_fp32"]) if "transfer_ms" in section else "",
                _mb(section.get("size_mb")),
            )
        if shown:
            parts.add_section()
    out.print(parts)
    for left_out in results["skipped"]:
        print(f"skipped: {left_out['name']}: {left_out['why']}")
    for row in rows:
        if not row["warm_up"]["stable"]:
            print(f"* {row['name']}: latency did not settle in {row['warm_up']['runs']} warm-up runs")
    print(
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, "
        f"integer instructions {', '.join(machine['int8_instructions']) or 'none'}"
        + (f", governor {machine['governor']}" if machine["governor"] else "")
        + (", virtual machine" if machine["virtual"] else "")
    )
    for gpu in machine["gpus"]:
        print(f"GPU {gpu['name']}, driver {gpu['driver']}, SM clock {gpu['sm_clock_mhz']} MHz")
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    load = machine["load"]
    if load["before"] is not None and load["before"] > BUSY * machine["cores"]:
        print(
            f"warning: load average {load['before']} before the first row on {machine['cores']} cores: other processes use this "
            "machine; ratios still hold, milliseconds do not"
        )


def print_files(out: Path, names: tuple[str, ...]) -> None:
    """Prints where the results are."""
    for name in names:
        print(out / name)
