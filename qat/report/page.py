"""Content of the self-contained HTML page of a results.json, for templates/report.html."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qat.core.files import write_text
from qat.core.locks import one_writer
from qat.report.charts import class_pairs, driver_view, scatter
from qat.report.schema import Results, load_results
from qat.report.sensitivity import sensitivity
from qat.report.template import render
from qat.report.verdict import (
    Row,
    Verdict,
    baseline_of,
    compared_row,
    decide,
    is_simulated,
    milliseconds,
    reference_of,
    row_name,
    signed,
)
from qat.report.words import about, in_words, keys_of, only_in, spaced

_TP_NAMES = {
    "trans_err": "mATE, m",
    "scale_err": "mASE",
    "orient_err": "mAOE, rad",
    "vel_err": "mAVE, m/s",
    "attr_err": "mAAE",
}


def _headline_figures(ship: Row | None, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The shipped row's latency, speed-up, mAP and NDS, each with a description."""
    if ship is None:
        return []
    own, reference = baseline_of(ship, rows), reference_of(rows)
    median = ship["latency_ms"]["median"]
    found = [(milliseconds(median), "a frame")]
    if own is not None and own is not ship:
        before = own["latency_ms"]["median"]
        found = [
            (milliseconds(median), f"a frame; FP32 {milliseconds(before)}"),
            (f"{before / median:.2f}×", f"the speed of {row_name(own, rows)}"),
        ]
    for name, key in (("mAP", "map"), ("NDS", "nds")):
        against = "" if reference in (None, ship) else f"; {signed(ship[key] - reference[key])} against FP32"
        found.append((f"{ship[key]:.3f}", name + against))
    return found


def _spread(rows: Sequence[Row]) -> str:
    samples = sorted({int(row["latency_ms"]["samples"]) for row in rows})
    count = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    noise = statistics.median(row["latency_ms"]["p99"] / row["latency_ms"]["median"] for row in rows)
    return f"Bar: median of {count} runs; whisker: 99th percentile, {noise:.2f}× the median for the middle row."


def _commands(provenance: Results) -> dict[tuple[str, str], list[str]]:
    """The commands that made the files and these results, each once, with its result and the versions that it ran with."""
    listed = provenance.get("commands") or []
    if not listed and provenance.get("command"):  # written before every file recorded its command
        listed = [{"what": "these results", "command": str(provenance["command"])}]
    made: dict[tuple[str, str], list[str]] = {}
    for entry in listed:
        made.setdefault((entry["command"], in_words(entry.get("versions", {}))), []).append(entry["what"])
    return made


def _shown(results: Results, verdict: Verdict) -> dict[str, Any]:
    """The template's values for checked results."""
    rows, provenance = results["rows"], results.get("provenance", {})
    reference, compared = reference_of(rows), compared_row(rows, verdict)
    measured = [row for row in rows if not is_simulated(row)]
    engines = measured or rows  # a simulation's time is unrelated to that of the simulated engine
    pairs = [] if reference is None or compared is None else class_pairs(reference["per_class_ap"], reference, compared)
    errors = [key for key in _TP_NAMES if any(row.get("tp_errors", {}).get(key) is not None for row in rows)]
    section = results.get("sensitivity")
    frames = [
        {**frame, "number": n + 1, "only": only_in(frame, rows), "cameras": driver_view(frame["cameras"])}
        for n, frame in enumerate(results.get("frames") or [])
    ]
    words = results.get("tensors")
    words = words if isinstance(words, Mapping) else {}
    return {
        "results": results,
        "rows": rows,
        "verdict": verdict,
        "ship": verdict.ship,
        "reference": reference,
        "compared": compared,
        "engines": engines,
        "simulated": len(measured) < len(rows),
        "about": ["bevqat", *about(results)],
        "headline_figures": _headline_figures(verdict.ship, rows),
        "spread": _spread(engines),
        "chart": scatter(engines),
        "measured_rows": measured,
        "stage_names": keys_of(measured, "stages_ms"),
        "class_pairs": pairs,
        "errors": {key: _TP_NAMES[key] for key in errors},
        "distances": keys_of(rows, "by_distance"),
        "tensors": {name: str(words.get(name, spaced(name))) for name in keys_of(rows, "sqnr_db")},
        "units": sensitivity(section) if section else None,
        "frames": frames,
        "commands": _commands(provenance),
        "run": {key: value for key, value in provenance.items() if key not in ("command", "commands", "files")},
        "files": [file for file in provenance.get("files", []) if isinstance(file, Mapping)],
    }


@one_writer("out")
def write_report(results: Mapping[str, Any] | str | Path, out: str | Path) -> Verdict:
    """Writes the page of `results` (a results.json or its content) to `out`, whole or not at all.

    Returns:
        the page's verdict.

    Raises:
        UserError: the results fail `qat.report.schema.check_results`, or `out` cannot be written.
    """
    checked = load_results(results)
    verdict = decide(checked["rows"])
    write_text(out, render("report.html", **_shown(checked, verdict)))
    return verdict
