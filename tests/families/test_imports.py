"""The arrows between folders: stages know no family, a family's inside is its own, and what a robot runs needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QAT = ROOT / "qat"
FAMILIES = QAT / "families"
FAMILY_NAMES = sorted(path.name for path in FAMILIES.iterdir() if (path / "flow.py").is_file())
# Ground floor: nothing here imports a stage.
GROUND = ("core", "boxes", "lean", "plan.py")
STAGES = ("calibrate", "export", "engine", "runtime", "evaluate", "compare", "benchmark", "report", "doctor", "cli")


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever it stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def of_family(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if parts[:2] == ["qat", "families"] and len(parts) > 2 and parts[2] in FAMILY_NAMES else None


def violations(root: Path) -> list[str]:
    """Files that import a family's inside from outside it."""
    found = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).parts
        own = inside[1] if inside[0] == "families" and len(inside) > 2 else None
        found += [
            f"{path.relative_to(root)} imports {module}"
            for module in sorted(imports(path))
            if of_family(module) not in (None, own)
        ]
    return found


def test_no_stage_imports_a_family_and_nobody_a_familys_inside():
    assert FAMILY_NAMES == ["bevfusion", "centerpoint", "pointpillars", "votenet"]
    assert violations(QAT) == []


def test_the_check_sees_an_import_of_a_family(tmp_path):
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "rows.py").write_text("def f():\n    from qat.families.bevfusion import config\n")
    assert violations(tmp_path) == [
        "compare/rows.py imports qat.families.bevfusion",
        "compare/rows.py imports qat.families.bevfusion.config",
    ]


def test_the_ground_floor_imports_no_stage():
    for folder in GROUND:
        files = [QAT / folder] if folder.endswith(".py") else sorted((QAT / folder).rglob("*.py"))
        for path in files:
            stages = {module for module in imports(path) if module.split(".")[0] == "qat"} & {
                f"qat.{stage}" for stage in STAGES
            }
            assert not stages, path


TORCH_FREE = [
    "qat.plan",
    "qat.manifest",
    "qat.engine",
    "qat.runtime",
    "qat.runtime.verify",
    "qat.benchmark.run",
    "qat.families.flow",
    *(f"qat.families.{name}.flow" for name in FAMILY_NAMES),
]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_a_robot_runs_imports_no_torch(module):
    blocked = "torch", "pydantic", "onnx", "nuscenes", "matplotlib", "timm"
    code = f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\nimport {module}\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
