"""Which command and which packages made a file, for what is written beside its content."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from qat.core.files import sha256
from qat.core.versions import versions

_COMMAND: ContextVar[str] = ContextVar("bevqat_command", default="")


@contextmanager
def running(arguments: Sequence[str]) -> Iterator[None]:
    """Inside the block, `command_line` is `bevqat` with these arguments."""
    before = _COMMAND.set(shlex.join(["bevqat", *arguments]))
    try:
        yield
    finally:
        _COMMAND.reset(before)


def command_line() -> str:
    """The verb that runs, as it can be pasted into a shell; "" where a library's user called the function himself."""
    return _COMMAND.get()


def made_by() -> dict[str, Any]:
    """{"command", "versions"} of what is being made: `command_line` and `versions`."""
    return {"command": command_line(), "versions": versions()}


def tables_sha256(folder: str | Path) -> str:
    """One hash of a folder's JSON tables: what `sha256sum *.json | sha256sum` prints in it (in the C locale)."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.json")):
        digest.update(f"{sha256(path)}  {path.name}\n".encode())
    return digest.hexdigest()
