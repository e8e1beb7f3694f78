"""Families of models, one folder each. This package is the registry; stages get families from it.

A family is a package with two modules:

    flow.py      FLOW, a `qat.families.flow.Flow`: the plan, the host's ops, raw input and boxes. No torch.
    family.py    FAMILY, a `qat.families.family.Family`: config, networks, parts, recipe, training. Imported by PyTorch stages.

Other packages add families by an entry point of the group `bevqat.families`: `toy = "my_package.toy"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.core.errors import UserError

if TYPE_CHECKING:
    from qat.families.family import Family
    from qat.families.flow import Flow

GROUP = "bevqat.families"
DEFAULT = "bevfusion"  # the family of manifests, checkpoints and configs that name none
KEY = "family"
_OWN = {name: f"qat.families.{name}" for name in (DEFAULT, "pointpillars", "centerpoint", "votenet")}
# Configs in Python: the functions that return a config's family.
_PYTHON_CONFIGS = "qat.families.mmdet3d.config"
# Verbs of a single family: the module with the flags, and the help text.
VERBS = {
    "export-mmdet3d": ("qat.families.mmdet3d.verb", "write mmdet3d models as model.pt2, model.onnx and metadata.json"),
}


@cache
def packages() -> dict[str, str]:
    """The package of each family, by its name."""
    return {**{entry.name: entry.value for entry in entry_points(group=GROUP)}, **_OWN}


def named_in(values: Mapping[str, Any], source: str) -> str:
    """The family that a config, a checkpoint or a manifest's section names.

    Raises:
        UserError: the family does not exist here.
    """
    name = values.get(KEY, DEFAULT)
    if not isinstance(name, str) or name not in packages():
        raise UserError(
            f"{source}: {KEY}: found {name!r}, expected one of {', '.join(packages())}; install the package that provides it"
        )
    return name


def flow_class(name: str) -> type[Flow]:
    """A family's torch-free side."""
    found: type[Flow] = import_module(f"{packages()[name]}.flow").FLOW
    return found


@cache
def state_names() -> tuple[str, ...]:
    """Prefixes of the names in a state dict of any family."""
    return tuple(dict.fromkeys(name for family in packages() for name in flow_class(family).state_names))


def flow_of(settings: Mapping[str, Any], threads: int = 0, source: str = "pipeline") -> Flow:
    """The flow that a manifest's `pipeline` section describes. threads, source: as in `Flow`."""
    return flow_class(named_in(settings, source))(settings, threads, source)


def family_named(name: str) -> Family:
    """A family's PyTorch side."""
    found: Family = import_module(f"{packages()[name]}.family").FAMILY
    return found


def of_python_config(path: Path) -> str:
    """The name of the family of a config in Python (mmengine's). The config is executed.

    Raises:
        UserError: it cannot be read, or no family here has its model.
    """
    name: str = import_module(_PYTHON_CONFIGS).family_in(path)
    return name


def family_of(values: Mapping[str, Any], source: str) -> Family:
    """The family that a config or a checkpoint names; raises like `named_in`."""
    return family_named(named_in(values, source))
