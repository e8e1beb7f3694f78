"""The comparison from files to results.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from qat.compare.accuracy import RowAccuracy, run_accuracy
from qat.compare.frames import describe_frame, disagreement, drawn_from, picture_size
from qat.compare.latency import measure
from qat.compare.machine import machine_facts
from qat.compare.rows import Row, Sources, load_rows
from qat.compare.sensitivity import sensitivity_section
from qat.core.command import command_line
from qat.core.console import results_console
from qat.core.errors import UserError
from qat.core.files import atomic_set, write_json
from qat.core.locks import one_writer
from qat.core.progress import progress_bar
from qat.core.provenance import tables_sha256
from qat.core.versions import versions
from qat.data import Sample
from qat.data.dataset import table_folders
from qat.engine import BACKENDS, CPU_BACKENDS, Options, described
from qat.evaluate import evaluate_detections, paired_bootstrap
from qat.evaluate.bootstrap import MIN_SCENES
from qat.report import (
    SCHEMA,
    Verdict,
    baseline_of,
    compared_row,
    decide,
    is_simulated,
    reference_of,
    row_name,
    write_report,
)

RESULTS, REPORT, CACHE = "results.json", "report.html", "cache"


@dataclass
class CompareOptions:
    """Options of the comparison.

    data, split, version, frames: the evaluation keyframes, as for `NuScenesDataset`. backends: of `qat.engine`.
    out: folder for results.json, report.html and the cache of finished keyframes. rounds, repeats, latency_frames: as
    `qat.compare.latency.measure` has them; as many of the keyframes, spread evenly, are timed. pictures: keyframes to
    draw in the report. resamples: of the scenes, for the intervals of the differences; 0 for none. model: its name in the
    results. sensitivity: a sensitivity.json of the PTQ checkpoint, for the report. engines: how they are built and run; its threads are PyTorch's and the pooling's too.
    """

    sources: Sources
    data: Path
    out: Path
    split: str = "eval"
    version: str | None = None
    frames: int | None = None
    backends: Sequence[str] = CPU_BACKENDS
    rounds: int = 10
    repeats: int = 3
    latency_frames: int = 4
    pictures: int = 2
    resamples: int = 1000
    model: str = ""
    sensitivity: Path | None = None
    engines: Options = field(default_factory=Options)


@dataclass
class Comparison:
    """results.json's content, the paths of results.json and the page, and the page's verdict."""

    results: dict[str, Any]
    results_file: Path
    report_file: Path
    verdict: Verdict


def _check(options: CompareOptions) -> None:
    for name, low in (
        ("rounds", 1),
        ("repeats", 1),
        ("latency_frames", 1),
        ("pictures", 0),
        ("resamples", 0),
    ):
        if getattr(options, name) < low:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: found {getattr(options, name)}, expected at least {low}")
    for backend in options.backends:
        if backend not in BACKENDS:
            raise UserError(f"--backends: found {backend!r}, expected some of {','.join(BACKENDS)}")


def _dataset_facts(dataset: Any, options: CompareOptions, objects: Counter[str], image: list[int]) -> dict[str, Any]:
    scenes = {dataset.nusc.get("sample", token)["scene_token"] for token in dataset.tokens}
    return {
        "name": options.data.resolve().name,
        "version": dataset.nusc.version,
        "split": dataset.split,
        "samples": len(dataset),
        "scenes": len(scenes),
        "cameras": list(dataset.cameras),
        "image_size": image,
        "objects": {name: objects[name] for name in dataset.classes},
    }


def _result_row(row: Row, accuracy: RowAccuracy, metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "backend": row.backend,
        "precision": row.precision,
        "flavour": row.flavour,
        "map": metrics["map"],
        "nds": metrics["nds"],
        "per_class_ap": metrics["per_class_ap"],
        "tp_errors": metrics["tp_errors"],
        "map_iou50": metrics["map_iou50"],
        "by_distance": metrics["by_distance"],
        "boxes_per_frame": round(metrics["boxes_per_frame"], 1),
        "size_mb": round(row.size_mb, 3),
        "sqnr_db": {name: round(value, 2) for name, value in accuracy.sqnr_db().items()},
    }


def _add_speedups(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        own = None if is_simulated(row) else baseline_of(row, rows)
        median = row["latency_ms"]["median"]
        row["speedup_vs_fp32"] = None if own is None else own["latency_ms"]["median"] / median


def _add_intervals(
    results: list[dict[str, Any]],
    accuracies: Sequence[RowAccuracy],
    dataset: Any,
    resamples: int,
    progress: Callable[[int], None],
) -> None:
    """Each row's difference to the reference, the first, with its interval over scenes."""
    others = {str(n): accuracy.detections for n, accuracy in enumerate(accuracies) if n}
    changes = paired_bootstrap(dataset, accuracies[0].detections, others, resamples, progress=progress)
    for n, intervals in changes.items():
        results[int(n)]["change"] = {metric: interval.to_json() for metric, interval in intervals.items()}


