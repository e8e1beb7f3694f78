"""The networks, with BEVFusion's options and state-dict names."""

from qat.lean import _torchvision  # noqa: F401  # before anything that imports torchvision
