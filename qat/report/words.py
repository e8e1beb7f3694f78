"""Names and figures as a page shows them."""

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
    """A module's name in the pieces between which a line may break: behind a dot or an underscore."""
    return re.split(r"(?<=[._])(?=\w)", name)


def timed(value: float | None, row: Row) -> float | None:
    """A figure of a row's time; None where the row is simulated, whose time says nothing."""
    return None if is_simulated(row) else value


def tone(change: float) -> str:
    """The CSS class of a difference in accuracy: green where it is a gain, red where it is more than a verdict accepts."""
    return "good" if change > 0.0005 else "bad" if change < -MAX_LOSS else ""


def decibels(value: float) -> str:
    """One digit, or "exact" for equal tensors."""
    return "exact" if value >= EXACT_DB else f"{value:.1f}"


def percent(share: float) -> str:
    """Two significant digits where it is small: 8.4 %, 0.013 %, 0 %."""
    value = 100 * share
    if value == 0:
        return "0 %"
    return f"{value:.0f} %" if value >= 99.95 else f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def in_words(value: Any) -> str:
    """Containers and numbers as a line of text."""
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
    """The model, how many keyframes of which data, and the day."""
    dataset = results["dataset"]
    keyframes = f"{dataset['samples']:g} keyframes" + (f" of {dataset['name']}" if dataset.get("name") else "")
    return [
        text
        for text in (results["model"], keyframes, str(results.get("provenance", {}).get("created", ""))[:10])
        if text
    ]


def only_in(frame: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """How many boxes of a keyframe only one of its two rows has."""
    said = []
    for key in ("reference", "candidate"):
        count = frame.get(f"only_{key}")
        if isinstance(count, int) and count > 0:
            said.append(f"{count} {'box' if count == 1 else 'boxes'} only in {row_name(rows[int(frame[key])], rows)}")
    return ", ".join(said) or "the same boxes in both"
