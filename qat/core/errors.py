"""Errors that a user can cause and fix."""

from __future__ import annotations

LONGEST = 600  # characters of a message: what a file holds may be quoted in it, and a file may hold anything


class UserError(Exception):
    """Bad input. Its message is one line: where, what was found, what was expected, how to fix it.

    The commands print it after `error:` and leave with exit status 2; no traceback is shown. What it quotes from a file may be
    of any length and hold line ends or a terminal's control characters: these are escaped, and of a long message the middle is
    left out, so that where and how to fix it stay.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class PictureSizeError(UserError):
    """A picture of another size than the model was made for."""


class NotFiniteError(UserError):
    """NaN or infinity that came out of a network, not of a file. The commands end its line with the `bevqat health` that finds
    the first layer that gave it."""


def one_line(text: str, longest: int = LONGEST) -> str:
    """The text as one line of at most `longest` printable characters."""
    if len(text) > longest:
        ahead = longest * 2 // 3
        text = f"{text[:ahead]} … {text[len(text) - (longest - ahead - 3) :]}"
    if text.isprintable():
        return text
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return escaped if len(escaped) <= longest else one_line(escaped, longest)
