"""Reads manifest.json, the description of a folder of exported parts, with hand-written checks: a robot has no pydantic.

qat.export writes it by `qat.manifest_schema`; tests/export/test_manifest_schema.py checks that the two agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.core.checks import Wrong, either, fail, listed, mapped, null, number, section, text
from qat.core.errors import UserError
from qat.core.files import is_inside, read_json, restore, sha256
from qat.families import flow_class, named_in

FORMAT, SCHEMA = "bevqat-parts", 1
FILE = "manifest.json"


def check_inside(path: str | Path, name: object) -> None:
    """Raises `UserError` if a manifest's entry is not a file name, or leads out of the manifest's folder, directly or through a
    link.

    Args:
        path: the manifest.
    """
    if not is_inside(Path(path).parent, name):
        raise UserError(f"{path}: found file {name!r}, expected the name of a file in the manifest's folder")


def check_kind(path: Path, values: object, key: str, kind: type, fix: str, where: str = "") -> Any:
    """Returns the value of a key in a section of a manifest.

    Args:
        where: the section's name in the message; "" for the manifest itself.

    Raises:
        UserError: `values` is not a section, or the key is missing or has a value of another type.
    """
    value = values.get(key) if isinstance(values, dict) else None
    if not isinstance(value, kind):
        name = {"dict": "a section", "str": "a text"}.get(kind.__name__, kind.__name__)
        found = "none" if value is None else f"{str(value)[:40]!r}"
        raise UserError(f"{path}: {where and where + ': '}{key}: found {found}, expected {name}: damaged; {fix}")
    return value


def pipeline_of(folder: str | Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The `pipeline` section of a manifest from `load_manifest`, which also reads folders that have only parts.

    Raises:
        UserError: the manifest has no such section.
    """
    fix = _again(manifest)
    section: dict[str, Any] = check_kind(Path(folder) / FILE, manifest, "pipeline", dict, fix)
    return section


def _again(manifest: Mapping[str, Any]) -> str:
    return "run `bevqat build` again" if manifest.get("format_of_parts") == "engine" else "export again"


def _check_shape(path: Path, manifest: dict[str, Any], fix: str) -> None:
    """Raises `UserError` if a section that every reader needs is missing or has another type (a truncated or edited file)."""
    check_kind(path, manifest, "precision", str, fix)
    if manifest.get("format_of_parts") != "pt2":
        check_kind(path, manifest, "flavour", str, fix)
    parts = check_kind(path, manifest, "parts", dict, fix)
    for name in parts:
        part = check_kind(path, parts, name, dict, fix, "parts")
        for key in ("sha256", "precision"):
            check_kind(path, part, key, str, fix, name)
    for name in ("verification", "pipeline"):
        if name in manifest:
            check_kind(path, manifest, name, dict, fix)
    if "pipeline" in manifest:
        pipeline = manifest["pipeline"]
        flow_class(named_in(pipeline, f"{path}: pipeline")).check(path, pipeline, fix)


def load_manifest(folder: str | Path, check_files: bool = True, format_of_parts: str = "onnx") -> dict[str, Any]:
    """Reads a folder's manifest and checks the sections that every reader needs.

    Args:
        check_files: also compare each listed file with its recorded sha256.
        format_of_parts: "onnx", "pt2" (torch.export programs) or "engine" (built engines). A manifest without this key
            describes ONNX parts.

    Raises:
        UserError: the manifest is missing, damaged, or has another format, schema or format of parts; a file is missing,
            changed, or outside the folder.
    """
    folder = Path(folder)
    restore(folder)
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a folder written by export-camera")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of exported parts; expected format {FORMAT!r}")
    if manifest.get("schema") != SCHEMA:
        raise UserError(f"{path}: found schema {manifest.get('schema')!r}, expected {SCHEMA}; export again")
    if (found := manifest.get("format_of_parts", "onnx")) != format_of_parts:
        fix = {
            "pt2": "those are for torch (docs/export.md); export ONNX parts for an engine",
            "engine": "those are built (docs/engines.md); give the folder that they were built from",
        }.get(str(found), "export again")
        raise UserError(f"{folder}: found parts of format {found}, expected {format_of_parts}: {fix}")
    again = _again(manifest)
    _check_shape(path, manifest, again)
    files = {f"part {name}": part for name, part in manifest["parts"].items()}
    verification = manifest.get("verification", {})
    for named in [*files.values(), verification] if "file" in verification else files.values():
        check_inside(path, named.get("file"))
    if check_files:
        for name, part in files.items():
            file = folder / part["file"]
            if not file.is_file():
                raise UserError(f"{file}: no such file, expected {name}; {again}")
            if (found := sha256(file)) != part["sha256"]:
                raise UserError(
                    f"{file}: found sha256 {found[:12]}…, expected {part['sha256'][:12]}… as in {FILE}: "
                    f"the file changed after it was written; {again}"
                )
    return manifest


# The sections that `bevqat verify` reads.
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
    """Raises `UserError` if a section that `bevqat verify` reads is missing, or sections do not fit each other."""
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
                    if row["frames"].get(key) is not None and len(row["frames"][key]) <= max(stored):
                        fail(f"{name}: verification: {output}", row["frames"], "a tolerance for each frame")
            if part.get("sites") is not None and part["sites"]["frame"] not in stored:
                fail(f"{name}: sites: frame", part["sites"]["frame"], "one of the stored frames")
    except Wrong as wrong:
        raise UserError(f"{path}: {wrong}: damaged; {fix}") from None
