"""Decides which of two runs is better, in words, and reports what cannot be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qat.report.schema import Results
from qat.report.verdict import MAX_LOSS, MIN_GAIN, Row, decide, milliseconds, signed
from qat.report.words import in_words

MIN_CHANGE = 0.002  # of mAP or NDS; a smaller change does not count, however many keyframes there are
# What must be equal in two runs to compare their accuracies, and their latencies.
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
    """The smallest difference of a metric that two rows' keyframes distinguish from chance: half the wider of the intervals that each
    has against its own FP32. (There is no interval between the runs: the scenes were resampled in each run alone.)"""
    intervals = [row.get("change", {}).get(key) for row in rows]
    return max([MIN_CHANGE, *((found["high"] - found["low"]) / 2 for found in intervals if found is not None)])


def compare_runs(a: Results, b: Results) -> RunsVerdict:
    """Decides which of two runs' shipped rows is better.

    A row is better if it gains accuracy (more mAP or NDS than `_told_apart`, and none of the other lost) or speed (5 %), and
    loses neither. Where one is faster and the other more accurate, the faster is taken as long as it loses no more than a verdict
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
    shares = [gains[name] / least[name] for name in metrics]  # 1 is the smallest visible difference
    ratio = first["latency_ms"]["median"] / second["latency_ms"]["median"]
    accuracy = speed = 0  # 1 if B is better, −1 if A is
    reasons = []
    if same_data:
        changes = " and ".join(f"{name} {signed(gain)}" for name, gain in gains.items())
        if all(abs(gain) < MIN_CHANGE for gain in gains.values()):
            reasons.append(f"Their accuracy is the same to within {MIN_CHANGE:g}.")
        elif all(abs(share) < 1 for share in shares):
            bounds = " and ".join(f"{value:.4f} {name}" for name, value in least.items())
            reasons.append(f"From A to B: {changes}; these keyframes cannot show differences below {bounds}.")
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
    if accuracy * speed < 0:  # a trade-off, by the verdict's rule
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