def _pictures(
    dataset: Any,
    rows: list[dict[str, Any]],
    accuracies: Sequence[RowAccuracy],
    annotated: int,
    count: int,
) -> list[dict[str, Any]]:
    reference, candidate = reference_of(rows), compared_row(rows, decide(rows))
    if candidate is None or reference is None:
        return []
    places = rows.index(reference), rows.index(candidate)
    a, b = (accuracies[place].detections for place in places)
    least = drawn_from(a.values(), annotated)
    order = sorted(dataset.tokens, key=lambda token: (-disagreement(a[token], b[token], least).total, token))
    return [
        describe_frame(dataset.load(token), a[token], b[token], places, dataset.classes, least)
        for token in order[:count]
    ]


def _provenance(
    options: CompareOptions, facts: dict[str, Any], sensitivity: dict[str, Any], tables: dict[str, str]
) -> dict[str, Any]:
    """Commands in order, each with the file it made, and the versions in which it differs from this process."""
    own = versions()
    recipe = {name: value for name, value in facts["recipe"].items() if name != "made"}
    ptq = options.sources.ptq
    made = [(ptq.name, by) for by in facts["recipe"].get("made", {}).values()] if ptq is not None else []
    made += facts["made"]
    if sensitivity:
        made.append(("sensitivity", sensitivity))
    made.append(("these results", {"command": command_line()}))
    commands = []
    for what, by in made:
        if isinstance(by, dict) and by.get("command"):
            found = by.get("versions") or {}
            others = {name: version for name, version in found.items() if own.get(name) != version}
            commands.append({"what": what, "command": by["command"], **({"versions": others} if others else {})})
    return {
        "command": command_line(),
        "commands": commands,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": own,
        "calibration": recipe,
        "files": [*facts["files"], tables],
    }


