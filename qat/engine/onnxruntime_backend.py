"""ONNX Runtime: the CPU, CUDA and TensorRT execution providers.

The built file is the optimized graph on the CPU, a graph with the engines in it (an "EP context" model) for TensorRT, and the
unchanged graph for CUDA, whose provider optimizes it when it is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qat.core.errors import UserError
from qat.core.files import atomic_path
from qat.core.machine import cores, threads_of
from qat.core.onnx_file import has_fp16, read_outline
from qat.engine import cuda
from qat.engine.base import Device, Engine, LayerProfile, Options, TensorSpec, cached, text_digest, this_cpu

ENDING = ".optimized.onnx"
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"

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
# Operators of the optimized graph that compute in integers.
INTEGER_PREFIXES = ("QLinear", "ConvInteger", "MatMulInteger", "QGemm", "DynamicQuantize")


def _specs(arguments: Any, source: object) -> dict[str, TensorSpec]:
    """Raises `UserError` if an input or output has a type that no part has, such as a sequence or a string."""
    if unknown := [a for a in arguments if a.type not in DTYPES]:
        raise UserError(
            f"{source}: {unknown[0].name}: found an input or output of type {unknown[0].type}, expected one of "
            f"{', '.join(DTYPES)}"
        )
    return {
        a.name: TensorSpec(DTYPES[a.type], tuple(n if isinstance(n, int) else None for n in a.shape)) for a in arguments
    }


def _plain_options(threads: int = 0) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # the optimizer's remarks are not for users
    return options


def session_options(options: Options) -> ort.SessionOptions:
    """Session options: threads, pinning and waiting. Memory is ONNX Runtime's default: an arena, with
    patterns.

    The number of threads is always set: with 0, ONNX Runtime takes all cores and pins its threads to them. The thread
    that calls `run` counts as the first; it belongs to the caller and is not pinned.
    """
    places, threads = cores(), threads_of(options.threads)
    settings = _plain_options(threads)
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spinning)))
    # Threads sleep between two runs: the next step (pooling, another part's threads) needs the cores.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if options.pinning and threads > 1:
        if threads > len(places):
            raise UserError(f"pinning: found {threads} threads, expected at most {len(places)}, one for each core")
        affinities = ";".join(str(place + 1) for place in places[1:threads])  # ONNX Runtime counts processors from 1
        settings.add_session_config_entry("session.intra_op_thread_affinities", affinities)
    if hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return settings


def provider_options(
    device: str, precision: str, cache: Path | None, quantized: bool = True
) -> list[tuple[str, dict[str, str]]]:
    """A session's execution providers in order, with their settings; operators that one cannot run go to the next.

    TensorFloat-32 is off in the CUDA provider, so FP32 is FP32 there. The TensorRT provider has no setting for it,
    and TensorRT uses it by default: engines built as FP32 may round the inputs of products to TF32 unless the
    process was started with NVIDIA_TF32_OVERRIDE=0 in its environment, which CUDA's libraries read when they are loaded.

    Args:
        cache: the folder of built engines, where TensorRT's timing cache lies too: it spares a second build most of the
            measurements. None for no cache.
        quantized: whether the graph has Q/DQ. A part of an int8 folder that stays float has none, and TensorRT's INT8 flag
            would require calibrating it.
    """
    cuda = (CUDA, {"device_id": "0", "use_tf32": "0"})
    if device == CPU:
        return [(CPU, {})]
    if device == CUDA:
        return [cuda, (CPU, {})]
    flags = {
        "device_id": "0",
        # FP16 in addition to INT8, as in the reference's build script.
        "trt_fp16_enable": str(int(precision in ("fp16", "int8"))),
        "trt_int8_enable": str(int(precision == "int8" and quantized)),
        "trt_timing_cache_enable": str(int(cache is not None)),
    }
    if cache is not None:
        flags["trt_timing_cache_path"] = str(cache)
    return [(TENSORRT, flags), cuda, (CPU, {})]


def _missing_library(device: str) -> str:
    """The first shared library that a provider needs and cannot find; "" if all are found."""
    name = "cuda" if device == CUDA else "tensorrt"
    provider = Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{name}.so"
    try:
        ctypes.CDLL(str(provider))
    except OSError as error:
        cause = str(error).partition(": cannot open shared object file")
        return cause[0] if cause[1] and cause[0] != str(provider) else ""
    return ""


def check_available(device: str) -> None:
    """Raises `UserError` where this ONNX Runtime was built without the provider."""
    available = ort.get_available_providers()
    if device not in available:
        raise UserError(
            f"onnxruntime: found the providers {', '.join(available)}, expected {device}; fix by: "
            "pip uninstall onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )


def check_used(session: ort.InferenceSession, device: str) -> None:
    """Raises `UserError` if ONNX Runtime made a session without the requested provider, or assigned it no operator.

    ONNX Runtime itself then computes on the CPU and only logs it.
    """
    if device not in session.get_providers():
        library = _missing_library(device)
        raise UserError(
            f"onnxruntime: {device} did not start"
            + (f": {library} is not found" if library else ": no driver, or no GPU that it supports")
            + "; fix by: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            + (" tensorrt" if device == TENSORRT else "")
            + ", with a driver for its CUDA"
        )
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return
    graphs = session.get_provider_graph_assignment_info()
    if graphs and not any(graph.ep_name == device for graph in graphs):
        others = ", ".join(sorted({graph.ep_name for graph in graphs}))
        raise UserError(f"onnxruntime: {device} took none of the graph's operators, all went to {others}")


def _session(source: str | bytes, options: ort.SessionOptions, **arguments: Any) -> Any:
    """A session. From opset 17 on ONNX Runtime's optimizer (1.31) makes one LayerNormalization of an FP32 layer norm behind a Cast
    from FP16, and leaves that Cast out, which is an invalid graph: then the session does without that rewrite."""
    try:
        return ort.InferenceSession(source, options, **arguments)
    except Exception as error:  # onnxruntime's own exceptions have no base class below Exception
        if "LayerNormFusion" not in str(error):
            raise
        return ort.InferenceSession(source, options, **arguments, disabled_optimizers=["LayerNormFusionL1"])


def _open(path: Path, options: ort.SessionOptions, providers: Sequence[tuple[str, dict[str, str]]]) -> Any:
    device = providers[0][0]
    if device != CPU:
        check_available(device)
        if hasattr(ort, "preload_dlls"):  # of the nvidia-* packages, which are outside the loader's search path
            with contextlib.redirect_stdout(io.StringIO()):
                ort.preload_dlls()
        ort.set_default_logger_severity(4)  # a provider that does not start is reported below, in one line
    try:
        session = _session(str(path), options, providers=list(providers), enable_fallback=0)
    except Exception as error:
        if device == TENSORRT and "install TensorRT libraries" in str(error):
            library = _missing_library(device)
            raise UserError(
                f"onnxruntime: {device} did not start"
                + (f": {library} is not found" if library else "")
                + "; fix by: pip install 'onnxruntime-gpu[cuda,cudnn]' tensorrt, with a driver for its CUDA"
            ) from None
        raise
    finally:
        if device != CPU:
            ort.set_default_logger_severity(2)  # warnings, as it was
    check_used(session, device)
    return session


class PlainGraph:
    """Runs a graph exactly as it is in its file, with ONNX Runtime's optimizer off.

    inputs, outputs: tensor name to `TensorSpec`, in the graph's order.
    """

    def __init__(self, graph: bytes | Path, threads: int = 0, optimized: bool = False) -> None:
        """Opens a graph.

        Args:
            graph: the file's bytes or its path.
            optimized: with the optimizer on, all of its rewrites but the one into integer kernels, whose sums saturate on
                CPUs without VNNI. This finds rewrites that change the result.

        Raises:
            UserError: ONNX Runtime cannot read it.
        """
        options = _plain_options(threads)
        if optimized:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        else:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        source = graph if isinstance(graph, bytes) else str(graph)
        name = "the graph" if isinstance(graph, bytes) else graph
        try:
            self._session = _session(source, options, providers=[CPU])
        except Exception as error:  # onnxruntime's own exceptions have no base class below Exception
            raise UserError(f"{name}: ONNX Runtime cannot read it: {' '.join(str(error).split())}") from None
        self.inputs = _specs(self._session.get_inputs(), name)
        self.outputs = _specs(self._session.get_outputs(), name)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the graph on arrays by input name; returns arrays by output name."""
        return dict(zip(self.outputs, self._session.run(list(self.outputs), dict(feeds)), strict=True))


