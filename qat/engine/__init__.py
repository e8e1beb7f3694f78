"""Inference backends behind one small interface: build, run, profile.

    engine = build("onnx_int8/fuser.onnx", "openvino", "int8")
    outputs = engine.run({"img": img, "depth": depth})

A backend is a line of `BACKENDS`: one file of this folder, on one kind of device. Its package is imported on first
use. No file here imports torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from qat.core.errors import UserError
from qat.core.onnx_file import check_graph
from qat.engine.base import (
    Device,
    Engine,
    LayerProfile,
    Options,
    TensorSpec,
    described,
    layers_by_device,
    takes_bfloat16,
)
from qat.engine.tensorrt_options import TensorRtOptions

__all__ = [
    "BACKENDS",
    "CPU_BACKENDS",
    "CPU_FLAVOURS",
    "PRECISIONS",
    "Backend",
    "Device",
    "Engine",
    "LayerProfile",
    "Options",
    "TensorRtOptions",
    "TensorSpec",
    "build",
    "described",
    "ending",
    "find_backend",
    "identify",
    "layers_by_device",
    "load",
    "passed_over",
    "takes_bfloat16",
]


@dataclass(frozen=True)
class Backend:
    """Where a graph can run.

    module: has `build(onnx_path, precision, options, device)`, `load(built_file, precision, options, device)`,
    `identify(device)` and ENDING, the name ending of its built files. package: the Python package that it needs. install: what pip
    calls it. device: in the backend's own words. flavour: the export flavour made for it.
    """

    module: str
    package: str
    install: str
    device: str
    flavour: str

    @property
    def version(self) -> str:
        """Version of the installed package; "" if it is not installed."""
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
CPU_BACKENDS = ("openvino", "onnxruntime")  # the backends of every machine
CPU_FLAVOURS = ("onnxruntime", "openvino")  # export flavours with u8 activations, each named after its one backend
PRECISIONS = ("fp32", "fp16", "int8")


def find_backend(name: str) -> Backend:
    """The backend of this name. Raises `UserError` if there is none."""
    if name not in BACKENDS:
        raise UserError(f"backend: found {name!r}, expected one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def passed_over(backend: str, precision: str, flavour: str, forms: Collection[tuple[str, str]]) -> str:
    """Why a backend skips exported graphs that others run: a CPU flavour is for its one backend, and where a
    backend's own flavour of a precision is there, others are not used on it.

    Args:
        forms: (precision, flavour) of all graphs.

    Returns:
        the reason, or "" where it is given them.
    """
    own = find_backend(backend).flavour
    if flavour in CPU_FLAVOURS and flavour != own:
        return f"only for {flavour}"
    if flavour != own and (precision, own) in forms:
        return f"{backend} has its own flavour among the folders"
    return ""


def _module(name: str) -> ModuleType:
    backend = find_backend(name)
    try:
        return importlib.import_module(backend.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != backend.package:
            raise
        raise UserError(
            f"backend {name}: the package {backend.package} is not installed; fix by: pip install {backend.install}"
        ) from None


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise UserError(f"precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")


def build(onnx_path: str | Path, backend: str, precision: str, options: Options | None = None) -> Engine:
    """Builds an engine for one ONNX part, or takes the one built earlier from the same bytes and options.

    Args:
        onnx_path: the graph; for OpenVINO also a model in its own format (.xml), as NNCF's are saved.
        backend: a key of `BACKENDS`.
        precision: what the graph was exported for: "fp32", "fp16" or "int8" (QDQ in the graph).
        options: threads, cache folder and options of single backends.

    Raises:
        UserError: no such file, not a graph that the backend reads, an unknown backend or precision, a precision
            that the backend cannot do on this machine, or a missing package.
    """
    path = Path(onnx_path)
    _check_precision(precision)
    if not path.is_file():
        raise UserError(f"{path}: no such file; write it with export-camera")
    if path.suffix != ".xml" or find_backend(backend).package != "openvino":  # otherwise a model in OpenVINO's format
        check_graph(path)
    engine: Engine = _module(backend).build(path, precision, options or Options(), BACKENDS[backend].device)
    return engine


def load(built_file: str | Path, backend: str, precision: str, options: Options | None = None) -> Engine:
    """Loads an engine that `Engine.save` wrote, on the same kind of device and with the same version of the backend.

    This function does not check that they are the same: only the notes of the file's writer describe a built file
    (`qat.runtime.load_engines` reads them). The engine cache is neither read nor written.

    Args:
        built_file: written by `Engine.save`.
        backend: a key of `BACKENDS`.
        precision: as it was built for.
        options: threads, pinning and spinning, which belong to the process and not to the file; bfloat16 as it was built
            with; TensorRT's plugins.

    Raises:
        UserError: no such file, one that the backend does not load, an unknown backend or precision, no such device, or
            a missing package.
    """
    path = Path(built_file)
    _check_precision(precision)
    if not path.is_file():
        raise UserError(f"{path}: no such file; write it with bevqat build")
    engine: Engine = _module(backend).load(path, precision, options or Options(), BACKENDS[backend].device)
    return engine


def ending(backend: str) -> str:
    """File name endings of a backend's built files."""
    return str(_module(backend).ENDING)


def identify(backend: str) -> Device:
    """The device that a backend's engines are built for and run on here.

    Raises:
        UserError: an unknown backend, a missing package, or no such device.
    """
    device: Device = _module(backend).identify(find_backend(backend).device)
    return device
