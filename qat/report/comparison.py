"""Two results.json → one page that sets the runs side by side: which is better, by how much, and what differs besides."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from qat.core.files import write_text
from qat.report.charts import precision_class
from qat.report.page import document
from qat.report.schema import Results, load_results
from qat.report.sensitivity import side_by_side
from qat.report.tables import MISSING, Cell, change, in_words, name_cell, optional, plain, table, timed
from qat.report.verdict import MAX_LOSS, MIN_GAIN, Row, Verdict, compared_row, decide, milliseconds, row_name, signed

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


def _both(pair: tuple[Row | None, Row | None], key: str) -> tuple[float | None, float | None]:
    a, b = (None if row is None else row[key] for row in pair)
    return a, b


def _difference(values: tuple[float | None, float | None]) -> Cell:
    return MISSING if values[0] is None or values[1] is None else change(values[1] - values[0])


def _rows_table(pairs: Sequence[tuple[Row | None, Row | None]], ships: tuple[Row | None, Row | None]) -> str:
    shown = [row for pair in pairs if (row := pair[0] or pair[1]) is not None]
    heads = ["Backend and precision", "mAP, A", "mAP, B", "Δ mAP", "NDS, A", "NDS, B", "Δ NDS"]
    heads += ["Median, A", "Median, B", "Δ", "B's speed"]
    body = []
    for row, pair in zip(shown, pairs, strict=True):
        accuracies = [_both(pair, key) for key in ("map", "nds")]
        before, after = (None if own is None else timed(own["latency_ms"]["median"], own) for own in pair)
        cells = [name_cell(row, shown)]
        for values in accuracies:
            cells += [*(optional(value, "{:.3f}".format) for value in values), _difference(values)]
        cells += [optional(value, milliseconds) for value in (before, after)]
        if before is None or after is None:
            cells += [MISSING] * 2
        else:
            by = after - before
            cells.append((f"{'−' if by < 0 else '+'}{milliseconds(abs(by))}", by))
            cells.append((f"{before / after:.2f}×", before / after))
        shipped = any(own is not None and own is ship for own, ship in zip(pair, ships, strict=True))
        body.append(("ship" if shipped else "", cells))
    return table(heads, body)


def _classes(a: Results, b: Results, ships: tuple[Row | None, Row | None]) -> str:
    """Each class's AP of the rows that the verdicts are about, as a pair of bars, and the change of every matched row."""
    shown = [
        ship or compared_row(own["rows"], decide(own["rows"])) or own["rows"][0]
        for ship, own in zip(ships, (a, b), strict=True)
    ]
    names = list(dict.fromkeys([*shown[0]["per_class_ap"], *shown[1]["per_class_ap"]]))
    if not names:
        return ""
    parts = []
    for name in sorted(names, key=lambda name: (-(shown[0]["per_class_ap"].get(name) or 0.0), name)):
        aps = [row["per_class_ap"].get(name) or 0.0 for row in shown]
        bars = "".join(
            f'<div class="track {style}"><div class="fill" style="width:{100 * ap:.2f}%"></div></div>'
            for style, ap in zip(("run-a", "run-b"), aps, strict=True)
        )
        tone = change(aps[1] - aps[0])[0]
        parts.append(
            f'<div>{escape(name.replace("_", " "))}</div><div class="pair">{bars}</div>'
            f'<div class="value">{aps[0]:.3f} <small>→</small> {aps[1]:.3f} <span class="by">{tone}</span></div>'
        )
    legend = " and ".join(
        f'<span class="dot {style}"></span>{letter}, {escape(row_name(row, own["rows"]))}'
        for style, letter, row, own in zip(("run-a", "run-b"), "AB", shown, (a, b), strict=True)
    )
    body = []
    for pair in _matched(a["rows"], b["rows"]):
        if pair[0] is None or pair[1] is None:
            continue
        first, second = pair[0]["per_class_ap"], pair[1]["per_class_ap"]
        cells: list[Cell] = [name_cell(pair[0], a["rows"])]
        cells += [_difference((first.get(name), second.get(name))) for name in names]
        body.append(("", cells))
    heads = ["Backend and precision", *(name.replace("_", " ") for name in names)]
    more = f"<details><summary>Change of every row's AP, B − A</summary>{table(heads, body)}</details>" if body else ""
    return (
        f'<div class="together"><h2>Per class</h2><p class="note">{legend}: average precision, and its change.</p>'
        f'<div class="card"><div class="classes">{"".join(parts)}</div></div></div>{more}'
    )


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


