"""What every manifest says, whatever the format of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.core.errors import UserError
from qat.core.files import sha256
from qat.core.provenance import made_by
from qat.lean.modes import quantizers
from qat.manifest import FORMAT, SCHEMA


def manifest_head(
    settings: Mapping[str, Any],
    precision: str,
    checkpoint: str | Path | None,
    recipe: Mapping[str, Any] | None,
    ema: bool,
) -> dict[str, Any]:
    """What every manifest says, whatever the format of the parts; `parts` is empty.

    Args:
        settings: the manifest's `pipeline` section (`Family.settings`).
        checkpoint: where the weights came from; its name and sha256 go into the manifest, and the model's name.
        recipe: how the quantizers were calibrated; for INT8.
        ema: whether the weights are a float checkpoint's averaged ones.
    """
    head: dict[str, Any] = {
        "format": FORMAT,
        "schema": SCHEMA,
        "model": None,
        "precision": precision,
        "checkpoint": None,
        "calibration": dict(recipe) if recipe is not None and precision == "int8" else None,
        **made_by(),
        "pipeline": dict(settings),
        "parts": {},
    }
    if checkpoint is not None:
        head["model"] = Path(checkpoint).resolve().parent.name
        head["checkpoint"] = {
            "file": Path(checkpoint).name,
            "sha256": sha256(checkpoint),
            **({"ema": True} if ema else {}),
        }
    return head


def check_calibrated(detector: Any, precision: str) -> None:
    """Raises `UserError` where INT8 is asked of a float detector."""
    if precision == "int8" and not quantizers(detector):
        raise UserError("precision int8: found a float detector, expected a calibrated one; run calibrate first")
