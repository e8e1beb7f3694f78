"""Shared by all backends: tensor checks, options, the engine cache."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from qat.core.errors import UserError
from qat.core.files import atomic_path, sha256
from qat.engine.tensorrt_options import TensorRtOptions
from qat.plan import Axis


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's numpy dtype name and shape; None is a dimension that may vary."""

    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join('?' if n is None else str(n) for n in self.shape)}]"

    def accepts(self, array: np.ndarray) -> bool:
        """Whether the array has this dtype and shape."""
        return self.accepts_shape(array.dtype.name, array.shape)

    def accepts_shape(self, dtype: str, shape: tuple[int, ...]) -> bool:
        """Whether it accepts this dtype name and shape."""
        return (
            dtype == self.dtype
            and len(shape) == len(self.shape)
            and all(want is None or want == have for want, have in zip(self.shape, shape, strict=True))
        )


class _Layer(TypedDict):
    name: str
    type: str
    precision: str
    ms: float


class LayerProfile(_Layer, total=False):
    """One executed layer: its name and kind in the backend's words, numeric type it ran in, milliseconds a run.

    device: where it ran, in the backend's words; left out by a backend that runs all layers in one place.
    """

    device: str


def layers_by_device(layers: Iterable[LayerProfile]) -> dict[str, int]:
    """Number of layers of a profile that ran on each device: shows what a GPU session left to the CPU."""
    return dict(Counter(layer.get("device", "") for layer in layers))


