"""--json: a verb's result for scripts. docs/commands.md lists each verb's keys."""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from qat.core.errors import UserError

STDOUT = "-"
_results: list[TextIO] = []  # the stream `emit_json` writes to for "-"; empty outside `json_output("-")`


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """--json FILE. `run` then ends with `emit_json(args, result)`."""
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the result there as JSON; with - to stdout, and readable output to stderr",
    )


def _flush_c() -> None:
    """Flushes what C libraries have printed to their buffer of stdout: if stdout is not a terminal, it would otherwise appear
    at the end of the process, after the JSON."""
    if os.name == "posix":  # on other systems each library has such a buffer
        ctypes.CDLL(None).fflush(None)


@contextmanager
def json_output(target: str | None) -> Iterator[None]:
    """While a verb runs with "-", only the JSON goes to stdout; output of libraries and child processes does not.

    Raises:
        UserError: the path cannot be a file; raised before the work begins.
    """
    if target is not None and target != STDOUT and Path(target).is_dir():
        raise UserError(f"--json: found the folder {target}, expected a file's name, or - for stdout")
    if target != STDOUT:
        yield
        return
    sys.stdout.flush()
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # the stream of a test or an embedding program, without a file descriptor
        _results.append(sys.stdout)
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _results.pop()
        return
    kept = os.dup(number)
    with os.fdopen(os.dup(kept), "w", encoding="utf-8") as results:
        _results.append(results)
        os.dup2(sys.stderr.fileno(), number)
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _results.pop()
            _flush_c()
            os.dup2(kept, number)
            os.close(kept)


def plain(value: Any) -> Any:
    """Converts to JSON values: paths to text, values that are not finite to null, numpy's numbers to Python's.

    Raises:
        TypeError: another type, which is a bug.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float):  # numpy's float64 too
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return plain(value.item())
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def emit_json(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Writes the result for --json, if it was given: to a file, whole or not at all, or to stdout.

    Raises:
        UserError: the file cannot be written.
    """
    if args.json is None:
        return
    value = plain(result)
    if args.json == STDOUT:
        _results[-1].write(json.dumps(value, indent=2, allow_nan=False) + "\n")
        _results[-1].flush()
        return
    from qat.core.files import write_json

    write_json(args.json, value)
    print(args.json)