@one_writer("options.out", inside=True)
def compare(options: CompareOptions) -> Comparison:
    """Runs every row over the evaluation keyframes and writes results.json and report.html, each whole or not at all.

    Raises:
        UserError: the files, the data or the flags are wrong.
    """
    _check(options)
    if options.engines.threads:
        torch.set_num_threads(options.engines.threads)
    section: dict[str, Any] | None = None
    made: dict[str, Any] = {}
    if options.sensitivity is not None:  # read before the work begins, so that its errors come first
        section, made = sensitivity_section(options.sensitivity, options.sources.ptq)
    with progress_bar("build engines"):
        rows, facts = load_rows(options.sources, options.backends, options.engines)
    family = facts["family"]
    dataset = family.dataset(options.data, options.split, facts["config"], options.version, options.frames)
    dataset.check_annotated()
    timed = set(
        np.linspace(0, len(dataset) - 1, min(options.latency_frames, len(dataset))).round().astype(int).tolist()
    )
    timing_samples: list[Sample] = []
    objects: Counter[str] = Counter()
    image: list[int] = []

    def keep(index: int, sample: Sample) -> None:
        objects.update(dataset.classes[label] for label in sample.gt_labels)
        image[:] = picture_size(sample)
        if index in timed:
            timing_samples.append(sample)

    with progress_bar("keyframes", len(dataset)) as progress:
        accuracies, rebuilds = run_accuracy(rows, dataset, options.out / CACHE, keep, progress)
    result_rows = []
    with progress_bar("nuScenes metrics", len(rows)) as progress:
        for n, (row, accuracy) in enumerate(zip(rows, accuracies, strict=True)):
            result_rows.append(_result_row(row, accuracy, evaluate_detections(dataset, accuracy.detections, more=True)))
            progress(n + 1)
    facts_of_data = _dataset_facts(dataset, options, objects, image)
    tables = {
        "what": "dataset tables, all together",
        "file": f"{facts_of_data['name']}/{dataset.nusc.version}/*.json",
        "sha256": tables_sha256(*table_folders(dataset.nusc)),
    }
    resamples = options.resamples if facts_of_data["scenes"] >= MIN_SCENES else 0
    if resamples:
        with progress_bar("resampled scenes", len(rows)) as progress:
            _add_intervals(result_rows, accuracies, dataset, resamples, progress)
    with progress_bar("latency rounds", options.rounds) as progress:
        timings = measure(rows, timing_samples, options.rounds, options.repeats, progress)
    for result, timing in zip(result_rows, timings, strict=True):
        result["latency_ms"] = timing.summary()
        result["stages_ms"] = timing.stage_medians()
        result["stages_p95_ms"] = timing.stage_medians(95)
    _add_speedups(result_rows)
    measurement: dict[str, Any] = {
        "rounds": options.rounds,
        "repeats": options.repeats,
        "frames": len(timing_samples),
        "order": "interleaved, turned by one row each round",
        "resamples": resamples,
        "engine_options": described(options.engines, options.backends),
    }
    if rebuilds:
        measurement["pattern_rebuild_ms"] = float(np.median(rebuilds))
    results = {
        "schema": SCHEMA,
        "model": options.model or options.sources.ckpt.resolve().parent.name,
        "dataset": facts_of_data,
        "tensors": dict(rows[0].pipeline.flow.words),
        "machine": machine_facts(options.engines.threads),
        "measurement": measurement,
        "rows": result_rows,
        "frames": _pictures(dataset, result_rows, accuracies, objects.total(), options.pictures),
        "provenance": _provenance(options, facts, made, tables),
    }
    if section is not None:
        results["sensitivity"] = section
    results_file, report_file = options.out / RESULTS, options.out / REPORT
    with atomic_set(results_file, report_file) as stage:
        write_json(stage / RESULTS, results)
        verdict = write_report(stage / RESULTS, stage / REPORT)
    return Comparison(results, results_file, report_file, verdict)


def _change(row: dict[str, Any], reference: dict[str, Any], key: str) -> str:
    change = f"{row[key] - reference[key]:+.3f}"
    interval = row.get("change", {}).get(key)
    return change if interval is None else f"{change} [{interval['low']:+.3f}, {interval['high']:+.3f}]"


def print_summary(comparison: Comparison) -> None:
    """Prints the table and the verdict."""
    rows = comparison.results["rows"]
    reference = reference_of(rows)
    table = Table(title=f"{comparison.results['model']} on {comparison.results['dataset']['samples']} keyframes")
    for heading in ("", "mAP", "Δ", "NDS", "Δ", "median", "p99", "speed-up", "size", "SQNR heads"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        changes = ["", ""] if reference is None else [_change(row, reference, key) for key in ("map", "nds")]
        speed, heads = row["speedup_vs_fp32"], row["sqnr_db"].get("heads")
        latency = {} if is_simulated(row) else row["latency_ms"]
        table.add_row(
            row_name(row, rows),
            f"{row['map']:.3f}",
            changes[0],
            f"{row['nds']:.3f}",
            changes[1],
            *(f"{latency[key]:.1f} ms" if key in latency else "" for key in ("median", "p99")),
            "" if speed is None else f"{speed:.2f}×",
            f"{row['size_mb']:.1f} MB",
            "" if heads is None else f"{heads:.0f} dB",
        )
    results_console().print(table)
    print(f"{comparison.verdict.headline}. {' '.join(comparison.verdict.reasons)}")
    print(f"results: {comparison.results_file}")
    print(f"report: {comparison.report_file}")
