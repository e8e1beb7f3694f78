"""Run by test_tensorrt_lab.py in the lab's interpreters, with the real module of a release: prints what it found as JSON.

    LAB/python tests/engine/tensorrt_checks.py '{"int8": "…/fuser.onnx", …}'

Without a GPU no builder can be made. What takes one is given an object that has a builder's, network's or configuration's
attributes as this release's class has them and no others (`spec_set`), and records what is set: a call that a release
does not know fails here.
"""

from __future__ import annotations

import ast
import gc
import json
import re
import sys
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import tensorrt as trt

from qat.core.errors import UserError
from qat.core.onnx_file import read_outline
from qat.engine import Options, TensorRtOptions, TensorSpec, build, cuda, tensorrt_backend
from qat.engine.tensorrt_backend import TensorRtEngine
from qat.engine.tensorrt_builder import (
    Interrupt,
    PlanFacts,
    Tools,
    Typing,
    _monitor,
    choose_typing,
    configure,
    make_logger,
    parse,
    set_formats,
    timing_cache,
)
from qat.engine.tensorrt_capabilities import Capabilities
from qat.engine.tensorrt_options import Profile

CAN = Capabilities(trt)
# Names that the engine's code has for TensorRT's objects, and their classes.
OBJECTS = {
    "_engine": "ICudaEngine", "engine": "ICudaEngine", "_context": "IExecutionContext", "context": "IExecutionContext",
    "_runtime": "Runtime", "inspector": "EngineInspector", "network": "INetworkDefinition", "config": "IBuilderConfig",
    "builder": "Builder", "parser": "OnnxParser", "tensor": "ITensor",
}  # fmt: skip
OPTIONAL = {
    "engine_host_code_allowed",
    "builder_optimization_level",
    "progress_monitor",
}  # asked of Capabilities or hasattr


