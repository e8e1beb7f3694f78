"""ONNX → TensorRT plan, with TensorRT 8.5, 8.6, 10 and 11.

A plan is TensorRT's file format, which trtexec and CUDA-BEVFusion load unchanged. Next to it, `NAME.plan.json` (the sidecar)
records what it was built with and for: a plan for another version or GPU is refused before TensorRT loads it.

How a graph is built:

    graph                                 8.5, 8.6                10                        11
    FP32 types, no Q/DQ                   flag FP16 if asked      flag FP16 if asked        strongly typed, FP32 only
    FP32 types, Q/DQ (`tensorrt`)         flags INT8 (and FP16)   flags INT8 (and FP16)     refused unless fp16 is off
    FP16 types (`tensorrt-strong`)        flag FP16; Q/DQ refused strongly typed            strongly typed
"""

from __future__ import annotations

import ctypes
import hashlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qat.core.errors import UserError
from qat.core.files import atomic_path, read_json, sha256, write_json
from qat.core.onnx_file import Outline, read_outline
from qat.engine.tensorrt_capabilities import Capabilities, tensorrt_module
from qat.engine.tensorrt_options import TensorRtOptions, split_format, spread_formats

FORMAT, SCHEMA = "bevqat-plan", 1
ENDING = ".plan"
LAST_WEAK_OPSET = 17  # of the parsers of 8.5 and 8.6
REEXPORT = "export with --flavour tensorrt"
FLOAT_EXPORT = "export with --fp32"
BUILD_VERSION = "1"  # version of how plans are built here; cached plans built with another version are not reused


@dataclass(frozen=True)
class Typing:
    """How a network is typed. strong: types come from its graph. flags: members of BuilderFlag, for a weakly typed one."""

    strong: bool
    flags: tuple[str, ...]


def choose_typing(
    path: Path, outline: Outline, precision: str, options: TensorRtOptions, capabilities: Capabilities
) -> Typing:
    """Decides by the graph, the requested precision and this TensorRT's capabilities.

    Raises:
        UserError: the graph is of a flavour that this TensorRT cannot build, or lacks what the precision promises.
    """
    here = f"TensorRT {capabilities.version}"
    if outline.has_uint8:
        raise UserError(f"{path}: found u8 Q/DQ, which TensorRT cannot build: a flavour for CPUs; {REEXPORT}")
    if precision != "int8" and outline.has_qdq:
        raise UserError(
            f"{path}: precision {precision}: found Q/DQ in the graph, expected none; ask for int8, or {FLOAT_EXPORT}"
        )
    if precision == "fp32" and outline.typed:
        raise UserError(f"{path}: precision fp32: found FP16 types in the graph; ask for fp16, or {FLOAT_EXPORT}")
    if outline.typed:
        if capabilities.strong_typing:
            return Typing(True, ())
        if outline.has_qdq:
            raise UserError(
                f"{path}: found precision written in the graph's types (flavour tensorrt-strong, opset {outline.opset}), which "
                f"{here} cannot build: it has no strongly typed networks; {REEXPORT}"
            )
        if outline.opset > LAST_WEAK_OPSET:
            raise UserError(
                f"{path}: found opset {outline.opset}, expected {LAST_WEAK_OPSET} at most for {here}; {REEXPORT}"
            )
    flags: tuple[str, ...] = ()
    if precision == "int8":
        # A part that stays float in an INT8 export: for it, the INT8 flag would require a calibrator.
        flags = (*(("INT8",) if outline.has_qdq else ()), *(("FP16",) if options.fp16 else ()))
    elif precision == "fp16":
        flags = ("FP16",)
    if capabilities.weak_typing:
        return Typing(False, flags)
    if "FP16" in flags:
        raise UserError(
            f"{path}: precision {precision}: found a graph in FP32 types, which {here} builds as FP32: it has no flag for FP16; "
            "export with --flavour tensorrt-strong"
        )
    return Typing(capabilities.strong_typing, ())


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that keeps errors and warnings instead of printing them."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING and message not in self.warnings:
                self.warnings.append(message)

    return Logger()


def one_line(message: str, limit: int = 400) -> str:
    """A library's message without its line breaks, cut to a reasonable length."""
    text = " ".join(message.split())
    return text if len(text) <= limit else f"{text[:limit]}…"


def _cause(logger: Any, otherwise: str) -> str:
    return one_line(logger.errors[-1]) if logger.errors else otherwise


def last_message(logger: Any) -> str:
    """The latest error of a logger from `make_logger`, or the latest warning if it has no error."""
    found = [*logger.warnings, *logger.errors]
    return one_line(found[-1]) if found else "no cause given"


