"""Errors that a user can cause and fix."""

from __future__ import annotations

LONGEST = 600  # characters of a message, which may quote a file's contents of any length


class UserError(Exception):
    """Bad input. Its message is one line: where, what was found, what was expected, how to fix it.

    The commands print it after `error:` and end with exit status 2, without a traceback. Text quoted from a file may have any
    length, and contain line ends or control characters: these are escaped, and the middle of a long message is left out, so
    that its beginning (where) and end (how to fix it) stay.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class PictureSizeError(UserError):
    """A picture of another size than the model was made for."""


class NotFiniteError(UserError):
    """A network computed NaN or infinity. The commands add to its line the `bevqat health` command that finds the first
    such layer."""


def one_line(text: str, longest: int = LONGEST) -> str:
    """The text as one line of at most `longest` printable characters."""
    if len(text) > longest:
        ahead = longest * 2 // 3
        text = f"{text[:ahead]} … {text[len(text) - (longest - ahead - 3) :]}"
    if text.isprintable():
        return text
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return escaped if len(escaped) <= longest else one_line(escaped, longest)