class DeviceRun:
    """Runs a session with its inputs and outputs in a device's memory.

    Buffers of shapes that do not vary are allocated once and keep their address.
    transfer_ms: of the latest run, copies to the device and back.
    """

    def __init__(
        self,
        session: Any,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        device: str = "cuda",
        pin: Callable[[Sequence[int], np.dtype], np.ndarray | None] | None = None,
    ) -> None:
        """
        Args:
            device: ONNX Runtime's name, "cuda" or "cpu".
            pin: returns an array in page-locked memory for an input's shape and dtype, or None where it cannot; None for
                `pinned_array` on a GPU.
        """
        self._session = session
        self._device = device
        self._binding = session.io_binding()
        self._inputs: dict[str, Any] = {}
        self._host: dict[str, np.ndarray | None] = {}  # of each input, where it waits page-locked for its copy
        self._pin = pin or (pinned_array if device == "cuda" else lambda shape, dtype: None)
        self.transfer_ms = 0.0
        for name, spec in outputs.items():
            if None not in spec.shape:
                shape = list(spec.shape)
                buffer = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(spec.dtype).type, device, 0)
                self._binding.bind_ortvalue_output(name, buffer)
        self._varying = [name for name, spec in outputs.items() if None in spec.shape]
        self._names = list(outputs)

    @property
    def pinned(self) -> bool:
        """Whether all inputs of the latest run went through page-locked host memory, which a GPU reads directly at full
        speed; it needs the package cuda-bindings."""
        return bool(self._host) and all(host is not None for host in self._host.values())

    def _send(self, name: str, array: np.ndarray) -> None:
        buffer = self._inputs.get(name)
        if buffer is None or list(buffer.shape()) != list(array.shape):
            buffer = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype.type, self._device, 0)
            self._inputs[name] = buffer
            self._binding.bind_ortvalue_input(name, buffer)
            self._host[name] = self._pin(array.shape, array.dtype)
        if (host := self._host[name]) is not None:
            np.copyto(host, array)
            array = host
        buffer.update_inplace(array)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Outputs as ONNX Runtime's own values on the device (`data_ptr()`, `__dlpack__()`); the next run overwrites them."""
        begin = time.perf_counter()
        for name, array in feeds.items():
            self._send(name, array)
        self.transfer_ms = (time.perf_counter() - begin) * 1e3
        for name in self._varying:  # bound again for each run: a run leaves its buffer bound, with the shape it had
            self._binding.bind_output(name, self._device, 0)
        self._session.run_with_iobinding(self._binding)  # returns when the device is done
        return dict(zip(self._names, self._binding.get_outputs(), strict=True))

    def fetch(self, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """`run`'s values as arrays of the caller's; adds to `transfer_ms`."""
        begin = time.perf_counter()
        arrays = {name: value.numpy() for name, value in values.items()}
        if self._device == "cpu":  # these may be views of the buffers
            arrays = {name: array.copy() for name, array in arrays.items()}
        self.transfer_ms += (time.perf_counter() - begin) * 1e3
        return arrays


def pinned_array(shape: Sequence[int], dtype: np.dtype) -> np.ndarray | None:
    """An array in page-locked host memory, freed with the array; None without cuda-bindings, a GPU or memory left."""
    try:
        return cuda.PinnedBuffer(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize).view(dtype, tuple(shape))
    except (UserError, RuntimeError):  # plain memory works too; RuntimeError: the package has no CUDA runtime
        return None


class OnnxRuntimeEngine(Engine):
    """A session with its execution providers."""

    def __init__(
        self, source: Path, precision: str, options: Options, device: str = CPU, built: Path | None = None
    ) -> None:
        """source: the graph, or the built file itself. built: a file that `save` wrote; None to build, or to take one of
        the cache."""
        self._options = options
        self._device = device
        # A built file has its engines: the flags are not read.
        quantized = device != TENSORRT or built is not None or read_outline(source).has_qdq
        self._providers = provider_options(device, precision, None if built else options.cache, quantized)
        self._built = built
        try:
            self._session = self._start(source, precision)
        except UserError:
            raise
        except Exception as error:  # onnxruntime's own exceptions have no base class below Exception
            raise UserError(f"{source}: ONNX Runtime cannot read it: {' '.join(str(error).split())}") from None
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        super().__init__(source, precision, _specs(inputs, source), _specs(outputs, source))
        self._names = list(self.outputs)
        self._bound = None if device == CPU else DeviceRun(self._session, self.inputs, self.outputs)

    def _settings(self) -> ort.SessionOptions:
        """Arguments of a session over the built file, or over the source if there is none."""
        settings = session_options(self._options)
        if self._built is not None and self._device == CPU:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return settings

    def _make(self, source: Path, path: Path) -> None:
        """Builds into a file."""
        settings = session_options(self._options)
        providers = self._providers
        if self._device == CPU:
            settings.optimized_model_filepath = str(path)
        elif self._device == TENSORRT:
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                context = {
                    "trt_dump_ep_context_model": "1",
                    "trt_ep_context_file_path": str(Path(folder) / "context.onnx"),
                    "trt_ep_context_embed_mode": "1",  # the engines inside the file, not in a separate one
                }
                providers = [(name, {**flags, **context} if name == TENSORRT else flags) for name, flags in providers]
                _open(source, settings, providers)
                shutil.copyfile(Path(folder) / "context.onnx", path)
            return
        else:
            shutil.copyfile(source, path)
            return
        _open(source, settings, providers)

    def _start(self, source: Path, precision: str) -> Any:
        cache = self._options.cache
        if self._built is not None or cache is None or self._device == CUDA:
            return _open(self._built or source, self._settings(), self._providers)
        check_available(self._device)
        key = {
            "backend": "onnxruntime",
            "version": ort.__version__,
            "precision": precision,
            "device": self._device,
            "fingerprint": identify(self._device).fingerprint,
        }
        self._built = cached(source, ENDING, self._options, key, lambda path: self._make(source, path))
        try:
            return _open(self._built, self._settings(), self._providers)
        except UserError:
            raise
        except Exception:  # a damaged cache file: build again
            self._built.unlink(missing_ok=True)
            self._built = cached(source, ENDING, self._options, key, lambda path: self._make(source, path))
            return _open(self._built, self._settings(), self._providers)

    @property
    def settings(self) -> ort.SessionOptions:
        """The session's options, as ONNX Runtime reports them."""
        return self._session.get_session_options()

    def _infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._bound is None:
            return dict(zip(self._names, self._session.run(self._names, feeds), strict=True))
        outputs = self._bound.fetch(self._bound.run(feeds))
        self.transfer_ms = self._bound.transfer_ms
        return outputs

    def run_on_device(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """`run` with outputs that stay on the GPU, as values with `data_ptr()`, `shape()` and `__dlpack__()`; the next run
        overwrites them.

        Raises:
            UserError: like `run`; or the engine runs on the CPU.
        """
        if self._bound is None:
            raise UserError(f"{self.source}: found an engine on the CPU, expected one on a GPU")
        outputs = self._bound.run(self._checked(feeds))
        self.transfer_ms = self._bound.transfer_ms
        return outputs

    def save(self, path: Path) -> None:
        with atomic_path(path) as temporary:
            if self._built is not None:
                shutil.copyfile(self._built, temporary)
            else:
                self._make(self.source, temporary)

    def profile(self, feeds: Mapping[str, np.ndarray] | None = None, runs: int = 3) -> list[LayerProfile]:
        arrays = dict(feeds or self.example_feeds())
        options = self._settings()
        options.enable_profiling = True
        with tempfile.TemporaryDirectory() as folder:
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = _open(self._built or self.source, options, self._providers)
            for _ in range(runs + 1):
                session.run(None, arrays)
            events = json.loads(Path(session.end_profiling()).read_text())
        kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        # The first run is the warm-up; every run executes the same nodes in the same order.
        kernels = kernels[len(kernels) // (runs + 1) :]
        layers: dict[str, LayerProfile] = {}
        for event in kernels:
            name = event["name"].removesuffix("_kernel_time")
            new: LayerProfile = {
                "name": name,
                "type": event["args"]["op_name"],
                "precision": _precision(event),
                "ms": 0.0,
                "device": event["args"].get("provider", ""),
            }
            layers.setdefault(name, new)["ms"] += event["dur"] / 1e3 / runs
        return list(layers.values())


def _precision(event: Mapping[str, Any]) -> str:
    kind = event["args"]["op_name"]
    if kind.startswith(INTEGER_PREFIXES):
        return "int8"
    types = event["args"].get("output_type_shape") or [{}]
    return next(iter(types[0]), "")


def _check_precision(path: Path, precision: str, device: str) -> None:
    if precision != "fp16":
        return
    if device == CPU:
        raise UserError(
            f"{path}: precision fp16: ONNX Runtime's CPU provider takes no precision flag; use fp32 or int8"
        )
    if device == CUDA and not has_fp16(path):
        raise UserError(
            f"{path}: precision fp16: found an FP32-typed graph, expected FP16 types: the CUDA provider takes no "
            "precision flag; use export-camera --fp16 --flavour tensorrt-strong, or by backend onnxruntime-tensorrt"
        )


def identify(device: str) -> Device:
    """The processor or GPU that engines are built for and run on here.

    Raises:
        UserError: there is no NVIDIA GPU, or no driver.
    """
    if device == CPU:
        return this_cpu()
    check_available(device)
    name = _gpu_name()
    return Device(name, text_digest(name))


def _gpu_name() -> str:
    """The first GPU, by the driver's library: ONNX Runtime does not need cuda-bindings, so they may not be installed."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UserError("onnxruntime: found no NVIDIA driver (libcuda.so.1), expected one with a GPU") from None
    handle, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), 0) or driver.cuDeviceGetName(name, 256, handle):
        raise UserError("onnxruntime: the NVIDIA driver found no GPU, expected one")
    return name.value.decode()


def build(onnx_path: Path, precision: str, options: Options, device: str) -> Engine:
    """See `qat.engine.build`."""
    _check_precision(onnx_path, precision, device)
    return OnnxRuntimeEngine(onnx_path, precision, options, device)


def load(built_file: Path, precision: str, options: Options, device: str) -> Engine:
    """See `qat.engine.load`."""
    return OnnxRuntimeEngine(built_file, precision, options, device, built=built_file)
