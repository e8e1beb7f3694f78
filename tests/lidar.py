"""Small lidar detectors and clouds that the tests of mmdet3d's families share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CONFIGS = Path(__file__).resolve().parent / "mmdet3d" / "configs"
POINTPILLARS, CENTERPOINT = CONFIGS / "pointpillars_small.py", CONFIGS / "centerpoint_small.py"
AWML = CONFIGS / "awml_small.py"


def need_mmdet3d() -> None:
    """Skips a module where mmdet3d is not installed; else its tests may import it, whichever of them runs first."""
    if importlib.util.find_spec("mmdet3d") is None:
        pytest.skip("mmdet3d is not installed (make test installs it)", allow_module_level=True)
    import qat.lean._torchvision  # noqa: F401
    from qat.families.mmdet3d import ops

    ops.install()


def cloud(seed: int = 0, count: int = 4000, columns: int = 4, far: float = 30.0) -> np.ndarray:
    """Points on a ground and on upright boxes in front of a sensor; float32[count,columns]."""
    rng = np.random.default_rng(seed)
    angle, reach = rng.uniform(-np.pi / 3, np.pi / 3, count), far * rng.random(count) ** 0.7
    points = np.zeros((count, columns), np.float32)
    points[:, 0], points[:, 1] = reach * np.cos(angle), reach * np.sin(angle)
    points[:, 2] = -1.6 + 0.05 * rng.normal(size=count)
    for n in range(6):
        at = rng.integers(0, count, count // 20)
        points[at, :2] = rng.normal(scale=0.8, size=(len(at), 2)) + [6 + 4 * n, rng.uniform(-8, 8)]
        points[at, 2] = rng.uniform(-1.6, 0, len(at))
    points[:, 3] = rng.random(count)
    return points


def write_cloud(path: Path, **more: Any) -> Path:
    """The same as a .bin file."""
    path.write_bytes(cloud(**more).tobytes())
    return path


def changed_config(config: Path, folder: Path, before: str, after: str) -> Path:
    """A copy of a config in which `after` stands for `before`."""
    text = config.read_text()
    assert before in text
    path = folder / "config.py"
    path.write_text(text.replace(before, after))
    return path


def changed_awml(folder: Path, *changes: tuple[str, str]) -> Path:
    """A copy of AWML's config with changes, whose base is still found."""
    path = changed_config(AWML, folder, "./centerpoint_small.py", str(CENTERPOINT))
    for before, after in changes:
        path = changed_config(path, folder, before, after)
    return path