def _provenance(a: Results, b: Results) -> str:
    first, second = _origin(a), _origin(b)
    names = list(dict.fromkeys([*first, *second]))
    differ = [name for name in names if first.get(name) != second.get(name)]
    same = len(names) - len(differ)
    if not differ:
        return f'<h2>What differs</h2><p class="note">Nothing: all {same} facts of their origin are the same.</p>'
    body = []
    for name in differ:
        style = "code" if name.startswith(("command", "sha256")) else "span"
        cells: list[Cell] = [plain(name)]
        for own in (first, second):
            cells.append((f"<{style}>{escape(own[name])}</{style}>", own[name]) if name in own else ("–", ""))
        body.append(("", cells))
    return (
        f'<h2>What differs</h2><p class="note">Commands, versions, files, calibration, data and machine: {len(differ)} of '
        f"{len(names)} facts differ, the other {same} are the same.</p>{table(['', 'A', 'B'], body, ('A', 'B'))}"
    )


def _run_card(letter: str, name: str, results: Results, verdict: Verdict, better: str | None) -> str:
    ship, dataset = verdict.ship, results["dataset"]
    about = [
        results["model"],
        f"{dataset['samples']:g} keyframes" + (f" of {dataset['name']}" if dataset.get("name") else ""),
    ]
    about.append(str(results.get("provenance", {}).get("created", ""))[:10])
    tiles = ""
    if ship is not None:
        facts = [(milliseconds(ship["latency_ms"]["median"]), "a frame"), (f"{ship['map']:.3f}", "mAP")]
        facts.append((f"{ship['nds']:.3f}", "NDS"))
        tiles = "".join(f'<div class="tile"><b>{escape(big)}</b><span>{small}</span></div>' for big, small in facts)
        tiles = f'<div class="tiles">{tiles}</div>'
    mark = ' <span class="better">better</span>' if letter == better else ""
    style = "none" if ship is None else precision_class(ship)
    return (
        f'<div class="card verdict {style}"><p class="eyebrow"><span class="dot run-{letter.lower()}"></span>'
        f"{letter}: {escape(name)}{mark}</p><h3>{escape(verdict.headline)}</h3>"
        f'<p class="note">{escape(" · ".join(text for text in about if text))}</p>{tiles}</div>'
    )


def render_comparison(a: Results, b: Results, names: tuple[str, str]) -> tuple[str, RunsVerdict]:
    """The page of two checked results, as text, and what it opens with."""
    verdicts = decide(a["rows"]), decide(b["rows"])
    ships = verdicts[0].ship, verdicts[1].ship
    found = compare_runs(a, b)
    cards = "".join(
        _run_card(letter, name, own, verdict, found.better)
        for letter, name, own, verdict in zip("AB", names, (a, b), verdicts, strict=True)
    )
    warned = "".join(f"<li>{escape(text)}</li>" for text in found.warnings)
    sections = [own.get("sensitivity") for own in (a, b)]
    units = ""
    if sections[0] and sections[1]:
        units = f"<h2>Which layers pay for INT8</h2>{side_by_side(sections[0], sections[1])}"
    page = document(
        f"{names[0]} and {names[1]}: {found.headline}",
        f'<p class="eyebrow">bevqat · two runs side by side</p><h1>{escape(found.headline)}</h1>'
        f'<p class="lead">{escape(" ".join(found.reasons))}</p>'
        + (f'<ul class="card warning">{warned}</ul>' if warned else "")
        + f'<div class="two apart">{cards}</div>'
        '<h2>Accuracy and latency</h2><p class="note">Rows of one backend, precision and flavour in both runs; differences are '
        "B less A. Bold on green: what either run would ship.</p>"
        f"{_rows_table(_matched(a['rows'], b['rows']), ships)}{_classes(a, b, ships)}{units}{_provenance(a, b)}",
    )
    return page, found


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
    page, found = render_comparison(*checked, names)
    write_text(out, page)
    return found
