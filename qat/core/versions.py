"""Versions of the packages that computed a result."""

from __future__ import annotations

import platform
from importlib import metadata

from qat import __version__

PACKAGES = (
    "torch", "openvino", "onnxruntime", "onnx", "onnxsim", "timm", "pytorch-quantization", "nuscenes-devkit", "numpy",
    "numba",
)  # fmt: skip


def versions() -> dict[str, str]:
    """bevqat's, Python's and those of the installed ones of PACKAGES."""
    found = {"bevqat": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
