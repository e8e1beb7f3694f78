"""OpenVINO on the CPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from qat.core.errors import UserError
from qat.engine.base import Engine, LayerProfile, Options, TensorSpec, cached
from qat.engine.openvino_shift import shift_concatenated

# The type that layers outside the QDQ run in. Left to itself OpenVINO takes bfloat16 where the CPU has it, and FP32
# rows would then not be FP32.
FLOAT_TYPE = {"fp32": "f32", "int8": "f32", "fp16": "f16"}

PASSES_VERSION = "1"  # of what is done to a graph before it is compiled; engines built otherwise are not reused


def _specs(ports: Any) -> dict[str, TensorSpec]:
    return {
        port.get_any_name(): TensorSpec(
            port.get_element_type().to_dtype().name,
            tuple(d.get_length() if d.is_static else None for d in port.get_partial_shape()),
        )
        for port in ports
    }


def _last_line(error: RuntimeError) -> str:
    """The cause; the lines above it are OpenVINO's own source files."""
    return str(error).strip().splitlines()[-1]


class OpenVinoEngine(Engine):
    """A compiled model with one synchronous request."""

    def __init__(self, source: Path, precision: str, options: Options) -> None:
        self._core = ov.Core()
        if precision == "fp16" and "FP16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise UserError(
                f"{source}: precision fp16: OpenVINO has no FP16 arithmetic on this CPU; mend by fp32 or int8"
            )
        self._settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": FLOAT_TYPE[precision],
        }
        if options.threads:
            self._settings["INFERENCE_NUM_THREADS"] = options.threads
        self._compiled = self._load(source, precision, options)
        super().__init__(source, precision, _specs(self._compiled.inputs), _specs(self._compiled.outputs))
        self._request = self._compiled.create_infer_request()

    def _compile(self, source: Path, **more: Any) -> ov.CompiledModel:
        try:
            model = self._core.read_model(source)
        except RuntimeError as error:
            raise UserError(
                f"{source}: OpenVINO cannot read it as ONNX: {str(error).strip().splitlines()[-1]}"
            ) from None
        shift_concatenated(model)
        try:
            return self._core.compile_model(model, "CPU", {**self._settings, **more})
        except RuntimeError as error:
            raise UserError(f"{source}: OpenVINO cannot compile it for this CPU: {_last_line(error)}") from None

    def _load(self, source: Path, precision: str, options: Options) -> ov.CompiledModel:
        if options.cache is None:
            return self._compile(source)
        compiled: list[ov.CompiledModel] = []

        def make(path: Path) -> None:
            compiled.append(self._compile(source))
            path.write_bytes(compiled[0].export_model().getvalue())

        key = {"backend": "openvino", "version": ov.__version__, "precision": precision, "passes": PASSES_VERSION}
        blob = cached(source, ".openvino", options, key, make)
        if compiled:
            return compiled[0]
        try:
            return self._core.import_model(blob.read_bytes(), "CPU", self._settings)
        except RuntimeError:
            blob.unlink()  # cut short or from another build: compile afresh
            return self._load(source, precision, options)

    def _infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = self._request.infer(list(feeds.values()), share_inputs=True, share_outputs=True)
        # The request reuses its output buffers.
        return {name: results[i].copy() for i, name in enumerate(self.outputs)}

    def profile(self, feeds: Mapping[str, np.ndarray] | None = None, runs: int = 3) -> list[LayerProfile]:
        compiled = self._compile(self.source, PERF_COUNT=True)
        request = compiled.create_infer_request()
        arrays = list((feeds or self.example_feeds()).values())
        request.infer(arrays)
        total: dict[str, float] = defaultdict(float)
        kinds: dict[str, str] = {}
        for _ in range(runs):
            request.infer(arrays)
            for layer in request.profiling_info:
                if layer.status == ov.ProfilingInfo.Status.EXECUTED:
                    kinds[layer.node_name] = layer.node_type
                    total[layer.node_name] += layer.real_time.total_seconds() * 1e3
        precisions = {
            node.get_friendly_name(): str(node.get_rt_info()["runtimePrecision"].astype(str))
            for node in compiled.get_runtime_model().get_ordered_ops()
            if "runtimePrecision" in node.get_rt_info()
        }
        return [
            {"name": name, "type": kinds[name], "precision": precisions.get(name, ""), "ms": milliseconds / runs}
            for name, milliseconds in total.items()
        ]


def build(onnx_path: Path, precision: str, options: Options, device: str) -> Engine:
    """See `qat.engine.build`."""
    return OpenVinoEngine(onnx_path, precision, options)
