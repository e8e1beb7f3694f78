"""Inference backends behind one small interface: build, run, profile.

    engine = build("onnx_int8/camera.backbone.onnx", "openvino", "int8")
    outputs = engine.run({"img": img, "depth": depth})

A backend is one file of this folder and one line of `BACKENDS`; its package is imported when it is first asked for.
Nothing here imports torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from qat.core.errors import UserError
from qat.engine.base import Engine, LayerProfile, Options, TensorSpec

__all__ = ["BACKENDS", "PRECISIONS", "Engine", "LayerProfile", "Options", "TensorSpec", "build"]

# backend: (module, what pip installs)
BACKENDS = {
    "openvino": ("qat.engine.openvino_backend", "openvino"),
    "onnxruntime": ("qat.engine.onnxruntime_backend", "onnxruntime"),
}
PRECISIONS = ("fp32", "fp16", "int8")


def _load(backend: str) -> ModuleType:
    if backend not in BACKENDS:
        raise UserError(f"backend: found {backend!r}, expected one of {', '.join(BACKENDS)}")
    module, package = BACKENDS[backend]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package:
            raise
        raise UserError(
            f"backend {backend}: the package {package} is not installed; mend by: pip install {package}"
        ) from None


def build(onnx_path: str | Path, backend: str, precision: str, options: Options | None = None) -> Engine:
    """Builds an engine for one ONNX part, or takes the one built earlier from the same bytes and options.

    Args:
        onnx_path: the graph.
        backend: a key of `BACKENDS`.
        precision: what the graph was exported for: "fp32", "fp16" or "int8" (QDQ in the graph).
        options: threads and cache folder.

    Raises:
        UserError: no such file, not a graph that the backend reads, an unknown backend or precision, a precision
            that the backend cannot do on this machine, or a missing package.
    """
    path = Path(onnx_path)
    if precision not in PRECISIONS:
        raise UserError(f"precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; write it with export-camera")
    return _load(backend).build(path, precision, options or Options())
