"""The networks, in BEVFusion's config schema and with its state-dict names."""

from qat.models import _torchvision  # noqa: F401  isort: skip  (before anything that imports torchvision)
from qat.models.checkpoint import load_checkpoint, load_float_branch, load_float_model, load_state
from qat.models.detector import CameraBEVDetector, build_model
from qat.models.random_init import random_model

__all__ = [
    "CameraBEVDetector",
    "build_model",
    "load_checkpoint",
    "load_float_branch",
    "load_float_model",
    "load_state",
    "random_model",
]
