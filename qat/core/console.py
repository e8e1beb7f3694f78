"""Tables for people, on a terminal and in a file alike."""

from __future__ import annotations

import sys

from rich.console import Console

from qat.core.errors import one_line


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich's own ends the process with status 1, which means that checks failed; the command line knows better."""
        raise


def note(text: str) -> None:
    """One line on stderr about what was decided for the user: nothing is wrong, and another choice exists."""
    print(f"note: {one_line(text)}", file=sys.stderr)


def results_console(width: int = 160) -> Console:
    """Where result tables are printed: stdout. Piped output has no width of its own, and rich's 80 columns would cut names.

    width: columns where stdout is not a terminal.
    """
    console = _Console()
    return console if console.is_terminal else _Console(width=width)
