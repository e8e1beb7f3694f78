"""The fields that every manifest has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.core.files import sha256
from qat.core.provenance import made_by
from qat.export.options import Origin
from qat.manifest import FORMAT, SCHEMA


def manifest_head(settings: Mapping[str, Any], precision: str, origin: Origin) -> dict[str, Any]:
    """Returns the fields that every manifest has, whatever the format of its parts; `parts` is empty.

    Args:
        settings: the manifest's `pipeline` section (`Family.settings`).
    """
    recipe = origin.recipe
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
    if origin.checkpoint is not None:
        head["model"] = Path(origin.checkpoint).resolve().parent.name
        head["checkpoint"] = {
            "file": Path(origin.checkpoint).name,
            "sha256": sha256(origin.checkpoint),
            **({"ema": True} if origin.ema else {}),
        }
    return head