def line(action: Any) -> str:
    """The message of the UserError that an action raises; "" where it raises none."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def tools() -> Tools:
    """As `Tools` makes them, but for the builder."""
    made = Tools.__new__(Tools)
    made.trt, made.capabilities, made.logger = trt, CAN, make_logger(trt)
    made.builder = mock.NonCallableMock(spec_set=trt.Builder)
    made.builder.create_builder_config.return_value = mock.NonCallableMock(spec_set=trt.IBuilderConfig)
    made.builder.create_optimization_profile.return_value = mock.NonCallableMock(spec_set=trt.IOptimizationProfile)
    return made


def network(dynamic: bool = False) -> Any:
    """Two inputs and an output, in FP32."""
    made = mock.NonCallableMock(spec_set=trt.INetworkDefinition)
    shapes = {"img": (-1 if dynamic else 1, 3, 8, 8), "depth": (1, 1, 8, 8), "out": (1, 4)}
    tensors = []
    for name, shape in shapes.items():
        tensor = mock.NonCallableMock(spec_set=trt.ITensor)
        tensor.name, tensor.shape, tensor.dtype = name, shape, trt.DataType.FLOAT
        tensors.append(tensor)
    made.num_inputs, made.num_outputs = 2, 1
    made.get_input.side_effect = tensors[:2].__getitem__
    made.get_output.side_effect = tensors[2:].__getitem__
    return made


def listing(releases: dict[str, list[str]]) -> dict[str, Any]:
    """What the table of releases in conftest.py says of this one."""
    members = {
        name: sorted(getattr(trt, name).__members__)
        for name in ("BuilderFlag", "NetworkDefinitionCreationFlag", "TacticSource")
    }
    has = {name: [a for a in names if hasattr(getattr(trt, name), a)] for name, names in releases.items()}
    return {**members, "has": has, "monitor": hasattr(trt, "IProgressMonitor")}


def attributes() -> dict[str, list[str]]:
    """What the engine's and builder's code uses of TensorRT's objects. used: "CLASS.NAME". wrong: those that this release has not,
    or has as a method where the code reads a property, or the other way round."""
    used, wrong = set(), []
    for name in ("tensorrt_backend", "tensorrt_builder"):
        source = Path(sys.modules["qat.engine"].__file__).with_name(f"{name}.py").read_text()
        tree = ast.parse(source)
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            base = node.value
            word = base.id if isinstance(base, ast.Name) else base.attr if isinstance(base, ast.Attribute) else ""
            kind = OBJECTS.get(word)
            if kind is None or node.attr in OPTIONAL:
                continue
            used.add(f"{kind}.{node.attr}")
            found = getattr(getattr(trt, kind), node.attr, None)
            if found is None:
                wrong.append(f"{kind}.{node.attr}: none")
            elif isinstance(found, property) == (id(node) in called):
                wrong.append(f"{kind}.{node.attr}: {'property' if isinstance(found, property) else 'method'}")
    return {"used": sorted(used), "wrong": sorted(set(wrong))}


def unknown_cuda_calls() -> list[str]:
    """Functions and constants of the runtime API, the driver's and NVRTC's that our code names and cuda-bindings has not."""
    words: list[str] = []
    for file in (Path(cuda.__file__), Path(cuda.__file__).parents[1] / "families/bevfusion/pooling/cuda.py"):
        tree = ast.parse(file.read_text())
        words += [str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        words += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    named = {word for word in words if re.fullmatch(r"(cuda|cu|nvrtc)[A-Z]\w+|CU_[A-Z_]+", word)}
    api, driver, nvrtc = (cuda.module(prefix) for prefix in ("cuda", "cu", "nvrtc"))
    enums = (
        "cudaError_t",
        "cudaDeviceAttr",
        "cudaMemcpyKind",
        "cudaStreamCaptureMode",
        "cudaStreamCaptureStatus",
        "cudaMemoryType",
    )
    known = {*dir(api), *dir(driver), *dir(nvrtc), *dir(driver.CUdevice_attribute)}
    return sorted(named - known.union(*(dir(getattr(api, enum)) for enum in enums)))


class Calls:
    """Stands for CUDA: `cuda.call` that only notes what was asked, but for what it has to answer."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []
        self.handles = iter(range(1000, 100000, 256))
        self.capturing: set[int] = set()

    def __call__(self, name: str, *arguments: Any) -> Any:
        self.made.append((name, *arguments))
        if name == "cudaStreamIsCapturing":
            status = cuda.runtime().cudaStreamCaptureStatus
            active = arguments[0] in self.capturing
            return status.cudaStreamCaptureStatusActive if active else status.cudaStreamCaptureStatusNone
        if name == "cudaPointerGetAttributes":
            return SimpleNamespace(type=cuda.runtime().cudaMemoryType.cudaMemoryTypeDevice, device=0)
        if name.startswith(("cudaStreamCreate", "cudaEventCreate")):
            return next(self.handles)
        return None


class Plan:
    """An engine over a plan that is not there: TensorRT's objects have the attributes of this release's classes and no others,
    and of contexts there may be one at a time, as 8.5 and 8.6 have it of a plan with one profile."""

    def __init__(self, dynamic: bool = True) -> None:
        self.contexts: list[Any] = []
        self.refuse: set[str] = set()
        self.engine = engine = TensorRtEngine.__new__(TensorRtEngine)
        engine._trt, engine._capabilities, engine._logger = trt, CAN, make_logger(trt)
        engine.source, engine.device = Path("g.plan"), SimpleNamespace(index=0, name="a GPU")
        shape = (None if dynamic else 1, 4)
        engine.inputs, engine.outputs = {"x": TensorSpec("float32", shape)}, {"y": TensorSpec("float32", shape)}
        engine._engine = mock.NonCallableMock(spec_set=trt.ICudaEngine)
        engine._engine.num_optimization_profiles = 1
        engine._engine.get_tensor_profile_shape.return_value = [(1, 4), (2, 4), (4, 4)]
        engine._engine.create_execution_context.side_effect = self._context
        engine.inspect = list
        engine._vectorized, engine._graph, engine._shapes, engine._foreign = [], None, None, False
        engine.stream = cuda.Stream()
        engine._own_end, engine._foreign_end = cuda.Event(timed=False), cuda.Event(timed=False)
        engine._device = {name: SimpleNamespace(pointer=256 * i) for i, name in enumerate("xy", 1)}
        engine._host = {"x": SimpleNamespace(pointer=64, view=lambda dtype, shape: np.empty(shape, dtype))}
        engine.graph_refused = "switched off"
        engine._context = engine._new_context(engine.source)

    def _context(self) -> Any:
        gc.collect()  # mocks hold one another
        if any(context() is not None for context in self.contexts):
            raise AssertionError("a second context beside the first")
        made = mock.NonCallableMock(spec_set=trt.IExecutionContext)
        for name in ("set_optimization_profile_async", "set_input_shape", "set_tensor_address", "execute_async_v3"):
            getattr(made, name).side_effect = lambda *_, name=name: name not in self.refuse
        made.get_tensor_shape.return_value = (2, 4)
        self.contexts.append(weakref.ref(made))
        return made


