"""Checks of the sections of a JSON file: types, lengths and ranges of values.

`text`, `flag` and `null` are checks; `number(…)`, `listed(…)`, `mapped(…)`, `section(…)` and `either(…)` return checks; `holds`
runs one. They need no library, so they run on a robot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qat.core.errors import UserError

TEXT = 1000

Check = Callable[[Any, str], None]


class Wrong(Exception):
    """The message says where, what was found and what was expected."""


def fail(where: str, found: Any, expected: str) -> None:
    shown = "none" if found is None else f"{type(found).__name__} {found!r:.40}"
    raise Wrong(f"{where}: found {shown}, expected {expected}")


def text(value: Any, where: str) -> None:
    if not isinstance(value, str) or len(value) > TEXT:
        fail(where, value, "a text")


def flag(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        fail(where, value, "true or false")


def number(low: float = -1e9, high: float = 1e9, whole: bool = False) -> Check:
    def check(value: Any, where: str) -> None:
        known = type(value) is int or (type(value) is float and not whole)
        if not known or not low <= value <= high:
            fail(where, value, f"a {'whole ' if whole else ''}number from {low:g} to {high:g}")

    return check


def listed(each: Check, least: int = 0, most: int = 10_000) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            size = str(least) if least == most else f"{least} or more" if least else "any number"
            fail(where, value, f"a list of {size}")
        for index, item in enumerate(value):
            each(item, f"{where}[{index}]")

    return check


def mapped(each: Check) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            fail(where, value, "a section")
        for name, item in value.items():
            each(item, f"{where}: {name}")

    return check


def section(optional: Mapping[str, Check] | None = None, **keys: Check) -> Check:
    """A section that has these keys, and may have the optional ones. Other keys are not checked."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            fail(where, value, "a section")
        for name, each in keys.items():
            each(value.get(name), f"{where}: {name}")
        for name, each in (optional or {}).items():
            if value.get(name) is not None:
                each(value[name], f"{where}: {name}")

    return check


def either(*checks: Check) -> Check:
    """A value that one of the checks accepts. If none does, the last one raises."""

    def check(value: Any, where: str) -> None:
        for one in checks[:-1]:
            try:
                return one(value, where)
            except Wrong:
                continue
        return checks[-1](value, where)

    return check


def null(value: Any, where: str) -> None:
    if value is not None:
        fail(where, value, "null")


def holds(path: str | Path, check: Callable[[], None], fix: str) -> None:
    """Runs a check; raises `UserError` with the file's name and the check's message."""
    try:
        check()
    except Wrong as wrong:
        raise UserError(f"{path}: {wrong}: damaged; {fix}") from None