class Tools:
    """A builder, network, parser and configuration of one build; plugins are loaded first.

    Raises:
        UserError: TensorRT cannot start here (no GPU, a driver too old), or a plugin library does not load.
    """

    def __init__(self, trt: Any, options: TensorRtOptions) -> None:
        self.trt = trt
        self.capabilities = Capabilities(trt)
        self.logger = make_logger(trt)
        load_plugins(trt, self.logger, options)
        try:
            self.builder = trt.Builder(self.logger)
        except (TypeError, RuntimeError):  # pybind11: the factory returned nullptr
            raise UserError(f"TensorRT {self.capabilities.version} cannot start: {last_message(self.logger)}") from None

    def network(self, strong: bool) -> Any:
        """An empty network."""
        flags = self.trt.NetworkDefinitionCreationFlag
        bits = 0
        if self.capabilities.explicit_batch_flag:
            bits |= 1 << int(flags.EXPLICIT_BATCH)
        if strong:
            bits |= 1 << int(flags.STRONGLY_TYPED)
        return self.builder.create_network(bits)


def load_plugins(trt: Any, logger: Any, options: TensorRtOptions) -> None:
    """Registers TensorRT's plugins and those of the options' libraries."""
    trt.init_libnvinfer_plugins(logger, "")
    for plugin in options.plugins:
        try:
            ctypes.CDLL(str(plugin), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise UserError(f"{plugin}: the plugin library does not load: {one_line(str(error))}") from None


def parse(tools: Tools, network: Any, path: Path) -> Any:
    """Reads the graph into the network; returns the parser, which owns weights that the network uses.

    Raises:
        UserError: TensorRT's parser refuses it: the line names the file, the node if the parser reports it, and the cause.
    """
    parser = tools.trt.OnnxParser(network, tools.logger)
    if parser.parse_from_file(str(path)):
        return parser
    raise UserError(
        f"{path}: TensorRT {tools.capabilities.version} cannot read it: {_parser_error(tools, parser, path)}"
    )


def _parser_error(tools: Tools, parser: Any, path: Path) -> str:
    if not parser.num_errors:
        return _cause(tools.logger, "its parser gives no cause")
    error = parser.get_error(0)
    cause = one_line(error.desc())
    if tools.capabilities.node_names and error.node_name():
        return f"node {error.node_name()} ({error.node_operator()}): {cause}"
    # 8.5 and 8.6 report only the node's index, −1 for none.
    nodes = read_outline(path).nodes
    index = error.node()
    if 0 <= index < len(nodes):
        return f"node {nodes[index].label} ({nodes[index].kind}): {cause}"
    return cause


def set_formats(tools: Tools, network: Any, path: Path, options: TensorRtOptions, strong: bool) -> None:
    """Sets type and layout of inputs and outputs as the options ask.

    Raises:
        UserError: another number of formats than of tensors, or another type than a strongly typed graph has.
    """
    trt = tools.trt
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for what, tensors, formats in (
        ("input", inputs, options.input_formats),
        ("output", outputs, options.output_formats),
    ):
        try:
            asked = spread_formats(formats, [tensor.name for tensor in tensors], what)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        for tensor in tensors:
            if tensor.name not in asked:
                continue
            kind, layout = split_format(asked[tensor.name])
            wanted = getattr(trt.DataType, kind)
            if strong and tensor.dtype != wanted:
                raise UserError(
                    f"{path}: {what} {tensor.name}: format {asked[tensor.name]}: found {tensor.dtype.name} in a strongly typed "
                    "graph, whose types are fixed; export with --io fp16"
                )
            if not strong:
                tensor.dtype = wanted
            tensor.allowed_formats = 1 << int(getattr(trt.TensorFormat, layout))


def configure(tools: Tools, network: Any, typing: Typing, path: Path, options: TensorRtOptions) -> Any:
    """The builder's configuration for the options.

    Raises:
        UserError: an option that this TensorRT does not have, or profiles that do not fit the inputs.
    """
    trt, can = tools.trt, tools.capabilities
    config = tools.builder.create_builder_config()
    for name in typing.flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if options.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:  # on by default
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.tactic_sources is not None:
        config.set_tactic_sources(tactic_bits(trt, can, options.tactic_sources))
    if options.version_compatible:
        if not can.version_compatible:
            raise UserError(
                f"version-compatible: TensorRT {can.version} does not support it; omit it, or use 8.6 or later"
            )
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.optimization_level is not None:
        if not can.optimization_level:
            raise UserError(
                f"optimization level: TensorRT {can.version} does not support it; omit it, or use 8.6 or later"
            )
        config.builder_optimization_level = options.optimization_level
    # Layer names, formats and precisions stay readable in the plan: `TensorRtEngine.layers` shows them.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _add_profile(tools, network, config, path, options)
    return config


def tactic_bits(trt: Any, capabilities: Capabilities, sources: tuple[str, ...]) -> int:
    """The bit mask of `IBuilderConfig.set_tactic_sources`. Raises `UserError` for one that this TensorRT lacks."""
    for source in sources:
        if source not in capabilities.tactic_sources:
            expected = ", ".join(sorted(capabilities.tactic_sources))
            raise UserError(
                f"tactic source {source}: TensorRT {capabilities.version} does not have it, expected some of {expected}"
            )
    return sum(1 << int(getattr(trt.TacticSource, source)) for source in sources)


def _add_profile(tools: Tools, network: Any, config: Any, path: Path, options: TensorRtOptions) -> None:
    inputs = {tensor.name: tuple(tensor.shape) for tensor in (network.get_input(i) for i in range(network.num_inputs))}
    given = {profile.input: profile for profile in options.profiles}
    for name in given:
        if name not in inputs:
            raise UserError(f"{path}: profile of {name}: no such input, expected one of {', '.join(inputs)}")
    dynamic = {name: shape for name, shape in inputs.items() if any(size < 0 for size in shape)}
    for name, shape in dynamic.items():
        axes = "x".join("?" if size < 0 else str(size) for size in shape)
        if name not in given:
            raise UserError(
                f"{path}: input {name}: found {axes}, expected a profile for it: --profile {name}=MIN:OPT:MAX"
            )
    for name, profile in given.items():
        shape = inputs[name]
        for wanted in (profile.min, profile.opt, profile.max):
            if len(wanted) != len(shape) or any(
                size not in (-1, want) for size, want in zip(shape, wanted, strict=True)
            ):
                found, axes = "x".join(map(str, wanted)), "x".join("?" if size < 0 else str(size) for size in shape)
                raise UserError(f"{path}: profile of {name}: found {found}, expected {axes}")
    if dynamic:
        profile = tools.builder.create_optimization_profile()
        for name in dynamic:
            profile.set_shape(name, given[name].min, given[name].opt, given[name].max)
        config.add_optimization_profile(profile)


@contextmanager
def timing_cache(config: Any, path: Path | None, logger: Any) -> Iterator[None]:
    """Reads the file before the block, if it exists, and writes the measurements after it, whole.

    A cache of another version or GPU, or damaged, is not used: TensorRT measures again and the file is replaced.
    """
    if path is None:
        yield
        return
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    cache = config.create_timing_cache(content) or config.create_timing_cache(b"")
    # False: entries of another device are ignored, they would be wrong here.
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    logger.errors.clear()  # a cache that does not fit is not an error of the build
    yield
    used = config.get_timing_cache()
    if used is not None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(bytes(used.serialize()))


class Interrupt:
    """Handles Ctrl-C during a build. TensorRT 10 and later stop at the next step; earlier versions finish the build first. A
    second Ctrl-C ends the process at once: nothing has been written by then. A process that ignores Ctrl-C, such as a worker
    that its parent ends, keeps ignoring it.
    """

    def __init__(self, stops: bool) -> None:
        self.asked = False
        self._stops = stops

    def _handle(self, _signal: int, _frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        when = "at the next step" if self._stops else "when this part is built: this TensorRT cannot stop earlier"
        print(f"\ninterrupted: stopping {when}; Ctrl-C again ends at once", file=sys.stderr, flush=True)

    def __enter__(self) -> Interrupt:
        # Python's handler would raise inside TensorRT's callbacks, which do not pass exceptions on.
        self._handles = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        )
        if self._handles:
            self._earlier = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if self._handles:
            signal.signal(signal.SIGINT, self._earlier)
        if self.asked and kind is None:
            raise KeyboardInterrupt


def _monitor(trt: Any, interrupt: Interrupt, report: Callable[[str], None]) -> Any:
    """TensorRT's progress (10 and later): steps of nested phases, and a way to stop."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, list[int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = [0, num_steps]

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                self.phases[phase_name][0] = step + 1
                report(", ".join(f"{name} {done}/{steps}" for name, (done, steps) in self.phases.items()))
            return not interrupt.asked

    return Monitor()


class Ticker:
    """One line on stderr during long work: the seconds so far, and TensorRT's phases where it reports them.

    Silent if stderr is not a terminal, and for the first two seconds.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._note = ""
        self._shown = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def note(self, text: str) -> None:
        """The current phase."""
        self._note = text

    def _run(self) -> None:
        started = time.monotonic()
        while not self._done.wait(0.5):
            spent = time.monotonic() - started
            if spent > 2:
                self._shown = True
                line = f"{self._what} {spent:.0f} s {self._note}"
                print(f"\r\x1b[K{line[:110]}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Ticker:
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class PlanFacts:
    """Facts about a plan, written next to it.

    tensorrt: version that built it. gpu, capability: what it was built for. quantized: ONNX nodes between Q/DQ, for which INT8
    kernels are expected for. options: as `TensorRtOptions.described`.
    """

    tensorrt: str
    gpu: str
    capability: str
    precision: str
    strongly_typed: bool
    onnx: str
    onnx_sha256: str
    quantized: tuple[str, ...]
    options: dict[str, Any]
    build_seconds: float
    plan_sha256: str = ""

    def write(self, plan: Path) -> None:
        """Writes the sidecar of a plan."""
        write_json(sidecar_path(plan), {"format": FORMAT, "schema": SCHEMA, **asdict(self)})


def sidecar_path(plan: Path) -> Path:
    """NAME.plan → NAME.plan.json"""
    return plan.with_name(f"{plan.name}.json")


def read_facts(plan: Path, sha: str | None = None) -> PlanFacts | None:
    """The sidecar of a plan; None if there is none, or if it belongs to another plan (one of that name built elsewhere).

    Raises:
        UserError: a damaged sidecar.
    """
    path = sidecar_path(plan)
    if not path.is_file():
        return None
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT or values.get("schema") != SCHEMA:
        raise UserError(f"{path}: found no description of a plan, expected format {FORMAT!r} {SCHEMA}; build again")
    try:
        facts = PlanFacts(**{name: value for name, value in values.items() if name not in ("format", "schema")})
        facts = replace(facts, quantized=tuple(facts.quantized))
    except TypeError:
        raise UserError(f"{path}: found a description of a plan with other fields; build again") from None
    return facts if facts.plan_sha256 == (sha or sha256(plan)) else None


def check_facts(plan: Path, facts: PlanFacts, version: str, gpu: str, capability: str) -> None:
    """Raises `UserError` where the plan was built by another TensorRT or for another GPU."""
    fix = "build it again here"
    if facts.tensorrt != version and not facts.options.get("version_compatible"):
        raise UserError(f"{plan}: built by TensorRT {facts.tensorrt}, found {version} here; {fix}")
    if facts.capability != capability:
        raise UserError(
            f"{plan}: built for {facts.gpu} (compute capability {facts.capability}), found {gpu} ({capability}) here; {fix}"
        )
    if facts.gpu != gpu:
        raise UserError(
            f"{plan}: built for {facts.gpu}, found {gpu} here, whose best kernels may differ; {fix}, or remove "
            f"{sidecar_path(plan).name} to use it anyway"
        )


def build_plan(
    onnx_path: Path, precision: str, options: TensorRtOptions, gpu: str, capability: str
) -> tuple[bytes, PlanFacts]:
    """Builds a plan for the current GPU.

    Args:
        onnx_path: the graph. precision: "fp32", "fp16" or "int8".
        gpu, capability: of the current device, for the facts.

    Returns:
        the plan's bytes, and what is known of it.

    Raises:
        UserError: see `choose_typing`, `parse` and `configure`; or TensorRT cannot build the graph.
        KeyboardInterrupt: Ctrl-C; nothing was written.
    """
    outline = read_outline(onnx_path)
    trt = tensorrt_module()
    typing = choose_typing(onnx_path, outline, precision, options, Capabilities(trt))
    tools = Tools(trt, options)
    network = tools.network(typing.strong)
    parser = parse(tools, network, onnx_path)
    set_formats(tools, network, onnx_path, options, typing.strong)
    config = configure(tools, network, typing, onnx_path, options)
    started = time.monotonic()
    interrupt = Interrupt(tools.capabilities.progress)
    with Ticker(f"TensorRT builds {onnx_path.name} {precision}") as ticker, interrupt:
        if tools.capabilities.progress:
            config.progress_monitor = _monitor(trt, interrupt, ticker.note)
        with timing_cache(config, options.timing_cache, tools.logger):
            serialized = tools.builder.build_serialized_network(network, config)
            if interrupt.asked:
                raise KeyboardInterrupt
    del parser
    if serialized is None:
        raise UserError(
            f"{onnx_path}: TensorRT {tools.capabilities.version} cannot build it: {_cause(tools.logger, 'no cause given')}"
        )
    plan = bytes(serialized)
    facts = PlanFacts(
        tensorrt=tools.capabilities.version,
        gpu=gpu,
        capability=capability,
        precision=precision,
        strongly_typed=typing.strong,
        onnx=onnx_path.name,
        onnx_sha256=sha256(onnx_path),
        quantized=tuple(outline.quantized),
        options=options.described(),
        build_seconds=round(time.monotonic() - started, 2),
        plan_sha256=hashlib.sha256(plan).hexdigest(),
    )
    return plan, facts


def write_plan(path: Path, plan: bytes, facts: PlanFacts) -> None:
    """Writes a plan and its sidecar. If killed between the two, it leaves a sidecar of another plan, which is ignored."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(plan)
    facts.write(path)
