"""Formats names and figures for a page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qat.report.schema import EXACT_DB
from qat.report.verdict import MAX_LOSS, Row, is_simulated, row_name

_NOTHING: tuple = (None, "", [], {})


def spaced(name: str) -> str:
    """construction_vehicle → construction vehicle."""
    return name.replace("_", " ")


def parts_of_name(name: str) -> list[str]:
    """Splits a module's name where a line may break: after a dot or an underscore."""
    return re.split(r"(?<=[._])(?=\w)", name)


def timed(value: float | None, row: Row) -> float | None:
    """A figure of a row's time; None for a simulated row, whose time is meaningless."""
    return None if is_simulated(row) else value


def tone(change: float) -> str:
    """The CSS class of a difference in accuracy: green for a gain, red for a loss that the verdict does not accept."""
    return "good" if change > 0.0005 else "bad" if change < -MAX_LOSS else ""


def decibels(value: float) -> str:
    """One digit, or "exact" for equal tensors."""
    return "exact" if value >= EXACT_DB else f"{value:.1f}"


def percent(share: float) -> str:
    """A percentage, with two significant digits if it is small: 8.4 %, 0.013 %, 0 %."""
    value = 100 * share
    if value == 0:
        return "0 %"
    return f"{value:.0f} %" if value >= 99.95 else f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def in_words(value: Any) -> str:
    """Converts containers and numbers to a line of text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {in_words(item)}" for key, item in value.items() if item not in _NOTHING)
    if isinstance(value, list | tuple):
        pairs = (" ".join(map(in_words, item)) if isinstance(item, list | tuple) else in_words(item) for item in value)
        return ", ".join(pairs)
    return f"{value:g}" if isinstance(value, float) else str(value)


def known(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without those that are empty."""
    return {key: value for key, value in values.items() if value not in _NOTHING}


def keys_of(rows: Sequence[Row], section: str) -> list[str]:
    """The names in a section (such as stages_ms) of any of the rows, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row.get(section, {})))


def about(results: Mapping[str, Any]) -> list[str]:
    """The model, the number of keyframes, the data, and the day."""
    dataset = results["dataset"]
    keyframes = f"{dataset['samples']:g} keyframes" + (f" of {dataset['name']}" if dataset.get("name") else "")
    return [
        text
        for text in (results["model"], keyframes, str(results.get("provenance", {}).get("created", ""))[:10])
        if text
    ]


def only_in(frame: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The numbers of boxes of a keyframe that only one of its two rows has."""
    said = []
    for key in ("reference", "candidate"):
        count = frame.get(f"only_{key}")
        if isinstance(count, int) and count > 0:
            said.append(f"{count} {'box' if count == 1 else 'boxes'} only in {row_name(rows[int(frame[key])], rows)}")
    return ", ".join(said) or "the same boxes in both"
