"""docs/reliability.md names tests that exist, and each row of its table of bad input is held by one."""

from __future__ import annotations

import re
from pathlib import Path

from tests.reliability.conftest import PAGE, table

HERE = Path(__file__).resolve().parent


def _named() -> set[tuple[str, str]]:
    return set(re.findall(r"`(?:tests/reliability/)?(test_\w+\.py)::(test_\w+)(?:\[[^`]*\])?`", PAGE.read_text()))


def test_every_test_that_the_page_names_exists():
    named = _named()
    assert len(named) > 15
    for file, name in sorted(named):
        assert re.search(rf"^def {name}\(", (HERE / file).read_text(), re.MULTILINE), f"{file}::{name}"


def test_every_row_of_bad_input_is_held_by_the_test_beside_it():
    """`refused` compares the row's line with what the command says; a test without it has the words itself."""
    assert len(table()) > 20
    for line, tests in table():
        assert line and tests, line
        for file, name in tests:
            source = (HERE / file).read_text()
            arguments = re.search(rf"^def {name.partition('[')[0]}\((.*?)\)", source, re.MULTILINE | re.DOTALL)
            assert arguments, f"{file}::{name}"
            assert "refused" in arguments[1] or max(line.split("…"), key=len) in source, f"{file}::{name}: {line}"
