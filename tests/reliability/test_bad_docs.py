"""Each row of docs/reliability.md's table of bad input is held by a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.reliability.conftest import HELD_BY, table

HERE = Path(__file__).resolve().parent


def test_every_row_of_bad_input_names_its_test():
    assert set(table()) == set(HELD_BY)


@pytest.mark.parametrize("found", HELD_BY)
def test_the_test_of_a_row_exists_and_sees_its_line(found):
    """`refused` compares the row's line with what the command prints; a test without it contains the words itself."""
    file, _, test = HELD_BY[found].partition("::")
    source = (HERE / file).read_text()
    arguments = re.search(rf"^def {test.partition('[')[0]}\((.*?)\)", source, re.MULTILINE | re.DOTALL)
    assert arguments, HELD_BY[found]
    assert "refused" in arguments[1] or max(table()[found].split("…"), key=len) in source, table()[found]
