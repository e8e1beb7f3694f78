"""Tables for people, the same on a terminal and in a file."""

from __future__ import annotations

import sys

from rich.console import Console

from qat.core.errors import one_line


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich's method ends the process with status 1, which would mean that checks failed; the verb sets the status."""
        raise


def note(text: str) -> None:
    """Prints one line on stderr about a choice made for the user: nothing is wrong, and another choice exists."""
    print(f"note: {one_line(text)}", file=sys.stderr)


def results_console(width: int = 160) -> Console:
    """The console for result tables: stdout. Piped output has no width, and rich's default of 80 columns would cut names.

    width: columns where stdout is not a terminal.
    """
    console = _Console()
    return console if console.is_terminal else _Console(width=width)
