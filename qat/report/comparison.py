"""Two results.json → one page that sets the runs side by side: what templates/comparison.html shows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat.core.files import write_text
from qat.report.charts import class_pairs
from qat.report.schema import Results, load_results
from qat.report.sensitivity import side_by_side
from qat.report.template import render
from qat.report.verdict import MAX_LOSS, MIN_GAIN, Row, compared_row, decide, milliseconds, signed
from qat.report.words import about, in_words

MIN_CHANGE = 0.002  # of mAP or NDS; less is no difference, however many keyframes there are
# What two runs must share for their accuracies, and for their latencies, to be compared.
_DATA = ("name", "version", "split", "samples")
_MACHINE = ("cpu", "cores", "threads", "gpus", "gpu")
_TIMED = ("engine_options",)


@dataclass(frozen=True)
class RunsVerdict:
    """better: "A", "B" or None. warnings: sentences on what cannot be compared."""

    better: str | None
    headline: str
    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def _differing(a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [name for name in names if a.get(name) != b.get(name)]


def _tables_hash(results: Results) -> str | None:
    files = results.get("provenance", {}).get("files", [])
    found = (
        f.get("sha256") for f in files if isinstance(f, Mapping) and str(f.get("what", "")).startswith("dataset tables")
    )
    return next(found, None)


def _warnings(a: Results, b: Results) -> tuple[bool, bool, list[str]]:
    """Whether accuracies and whether latencies can be compared, and why not."""
    said = []
    data = _differing(a["dataset"], b["dataset"], _DATA)
    if data:
        pairs = "; ".join(f"{name} {a['dataset'].get(name)} and {b['dataset'].get(name)}" for name in data)
        said.append(f"The data differ ({pairs}): mAP and NDS of the two runs cannot be compared.")
    hashes = _tables_hash(a), _tables_hash(b)
    if not data and None not in hashes and hashes[0] != hashes[1]:
        data = ["tables"]
        said.append("The data set's tables were changed between the runs: mAP and NDS cannot be compared.")
    machine = _differing(a["machine"], b["machine"], _MACHINE)
    if machine:
        pairs = "; ".join(
            f"{name} {in_words(a['machine'].get(name))} and {in_words(b['machine'].get(name))}" for name in machine
        )
        said.append(f"The machines differ ({pairs}): latencies of the two runs cannot be compared.")
    timed = _differing(a.get("measurement", {}), b.get("measurement", {}), _TIMED)
    if timed and not machine:
        said.append("The engines were run with other options: a difference in latency may be theirs.")
    if a["model"] != b["model"]:
        said.append(f"The models differ: {a['model']} and {b['model']}.")
    return not data, not machine, said


def _told_apart(rows: Sequence[Row], key: str) -> float:
    """The least difference of a metric that two rows' keyframes tell from chance: half the wider of the intervals that each
    has against its own FP32. (There is none between the runs: the scenes were resampled in each alone.)"""
    intervals = [row.get("change", {}).get(key) for row in rows]
    return max([MIN_CHANGE, *((found["high"] - found["low"]) / 2 for found in intervals if found is not None)])


def compare_runs(a: Results, b: Results) -> RunsVerdict:
    """Which of two runs' shipped rows is the better one.

    Better is what gains accuracy (more mAP or NDS than `_told_apart`, and none of the other lost) or speed (5 %) and gives up
    neither. Where one is faster and the other more accurate, the faster is taken as long as it loses no more than a verdict
    accepts.
    """
    same_data, same_machine, warnings = _warnings(a, b)
    ships = decide(a["rows"]).ship, decide(b["rows"]).ship
    if None in ships:
        if ships == (None, None):
            return RunsVerdict(None, "Neither run has an engine to ship", [], warnings)
        better = "A" if ships[0] is not None else "B"
        other = "B" if better == "A" else "A"
        return RunsVerdict(better, f"{better} is better", [f"{other} has no engine to ship."], warnings)
    first, second = ships
    assert first is not None and second is not None
    metrics = {"mAP": "map", "NDS": "nds"}
    gains = {name: second[key] - first[key] for name, key in metrics.items()}
    least = {name: _told_apart((first, second), key) for name, key in metrics.items()}
    shares = [gains[name] / least[name] for name in metrics]  # 1 is what the keyframes just tell
    ratio = first["latency_ms"]["median"] / second["latency_ms"]["median"]
    accuracy = speed = 0  # 1 where B is the better, −1 where A is
    reasons = []
    if same_data:
        changes = " and ".join(f"{name} {signed(gain)}" for name, gain in gains.items())
        if all(abs(gain) < MIN_CHANGE for gain in gains.values()):
            reasons.append(f"Their accuracy is the same to within {MIN_CHANGE:g}.")
        elif all(abs(share) < 1 for share in shares):
            bounds = " and ".join(f"{value:.4f} {name}" for name, value in least.items())
            reasons.append(f"From A to B: {changes}; these keyframes tell no differences below {bounds}.")
        else:
            accuracy = 1 if min(shares) > -1 else -1 if max(shares) < 1 else 0
            reasons.append(f"From A to B: {changes}.")
    if same_machine:
        medians = [milliseconds(row["latency_ms"]["median"]) for row in (first, second)]
        if 1 / MIN_GAIN < ratio < MIN_GAIN:
            reasons.append(f"A frame takes as long in both: {medians[0]} and {medians[1]}.")
        else:
            speed = 1 if ratio > 1 else -1
            faster, times = ("B", ratio) if ratio > 1 else ("A", 1 / ratio)
            reasons.append(f"{faster} is {times:.2f}× as fast: {medians[0]} in A, {medians[1]} in B.")
    if not same_data and not same_machine:
        return RunsVerdict(None, "The runs cannot be compared", reasons, warnings)
    if accuracy * speed < 0:  # a trade, by the rule of the verdict itself
        lost = max(-speed * gain for gain in gains.values())
        if lost <= MAX_LOSS:
            faster = "B" if speed > 0 else "A"
            reasons.append(f"The loss of {lost:.3f} is within the {MAX_LOSS:g} that a verdict accepts for speed.")
            return RunsVerdict(faster, f"{faster} is better", reasons, warnings)
        speed = 0
    total = accuracy or speed
    if total == 0:
        mixed = same_data and any(abs(share) >= 1 for share in shares)
        return RunsVerdict(None, "Neither is clearly better" if mixed else "There is no difference", reasons, warnings)
    better = "B" if total > 0 else "A"
    return RunsVerdict(better, f"{better} is better", reasons, warnings)


def _matched(a: Sequence[Row], b: Sequence[Row]) -> list[tuple[Row | None, Row | None]]:
    """Rows of one backend, precision and flavour; in A's order, then what B has alone."""

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
    """Everything that a run's figures come from, by name."""
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
    """What a run's card shows, and the row that stands for it in the classes."""
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
    """What the template shows of two checked results."""
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
    """What to call two results: their folders where these differ, else their files, else the paths from where they part."""
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
        names: what to call them; None for their folders' names, or "A" and "B" of contents.

    Returns:
        what the page opens with.

    Raises:
        UserError: a run's results fail `qat.report.schema.check_results`, or `out` cannot be written.
    """
    checked = load_results(a), load_results(b)
    if names is None:
        names = ("A", "B") if isinstance(a, Mapping) or isinstance(b, Mapping) else run_names(a, b)
    found = compare_runs(*checked)
    write_text(out, render("comparison.html", **_shown(*checked, names, found)))
    return found
