"""The benchmark from folders to benchmark.json, benchmark.csv and benchmark.svg."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from qat.benchmark.environment import environment, gpu_memory_mb, load_average
from qat.benchmark.plan import Planned, plan
from qat.benchmark.plot import draw
from qat.benchmark.statistics import summary
from qat.benchmark.worker import MOST_RUNS, MOST_SECONDS, REBUILD, STABLE, WHOLE, WINDOW, RowSpec, Worker, start_row
from qat.core.errors import UserError
from qat.core.files import atomic_set, write_json, write_text
from qat.core.locks import one_writer
from qat.core.progress import Done, progress_bar
from qat.core.rounds import turned
from qat.engine import Options, described
from qat.families import flow_of
from qat.manifest import FILE
from qat.runtime.engines import run_options

FORMAT, SCHEMA = "bevqat-benchmark", 1
NAME = "benchmark"  # of the three files
Results = dict[str, Any]
CSV_FIELDS = (
    *("row", "backend", "precision", "flavour", "section", "median_ms", "p90_ms", "p99_ms", "mean_ms", "samples"),
    *("per_second", "transfer_ms", "outliers", "speedup_vs_fp32", "speedup_vs_best_fp32"),
    *("size_mb", "memory_peak_mb"),
)


@dataclass
class BenchmarkOptions:
    """Options of the benchmark.

    folders: of exported parts, or of engines. backends: of `qat.engine`; None for those that every machine has. data, split,
    version: keyframes of a nuScenes-format data set; without data, generated frames. frames: how many. rounds, repeats: in
    each round every row runs one frame, `repeats` counted times. engine: threads and what else engines are built and run with; where it
    has no cache, each row is rebuilt. Built engines run with their stored options, except for fields that differ from the default ones
    (`qat.runtime.engines.run_options`). out: folder for the results. command: for the record.
    """

    folders: Sequence[Path]
    out: Path
    backends: Sequence[str] | None = None
    data: Path | None = None
    split: str = "all"
    version: str | None = None
    frames: int = 4
    rounds: int = 20
    repeats: int = 3
    engine: Options = field(default_factory=lambda: Options(cache=None))
    command: str = ""


def _check(options: BenchmarkOptions) -> None:
    for name, low in (("rounds", 1), ("repeats", 1), ("frames", 1)):
        if getattr(options, name) < low:
            raise UserError(f"--{name}: found {getattr(options, name)}, expected at least {low}")


def _frames(options: BenchmarkOptions, settings: Mapping[str, Any]) -> list[Any]:
    flow = flow_of(settings)
    if options.data is None:
        return flow.raw_frames(options.frames)
    return flow.recorded(options.data, options.split, options.version, options.frames)


@dataclass
class _Row:
    planned: Planned
    worker: Worker
    described: dict[str, Any] = field(default_factory=dict)
    warm_up: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)
    finished: dict[str, Any] = field(default_factory=dict)


def _start(
    planned: Sequence[Planned], options: BenchmarkOptions, skipped: list[dict[str, str]], done: Done
) -> list[_Row]:
    """Builds and warms up each row, one after the other; rows that a backend refuses are left out and reported."""
    rows: list[_Row] = []
    inputs: dict[str, list[Any]] = {}
    try:
        for n, entry in enumerate(planned):
            done(n, entry.name)
            settings = entry.manifest["pipeline"]
            key = json.dumps(settings, sort_keys=True)
            if key not in inputs:
                inputs[key] = _frames(options, settings)
            row = _Row(entry, start_row(RowSpec(entry.name, entry.folder, entry.backend, options.engine), inputs[key]))
            rows.append(row)
            try:
                row.described = row.worker.described()
                row.warm_up = row.worker.ask("warm_up")
            except UserError as error:
                rows.pop().worker.close()
                skipped.append({"name": entry.name, "why": str(error)})
    except BaseException:
        _stop(rows)
        raise
    if not rows:
        raise UserError(skipped[-1]["why"])
    return rows


def _stop(rows: Sequence[_Row]) -> None:
    for row in rows:
        row.worker.close()


def _measure(rows: Sequence[_Row], options: BenchmarkOptions, done: Done) -> None:
    """Gives every row one turn in each round; the order rotates by one place each round."""
    for turn in range(options.rounds):
        for row in turned(rows, turn):
            row.turns.append(row.worker.ask("turn", turn, options.repeats))
        done(turn + 1)
    for row in rows:
        on_gpu = gpu_memory_mb(row.worker.pid)
        row.finished = row.worker.ask("finish")
        row.finished["memory"]["memory_gpu_mb"] = on_gpu


def _times(row: _Row) -> dict[str, list[list[float]]]:
    """Milliseconds of each section, by round, in the order of a frame's path."""
    sections = {name: [[t[name] for t in turn["times"]] for turn in row.turns] for name in row.turns[0]["times"][0]}
    if REBUILD in row.turns[0]:
        sections[REBUILD] = [[turn[REBUILD]] for turn in row.turns]
    return sections


def _row_options(entry: Planned, options: Options) -> dict[str, Any]:
    """The options the row was built and run with."""
    if entry.built:
        options = run_options(entry.manifest["engine"], options, entry.folder / FILE)
    return described(options, [entry.backend], [entry.precision])


