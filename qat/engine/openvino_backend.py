"""OpenVINO on a CPU, GPU or NPU. OpenVINO exports the built file: the graph as its plugin transformed it."""

from __future__ import annotations

import functools
import shutil
import threading
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from qat.core.errors import UserError
from qat.core.files import atomic_path
from qat.engine.base import Device, Engine, LayerProfile, Options, TensorSpec, cached, text_digest, this_cpu
from qat.engine.openvino_shift import shift_concatenated

ENDING = ".openvino"
# The type of layers outside the QDQ. By default OpenVINO uses bfloat16 on CPUs that have it and FP16 on GPUs, so that FP32
# rows would not be FP32. An NPU has no FP32.
FLOAT_TYPE = {
    "CPU": {"fp32": "f32", "int8": "f32", "fp16": "f16"},
    "GPU": {"fp32": "f32", "int8": "f16", "fp16": "f16"},
    "NPU": {"int8": "f16", "fp16": "f16"},
}

_making_core = threading.Lock()

PASSES_VERSION = "1"  # of the changes to a graph before it is compiled; engines of another version are not reused


@functools.cache
def _only_core() -> ov.Core:
    return ov.Core()


def only_core() -> ov.Core:
    """The process's one `ov.Core`, which lives as long as the process.

    On a processor with AMX, each Core's CPU plugin sets its own signal stack for the calling thread. A Core unmaps its stack
    when it is destroyed; a later Core restores that unmapped stack when it is destroyed in turn. The next signal with a
    Python handler, such as Ctrl-C, then ends the process with a segmentation fault (seen with OpenVINO 2026.4.1).
    """
    with _making_core:  # the cache alone lets two threads make one each
        return _only_core()


def _name(port: Any) -> str:
    """The graph's name of a port. An output also has the names of other tensors if the plugin removed an operation between
    them (a cast to the same type), and `get_any_name` may return one of these."""
    own: str = port.get_node().get_friendly_name().removesuffix("/sink_port_0")
    return own if own in port.get_names() else port.get_any_name()


def _specs(ports: Any) -> dict[str, TensorSpec]:
    return {
        _name(port): TensorSpec(
            port.get_element_type().to_dtype().name,
            tuple(d.get_length() if d.is_static else None for d in port.get_partial_shape()),
        )
        for port in ports
    }


def _last_line(error: RuntimeError) -> str:
    """The last line, which has the cause; the lines above it name OpenVINO's source files."""
    return str(error).strip().splitlines()[-1].strip()


def settings(precision: str, options: Options, device: str) -> dict[str, Any]:
    """OpenVINO's properties for compiling or loading a graph.

    LATENCY: one picture at a time and no second stream. On a CPU also the number of threads, and whether they are pinned.
    """
    told: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if _bfloat16(precision, options, device) else FLOAT_TYPE[device][precision],
    }
    if device == "CPU":
        told["ENABLE_CPU_PINNING"] = options.pinning
        if options.threads:
            told["INFERENCE_NUM_THREADS"] = options.threads
    return told


def _bfloat16(precision: str, options: Options, device: str) -> bool:
    """Whether the option applies to this engine: an FP32 row stays FP32, and a GPU already uses FP16."""
    return options.bfloat16 and precision == "int8" and device == "CPU"


def _check(core: ov.Core, source: Path, precision: str, options: Options, device: str) -> None:
    """Raises `UserError` if the device is missing, or has no arithmetic of this precision."""
    _check_device(core, device)
    if precision not in FLOAT_TYPE[device]:
        raise UserError(f"{source}: precision {precision}: OpenVINO's {device} computes in FP16; use fp16 or int8")
    if precision == "fp16" and "FP16" not in core.get_property(device, "OPTIMIZATION_CAPABILITIES"):
        raise UserError(f"{source}: precision fp16: OpenVINO has no FP16 arithmetic on this {device}; use fp32 or int8")

    if _bfloat16(precision, options, device) and "BF16" not in core.get_property(device, "OPTIMIZATION_CAPABILITIES"):
        raise UserError(f"{source}: bfloat16: OpenVINO has no bfloat16 arithmetic on this {device}; omit it")


def _check_device(core: ov.Core, device: str) -> None:
    there = core.available_devices  # "GPU" alone, or "GPU.0" and "GPU.1"
    if not any(name.split(".")[0] == device for name in there):
        raise UserError(
            f"openvino: found the devices {', '.join(there)}, expected {device}; install its driver "
            "(docs.openvino.ai: additional hardware setup), or choose another backend"
        )