class Array:
    """What offers a GPU's memory at an address."""

    def __init__(self, address: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False), "typestr": "<f4", "shape": (2, 4), "strides": None, "stream": None, "version": 3
        }  # fmt: skip


def running() -> dict[str, Any]:
    """What an engine asks of CUDA and TensorRT when it runs, and what it says when they refuse."""
    calls = Calls()
    with mock.patch.object(cuda, "call", calls):
        plan = Plan()
        engine = plan.engine
        own, own_end, foreign_end = engine.stream.handle, engine._own_end.native, engine._foreign_end.native
        feeds = {"x": np.ones((2, 4), np.float32)}
        layers = line(lambda: engine.layers(feeds))
        renewed = len(plan.contexts), engine._shapes

        def order(action: Any) -> list[str]:
            """Of an action, records and waits by the names of streams and events."""
            names = {own: "own", 5: "A", 6: "B", 0: "default", own_end: "own's end", foreign_end: "end"}
            calls.made.clear()
            action()
            words = {"cudaEventRecord": "records", "cudaStreamWaitEvent": "waits for"}
            found = []
            for name, *arguments in calls.made:
                if name in words:
                    stream, event = arguments[:2] if name == "cudaStreamWaitEvent" else arguments[1::-1]
                    found.append(f"{names[stream]} {words[name]} {names[event]}")
            return found

        x, y = {"x": Array(4096)}, {"y": Array(8192)}
        orders = {
            "own": order(engine.enqueue),
            "A": order(lambda: engine.run_device(x, y, 5)),
            "B": order(lambda: engine.run_device(x, y, 6)),
            "own after B": order(engine.enqueue),
            "own again": order(engine.enqueue),
        }
        calls.capturing = {5}
        orders["A captured"] = order(lambda: engine.run_device(x, y, 5))
        default = engine.run_device(x, None, 0)["y"].__cuda_array_interface__["stream"]
        refused = {}
        for name in ("set_tensor_address", "execute_async_v3", "set_input_shape", "set_optimization_profile_async"):
            plan.refuse = {name}
            engine._shapes = None
            ask = engine._select_profile if name.startswith("set_opt") else lambda: engine.run_device(x, y)
            refused[name] = line(ask)
        plan.refuse = set()
        refused["alignment"] = line(lambda: engine.run_device({"x": Array(4096 + 64)}, y))
        return {"layers": layers, "renewed": renewed, "orders": orders, "default": default, "refused": refused}


