"""results.json's entry `sensitivity`: the content of a sensitivity.json for the compared checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qat.calibrate.sensitivity import load_sensitivity
from qat.core.errors import UserError
from qat.report import check_sensitivity

SHOWN = 20  # units, the most harmful first
_SECTIONS = ("checkpoint", "dataset", "frames", "units", "together", "reference", "floats", "histograms")


def sensitivity_section(file: Path, ptq: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads and checks a sensitivity.json.

    Args:
        file: the file from `bevqat sensitivity`. ptq: the checkpoint that it must belong to.

    Returns:
        the entry; {"command", "versions"} that made it.

    Raises:
        UserError: no checkpoint to compare, a file for another checkpoint, or a damaged file.
    """
    if ptq is None:
        raise UserError("--sensitivity: found no --ptq, expected the checkpoint that it was measured on")
    found = load_sensitivity(file, ptq)
    again = f"run `bevqat sensitivity {ptq}` again"
    checked = check_sensitivity({name: found.get(name) for name in _SECTIONS}, str(file), again)
    section = {**checked, "units": checked["units"][:SHOWN], "units_in_all": len(checked["units"])}
    return section, {name: found.get(name) for name in ("command", "versions")}
