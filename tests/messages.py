"""Error messages are checked by their parts (file or flag, found, expected), not by whole sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qat.core.errors import UserError


def says(message: str, *parts: str) -> bool:
    """Whether the message has all parts, in their order; shows what is missing."""
    at = 0
    for part in parts:
        at = message.find(part, at)
        assert at >= 0, f"{part!r} is missing, or not in this order, in {message!r}"
        at += len(part)
    return True


@contextmanager
def refused(*parts: str, error: type[Exception] = UserError) -> Iterator[None]:
    """The block must raise the error, whose message is one line with all parts in their order."""
    with pytest.raises(error) as info:
        yield
    message = str(info.value)
    assert "\n" not in message, message
    assert says(message, *parts)
