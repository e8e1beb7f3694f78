"""The command and the packages that made a file, to record in it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from qat.core.command import command_line
from qat.core.files import sha256
from qat.core.versions import versions


def made_by() -> dict[str, Any]:
    """{"command", "versions"} to record in a new file: `command_line` and `versions`."""
    return {"command": command_line(), "versions": versions()}


def tables_sha256(*folders: str | Path) -> str:
    """One hash of a folder's JSON tables: what `sha256sum *.json | sha256sum` prints in it (in the C locale); of several folders, of
    their lines one after another."""
    digest = hashlib.sha256()
    for path in (path for folder in folders for path in sorted(Path(folder).glob("*.json"))):
        digest.update(f"{sha256(path)}  {path.name}\n".encode())
    return digest.hexdigest()
