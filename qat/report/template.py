"""Renders templates; defines the functions that they call. Every value is escaped (autoescape)."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from qat.report import charts, sensitivity, verdict, words

if TYPE_CHECKING:
    from jinja2 import Environment

_FILES = resources.files("qat.report")
# The page loads nothing and runs only its own script, whatever the results hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'"
_FILTERS = {
    "about_box": charts.about_box,
    "decibels": words.decibels,
    "footprint": charts.footprint,
    "in_words": words.in_words,
    "known": words.known,
    "longest": charts.longest,
    "milliseconds": verdict.milliseconds,
    "name": verdict.row_name,
    "parts_of_name": words.parts_of_name,
    "percent": words.percent,
    "signed": verdict.signed,
    "spaced": words.spaced,
    "style": charts.precision_class,
    "timed": words.timed,
    "to": format,
    "tone": words.tone,
    "unit_name": sensitivity.unit_name,
}


def _read(name: str) -> str:
    """A template's source. A line break next to a tag or an expression is removed; others become spaces."""
    source = _FILES.joinpath("templates", name).read_text("utf-8")
    return re.sub(r"\n\s*", " ", re.sub(r"(?<=[>}])\n\s*|\n\s*(?=[<{])", "", source.strip()))


@cache
def _environment() -> Environment:
    # Imported here: results are checked and benchmarks drawn on machines without jinja2.
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    css, script = (_FILES.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    environment = Environment(loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined)
    environment.filters.update(_FILTERS)
    environment.globals.update(
        css=Markup(css),  # noqa: S704  our own files
        script=Markup(script),  # noqa: S704
        policy=_POLICY.format(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()),
        max_loss=verdict.MAX_LOSS,
    )
    return environment


def render(name: str, **values: Any) -> str:
    """The page from `templates/<name>` and `values`, with styles, script and drawings included."""
    return _environment().get_template(name).render(values) + "\n"
