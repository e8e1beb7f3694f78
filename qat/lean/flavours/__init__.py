"""The target flavours, one file each: what is rounded for a backend, and how.

A flavour is a policy: it chooses the roles in which a tensor is rounded (`qat.lean.placement.ROLES`), assigns a `Spec` to each
site, and lists the passes over the ONNX graph (`qat.export.passes`). PyTorch simulates each flavour.
"""

from __future__ import annotations

from qat.core.errors import UserError
from qat.lean.flavours.base import Flavour
from qat.lean.flavours.onnxruntime import ONNXRUNTIME
from qat.lean.flavours.openvino import OPENVINO
from qat.lean.flavours.tensorrt import TENSORRT, TENSORRT_STRONG

FLAVOURS: dict[str, Flavour] = {f.name: f for f in (TENSORRT, TENSORRT_STRONG, ONNXRUNTIME, OPENVINO)}
DEFAULT = TENSORRT.name


def flavour_of(name: str) -> Flavour:
    """The flavour of this name.

    Raises:
        UserError: the flavour does not exist.
    """
    if name not in FLAVOURS:
        raise UserError(f"flavour: found {name!r}, expected one of {', '.join(FLAVOURS)}")
    return FLAVOURS[name]


__all__ = ["DEFAULT", "FLAVOURS", "Flavour", "flavour_of"]
