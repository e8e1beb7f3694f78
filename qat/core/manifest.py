"""manifest.json: what a folder of exported parts says about itself. Written by qat.export, read by qat.runtime."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from qat.core.errors import UserError
from qat.core.files import read_json, sha256

FORMAT, SCHEMA = "bevqat-parts", 1
FILE = "manifest.json"

# In the order in which they run. BEV pooling stands between the first and the second and is no file;
# camera.vtransform is left out of a folder when the view transform does not downsample.
PARTS = ("camera.backbone", "camera.vtransform", "fuser", "head.bbox")


def check_inside(path: str | Path, name: object) -> None:
    """Raises `UserError` where a file's name in a manifest is none, or leads out of the manifest's folder."""
    plain = isinstance(name, str) and bool(name) and "\0" not in name
    if plain:
        parts = PurePosixPath(str(name).replace("\\", "/"))
        plain = not (parts.is_absolute() or ".." in parts.parts or PureWindowsPath(str(name)).drive)
    if not plain:
        raise UserError(f"{path}: found file {name!r}, expected the name of a file in the manifest's folder")


def load_manifest(folder: str | Path, check_files: bool = True, format_of_parts: str = "onnx") -> dict[str, Any]:
    """Reads a folder's manifest and, unless told not to, checks each file that it lists against its recorded sha256.

    Args:
        format_of_parts: "onnx", "pt2" for programs of torch.export, or "engine" for built engines. A manifest that does not
            say is of ONNX parts.

    Raises:
        UserError: no manifest, another format or schema, other parts, a file outside the folder, or one that is
            missing or was changed.
    """
    folder = Path(folder)
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a folder written by export-camera")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of exported parts; expected format {FORMAT!r}")
    if manifest.get("schema") != SCHEMA:
        raise UserError(f"{path}: found schema {manifest.get('schema')!r}, expected {SCHEMA}; export again")
    if (found := manifest.get("format_of_parts", "onnx")) != format_of_parts:
        mend = {
            "pt2": "those are for torch (docs/formats.md); export ONNX parts for an engine",
            "engine": "those are built (docs/engines.md); name the folder that they were built from",
        }.get(found, "export again")
        raise UserError(f"{folder}: found parts of format {found}, expected {format_of_parts}: {mend}")
    names = [part["file"] for part in (*manifest["parts"].values(), *([manifest["e2e"]] if "e2e" in manifest else []))]
    verification = manifest.get("verification", {})
    for name in [*names, verification["file"]] if "file" in verification else names:
        check_inside(path, name)
    if check_files:
        again = "run `bevqat build` again" if format_of_parts == "engine" else "export again"
        files = {f"part {name}": part for name, part in manifest["parts"].items()}
        if "e2e" in manifest:
            files["the whole detector"] = manifest["e2e"]
        for name, part in files.items():
            file = folder / part["file"]
            if not file.is_file():
                raise UserError(f"{file}: no such file, expected {name}; {again}")
            if (found := sha256(file)) != part["sha256"]:
                raise UserError(
                    f"{file}: found sha256 {found[:12]}…, expected {part['sha256'][:12]}… as in {FILE}: "
                    f"the file was changed after it was written; {again}"
                )
    return manifest