@dataclass(frozen=True)
class Options:
    """How to build and run (docs/engines.md).

    threads: CPU threads, 0 for one on each core.
    cache: folder of built engines; None switches the cache off. The default is $BEVQAT_CACHE, else
        $XDG_CACHE_HOME/bevqat, else ~/.cache/bevqat.
    pinning: each CPU thread stays on its own core. For a process that has the cores to itself: threads of two that
        both pin meet on the same cores.
    spinning: ONNX Runtime's CPU threads wait for work in a loop, which answers sooner and takes whole cores while it runs.
    bfloat16: what an INT8 graph leaves in float runs in bfloat16, on OpenVINO where the CPU multiplies it: faster, and
        another accuracy, to be measured.
    tensorrt: options of the backend tensorrt, which decides which of them enter the key of its cached plans.
    """

    threads: int = 0
    cache: Path | None = Path(
        os.environ.get("BEVQAT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bevqat"
    )
    pinning: bool = False
    spinning: bool = True
    bfloat16: bool = False
    tensorrt: TensorRtOptions = field(default_factory=TensorRtOptions)

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise UserError(f"threads: found {self.threads}, expected 0 (one thread per core) or more")


def takes_bfloat16(backend: str, precision: str) -> bool:
    """Whether the option bfloat16 affects an engine of this backend and precision."""
    return backend == "openvino" and precision == "int8"


def described(options: Options, backends: Collection[str], precisions: Collection[str] = ("int8",)) -> dict[str, Any]:
    """Options as JSON values, to record with results: those that affect these backends and precisions.
    The cache is left out: it depends on the machine."""
    values = {name: value for name, value in asdict(options).items() if name not in ("cache", "tensorrt", "bfloat16")}
    if any(takes_bfloat16(backend, precision) for backend in backends for precision in precisions):
        values["bfloat16"] = options.bfloat16
    return values | ({"tensorrt": options.tensorrt.described()} if "tensorrt" in backends else {})


class Device(NamedTuple):
    """The device an engine was built for. name: for people. fingerprint: equal on devices that may run the same engine."""

    name: str
    fingerprint: str


def this_cpu() -> Device:
    """The processor; its fingerprint is over its model and instruction sets."""
    features = _cpu_features()
    name = next((line.partition(":")[2].strip() for line in features.splitlines() if line.startswith("model name")), "")
    return Device(name or platform.processor() or platform.machine(), text_digest(features))


def text_digest(text: str) -> str:
    """16 hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cpu_features() -> str:
    """The processor's name and instruction sets: compiled graphs are laid out for them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


# Fields of `Options` that change what a backend's `cached` writes. For ONNX Runtime none does: threads, pinning and spinning
# belong to the session, and the file is the graph that they run.
KEY_FIELDS = {"openvino": ("threads", "pinning", "bfloat16"), "onnxruntime": ()}


def cache_path(
    onnx_path: Path, suffix: str, options: Options, key: Mapping[str, str], fields: Collection[str] = ()
) -> Path:
    """Where the built file for this graph is kept, whether it is there or not.

    Args:
        suffix: file name ending of the built file.
        key: what the file depends on besides the graph: backend, its version, precision, device.
        fields: names of the options that the file depends on; other options do not rebuild it.
    """
    assert options.cache is not None
    described = {**key, **{name: getattr(options, name) for name in fields}, "onnx": sha256(onnx_path)}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return options.cache / f"{digest[:32]}{suffix}"


def cached(
    onnx_path: Path, suffix: str, options: Options, key: Mapping[str, str], make: Callable[[Path], None]
) -> Path:
    """The file at `cache_path` for the key's backend and its `KEY_FIELDS`; if it does not exist, `make(path)` writes it.

    Raises:
        UserError: the cache folder cannot be written.
    """
    built = cache_path(onnx_path, suffix, options, key, KEY_FIELDS[key["backend"]])
    if not built.exists():
        with atomic_path(built) as temporary:
            make(temporary)
    return built


class Engine(ABC):
    """A compiled graph. Not for use by several threads at once.

    inputs, outputs: tensor name to `TensorSpec`, in the graph's order.
    transfer_ms: of the latest run, copies between host and device; 0 where it computes in the host's memory.
    limits: of inputs whose dimensions vary within known sizes, the place of each such dimension, its name and sizes; whoever reads
        them in a manifest sets them (`qat.runtime.axes.limited`), for a graph alone does not say them.
    """

    transfer_ms: float = 0.0

    def __init__(
        self, source: Path, precision: str, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
    ) -> None:
        self.source = source
        self.precision = precision
        self.inputs = dict(inputs)
        self.limits: dict[str, dict[int, tuple[str, Axis]]] = {}
        self.outputs = dict(outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the graph once.

        Args:
            feeds: an array for each of `inputs`, of exactly its dtype and shape.

        Returns:
            an array for each of `outputs`; the caller owns them.

        Raises:
            UserError: an input is missing, unknown, or of another dtype or shape.
        """
        return self._infer(self._checked(feeds))

    def _checked(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Contiguous arrays in the order of `inputs`; raises as `run` does."""
        for name in feeds:
            if name not in self.inputs:
                raise UserError(f"{self.source}: input {name!r}: unknown, expected {', '.join(self.inputs)}")
        for name, spec in self.inputs.items():
            if name not in feeds:
                raise UserError(f"{self.source}: input {name}: missing, expected {spec}")
            array = feeds[name]
            if not spec.accepts(array):
                found = TensorSpec(array.dtype.name, array.shape)
                raise UserError(f"{self.source}: input {name}: found {found}, expected {spec}")
            for place, (label, axis) in self.limits.get(name, {}).items():
                if not axis.holds(array.shape[place]):
                    raise UserError(
                        f"{self.source}: input {name}: found {array.shape[place]} along its axis {label}, expected {axis}, the "
                        "sizes in manifest.json; export with other sizes of the axis in the family's plan"
                    )
        return {name: np.ascontiguousarray(feeds[name]) for name in self.inputs}

    @abstractmethod
    def _infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Does `run`'s work after the checks. arrays: contiguous, in the order of `inputs`."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Writes the built engine, which the backend's `load` reads.

        Raises:
            UserError: the backend cannot write engines for this device.
        """

    @cached_property
    def size_bytes(self) -> int | None:
        """Size of the built engine as `save` writes it; None if the backend cannot write it."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.save(Path(folder) / "engine")
            except UserError:
                return None
            return (Path(folder) / "engine").stat().st_size

    @abstractmethod
    def profile(self, feeds: Mapping[str, np.ndarray] | None = None, runs: int = 3) -> list[LayerProfile]:
        """Time and precision of each layer as executed: the mean of `runs` runs after one warm-up, in order.

        Builds a second, instrumented copy of the engine: counters in the first would slow it down.

        Args:
            feeds: as for `run`; None for seeded random numbers.
        """

    def example_feeds(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Random inputs: standard normal floats, dimensions that vary at their usual size, 1 where none is known."""
        random = np.random.default_rng(seed)
        usual = {
            name: {place: axis.usual for place, (_, axis) in places.items()} for name, places in self.limits.items()
        }
        return {
            name: random.standard_normal(
                [n or usual.get(name, {}).get(place, 1) for place, n in enumerate(spec.shape)]
            ).astype(spec.dtype)
            for name, spec in self.inputs.items()
        }
