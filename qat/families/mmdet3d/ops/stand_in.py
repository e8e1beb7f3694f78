"""Puts ours in the place of mmcv's compiled operators, where those are not."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from typing import Any, Literal

from qat.core.errors import UserError

NAME = "mmcv._ext"
# What a compiled mmcv 2.1.0 has a CPU kernel for, of the operators that we have.
COMPILED_FOR_CPU = {
    "box_iou_rotated",
    "dynamic_voxelize_forward",
    "hard_voxelize_forward",
    "deform_conv_forward",
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "modulated_deform_conv_forward",
    "modulated_deform_conv_backward",
    "nms",
    "nms_rotated",
    "points_in_boxes_cpu_forward",
}
SPARSE = ("indice_", "fused_indice_", "get_indice_")  # spconv's


class MissingOperatorError(UserError):
    """An operator of mmcv that is neither compiled nor replaced."""

    def __init__(self, operator: str) -> None:
        what = "sparse convolution, " if operator.startswith(SPARSE) else ""
        super().__init__(
            f"{what}mmcv's operator {operator}: it is not compiled here, and bevqat does not replace it. Install mmcv with its "
            "compiled operators (the package mmcv 2.1.0 in the place of mmcv-lite), or take a config that does without it"
        )


def which() -> Literal["compiled", "bevqat", "none"]:
    """Whose operators `import mmcv` gets: its own compiled ones, ours in their place, or none, as there is no mmcv.

    Looks at files and imports nothing.
    """
    mmcv = importlib.util.find_spec("mmcv")
    if mmcv is None or mmcv.submodule_search_locations is None:
        return "none"
    compiled = importlib.machinery.PathFinder.find_spec(NAME, list(mmcv.submodule_search_locations))
    return "bevqat" if compiled is None else "compiled"


def install() -> Literal["compiled", "bevqat"]:
    """Lets mmcv.ops, and so mmdet and mmdet3d, import and run where nothing is compiled. Call it before they are imported.

    Ours come at the end of the import path, so compiled ones always win; beside those, ours answer for what mmcv has compiled for
    GPUs alone, and wherever a graph is traced. Wrappers of mmcv that want CUDA whatever they are given are replaced. Calling it
    again changes nothing. Returns whose operators are used.

    Raises:
        UserError: mmcv is not installed, or its compiled operators do not load.
    """
    found = which()
    if found == "none":
        raise UserError(
            "mmcv is not installed: pip install 'bevqat[mmdet3d]', then pip install --no-deps mmdet3d==1.4.0"
        )
    if found == "bevqat" and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    try:
        module = importlib.import_module(NAME)
    except ImportError as error:
        raise UserError(
            f"mmcv's compiled operators do not load ({error}): they are made for one version of torch. Install the mmcv made for "
            "this one, or mmcv-lite==2.1.0 in its place, whose operators bevqat replaces"
        ) from error
    if found == "compiled":
        _stand_beside(module)
    from qat.families.mmdet3d.ops import wrappers

    wrappers.rebind()
    return found


class _Finder(MetaPathFinder):
    """Answers for `mmcv._ext` alone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, _Loader(), origin="bevqat") if fullname == NAME else None


class _Loader(Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Extension(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        from qat.families.mmdet3d.ops.mmcv_ext import OPERATORS

        vars(module).update(OPERATORS)


class _Extension(types.ModuleType):
    """mmcv asks on import whether each of some hundred operators is there: each is, and one that we have not raises when called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: object, **kwargs: object) -> None:
            raise MissingOperatorError(name)

        setattr(self, name, missing)
        return missing


def _stand_beside(module: types.ModuleType) -> None:
    """Ours answer where the compiled operators cannot: while a graph is traced, and on the CPU for what has no kernel there."""
    from qat.families.mmdet3d.ops.mmcv_ext import OPERATORS

    for name, ours in OPERATORS.items():
        compiled = getattr(module, name, None)
        if compiled is None:
            setattr(module, name, ours)
        elif not hasattr(compiled, "beside"):
            setattr(module, name, _either(compiled, ours, name in COMPILED_FOR_CPU))


def _either(compiled: Callable[..., Any], ours: Callable[..., Any], has_cpu_kernel: bool) -> Callable[..., Any]:
    import torch

    from qat.families.mmdet3d.ops.mmcv_ext.forms import traced

    def operator(*args: Any, **kwargs: Any) -> Any:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        on_gpu = first is not None and first.device.type != "cpu"
        return (compiled if (on_gpu or has_cpu_kernel) and not traced() else ours)(*args, **kwargs)

    operator.beside = ours  # type: ignore[attr-defined]
    return operator