class OpenVinoEngine(Engine):
    """A compiled model with one synchronous request."""

    def __init__(
        self, source: Path, precision: str, options: Options, device: str = "CPU", built: Path | None = None
    ) -> None:
        """source: the graph, or the built file itself. built: a file that `save` wrote; None to build, or to take one of
        the cache."""
        self._core = only_core()
        self._device = device
        _check(self._core, source, precision, options, device)
        self._settings = settings(precision, options, device)
        self._cached: bytes | None = None
        self._compiled = self._import(built) if built else self._load(source, precision, options)
        super().__init__(source, precision, _specs(self._compiled.inputs), _specs(self._compiled.outputs))
        self._built = built
        self._request = self._compiled.create_infer_request()

    @property
    def compiled(self) -> ov.CompiledModel:
        """OpenVINO's compiled model, which has its properties."""
        return self._compiled

    def _compile(self, source: Path, **more: Any) -> ov.CompiledModel:
        try:
            model = self._core.read_model(source)
            shift_concatenated(model)  # it reads the shapes of nodes, which an invalid graph may lack
        except RuntimeError as error:
            raise UserError(f"{source}: OpenVINO cannot read it as ONNX: {_last_line(error)}") from None
        try:
            return self._core.compile_model(model, self._device, {**self._settings, **more})
        except RuntimeError as error:
            raise UserError(
                f"{source}: OpenVINO cannot compile it for this {self._device}: {_last_line(error)}"
            ) from None

    def _import(self, built: Path, **more: Any) -> ov.CompiledModel:
        # Settings are not part of the file: a graph that is imported without them runs in another precision.
        try:
            return self._core.import_model(built.read_bytes(), self._device, {**self._settings, **more})
        except RuntimeError as error:
            raise UserError(f"{built}: OpenVINO cannot load it on this {self._device}: {_last_line(error)}") from None

    def _load(self, source: Path, precision: str, options: Options) -> ov.CompiledModel:
        exports = "EXPORT_IMPORT" in self._core.get_property(self._device, "OPTIMIZATION_CAPABILITIES")
        if options.cache is None or not exports:
            return self._compile(source)
        compiled: list[ov.CompiledModel] = []

        def make(path: Path) -> None:
            compiled.append(self._compile(source))
            path.write_bytes(compiled[0].export_model().getvalue())

        key = {
            "backend": "openvino",
            "version": ov.__version__,
            "precision": precision,
            "passes": PASSES_VERSION,
            "device": self._device,
            "fingerprint": identify(self._device).fingerprint,
        }
        blob = cached(source, ENDING, options, key, make)
        if compiled:
            return compiled[0]
        try:
            found = self._import(blob)
            self._cached = (
                blob.read_bytes()
            )  # OpenVINO 2026.4.1 cannot always import what it exported from an imported model
            return found
        except (UserError, FileNotFoundError):
            blob.unlink(missing_ok=True)  # truncated or from another build, or another process has just removed it
            return self._load(source, precision, options)

    def _infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = self._request.infer(list(feeds.values()), share_inputs=True, share_outputs=True)
        # The request reuses its output buffers.
        return {name: results[i].copy() for i, name in enumerate(self.outputs)}

    def save(self, path: Path) -> None:
        if self._built is not None:
            with atomic_path(path) as temporary:
                shutil.copyfile(self._built, temporary)
            return
        try:
            exported = self._compiled.export_model().getvalue() if self._cached is None else self._cached
        except RuntimeError as error:
            raise UserError(
                f"{self.source}: OpenVINO cannot export what it built for this {self._device}: {_last_line(error)}"
            ) from None
        with atomic_path(path) as temporary:
            temporary.write_bytes(exported)

    def profile(self, feeds: Mapping[str, np.ndarray] | None = None, runs: int = 3) -> list[LayerProfile]:
        counted = {"PERF_COUNT": True}
        compiled = self._import(self._built, **counted) if self._built else self._compile(self.source, **counted)
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


def identify(device: str) -> Device:
    """The processor, GPU or NPU that engines are built for and run on here.

    Raises:
        UserError: OpenVINO does not find one.
    """
    if device == "CPU":
        return this_cpu()
    core = only_core()
    _check_device(core, device)
    name = str(core.get_property(device, "FULL_DEVICE_NAME"))
    return Device(name, text_digest(f"{name} {core.get_property(device, 'DEVICE_ARCHITECTURE')}"))


def build(onnx_path: Path, precision: str, options: Options, device: str) -> Engine:
    """See `qat.engine.build`."""
    return OpenVinoEngine(onnx_path, precision, options, device)


def load(built_file: Path, precision: str, options: Options, device: str) -> Engine:
    """See `qat.engine.load`."""
    return OpenVinoEngine(built_file, precision, options, device, built=built_file)
