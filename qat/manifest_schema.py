"""What the sections of a manifest must hold for `bevqat verify`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.core.checks import Wrong, either, fail, listed, mapped, null, number, section, text
from qat.core.errors import UserError

_SHAPE = listed(either(text, number(-1, 1 << 40, whole=True)), 0, 32)
_TENSORS = mapped(section(dtype=text, shape=_SHAPE))
_VERIFICATION = section(
    frames=listed(text),
    seed=number(0, 1 << 62, whole=True),
    batch=number(1, 1024, whole=True),
    file=text,
    sha256=text,
    stored=mapped(listed(number(0, 1 << 30, whole=True))),
    made_sha256=text,
)
_DECIBELS = listed(either(null, number(-1e9, 1e9)))
_PAIR = section(
    tensor=text,
    node=text,
    module=text,
    dtype=text,
    scale=listed(number(0, 1e30), 1, 1 << 20),
    zero_point=listed(number(-128, 255, whole=True), 1, 1 << 20),
)
_SITES = section(frame=number(0, 1 << 30, whole=True), pairs=listed(_PAIR), outputs=listed(text), problems=listed(text))
_VERIFIED_PART = section(
    {"sites": _SITES},
    opset=number(1, 1000, whole=True),
    inputs=_TENSORS,
    outputs=_TENSORS,
    verification=mapped(
        section(frames=section({"float_tolerance_db": _DECIBELS}, tolerance_db=listed(number(-1e9, 1e9))))
    ),
)


def check_verification(path: str | Path, manifest: Mapping[str, Any], fix: str) -> None:
    """Raises `UserError` where what `bevqat verify` reads of a manifest is missing or does not fit together."""
    try:
        about = manifest.get("verification")
        _VERIFICATION(about, "verification")
        assert isinstance(about, dict)
        for name, part in manifest["parts"].items():
            _VERIFIED_PART(part, name)
            if (unknown := set(part["verification"]) - set(part["outputs"])) or not part["verification"]:
                fail(f"{name}: verification", sorted(unknown), "the part's outputs")
            stored = about["stored"].get(name)
            if not stored or max(stored) >= len(about["frames"]):
                fail(f"verification: stored: {name}", stored, "numbers of the frames")
            for output, row in part["verification"].items():
                for key in ("tolerance_db", "float_tolerance_db"):
                    if key in row["frames"] and len(row["frames"][key]) <= max(stored):
                        fail(f"{name}: verification: {output}", row["frames"], "a tolerance for each frame")
            if "sites" in part and part["sites"]["frame"] not in stored:
                fail(f"{name}: sites: frame", part["sites"]["frame"], "one of the stored frames")
    except Wrong as wrong:
        raise UserError(f"{path}: {wrong}: damaged; {fix}") from None
