"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qat.core.errors import UserError
from qat.engine.base import Engine, LayerProfile, Options, TensorSpec, cached

DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
# Operators whose type in the optimized graph says that they compute in integers.
INTEGER_PREFIXES = ("QLinear", "ConvInteger", "MatMulInteger", "QGemm", "DynamicQuantize")


def _specs(arguments: Any) -> dict[str, TensorSpec]:
    return {
        a.name: TensorSpec(DTYPES[a.type], tuple(n if isinstance(n, int) else None for n in a.shape)) for a in arguments
    }


def _session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # the optimizer's remarks are not for users
    return options


def _open(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class PlainGraph:
    """A graph as it is in its file, ONNX Runtime's optimizer off: what is run is the file, not one backend's fusions.

    inputs, outputs: tensor name to `TensorSpec`, in the graph's order.
    """

    def __init__(self, graph: bytes | Path, threads: int = 0) -> None:
        """graph: the file's bytes or its path. Raises `UserError` where ONNX Runtime cannot read it."""
        options = _session_options(threads)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        source = graph if isinstance(graph, bytes) else str(graph)
        try:
            self._session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions have no base class below Exception
            name = "the graph" if isinstance(graph, bytes) else graph
            raise UserError(f"{name}: ONNX Runtime cannot read it: {' '.join(str(error).split())}") from None
        self.inputs = _specs(self._session.get_inputs())
        self.outputs = _specs(self._session.get_outputs())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by input name → arrays by output name."""
        return dict(zip(self.outputs, self._session.run(list(self.outputs), dict(feeds)), strict=True))


class OnnxRuntimeEngine(Engine):
    """A session over the graph as ONNX Runtime's optimizer left it."""

    def __init__(self, source: Path, precision: str, options: Options) -> None:
        self._threads = options.threads
        self._graph = source
        try:
            self._session = self._load(source, precision, options)
        except UserError:
            raise
        except Exception as error:  # onnxruntime's own exceptions have no base class below Exception
            raise UserError(f"{source}: ONNX Runtime cannot read it: {' '.join(str(error).split())}") from None
        super().__init__(source, precision, _specs(self._session.get_inputs()), _specs(self._session.get_outputs()))
        self._names = list(self.outputs)

    def _optimized(self) -> ort.SessionOptions:
        options = _session_options(self._threads)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return options

    def _load(self, source: Path, precision: str, options: Options) -> ort.InferenceSession:
        if options.cache is None:
            return _open(source, _session_options(self._threads))

        def make(path: Path) -> None:
            building = _session_options(self._threads)
            building.optimized_model_filepath = str(path)
            _open(source, building)

        key = {"backend": "onnxruntime", "version": ort.__version__, "precision": precision}
        self._graph = cached(source, ".onnx", options, key, make)
        try:
            return _open(self._graph, self._optimized())
        except Exception:  # a damaged file of the cache, in whatever way: build afresh
            self._graph.unlink(missing_ok=True)
            self._graph = cached(source, ".onnx", options, key, make)
            return _open(self._graph, self._optimized())

    def _infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._names, self._session.run(self._names, feeds), strict=True))

    def profile(self, feeds: Mapping[str, np.ndarray] | None = None, runs: int = 3) -> list[LayerProfile]:
        arrays = dict(feeds or self.example_feeds())
        options = _session_options(self._threads) if self._graph == self.source else self._optimized()
        options.enable_profiling = True
        with tempfile.TemporaryDirectory() as folder:
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = _open(self._graph, options)
            for _ in range(runs + 1):
                session.run(None, arrays)
            events = json.loads(Path(session.end_profiling()).read_text())
        kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        # The first run is the warm-up; every run executes the same nodes in the same order.
        kernels = kernels[len(kernels) // (runs + 1) :]
        layers: dict[str, LayerProfile] = {}
        for event in kernels:
            name = event["name"].removesuffix("_kernel_time")
            kind = event["args"]["op_name"]
            layer = layers.setdefault(name, {"name": name, "type": kind, "precision": _precision(event), "ms": 0.0})
            layer["ms"] += event["dur"] / 1e3 / runs
        return list(layers.values())


def _precision(event: Mapping[str, Any]) -> str:
    kind = event["args"]["op_name"]
    if kind.startswith(INTEGER_PREFIXES):
        return "int8"
    types = event["args"].get("output_type_shape") or [{}]
    return next(iter(types[0]), "")


def build(onnx_path: Path, precision: str, options: Options, device: str) -> Engine:
    """See `qat.engine.build`."""
    if precision == "fp16":
        raise UserError(
            f"{onnx_path}: precision fp16: ONNX Runtime's CPU provider takes no precision flag; mend by fp32 or int8"
        )
    return OnnxRuntimeEngine(onnx_path, precision, options)
