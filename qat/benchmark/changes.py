"""Differences between two benchmark runs beyond the noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from qat.benchmark.run import FORMAT, SCHEMA, Results
from qat.benchmark.statistics import ratio_interval
from qat.core.errors import UserError
from qat.core.files import read_json

THRESHOLD = 0.03  # the difference allowed between two runs of the same thing on an idle machine
_SAME = ("cpu", "cores", "threads", "governor", "thread_variables", "os")


@dataclass(frozen=True)
class Change:
    """One section of one row. ratio: new median over old; low, high: its 95 % interval. beyond: beyond the noise."""

    row: str
    section: str
    old_ms: float
    new_ms: float
    ratio: float
    low: float
    high: float
    beyond: bool


def load_results(path: Path) -> Results:
    """Reads a benchmark.json.

    Raises:
        UserError: missing, damaged, another kind of file, or of another schema.
    """
    results = read_json(path)
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise UserError(f"{path}: not a result of benchmark, expected format {FORMAT!r}; name a benchmark.json")
    if results.get("schema") != SCHEMA:
        raise UserError(f"{path}: found schema {results.get('schema')!r}, expected {SCHEMA}; run the benchmark again")
    try:
        for row in results["rows"]:
            str(row["name"])
            for section in row["sections"].values():
                rounds = section["rounds_ms"]
                if not rounds or not all(r and all(float(t) >= 0 for t in r) for r in rounds):
                    raise ValueError("rounds without samples, or negative times")
                float(section["latency_ms"]["median"])
        results["machine"]["versions"].items()
        results["measurement"].items()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged: {error!r}, expected rows with sections and their rounds; run the benchmark again"
        ) from None
    return results


def _option_changes(old: object, new: object) -> list[str]:
    """Texts about options that differ between the engines of two runs; empty if one run recorded no options."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return []
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) or isinstance(
            after, dict
        ):  # options of one backend: the rows show where it did not run
            found += [f"{key}: {change}" for change in _option_changes(before, after)]
        elif before != after and (before or after):  # an option not recorded is off: it does not apply
            found.append(f"{key}: {before} then, {after} now")
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Texts about other differences between two runs: machine, versions, inputs, options, files."""
    found = []
    a, b = old["machine"], new["machine"]
    for key in _SAME:
        if a.get(key) != b.get(key):
            found.append(f"machine: {key}: {a.get(key)} then, {b.get(key)} now")
    names = [[gpu.get("name") for gpu in machine.get("gpus", [])] for machine in (a, b)]
    if names[0] != names[1]:
        found.append(f"machine: GPUs: {', '.join(names[0]) or 'none'} then, {', '.join(names[1]) or 'none'} now")
    for key in sorted({*a["versions"], *b["versions"]}):
        if a["versions"].get(key) != b["versions"].get(key):
            found.append(f"version: {key} {a['versions'].get(key, 'none')} then, {b['versions'].get(key, 'none')} now")
    for key in ("inputs", "frames"):
        if old["measurement"].get(key) != new["measurement"].get(key):
            found.append(f"{key}: {old['measurement'].get(key)} then, {new['measurement'].get(key)} now")
    told = _option_changes(*(run["measurement"].get("options") for run in (old, new)))
    found += [f"options: {change}" for change in told]
    before = {row["name"]: row for row in old["rows"]}
    for row in new["rows"]:
        if row["name"] in before:
            own = _option_changes(before[row["name"]].get("options"), row.get("options"))
            found += [f"options: {row['name']}: {change}" for change in own if change not in told]
            files = before[row["name"]].get("files", {})
            changed = [name for name, digest in row.get("files", {}).items() if files.get(name) != digest]
            if changed:
                found.append(f"files: {row['name']}: {', '.join(changed)} changed")
    for gone in before.keys() - {row["name"] for row in new["rows"]}:
        found.append(f"rows: {gone} is not among the new ones")
    for come in {row["name"] for row in new["rows"]} - before.keys():
        found.append(f"rows: {come} is not among the old ones")
    return found


def compare_results(old: Mapping[str, Any], new: Mapping[str, Any], threshold: float = THRESHOLD) -> list[Change]:
    """Compares every section that both runs have, by row. A section changed beyond the noise if the whole 95 % interval of
    the ratio lies more than `threshold` away from 1.

    Raises:
        UserError: the threshold is negative.
    """
    if not 0 <= threshold < 1:
        raise UserError(f"--threshold: found {threshold}, expected a share from 0 to below 1, such as {THRESHOLD}")
    before = {row["name"]: row["sections"] for row in old["rows"]}
    changes = []
    for row in new["rows"]:
        for name, section in row["sections"].items():
            earlier = before.get(row["name"], {}).get(name)
            # Looking up a known pattern takes microseconds: its ratio is meaningless.
            if earlier is None or min(s["latency_ms"]["median"] for s in (earlier, section)) < 1e-2:
                continue
            ratio, low, high = ratio_interval(earlier["rounds_ms"], section["rounds_ms"])
            beyond = low > 1 + threshold or high < 1 - threshold
            medians = earlier["latency_ms"]["median"], section["latency_ms"]["median"]
            changes.append(Change(row["name"], name, *medians, ratio, low, high, beyond))
    return changes


def print_changes(old: Mapping[str, Any], new: Mapping[str, Any], source: Path, threshold: float = THRESHOLD) -> None:
    """Prints what changed, and other differences that may be the reason."""
    from qat.benchmark.table import console

    changes = compare_results(old, new, threshold)
    for line in differences(old, new):
        print(f"differs: {line}")
    beyond = [change for change in changes if change.beyond]
    if beyond:
        table = Table(title=f"changed since {source} ({old['created']}), by more than {threshold:.0%} beyond the noise")
        for n, heading in enumerate(("row", "section", "then, ms", "now, ms", "now / then", "95 % interval")):
            table.add_column(heading, justify="left" if n < 2 else "right", no_wrap=n < 2)
        for change in beyond:
            table.add_row(
                change.row,
                change.section,
                f"{change.old_ms:.3f}",
                f"{change.new_ms:.3f}",
                f"{change.ratio:.3f}",
                f"{change.low:.3f} to {change.high:.3f}",
            )
        console().print(table)
    print(
        f"{len(beyond)} of {len(changes)} sections changed by more than {threshold:.0%} beyond the noise since {source}"
    )
