"""One finding, and how findings are printed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

OK, MISSING, PROBLEM = "ok", "missing", "problem"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    state: OK; MISSING, a problem only if it is needed; PROBLEM: present but not usable.
    found: in words. fix: what to do, a command where there is one; "" for nothing. needed: whether the main job, from
    calibrate to compare on the CPU, cannot be done without it.
    """

    group: str
    name: str
    state: str
    found: str
    fix: str = ""
    needed: bool = False


def one_line(error: BaseException) -> str:
    """An exception in a line: its kind, and its message without line ends."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")[:300]


def describe(findings: Iterable[Finding], width: int = 120) -> Iterator[str]:
    """The findings as lines of at most `width` columns where words allow it; commands are never broken."""
    findings = list(findings)
    names = max((len(found.name) for found in findings), default=0)
    group = None
    for found in findings:
        if found.group != group:
            if group is not None:
                yield ""
            group = found.group
            yield group
        margin = " " * (13 + names)
        yield from textwrap.wrap(
            found.found,
            max(width, len(margin) + 20),
            initial_indent=f"  {found.state:9s}{found.name:{names}s}  ",
            subsequent_indent=margin,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [f"  {found.state:9s}{found.name}"]
        if found.fix:
            yield f"{margin}fix by: {found.fix}"
