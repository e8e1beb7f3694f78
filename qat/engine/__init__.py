"""Inference backends behind one small interface: build, run, profile.

    engine = build("onnx_int8/camera.backbone.onnx", "openvino", "int8")
    outputs = engine.run({"img": img, "depth": depth})

A backend is a line of `BACKENDS`: one file of this folder, on one kind of device. Its package is imported when it is first
asked for. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from qat.core.errors import UserError
from qat.engine.base import Engine, LayerProfile, Options, TensorSpec
from qat.engine.tensorrt_options import TensorRtOptions

__all__ = [
    "BACKENDS",
    "CPU_BACKENDS",
    "PRECISIONS",
    "Backend",
    "Engine",
    "LayerProfile",
    "Options",
    "TensorRtOptions",
    "TensorSpec",
    "build",
    "find_backend",
]


@dataclass(frozen=True)
class Backend:
    """Where a graph can run.

    module: has `build(onnx_path, precision, options, device)`. package: the Python package that it needs. install: what pip
    calls it. device: in the backend's own words. flavour: the export flavour made for it.
    """

    module: str
    package: str
    install: str
    device: str
    flavour: str

    @property
    def version(self) -> str:
        """Of the installed package; "" where it is not installed."""
        for name in (self.install, self.package):
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return ""


_OPENVINO = ("qat.engine.openvino_backend", "openvino", "openvino")
_ONNXRUNTIME = ("qat.engine.onnxruntime_backend", "onnxruntime")
BACKENDS = {
    "openvino": Backend(*_OPENVINO, "CPU", "openvino"),
    "openvino-gpu": Backend(*_OPENVINO, "GPU", "openvino"),
    "openvino-npu": Backend(*_OPENVINO, "NPU", "openvino"),
    "tensorrt": Backend("qat.engine.tensorrt_backend", "tensorrt", "tensorrt", "cuda:0", "tensorrt"),
    "onnxruntime": Backend(*_ONNXRUNTIME, "onnxruntime", "CPUExecutionProvider", "onnxruntime"),
    "onnxruntime-cuda": Backend(*_ONNXRUNTIME, "onnxruntime-gpu", "CUDAExecutionProvider", "tensorrt"),
    "onnxruntime-tensorrt": Backend(*_ONNXRUNTIME, "onnxruntime-gpu", "TensorrtExecutionProvider", "tensorrt"),
}
CPU_BACKENDS = ("openvino", "onnxruntime")  # those that every machine has
PRECISIONS = ("fp32", "fp16", "int8")


def find_backend(name: str) -> Backend:
    """The backend by its name. Raises `UserError` where there is none."""
    if name not in BACKENDS:
        raise UserError(f"backend: found {name!r}, expected one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def _load(name: str) -> ModuleType:
    backend = find_backend(name)
    try:
        return importlib.import_module(backend.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != backend.package:
            raise
        raise UserError(
            f"backend {name}: the package {backend.package} is not installed; mend by: pip install {backend.install}"
        ) from None


def build(onnx_path: str | Path, backend: str, precision: str, options: Options | None = None) -> Engine:
    """Builds an engine for one ONNX part, or takes the one built earlier from the same bytes and options.

    Args:
        onnx_path: the graph.
        backend: a key of `BACKENDS`.
        precision: what the graph was exported for: "fp32", "fp16" or "int8" (QDQ in the graph).
        options: threads, cache folder and what single backends take.

    Raises:
        UserError: no such file, not a graph that the backend reads, an unknown backend or precision, a precision
            that the backend cannot do on this machine, or a missing package.
    """
    path = Path(onnx_path)
    if precision not in PRECISIONS:
        raise UserError(f"precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; write it with export-camera")
    engine: Engine = _load(backend).build(path, precision, options or Options(), BACKENDS[backend].device)
    return engine