def cached_plans() -> dict[str, Any]:
    """Whether a cached plan outlives failures that are not its own, and one that TensorRT does not take is written over."""
    found = {}
    gpu = cuda.Device(0, "a GPU", "9.0", "12.9")
    facts = PlanFacts(CAN.version, gpu.name, gpu.capability, "fp32", False, "g.onnx", "", (), {}, 0.0, "")
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "g.onnx"
        graph.write_bytes(b"graph")
        options = Options(cache=Path(folder) / "cache")
        path = tensorrt_backend.plan_path(graph, "fp32", options, gpu, trt.__version__)
        for name, error in (("memory", UserError("no memory")), ("damaged", tensorrt_backend.PlanError("damaged"))):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"kept")
            with (
                mock.patch.object(cuda, "use_device", lambda device: gpu),
                mock.patch.object(tensorrt_backend, "TensorRtEngine", mock.Mock(side_effect=[error, "built"])),
                mock.patch.object(tensorrt_backend, "build_plan", lambda *_: (b"new", facts)),
            ):
                said = line(lambda: tensorrt_backend.build(graph, "fp32", options, "cuda:0"))
            found[name] = [said, path.read_bytes().decode()]
    return found


def typings(graphs: dict[str, str]) -> dict[str, Any]:
    """form and precision → [strong, flags], or the refusal."""
    found = {}
    for form, file in graphs.items():
        for precision in ("fp32", "fp16", "int8"):
            path = Path(file)
            try:
                typing = choose_typing(path, read_outline(path), precision, TensorRtOptions(), CAN)
                found[f"{form} {precision}"] = [typing.strong, list(typing.flags)]
            except UserError as error:
                found[f"{form} {precision}"] = str(error)
    return found


def configuration() -> dict[str, Any]:
    """What reaches the builder's configuration of options."""
    made = tools()
    weak = ("INT8", "FP16") if CAN.weak_typing else ()
    options = TensorRtOptions(
        tf32=False,
        workspace=1 << 28,
        tactic_sources=("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"),
        profiles=(Profile("img", (1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8)),),
        version_compatible=CAN.version_compatible,
        optimization_level=3 if CAN.optimization_level else None,
    )
    config = configure(made, network(dynamic=True), Typing(not weak, weak), Path("g.onnx"), options)
    profile = made.builder.create_optimization_profile.return_value
    set_ = sorted(call.args[0].name for call in config.set_flag.call_args_list)
    return {
        "set": set_,
        "cleared": [call.args[0].name for call in config.clear_flag.call_args_list],
        "workspace": [[call.args[0].name, call.args[1]] for call in config.set_memory_pool_limit.call_args_list],
        "sources": config.set_tactic_sources.call_args.args[0],
        "sources_expected": (1 << int(trt.TacticSource.EDGE_MASK_CONVOLUTIONS)) | (1 << int(trt.TacticSource.JIT_CONVOLUTIONS)),
        "detailed": config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED,
        "profile": [list(map(str, call.args)) for call in profile.set_shape.call_args_list],
        "added": config.add_optimization_profile.call_args.args[0] is profile,
        "level": config.builder_optimization_level if CAN.optimization_level else None,
        "refused": {
            name: line(lambda values=values: configure(tools(), network(), Typing(False, ()), Path("g.onnx"), TensorRtOptions(**values)))
            for name, values in {
                "version_compatible": {"version_compatible": True},
                "level": {"optimization_level": 5},
                "cudnn": {"tactic_sources": ("CUDNN",)},
                "stranger": {"profiles": (Profile("nobody", (1,), (1,), (1,)),)},
                "shape": {"profiles": (Profile("img", (1, 4, 8, 8), (1, 4, 8, 8), (1, 4, 8, 8)),)},
            }.items()
        } | {"no profile": line(lambda: configure(tools(), network(True), Typing(False, ()), Path("g.onnx"), TensorRtOptions()))},
    }  # fmt: skip


def formats() -> dict[str, Any]:
    """FP16 inputs and outputs, as CUDA-BEVFusion's script builds them."""
    options = TensorRtOptions(input_formats=("fp16:chw",), output_formats=("fp16:chw",))
    weak = network()
    set_formats(tools(), weak, Path("g.onnx"), options, strong=False)
    tensors = [weak.get_input(0), weak.get_input(1), weak.get_output(0)]
    return {
        "types": [tensor.dtype.name for tensor in tensors],
        "layouts": [tensor.allowed_formats for tensor in tensors],
        "linear": 1 << int(trt.TensorFormat.LINEAR),
        "strong": line(lambda: set_formats(tools(), network(), Path("g.onnx"), options, strong=True)),
        "count": line(lambda: set_formats(tools(), network(), Path("g.onnx"), TensorRtOptions(input_formats=("fp16:chw",) * 3), False)),
    }  # fmt: skip


