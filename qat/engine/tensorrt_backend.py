"""TensorRT on an NVIDIA GPU: plans built from ONNX or loaded, run through cuda-bindings. No torch.

engine = build(Path("onnx_int8/fuser.onnx"), "int8", Options(), "cuda:0")
outputs = engine.run({"img": img, "depth": depth})                       # numpy, through pinned memory
engine.run_device({"img": img_gpu, "depth": depth_gpu}, stream=stream)   # torch or CuPy tensors, no copy
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qat.core.errors import UserError
from qat.core.files import atomic_path
from qat.engine import cuda
from qat.engine.base import Device, Engine, LayerProfile, Options, TensorSpec, cache_path, text_digest
from qat.engine.device_arrays import DeviceArray, stream_handle, take, wait_for_arrays
from qat.engine.inspector import Findings, LayerInfo, find, read_layers, with_times
from qat.engine.tensorrt_builder import (
    BUILD_VERSION,
    ENDING,
    PlanFacts,
    build_plan,
    check_facts,
    last_message,
    load_plugins,
    make_logger,
    one_line,
    read_facts,
    write_plan,
)
from qat.engine.tensorrt_capabilities import Capabilities, tensorrt_module
from qat.engine.tensorrt_options import TensorRtOptions

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


ALIGNMENT = 256  # of every address passed to TensorRT, in bytes


class PlanError(UserError):
    """TensorRT rejects a plan: damaged, or of another version or GPU."""


def _shape(dims: Any) -> tuple[int | None, ...]:
    return tuple(None if size < 0 else int(size) for size in dims)


class TensorRtEngine(Engine):
    """A plan with one execution context, its buffers on the GPU and in pinned memory, and its own stream.

    Runs share the context's memory: a run on one stream waits on the GPU for an earlier one on another stream. The caller must
    order runs that it captures in a CUDA graph.

    transfer_ms: of the latest `run`, both copies, from CUDA events.
    compute_ms: of the latest `run`, between them.
    graph_refused: why runs are enqueued layer by layer although a CUDA graph was requested; "" if they are not.
    device: the GPU. facts: how the plan was built, None without a sidecar.
    """

    def __init__(
        self,
        plan: bytes,
        source: Path,
        precision: str,
        options: TensorRtOptions,
        device: cuda.Device,
        facts: PlanFacts | None,
    ) -> None:
        """plan: TensorRT's file, already checked against `facts`.

        Raises:
            PlanError: TensorRT cannot take the plan.
            UserError: no memory, or an output's size is known only after a run.
        """
        self._trt = tensorrt_module()
        self._capabilities = Capabilities(self._trt)
        self._options = options
        self._plan = plan
        self.device = device
        self.facts = facts
        self.size_bytes = len(plan)
        self.compute_ms = 0.0
        self.graph_refused = "" if options.cuda_graph else "switched off"
        self._logger = make_logger(self._trt)
        load_plugins(self._trt, self._logger, options)
        self._engine = self._deserialize(source)
        self._context: Any = self._new_context(source)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        reads = self._trt.TensorIOMode.INPUT
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == reads]
        super().__init__(
            source,
            precision,
            {name: self._spec(name) for name in inputs},
            {name: self._spec(name) for name in names if name not in inputs},
        )
        self._vectorized = [
            name for name in names if self._engine.get_tensor_format(name) != self._trt.TensorFormat.LINEAR
        ]
        self.stream = cuda.Stream()
        self._graph: tuple[tuple[Any, ...], cuda.Graph] | None = None
        self._shapes: tuple[Any, ...] | None = None
        self._own_end, self._foreign_end = cuda.Event(timed=False), cuda.Event(timed=False)
        self._foreign = False  # whether a caller's stream may still use the context's memory
        self._select_profile()
        self._allocate()

    def _deserialize(self, source: Path) -> Any:
        try:
            # Kept, because in some versions an engine does not keep its runtime alive.
            self._runtime = self._trt.Runtime(self._logger)
        except (TypeError, RuntimeError):
            raise UserError(f"TensorRT {self._capabilities.version} cannot start: {self._messages()}") from None
        if self._options.version_compatible and hasattr(self._runtime, "engine_host_code_allowed"):
            self._runtime.engine_host_code_allowed = True
        try:
            engine = self._runtime.deserialize_cuda_engine(self._plan)
        except RuntimeError:
            engine = None
        if engine is None:
            raise PlanError(
                f"{source}: TensorRT {self._capabilities.version} cannot load the plan on {self.device.name}: "
                f"{self._messages()}; build it again here"
            )
        return engine

    def _messages(self) -> str:
        return last_message(self._logger)

    def _new_context(self, source: Path) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            needed = getattr(self._engine, self._capabilities.memory_attribute)
            raise UserError(
                f"{source}: TensorRT cannot make an execution context ({needed / 2**20:.0f} MiB of scratch memory): "
                f"{self._messages()}"
            )
        return context

    def _select_profile(self) -> None:
        if not (self._engine.num_optimization_profiles and any(None in spec.shape for spec in self.inputs.values())):
            return
        if not self._context.set_optimization_profile_async(0, self.stream.handle):
            raise UserError(f"{self.source}: TensorRT cannot select the plan's shapes: {self._messages()}")
        self.stream.synchronize()

    def _renew_context(self) -> None:
        """Replaces the context by a new one with the same shapes.

        There are never two at once: in TensorRT 8.5 and 8.6 a second context cannot use the plan's only profile.
        """
        self._follow(self.stream.handle)
        self._wait()
        earlier, self._shapes, self._graph = self._shapes, None, None  # a graph keeps using its context's memory
        self._context = None
        self._context = self._new_context(self.source)
        self._select_profile()
        if earlier is not None:
            self._set_shapes(dict(zip(self.inputs, earlier, strict=True)))

    def _spec(self, name: str) -> TensorSpec:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise UserError(f"{name}: found tensors of type {kind}, expected of {', '.join(DTYPES.values())}")
        return TensorSpec(DTYPES[kind], _shape(self._engine.get_tensor_shape(name)))

    def _profile_shapes(self, name: str) -> list[tuple[int, ...]]:
        """min, opt and max shape of an input; the same shape three times if no axis varies."""
        spec = self.inputs[name]
        if None not in spec.shape:
            return [tuple(n or 0 for n in spec.shape)] * 3
        return [tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, 0)]

    def _bytes(self, name: str, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor on the GPU, including the padding of vectorized layouts."""
        spec = {**self.inputs, **self.outputs}[name]
        sizes = list(shape)
        vector = self._engine.get_tensor_vectorized_dim(name) if name in self._vectorized else -1
        if vector >= 0:
            step = self._engine.get_tensor_components_per_element(name)
            sizes[vector] = -(-sizes[vector] // step) * step
        return int(np.prod(sizes, dtype=np.int64)) * np.dtype(spec.dtype).itemsize

    def _allocate(self) -> None:
        """Allocates buffers for the largest shapes, once."""
        largest = {name: self._profile_shapes(name)[2] for name in self.inputs}
        self._set_shapes(largest)
        sizes = {name: self._bytes(name, shape) for name, shape in largest.items()}
        for name in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise UserError(f"{self.source}: output {name}: its size depends on the data, which is not supported")
            sizes[name] = self._bytes(name, shape)
        self._device = {name: cuda.DeviceBuffer(size) for name, size in sizes.items()}
        self._host = {name: cuda.PinnedBuffer(size) for name, size in sizes.items() if name not in self._vectorized}

    def _set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Sets the inputs' shapes in the context, only when they change: TensorRT then sets itself up again."""
        key = tuple(shapes[name] for name in self.inputs)
        if key == self._shapes:
            return
        for name in self.inputs:
            self._check_profile(name, shapes[name])
        self._shapes = (
            None  # if one of several shapes is refused, the context has neither the old shapes nor the new ones
        )
        for name, spec in self.inputs.items():
            if None in spec.shape and not self._context.set_input_shape(name, shapes[name]):
                raise UserError(
                    f"{self.source}: input {name}: TensorRT refuses shape {list(shapes[name])}: {self._messages()}"
                )
        self._shapes = key

    def _check_profile(self, name: str, shape: tuple[int, ...]) -> None:
        low, _, high = self._profile_shapes(name)
        if any(not a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            raise UserError(
                f"{self.source}: input {name}: found shape {list(shape)}, expected between {list(low)} and {list(high)}, for "
                "which the plan was built"
            )

    def _output_shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in self._context.get_tensor_shape(name))

    def _bind(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise UserError(f"{self.source}: {name}: TensorRT rejects its memory: {self._messages()}")

    def _enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise UserError(f"{self.source}: TensorRT cannot run the plan: {self._messages()}")

    def _follow(self, stream: int) -> None:
        """Makes a stream wait for the runs enqueued on others: they use the same memory."""
        own = self.stream.handle
        if self._foreign:
            cuda.wait(stream, self._foreign_end)
        if stream == own:
            self._foreign = False  # from now on, waiting for the engine's stream includes waiting for that run
        else:
            self._own_end.record(own)
            cuda.wait(stream, self._own_end)

    def _enqueue_after(self, stream: int) -> None:
        """`_enqueue` on any stream, after earlier runs; does not wait if the caller captures, because nothing runs then."""
        if stream != self.stream.handle and cuda.capturing(stream):
            self._enqueue(stream)
            return
        self._follow(stream)
        self._enqueue(stream)
        if stream != self.stream.handle:
            self._foreign_end.record(stream)
            self._foreign = True

    def _own(self) -> dict[str, int]:
        return {name: buffer.pointer for name, buffer in self._device.items()}

    def enqueue(self) -> None:
        """Enqueues one run over the engine's own buffers, at the shapes of the latest `run`; does not wait."""
        self._follow(self.stream.handle)
        if not self.graph_refused and (self._graph is None or self._graph[0] != self._shapes):
            self._graph = self._capture()
        if not self.graph_refused and self._graph is not None:
            self._graph[1].launch(self.stream.handle)
            return
        self._bind(self._own())
        self._enqueue(self.stream.handle)

    def _capture(self) -> tuple[tuple[Any, ...], cuda.Graph] | None:
        """A CUDA graph for the current shapes; None if capture is refused, with the reason in `graph_refused`."""
        assert self._shapes is not None
        self._bind(self._own())
        # The first run after a change of shapes sets TensorRT up; that must not be captured.
        self._enqueue(self.stream.handle)
        self.stream.synchronize()
        try:
            return self._shapes, cuda.Graph(self.stream, lambda: self._enqueue(self.stream.handle))
        except (cuda.CudaError, UserError) as error:
            self.graph_refused = one_line(str(error))
            return None

    def _infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._vectorized:
            raise UserError(
                f"{self.source}: {', '.join(self._vectorized)}: built with another layout than chw, which numpy arrays do not "
                "have; use run_device, or build with formats such as fp16:chw"
            )
        self._set_shapes({name: array.shape for name, array in feeds.items()})
        for name, array in feeds.items():
            np.copyto(self._host[name].view(array.dtype, array.shape), array)
        handle = self.stream.handle
        self._follow(handle)
        if not self.graph_refused and (self._graph is None or self._graph[0] != self._shapes):
            self._graph = self._capture()  # its run must not count as this engine's
        points = [cuda.Event() for _ in range(4)]
        points[0].record(handle)
        for name, array in feeds.items():
            cuda.upload(self._device[name].pointer, self._host[name].pointer, array.nbytes, handle)
        points[1].record(handle)
        self.enqueue()
        points[2].record(handle)
        results = {}
        for name, spec in self.outputs.items():
            view = self._host[name].view(spec.dtype, self._output_shape(name))
            cuda.download(self._host[name].pointer, self._device[name].pointer, view.nbytes, handle)
            results[name] = view
        points[3].record(handle)
        self._wait()
        self.transfer_ms = points[1].milliseconds_since(points[0]) + points[3].milliseconds_since(points[2])
        self.compute_ms = points[2].milliseconds_since(points[1])
        return {name: view.copy() for name, view in results.items()}

    def _wait(self) -> None:
        try:
            self.stream.synchronize()
        except cuda.CudaError as error:
            raise UserError(f"{self.source}: the GPU failed while running the plan: {error}") from None

    def run_device(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Any] | None = None, stream: Any = None
    ) -> dict[str, Any]:
        """Runs on arrays that are on the GPU already, without a copy.

        Args:
            inputs: for each input an array with `__cuda_array_interface__` or DLPack, contiguous, of its dtype and shape, at
                an address that is a multiple of 256, as TensorRT requires (the start of an allocation is).
            outputs: arrays to write to, with the same rules; None for the engine's buffers, which the next run overwrites.
            stream: the caller's: an integer handle, or a torch or CuPy stream. The run is only enqueued there, so the
                arrays must live until it is done. None for the engine's own: this call then waits.

        Returns:
            the arrays of `outputs`; or, for the engine's buffers, objects with `__cuda_array_interface__`.

        Raises:
            UserError: an array is missing, unknown, on the host or another GPU, not contiguous, of another dtype or shape,
                at another address; an output that may not be written.
        """
        handle = self.stream.handle if stream is None else stream_handle(stream)
        taken = {name: self._taken(inputs, name, spec, "input", handle) for name, spec in self.inputs.items()}
        for name in inputs:
            if name not in self.inputs:
                raise UserError(f"{self.source}: input {name!r}: unknown, expected {', '.join(self.inputs)}")
        self._set_shapes({name: array.shape for name, array in taken.items()})
        results: dict[str, Any]
        if outputs is None:
            written_on = None if stream is None else handle or cuda.LEGACY  # 0 has no place in the interface
            results = {
                name: DeviceArray(
                    self._device[name].pointer, spec.dtype, self._output_shape(name), written_on, self._device[name]
                )
                for name, spec in self.outputs.items()
            }
            taken |= results
        else:
            results = {name: outputs[name] for name in self.outputs if name in outputs}
            for name, spec in self.outputs.items():
                exact = TensorSpec(spec.dtype, self._output_shape(name))
                taken[name] = self._taken(outputs, name, exact, "output", handle)
        wait_for_arrays(taken.values(), handle)
        self._bind({name: array.pointer for name, array in taken.items()})
        self._enqueue_after(handle)
        if stream is None:
            self._wait()
        return results

    def _taken(self, arrays: Mapping[str, Any], name: str, spec: TensorSpec, what: str, stream: int) -> DeviceArray:
        if name not in arrays:
            raise UserError(f"{self.source}: {what} {name}: missing, expected {spec}")
        where = f"{self.source}: {what} {name}"
        return take(arrays[name], spec, where, stream, self.device.index, what == "output", ALIGNMENT)

    def example_feeds(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Random inputs as in `Engine`; dimensions that vary are those that the plan was tuned for."""
        random = np.random.default_rng(seed)
        return {
            name: random.standard_normal(self._profile_shapes(name)[1]).astype(spec.dtype)
            for name, spec in self.inputs.items()
        }

    def inspect(self) -> list[LayerInfo]:
        """The plan's layers as TensorRT's inspector names them, without times."""
        return read_layers(self.inspector_json())

    def inspector_json(self) -> str:
        """The inspector's text for the whole plan."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def layers(self, feeds: Mapping[str, np.ndarray] | None = None, runs: int = 3) -> list[LayerInfo]:
        """`inspect` with the mean milliseconds of `runs` runs after one warm-up, without a graph.

        They run in a separate context, which replaces the engine's: a CUDA graph in which the caller captured a run must not
        be launched after this.
        """
        trt = self._trt
        total: dict[str, float] = {}

        class Times(trt.IProfiler):  # type: ignore[name-defined]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)
                self.counts = False

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                if self.counts:
                    total[layer_name] = total.get(layer_name, 0.0) + ms

        arrays = dict(feeds or self.example_feeds())
        times = Times()
        self._renew_context()
        try:
            self._context.profiler = times
            self._set_shapes({name: array.shape for name, array in arrays.items()})
            handle = self.stream.handle
            for name, array in arrays.items():
                self._host_for(name, array)
                cuda.upload(self._device[name].pointer, self._host[name].pointer, array.nbytes, handle)
            self._bind(self._own())
            for run in range(runs + 1):
                times.counts = run > 0
                self._enqueue(handle)
                self._wait()
        finally:
            self._renew_context()  # without the profiler, which makes every run wait
        return with_times(self.inspect(), {name: ms / runs for name, ms in total.items()})

    def _host_for(self, name: str, array: np.ndarray) -> None:
        if name in self._vectorized:
            raise UserError(
                f"{self.source}: input {name}: built with another layout than chw, which numpy arrays do not have"
            )
        np.copyto(self._host[name].view(array.dtype, array.shape), array)

    def profile(self, feeds: Mapping[str, np.ndarray] | None = None, runs: int = 3) -> list[LayerProfile]:
        return [
            {"name": layer.name, "type": layer.type, "precision": layer.precision, "ms": layer.ms or 0.0}
            for layer in self.layers(feeds, runs)
        ]

    def findings(self) -> Findings:
        """Reformats, and which quantized convolutions run in INT8, from the inspector and the sidecar."""
        return find(self.inspect(), self.facts.quantized if self.facts else ())

    def save(self, path: str | Path) -> None:
        """Writes the plan, as TensorRT serialized it, and its sidecar NAME.plan.json where it is known."""
        path = Path(path)
        if self.facts is not None:
            write_plan(path, self._plan, self.facts)
            return
        with atomic_path(path) as temporary:
            temporary.write_bytes(self._plan)


def plan_path(onnx_path: Path, precision: str, options: Options, device: cuda.Device, version: str) -> Path:
    """Path of the plan in the cache, from everything that affects it. CPU options and options for running do not."""
    key = {
        "backend": "tensorrt",
        "build": BUILD_VERSION,
        "version": version,
        "gpu": f"{device.name} {device.capability}",
        "precision": precision,
        "options": json.dumps(options.tensorrt.described(), sort_keys=True),
    }
    return cache_path(onnx_path, ENDING, options, key)


def build(onnx_path: Path, precision: str, options: Options, device: str) -> TensorRtEngine:
    """See `qat.engine.build`. A plan of the cache is for this TensorRT version and GPU model.

    Raises:
        UserError: no GPU, no TensorRT, or what `tensorrt_builder.build_plan` raises.
        KeyboardInterrupt: Ctrl-C during the build.
    """
    trt = tensorrt_module()
    gpu = cuda.use_device(device)
    path: Path | None = None
    if options.cache is not None:
        path = plan_path(onnx_path, precision, options, gpu, trt.__version__)
        if path.is_file():
            try:
                return TensorRtEngine(path.read_bytes(), onnx_path, precision, options.tensorrt, gpu, _kept_facts(path))
            except PlanError:
                pass  # a damaged file in the cache: rebuilt and overwritten
    plan, facts = build_plan(onnx_path, precision, options.tensorrt, gpu.name, gpu.capability)
    if path is not None:
        write_plan(path, plan, facts)
    return TensorRtEngine(plan, onnx_path, precision, options.tensorrt, gpu, facts)


def _kept_facts(plan: Path) -> PlanFacts | None:
    """Facts of a plan in the cache. Raises `PlanError` if its sidecar is damaged."""
    try:
        return read_facts(plan)
    except UserError as error:
        raise PlanError(str(error)) from None


def load(built_file: Path, precision: str, options: Options, device: str) -> TensorRtEngine:
    """A plan from a file: of `TensorRtEngine.save`, or of trtexec.

    Args:
        precision: what it was built for; a sidecar overrides it.

    Raises:
        UserError: no such file, no GPU, no TensorRT, or a plan of another TensorRT version or for another GPU: known from
            the sidecar before TensorRT sees the plan, else from TensorRT's own message.
    """
    built_file = Path(built_file)
    try:
        plan = built_file.read_bytes()
    except OSError as error:
        raise UserError(f"{built_file}: cannot be read: {error.strerror}") from None
    trt = tensorrt_module()
    facts = read_facts(built_file)
    tensorrt_options = options.tensorrt
    gpu = cuda.use_device(device)
    if facts is not None:
        check_facts(built_file, facts, trt.__version__, gpu.name, gpu.capability)
        precision = facts.precision
        if facts.options.get("version_compatible") and not tensorrt_options.version_compatible:
            tensorrt_options = replace(tensorrt_options, version_compatible=True)
    return TensorRtEngine(plan, built_file, precision, tensorrt_options, gpu, facts)


def identify(device: str) -> Device:
    """The GPU that plans are built for and run on here: its model and compute capability.

    Raises:
        UserError: no driver, no GPU, or none of that number.
    """
    gpu = cuda.use_device(device)
    return Device(gpu.name, text_digest(f"{gpu.name} {gpu.capability}"))
