"""docs/reliability.md names tests that there are, and every test of bad input is in its table."""

from __future__ import annotations

import re
from pathlib import Path

from tests.reliability.conftest import PAGE, table

HERE = Path(__file__).resolve().parent


def _named() -> set[tuple[str, str]]:
    return set(re.findall(r"`(?:tests/reliability/)?(test_\w+\.py)::(test_\w+)(?:\[[^`]*\])?`", PAGE.read_text()))


def test_every_test_that_the_page_names_exists():
    named = _named()
    assert len(named) > 30
    for file, name in sorted(named):
        assert re.search(rf"^def {name}\(", (HERE / file).read_text(), re.MULTILINE), f"{file}::{name}"


def test_every_row_of_bad_input_names_a_test():
    assert table() and all(tests for _, tests in table())
