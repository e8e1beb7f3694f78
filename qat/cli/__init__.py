"""The command line: `bevqat VERB`, and the scripts `python qat/VERB.py` next to this folder.

Each verb is a module, imported only when it is used. A module has `add_arguments(parser)` and `run(args) -> int` (the exit
status): it parses, calls one function, prints. The lines after the first line of its docstring are the end of its --help.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qat.cli import interrupts  # before slow imports
from qat.cli.failures import health_of, one_line_of
from qat.cli.flags import check_config
from qat.cli.json_output import json_output
from qat.cli.parser import VERBS, make_parser, nearest, verb_of
from qat.cli.pipes import reader_gone
from qat.core.command import running
from qat.core.errors import UserError
from qat.core.plain_output import allow_any_text

__all__ = ["BAD_USE", "FAILED", "INTERRUPTED", "OK", "PIPE_CLOSED", "VERBS", "main"]

OK, FAILED, BAD_USE, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status: 0 fine, 1 checks failed, 2 bad use, 130 interrupted, 141 the output pipe was
    closed (as `head` does). A bug in this program keeps its traceback, and Python then ends with 1.

    Raises:
        SystemExit: status 0 after --help and --version, status 2 for unknown arguments.
    """
    program = argv is None  # not a call by another program
    allow_any_text()
    if program:
        interrupts.show_one_line(True)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        if program:
            interrupts.take_no_more()
        print(interrupts.LINE, file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        package = (error.name or "qat").partition(".")[0]
        if package == "qat":
            raise
        print(
            f"error: the package {package} is not installed; fix by: run `bevqat doctor`, which prints the command",
            file=sys.stderr,
        )
        return BAD_USE


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    asked = verb_of(arguments)
    parser = make_parser([asked] if asked in VERBS else [])
    if not arguments:
        parser.print_help(sys.stderr)
        return BAD_USE
    if asked is not None and asked not in VERBS:
        hint = nearest(asked, VERBS) or "; `bevqat --help` lists them"
        parser.error(f"unknown verb {asked!r}{hint}")
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.verb_parser(args.verb).refuse_unknown(unknown)
    try:
        with running(arguments), json_output(getattr(args, "json", None)):
            check_config(args)
            status = int(args.run(args))
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}{health_of(error, args)}", file=sys.stderr)
        return BAD_USE
    except BrokenPipeError:
        if not reader_gone():
            raise
        return PIPE_CLOSED
    except (OSError, MemoryError, RuntimeError) as error:
        line = one_line_of(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return BAD_USE


interrupts.show_one_line(False)
