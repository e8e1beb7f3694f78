"""Content of the page that compares two results.json, for templates/comparison.html."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qat.core.files import write_text
from qat.report.charts import class_pairs
from qat.report.runs import RunsVerdict, compare_runs
from qat.report.schema import Results, load_results
from qat.report.sensitivity import side_by_side
from qat.report.template import render
from qat.report.verdict import Row, compared_row, decide
from qat.report.words import about, in_words


def _matched(a: Sequence[Row], b: Sequence[Row]) -> list[tuple[Row | None, Row | None]]:
    """Pairs of rows with the same backend, precision and flavour, in A's order; then rows that only B has."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["backend"], row["precision"], row.get("flavour")

    second = {key(row): row for row in b}
    pairs: list[tuple[Row | None, Row | None]] = [(row, second.get(key(row))) for row in a]
    first = {key(row) for row in a}
    return [*pairs, *((None, row) for row in b if key(row) not in first)]


def _flat(value: Any, path: str, into: dict[str, str]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _flat(item, f"{path} {key}".strip(), into)
    elif value not in (None, "", []):
        into[path.replace("_", " ")] = in_words(value)


def _origin(results: Results) -> dict[str, str]:
    """Everything that a run's figures depend on, by name."""
    found: dict[str, str] = {}
    provenance = results.get("provenance", {})
    for name in ("dataset", "machine", "measurement"):
        _flat({key: value for key, value in results.get(name, {}).items() if key != "pattern_rebuild_ms"}, name, found)
    for name in ("versions", "calibration"):
        _flat(provenance.get(name, {}), name, found)
    for entry in provenance.get("commands") or []:
        found[f"command: {entry['what']}"] = entry["command"]
    if not provenance.get("commands") and provenance.get("command"):
        found["command: these results"] = str(provenance["command"])
    for file in provenance.get("files", []):
        if isinstance(file, Mapping):
            name = str(file.get("file", "")).rpartition("/")[2]
            found[f"sha256: {file.get('what', '')} {name}"] = str(file.get("sha256", ""))[:16]
    found["model"] = str(results["model"])
    return found


def _run(letter: str, name: str, results: Results) -> dict[str, Any]:
    """The content of a run's card, and the row that represents it in the classes."""
    rows, verdict = results["rows"], decide(results["rows"])
    return {
        "letter": letter,
        "style": f"run-{letter.lower()}",
        "name": name,
        "headline": verdict.headline,
        "ship": verdict.ship,
        "about": about(results),
        "rows": rows,
        "compared": verdict.ship or compared_row(rows, verdict) or rows[0],
    }


def _shown(a: Results, b: Results, names: tuple[str, str], found: RunsVerdict) -> dict[str, Any]:
    """The template's values for two checked results."""
    runs = [_run(letter, name, own) for letter, name, own in zip("AB", names, (a, b), strict=True)]
    pairs = _matched(a["rows"], b["rows"])
    first, second = (run["compared"] for run in runs)
    classes = list(dict.fromkeys([*first["per_class_ap"], *second["per_class_ap"]]))
    origins = _origin(a), _origin(b)
    origin_names = list(dict.fromkeys([*origins[0], *origins[1]]))
    differ = [name for name in origin_names if origins[0].get(name) != origins[1].get(name)]
    first_section, second_section = a.get("sensitivity"), b.get("sensitivity")
    return {
        "names": names,
        "found": found,
        "runs": runs,
        "ships": [run["ship"] for run in runs],
        "pairs": pairs,
        "both": [pair for pair in pairs if None not in pair],
        "shown_rows": [before or after for before, after in pairs],
        "class_names": classes,
        "class_pairs": class_pairs(classes, first, second),
        "units": side_by_side(first_section, second_section) if first_section and second_section else None,
        "origins": origins,
        "differ": differ,
        "same": len(origin_names) - len(differ),
    }


def run_names(a: str | Path, b: str | Path) -> tuple[str, str]:
    """Names for two results: their folders if these differ, else their files, else the paths from where they differ."""
    paths = Path(a), Path(b)
    for pick in (lambda path: path.resolve().parent.name, lambda path: path.stem):
        names = pick(paths[0]), pick(paths[1])
        if names[0] != names[1] and all(names):
            return names
    whole = paths[0].resolve().parts, paths[1].resolve().parts
    shared = len(os.path.commonpath([Path(*whole[0]), Path(*whole[1])]).split(os.sep))
    shared = min(shared, len(whole[0]) - 1, len(whole[1]) - 1)
    return "/".join(whole[0][shared:]), "/".join(whole[1][shared:])


def write_comparison(
    a: Mapping[str, Any] | str | Path,
    b: Mapping[str, Any] | str | Path,
    out: str | Path,
    names: tuple[str, str] | None = None,
) -> RunsVerdict:
    """Writes the page of two runs (results.json, or their content) to `out`, whole or not at all.

    Args:
        names: their names; None for their folders' names, or "A" and "B" for contents.

    Returns:
        the page's verdict.

    Raises:
        UserError: a run's results fail `qat.report.schema.check_results`, or `out` cannot be written.
    """
    checked = load_results(a), load_results(b)
    if names is None:
        names = ("A", "B") if isinstance(a, Mapping) or isinstance(b, Mapping) else run_names(a, b)
    found = compare_runs(*checked)
    write_text(out, render("comparison.html", **_shown(*checked, names, found)))
    return found
