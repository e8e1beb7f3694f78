"""Decides which exported folder runs on which backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.core.errors import UserError
from qat.engine import CPU_BACKENDS, find_backend, passed_over
from qat.manifest import load_manifest, pipeline_of
from qat.runtime.engines import FORMAT_OF_PARTS, engine_section, is_engines


@dataclass(frozen=True)
class Planned:
    """A planned row: a folder on a backend. name: the row's unique name."""

    name: str
    folder: Path
    backend: str
    manifest: dict[str, Any]

    @property
    def precision(self) -> str:
        """The folder's precision."""
        return _precision(self.manifest)

    @property
    def flavour(self) -> str:
        """The folder's flavour."""
        return str(self.manifest["flavour"])

    @property
    def built(self) -> bool:
        """Whether the folder holds built engines."""
        return _own_backend(self.manifest) is not None


def _precision(manifest: dict[str, Any]) -> str:
    return str(manifest.get("engine", manifest)["precision"])


def _own_backend(manifest: dict[str, Any]) -> str | None:
    """The backend that a folder of built engines is for; None for a folder of graphs."""
    return str(manifest["engine"]["backend"]) if "engine" in manifest else None


def _load(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of graphs or of built engines."""
    if is_engines(folder):
        manifest = load_manifest(folder, format_of_parts=FORMAT_OF_PARTS)
        engine_section(folder, manifest)
    else:
        manifest = load_manifest(folder)
    pipeline_of(folder, manifest)
    return manifest


def asked_backends(folders: Sequence[Path], backends: Sequence[str] | None) -> list[str]:
    """The backends of a benchmark, in order.

    Args:
        backends: None for those that every machine has, plus the backends of folders with built engines.

    Raises:
        UserError: a backend is unknown, or a folder of engines is damaged.
    """
    asked = list(CPU_BACKENDS if backends is None else backends)
    if backends is None:
        for folder in filter(is_engines, folders):
            manifest = load_manifest(folder, check_files=False, format_of_parts=FORMAT_OF_PARTS)
            asked.append(engine_section(folder, manifest)["backend"])
    for backend in asked:
        find_backend(backend)
    return list(dict.fromkeys(asked))


def plan(folders: Sequence[Path], backends: Sequence[str] | None) -> tuple[list[Planned], list[dict[str, str]]]:
    """Plans a row for every folder on every backend that can run it.

    Graphs of a CPU flavour run on its one backend; where a backend's own flavour of a precision is among the folders, others
    of that precision are left out there, as nobody would ship them; built engines run where they were built for.

    Args:
        backends: as in `asked_backends`.

    Returns:
        the rows, and {"name", "why"} for each row that was left out.

    Raises:
        UserError: a folder is incomplete or was changed, a backend is unknown, or no row can run.
    """
    if not folders:
        raise UserError("--onnx: found none, expected at least one folder that export-camera wrote")
    manifests = [(folder, _load(folder)) for folder in dict.fromkeys(folders)]
    asked = asked_backends(folders, backends)
    forms = {(_precision(m), m["flavour"]) for _, m in manifests if _own_backend(m) is None}
    chosen: list[tuple[Path, str, dict[str, Any]]] = []
    skipped: list[dict[str, str]] = []
    for backend in asked:
        for folder, manifest in manifests:
            built_for = _own_backend(manifest)
            if built_for is None:
                why = passed_over(backend, _precision(manifest), manifest["flavour"], forms)
            else:
                why = "" if built_for == backend else f"engines of {built_for}"
            if why:
                skipped.append({"name": f"{folder.name} on {backend}", "why": why})
            else:
                chosen.append((folder, backend, manifest))
    if not chosen:
        reasons = "; ".join(f"{s['name']}: {s['why']}" for s in skipped)
        raise UserError(f"--onnx: found nothing to run, expected a folder for {', '.join(asked)}: {reasons}")
    return [Planned(_name(n, chosen), *chosen[n]) for n in range(len(chosen))], skipped


def _name(place: int, chosen: Sequence[tuple[Path, str, dict[str, Any]]]) -> str:
    """Backend and precision, and what else distinguishes the row from the others."""

    def names(entry: tuple[Path, str, dict[str, Any]]) -> list[str]:
        folder, backend, manifest = entry
        short = f"{backend} {_precision(manifest)}" + (" built" if _own_backend(manifest) else "")
        return [short, f"{short} ({manifest['flavour']})", f"{short} ({folder.name})", f"{short} ({folder})"]

    for n, name in enumerate(names(chosen[place])):
        if sum(names(entry)[n] == name for entry in chosen) == 1:
            return name
    return name
