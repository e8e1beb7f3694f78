"""A report's tables: every column sorts; figures are set in columns that align."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from html import escape
from typing import Any

from qat.report.charts import precision_class
from qat.report.schema import EXACT_DB
from qat.report.verdict import MAX_LOSS, Row, is_simulated, row_name, signed

Cell = tuple[str, float | str | None]  # what is shown (HTML), what it sorts by
MISSING: Cell = ("–", "-Infinity")  # sorts below every figure
_NOTHING: tuple = (None, "", [], {})


def table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]], prose: Collection[str] = ()) -> str:
    """A table whose columns sort; the first column is each row's heading.

    Args:
        heads: column heads (plain text).
        rows: CSS class and cells.
        prose: heads of columns of text, which stands to the left and goes over several lines.
    """
    left = {n for n, text in enumerate(heads) if text in prose}
    head = "".join(
        f'<th scope="col"{" class=left" if n == 0 or n in left else ""}><button type="button">{escape(text)}</button></th>'
        for n, text in enumerate(heads)
    )
    body = []
    for row_style, cells in rows:
        tags = []
        for n, (shown, value) in enumerate(cells):
            data = "" if value is None else f' data-value="{escape(str(value))}"'
            tags.append(
                f'<th scope="row"{data}>{shown}</th>'
                if n == 0
                else f"<td{' class=prose' if n in left else ''}{data}>{shown}</td>"
            )
        body.append(f'<tr class="{row_style}">{"".join(tags)}</tr>')
    return (
        f'<div class="card scroll"><table class="{"sticky tall" if left else "sticky"}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def plain(text: Any) -> Cell:
    """A cell of text, which sorts by it."""
    return escape(str(text)), str(text)


def breakable(name: str) -> str:
    """A module's name, escaped, that may go over to the next line behind a dot or an underscore."""
    return re.sub(r"([._])(?=\w)", r"\1<wbr>", escape(name))


def optional(value: float | None, show: Callable[[float], str]) -> Cell:
    """A cell of a figure, or of none."""
    return MISSING if value is None else (show(value), value)


def timed(value: float | None, row: Row) -> float | None:
    """A figure of a row's time; None where the row is simulated, whose time says nothing."""
    return None if is_simulated(row) else value


def change(value: float, bounds: str = "", digits: int = 3) -> Cell:
    """A cell of a difference in accuracy: green where it is a gain, red where it is more than a verdict accepts."""
    tone = "good" if value > 0.0005 else "bad" if value < -MAX_LOSS else ""
    return f'<span class="{tone}">{signed(value, digits)}</span>{bounds}', value


def name_cell(row: Row, rows: Sequence[Row]) -> Cell:
    """A row's name behind a dot in the colour of its precision."""
    name, _, flavour = row_name(row, rows).partition(" (")
    small = f" <small>{escape(flavour.rstrip(')'))}</small>" if flavour else ""
    return f'<span class="dot {precision_class(row)}"></span>{escape(name)}{small}', row_name(row, rows)


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


def facts(values: Mapping[str, Any]) -> str:
    """A list of names and values; what is empty is left out."""
    shown = {key: value for key, value in values.items() if value not in _NOTHING}
    rows = (
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(in_words(value))}</dd>" for key, value in shown.items()
    )
    return f"<dl>{''.join(rows)}</dl>"
