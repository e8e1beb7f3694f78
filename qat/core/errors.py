"""Errors that a user can cause and mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. Its message is one line: where, what was found, what was expected, how to mend it.

    The commands print it after `error:` and leave with exit status 2; no traceback is shown.
    """
