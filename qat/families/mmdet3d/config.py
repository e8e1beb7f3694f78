"""An mmdet3d config: a file, or the name of one that mmdet3d ships, by its 1.x or its 0.x name."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.core.errors import UserError
from qat.families.mmdet3d import awml
from qat.families.mmdet3d.library import load

if TYPE_CHECKING:
    from mmengine.config import Config

# What 0.x and 1.x say differently, or one of them alone.
_DROPPED = {"3d", "head", "10class", "18class", "py"}
_RENAMED = {"fp16": "amp"}
EXPECTED = "an mmdet3d 1.x config"
_FAMILIES = {"Anchor3DHead": "pointpillars", "CenterHead": "centerpoint"}
_VOTENET = ("VoteNet", "PointNet2SASSG", "VoteHead")  # detector, backbone, head


def shipped() -> Path | None:
    """The folder of the configs that mmdet3d's wheel has; None where it is not installed."""
    spec = importlib.util.find_spec("mmdet3d")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / ".mim" / "configs"


def _words(name: str) -> frozenset[str]:
    """What a config's file name says, the same for both spellings: `hv_pointpillars_secfpn_6x8_160e_kitti-3d-3class` has six
    samples on each of eight GPUs, which 1.x writes as 8xb6."""
    found = set()
    for word in re.split(r"[-_.]", name):
        batch = re.fullmatch(r"(\d+)x(\d+)", word)
        size = re.fullmatch(r"(\d+)(pillar|voxel)", word)
        if batch:
            word = f"{batch[2]}xb{batch[1]}"
        elif size:
            word = size[2] + size[1]
        if word not in _DROPPED:
            found.add(_RENAMED.get(word, word))
    return frozenset(found)


def find(name: str | Path) -> Path:
    """The file of a config.

    Args:
        name: a path; or one below mmdet3d's own `configs/`, with or without that word, of 1.x or of 0.x; or its file name alone.

    Raises:
        UserError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    root = shipped()
    if root is not None:
        below = path.parts[path.parts.index("configs") + 1 :] if "configs" in path.parts else path.parts
        if (root / Path(*below)).is_file():
            return root / Path(*below)
        known = [p for p in sorted(root.rglob("*.py")) if "_base_" not in p.parts]
        for fits in (lambda p: p.name == path.name, lambda p: _words(p.name) == _words(path.name)):
            if len(found := [p for p in known if fits(p)]) == 1:
                return found[0]
    raise UserError(
        f"{name}: found no such file, expected an mmdet3d config: a path, or the name of one that mmdet3d ships "
        "(PACKAGE/mmdet3d/.mim/configs)"
    )


def of_python(path: str | Path, expected: str) -> Config:
    """A config in Python by mmengine's convention: its code runs, but modules that it names are not imported.

    Raises:
        UserError: it cannot be read. expected: what it should have been.
    """
    from mmengine.config import Config

    with one_line(path, expected):
        return Config.fromfile(str(path), import_custom_modules=False)


@contextmanager
def one_line(path: str | Path, expected: str) -> Iterator[None]:
    """What a config's code raises inside the block becomes a `UserError`: it may be anything."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: _base_: found no {error.filename or error}, expected a config; fix its _base_"
        ) from error
    except Exception as error:
        what = str(error).strip().splitlines()
        raise UserError(
            f"{path}: found {type(error).__name__}: {what[0][:200] if what else ''}, expected {expected}"
        ) from error


def test_dataset(config: Any, key: str) -> Any:
    """The data set of a config's test_dataloader, inside others that wrap it: the first that has a key, or the innermost."""
    dataset = config.test_dataloader.dataset
    while key not in dataset and "dataset" in dataset:
        dataset = dataset.dataset
    return dataset


def read(name: str | Path) -> Config:
    """Reads a config, which is Python by mmengine's convention: its code runs.

    Raises:
        UserError: it is not there, cannot be read, or is not one of mmdet3d 1.x.
    """
    path = find(name)
    load()
    from mmengine.utils import import_modules_from_strings

    config = of_python(path, EXPECTED)
    with one_line(path, EXPECTED):
        imports = dict(config.get("custom_imports") or {"imports": []})
        names = [imports["imports"]] if isinstance(imports["imports"], str) else list(imports["imports"])
        others = [name for name in names if not awml.is_own(name)]
        import_modules_from_strings(others, bool(imports.get("allow_failed_imports")))
    if not isinstance(config.get("model"), dict) or "type" not in config.model:
        raise UserError(f"{path}: found no model with a type, expected an mmdet3d config with `model = dict(type=…)`")
    if "test_dataloader" not in config:
        older = "an mmdet3d 0.x config (`data = dict(test=…)`)" if "data" in config else "no test_dataloader"
        raise UserError(f"{path}: found {older}, expected one of mmdet3d 1.x; take the 1.x config of the same model")
    config.source = str(path)
    if len(others) < len(names):
        awml.translate(config.model, str(path))
    return config


def family_in(path: str | Path) -> str:
    """The family that has the model of a config.

    Raises:
        UserError: the config cannot be read, or no family has such a model.
    """
    model = read(path).model
    head = (model.get("pts_bbox_head") or model.get("bbox_head") or {}).get("type")
    encoder = (model.get("pts_voxel_encoder") or model.get("voxel_encoder") or {}).get("type")
    if head in _FAMILIES and encoder in ("PillarFeatureNet", "BackwardPillarFeatureNet"):
        return _FAMILIES[head]
    backbone = (model.get("backbone") or {}).get("type")
    if (model.type, backbone, head) == _VOTENET:
        return "votenet"
    raise UserError(
        f"{path}: model: found {model.type} with {encoder or 'no voxel encoder'}, {backbone or 'no backbone'} and {head or 'no head'}, "
        f"expected PillarFeatureNet with {' or '.join(_FAMILIES)}, or {', '.join(_VOTENET)}; export it whole, with export-mmdet3d"
    )
