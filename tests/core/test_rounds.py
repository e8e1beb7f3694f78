"""Rows take turns, and nothing is collected while they are timed."""

import gc

from qat.core.rounds import no_collection, turned


def test_every_round_begins_one_row_further():
    assert [turned("abc", turn) for turn in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert turned([], 3) == []


def test_the_collector_is_as_it_was_afterwards():
    assert gc.isenabled()
    with no_collection():
        assert not gc.isenabled()
        with no_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()  # it was off outside the inner block
    assert gc.isenabled()
