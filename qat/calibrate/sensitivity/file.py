"""Writes and reads sensitivity.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.calibrate.sensitivity.result import Sensitivity
from qat.core.errors import UserError
from qat.core.files import read_json, sha256, write_json
from qat.core.provenance import made_by

FORMAT, SCHEMA = "bevqat-sensitivity", 1


def write_sensitivity(path: str | Path, found: Sensitivity, checkpoint: str | Path, dataset: Mapping[str, Any]) -> None:
    """Writes sensitivity.json, whole or not at all: `found`, and what was measured.

    Args:
        checkpoint: the PTQ checkpoint that was measured. dataset: {"name", "version", "split"} of the frames.
    """
    head = {
        "format": FORMAT,
        "schema": SCHEMA,
        "checkpoint": {"file": Path(checkpoint).name, "sha256": sha256(checkpoint)},
        "dataset": dict(dataset),
        **made_by(),
    }
    write_json(path, {**head, **found.to_json()})


def load_sensitivity(path: str | Path, checkpoint: str | Path) -> dict[str, Any]:
    """Reads a sensitivity.json of this PTQ checkpoint.

    Raises:
        UserError: the file cannot be read, was not written by `write_sensitivity`, or belongs to another checkpoint.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(
            f"{path}: not a sensitivity of format {FORMAT!r}; write it with `bevqat sensitivity {checkpoint}`"
        )
    if found.get("schema") != SCHEMA:
        raise UserError(f"{path}: found schema {found.get('schema')!r}, expected {SCHEMA}; run sensitivity again")
    source, expected = found.get("checkpoint"), sha256(checkpoint)
    measured = source.get("sha256") if isinstance(source, dict) else None
    if measured != expected:
        raise UserError(
            f"{path}: measured on a checkpoint with sha256 {str(measured)[:12]}…, {checkpoint} has {expected[:12]}…; run "
            f"`bevqat sensitivity {checkpoint}` again"
        )
    return found