def parser_error(graph: str) -> str:
    """The line made of a parser's error on the second node of the graph."""
    error = mock.NonCallableMock(spec_set=trt.ParserError)
    error.desc.return_value = "no\n importer"
    error.node.return_value = 1
    if CAN.node_names:
        second = read_outline(graph).nodes[1]
        error.node_name.return_value, error.node_operator.return_value = second.label, second.kind
    parser = mock.NonCallableMock(spec_set=trt.OnnxParser)
    parser.parse_from_file.return_value, parser.num_errors, parser.get_error.return_value = False, 1, error
    made = tools()
    made.trt = SimpleNamespace(OnnxParser=lambda network, logger: parser)
    return line(lambda: parse(made, network(), Path(graph)))


def callbacks() -> dict[str, Any]:
    """Subclasses of TensorRT's own interfaces: made and called as TensorRT calls them."""
    logger = make_logger(trt)
    for severity in (trt.ILogger.ERROR, trt.ILogger.WARNING, trt.ILogger.INFO, trt.ILogger.VERBOSE):
        logger.log(severity, severity.name)
    found: dict[str, Any] = {"errors": logger.errors, "warnings": logger.warnings}
    if CAN.progress:
        notes: list[str] = []
        interrupt = Interrupt(stops=True)
        monitor = _monitor(trt, interrupt, notes.append)
        monitor.phase_start("build", None, 4)
        goes_on = monitor.step_complete("build", 0)
        interrupt.asked = True
        found |= {"goes_on": goes_on, "stops": not monitor.step_complete("build", 1), "notes": notes}
        monitor.phase_finish("build")
    return found


def network_flags() -> dict[str, int]:
    """The bits that a network is made with."""
    flags = trt.NetworkDefinitionCreationFlag.__members__
    bits = {}
    for name, strong in (("weak", False), ("strong", True)):
        if strong and "STRONGLY_TYPED" not in flags:
            continue
        made = tools()
        made.network(strong)
        bits[name] = made.builder.create_network.call_args.args[0]
    expected = {name: 1 << int(flags[name]) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if name in flags}
    return {**bits, **expected}


def cache_calls() -> bool:
    """Whether the timing cache goes through calls that this release has."""
    config = mock.NonCallableMock(spec_set=trt.IBuilderConfig)
    kept = mock.NonCallableMock(spec_set=trt.ITimingCache)
    kept.serialize.return_value = b"measured"
    config.get_timing_cache.return_value = kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "timing.cache"
        with timing_cache(config, path, make_logger(trt)):
            pass
        return path.read_bytes() == b"measured"


def main(graphs: dict[str, str], asked: dict[str, list[str]]) -> dict[str, Any]:
    """Every check by name."""
    return {
        "version": trt.__version__,
        "torch": "torch" in sys.modules,
        "rich": "rich" in sys.modules,
        "capabilities": {name: sorted(v) if isinstance(v, frozenset) else v for name, v in vars(CAN).items()},
        "listing": listing(asked),
        "attributes": attributes(),
        "running": running(),
        "cached_plans": cached_plans(),
        "unknown_cuda_calls": unknown_cuda_calls(),
        "typings": typings(graphs),
        "configuration": configuration(),
        "formats": formats(),
        "parser_error": parser_error(graphs["int8"]),
        "callbacks": callbacks(),
        "network_flags": network_flags(),
        "cache_calls": cache_calls(),
        # What a machine without a GPU says; one with a GPU builds, in tests/gpu.
        "no_builder": line(lambda: Tools(trt, TensorRtOptions())),
        "no_gpu": line(lambda: build(graphs["int8"], "tensorrt", "int8", Options(cache=None))),
    }


if __name__ == "__main__":
    print(json.dumps(main(*map(json.loads, sys.argv[1:3]))))
