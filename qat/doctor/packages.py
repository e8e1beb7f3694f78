"""Installed versions compared with setup.py's requirements, and the command that fixes a difference."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import qat
from qat.doctor.finding import MISSING, OK, PROBLEM, Finding

ROOT = Path(qat.__file__).resolve().parents[1]
STANDS_FOR = {"onnxruntime": "onnxruntime-gpu"}  # another build of the same modules, which replaces the first
GROUP, EXTRAS = "packages", "extras"


@dataclass(frozen=True)
class Wanted:
    """core: requirements of every installation. extras: of each extra. In pip's notation, such as "numpy<2"."""

    core: Sequence[str]
    extras: Mapping[str, Sequence[str]]


def wanted(root: Path = ROOT) -> Wanted:
    """Read from the checkout's setup.py, or else from the installed metadata; empty if neither can be read."""
    try:
        tree = ast.parse((root / "setup.py").read_text(encoding="utf-8"))
        words: dict[str, Any] = {
            word.arg: ast.literal_eval(word.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"
            for word in node.keywords
            if word.arg in ("install_requires", "extras_require")
        }
        return Wanted(words["install_requires"], words["extras_require"])
    except (OSError, SyntaxError, ValueError, KeyError):
        pass
    core: list[str] = []
    extras: dict[str, list[str]] = {}
    try:
        lines = metadata.requires("bevqat") or []
    except metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        extra = re.search(r"""extra\s*==\s*["']([^"']+)["']""", marker)
        (extras.setdefault(extra[1], []) if extra else core).append(requirement)
    return Wanted(core, extras)


def name_of(requirement: str) -> str:
    """ "numpy<2" → "numpy"."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    return found[0] if found else requirement


def installed(name: str) -> str | None:
    """The version; None if the package is not installed, "" if its metadata lack it."""
    try:
        return str(metadata.version(name) or "")
    except metadata.PackageNotFoundError:
        return None
    except Exception:  # truncated metadata: the parser may raise anything
        return ""


def fits(requirement: str, version: str) -> bool | None:
    """Whether the requirement allows a version; None if unknown."""
    for module in ("packaging", "pip._vendor.packaging"):
        try:
            requirements = importlib.import_module(f"{module}.requirements")
            return bool(requirements.Requirement(requirement).specifier.contains(version, prereleases=True))
        except ImportError:
            continue
        except Exception:  # InvalidVersion, InvalidRequirement: each copy of the package has its own
            return None
    return None


def pip_line(*requirements: str, extra: str = "") -> str:
    """The installation command: in a checkout with its constraints, elsewhere from the package."""
    checkout = (ROOT / "setup.py").is_file() and (ROOT / "constraints.txt").is_file()
    here = os.path.relpath(ROOT) if checkout else ""
    words = ["pip", "install"]
    if checkout:
        words += ["-c", os.path.join(here, "constraints.txt").removeprefix("./")]
    words += list(requirements)
    if extra:
        words += ["-e", f"{here}[{extra}]"] if checkout else [f"bevqat[{extra}]"]
    return shlex.join(words)


def package_findings(want: Wanted) -> list[Finding]:
    """Core packages each, extras as a whole."""
    if not want.core:
        fix = "pip install -e . in a checkout"
        return [
            Finding(
                GROUP, "bevqat", PROBLEM, "found neither setup.py nor installed metadata with the requirements", fix
            )
        ]
    found = []
    for requirement in want.core:
        name = name_of(requirement)
        version = installed(name)
        if version is None and name in STANDS_FOR:
            version = installed(STANDS_FOR[name])
        bounds = requirement[len(name) :].strip() or "any"
        fix = pip_line(requirement)
        if version is None:
            state, words = MISSING, f"not installed, expected {bounds}"
        elif not version:
            state, words = PROBLEM, "installed in part: its metadata have no version"
            fix = fix.replace("install", "install --force-reinstall", 1)
        elif fits(requirement, version) is False:
            state, words = PROBLEM, f"{version}, expected {bounds}"
        else:
            state, words, fix = OK, f"{version} ({bounds})", ""
        found.append(Finding(GROUP, name, state, words, fix, needed=True))
    for extra, requirements in want.extras.items():
        bad = []
        for requirement in requirements:
            name = name_of(requirement)
            version = installed(name)
            if version is None:
                bad.append(f"{name} is not installed")
            elif not version or fits(requirement, version) is False:
                bad.append(f"{name} {version or '?'}, expected {requirement[len(name) :].strip()}")
        all_missing = len(bad) == len(requirements) and all(line.endswith("not installed") for line in bad)
        state = OK if not bad else MISSING if all_missing or "expected" not in "".join(bad) else PROBLEM
        words = "; ".join(bad) if bad else ", ".join(f"{name_of(r)} {installed(name_of(r))}" for r in requirements)
        names = {name_of(requirement) for requirement in requirements}
        first = [f"pip uninstall {old} && " for old, new in STANDS_FOR.items() if new in names and installed(old)]
        found.append(
            Finding(EXTRAS, f"[{extra}]", state, words, "".join([*first, pip_line(extra=extra)]) if bad else "")
        )
    return [*found, _mmdet3d()]


def _mmdet3d() -> Finding:
    """mmdet3d, which is in no extra (its requirements are a gigabyte), and the operators that its models use."""
    version = installed("mmdet3d")
    if version is None:
        fix = pip_line("--no-deps", "mmdet3d==1.4.0")
        return Finding(EXTRAS, "mmdet3d", MISSING, "not installed (export-mmdet3d, pointpillars, centerpoint)", fix)
    try:
        compiled = importlib.util.find_spec("mmcv._ext") is not None
    except ImportError:  # no mmcv: the extra's line reports it
        compiled = False
    operators = (
        "mmcv's compiled operators" if compiled else "operators in numba and torch instead of mmcv's compiled ones"
    )
    return Finding(EXTRAS, "mmdet3d", OK, f"{version}, {operators}", "")