def _result_row(row: _Row, options: Options) -> dict[str, Any]:
    entry, parts = row.planned, row.finished["parts"]
    sections: dict[str, Any] = {}
    for name, rounds in _times(row).items():
        latency = summary(rounds)
        section: dict[str, Any] = {"latency_ms": latency, "per_second": round(1e3 / max(latency["mean"], 1e-6), 3)}
        if name == WHOLE or name in parts:
            moved = [t.get(name, 0.0) for turn in row.turns for t in turn["transfers"]]
            section["transfer_ms"] = round(float(np.median(moved)), 4)
        if name in parts:
            section["size_mb"] = parts[name]["size_mb"]
        section["rounds_ms"] = [[round(t, 4) for t in values] for values in rounds]
        sections[name] = section
    sections[WHOLE]["size_mb"] = round(sum(part["size_mb"] for part in parts.values()), 4)
    return {
        "name": entry.name,
        "backend": entry.backend,
        "precision": entry.precision,
        "flavour": entry.flavour,
        "folder": entry.folder.name,
        "ends_with": "boxes" if flow_of(entry.manifest["pipeline"]).plan.boxes else "BEV features",
        "files": {name: part["sha256"] for name, part in entry.manifest["parts"].items()},
        "options": _row_options(entry, options),
        "build_seconds": row.described["build_seconds"],
        **row.finished["memory"],
        "memory_before_mb": row.described["memory_before_mb"],
        "size_of": next(iter(parts.values()))["size_of"],
        "warm_up": row.warm_up,
        "sections": sections,
    }


def _add_speedups(rows: Sequence[dict[str, Any]]) -> None:
    """Speedups over FP32 on the same backend, and over the fastest FP32 row, section by section."""
    for row in rows:
        for name, section in row["sections"].items():
            floats = [r for r in rows if r["precision"] == "fp32" and name in r["sections"]]

            def best(others: Sequence[dict[str, Any]], name: str = name, section: Any = section) -> float | None:
                medians = [other["sections"][name]["latency_ms"]["median"] for other in others]
                median = section["latency_ms"]["median"]
                return round(min(medians) / median, 4) if medians and median > 0 else None

            section["speedup_vs_fp32"] = best([r for r in floats if r["backend"] == row["backend"]])
            section["speedup_vs_best_fp32"] = best(floats)


def csv_text(results: Results) -> str:
    """A line for each row's section, with the figures of benchmark.json."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in results["rows"]:
        for name, section in row["sections"].items():
            latency = section["latency_ms"]
            writer.writerow(
                {
                    "row": row["name"],
                    **{key: row[key] for key in ("backend", "precision", "flavour")},
                    "section": name,
                    **{f"{key}_ms": latency[key] for key in ("median", "p90", "p99", "mean")},
                    "samples": latency["samples"],
                    "per_second": section["per_second"],
                    "transfer_ms": section.get("transfer_ms"),
                    "outliers": latency["outliers"]["count"],
                    "speedup_vs_fp32": section["speedup_vs_fp32"],
                    "speedup_vs_best_fp32": section["speedup_vs_best_fp32"],
                    "size_mb": section.get("size_mb"),
                    "memory_peak_mb": row["memory_peak_mb"] if name == WHOLE else None,
                }
            )
    return stream.getvalue()


@one_writer("options.out", inside=True)
def benchmark(options: BenchmarkOptions) -> Results:
    """Measures every row and writes OUT/benchmark.json, .csv and .svg, each whole, after the last round.

    Raises:
        UserError: the folders, the data or the flags are wrong, or no backend accepts any row.
    """
    _check(options)
    planned, skipped = plan(options.folders, options.backends)
    threads = options.engine.threads
    facts, before = environment(threads), load_average()
    with progress_bar("build and warm up", len(planned)) as done:
        rows = _start(planned, options, skipped, done)
    try:
        with progress_bar("rounds", options.rounds) as done:
            _measure(rows, options, done)
    finally:
        _stop(rows)
    after = environment(threads)
    result_rows = [_result_row(row, options.engine) for row in rows]
    _add_speedups(result_rows)
    results: Results = {
        "format": FORMAT,
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": options.command,
        "machine": facts | {"load": {"before": before, "after": load_average()}, "gpus_after": after["gpus"]},
        "measurement": {
            "rounds": options.rounds,
            "repeats": options.repeats,
            "frames": options.frames,
            "inputs": "made up, seed 0" if options.data is None else f"{options.data.resolve().name}:{options.split}",
            "order": "interleaved, turned by one row each round; one run of a turn is not counted",
            "warm_up": f"until the medians of two windows of {WINDOW} runs differ by at most {STABLE:.0%}, "
            f"{MOST_RUNS} runs or {MOST_SECONDS:g} s",
            "memory": "VmHWM of the row's own process after its last run; before: the same before it built anything",
            "options": described(options.engine, {p.backend for p in planned}, {p.precision for p in planned}),
            "built": "anew" if options.engine.cache is None else "or taken from the engine cache",
        },
        "rows": result_rows,
        "skipped": skipped,
    }
    with atomic_set(*(options.out / f"{NAME}.{kind}" for kind in ("json", "csv", "svg"))) as stage:
        write_json(stage / f"{NAME}.json", results)
        write_text(stage / f"{NAME}.csv", csv_text(results))
        write_text(stage / f"{NAME}.svg", draw(results))
    return results
