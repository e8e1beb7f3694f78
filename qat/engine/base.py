"""What every backend has in common: tensor checks, options, the engine cache."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np

from qat.core.errors import UserError
from qat.core.files import atomic_path, sha256
from qat.engine.tensorrt_options import TensorRtOptions


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's numpy dtype name and shape; None stands for a dimension that may vary."""

    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join('?' if n is None else str(n) for n in self.shape)}]"

    def accepts(self, array: np.ndarray) -> bool:
        """Whether the array has this dtype and shape."""
        return self.accepts_shape(array.dtype.name, array.shape)

    def accepts_shape(self, dtype: str, shape: tuple[int, ...]) -> bool:
        """Whether an array of this dtype name and shape is one."""
        return (
            dtype == self.dtype
            and len(shape) == len(self.shape)
            and all(want is None or want == have for want, have in zip(self.shape, shape, strict=True))
        )


class LayerProfile(TypedDict):
    """One executed layer: its name and kind in the backend's words, numeric type it ran in, milliseconds a run."""

    name: str
    type: str
    precision: str
    ms: float


@dataclass(frozen=True)
class Options:
    """How to build.

    threads: CPU threads, 0 for what the backend takes by itself (all cores).
    cache: folder of built engines; None switches the cache off. The default is $BEVQAT_CACHE, else
        $XDG_CACHE_HOME/bevqat, else ~/.cache/bevqat.
    tensorrt: what the backend tensorrt alone takes; it says itself what enters the key of its cached plans.
    """

    threads: int = 0
    cache: Path | None = Path(
        os.environ.get("BEVQAT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bevqat"
    )
    tensorrt: TensorRtOptions = field(default_factory=TensorRtOptions)

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise UserError(f"threads: found {self.threads}, expected 0 (all cores) or more")


def _cpu_features() -> str:
    """The processor's name and instruction sets: compiled graphs are laid out for them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def cache_path(onnx_path: Path, suffix: str, options: Options, key: Mapping[str, str]) -> Path:
    """Where the built file for this graph, backend, options and processor is kept, whether it is there or not.

    Args:
        suffix: file name ending of the built file.
        key: what else the result depends on: backend, its version, precision.
    """
    assert options.cache is not None
    plain = {name: value for name, value in asdict(options).items() if name not in ("cache", "tensorrt")}
    described = {**key, **plain, "cache": None, "onnx": sha256(onnx_path), "cpu": _cpu_features()}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return options.cache / f"{digest[:32]}{suffix}"


def cached(
    onnx_path: Path, suffix: str, options: Options, key: Mapping[str, str], make: Callable[[Path], None]
) -> Path:
    """The file at `cache_path`; `make(path)` writes it where there is none.

    Raises:
        UserError: the cache folder cannot be written.
    """
    built = cache_path(onnx_path, suffix, options, key)
    if not built.exists():
        with atomic_path(built) as temporary:
            make(temporary)
    return built


class Engine(ABC):
    """A compiled graph. Not for use by several threads at once.

    inputs, outputs: tensor name to `TensorSpec`, in the graph's order.
    size_bytes: of the built engine as it would be shipped; None where the backend does not tell.
    transfer_ms: of the latest run, copies between host and device; 0 where it computes in the host's memory.
    """

    size_bytes: int | None = None
    transfer_ms: float = 0.0

    def __init__(
        self, source: Path, precision: str, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
    ) -> None:
        self.source = source
        self.precision = precision
        self.inputs = dict(inputs)
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
        return self._infer({name: np.ascontiguousarray(feeds[name]) for name in self.inputs})

    @abstractmethod
    def _infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`run` after the checks: contiguous arrays in the order of `inputs`."""

    @abstractmethod
    def profile(self, feeds: Mapping[str, np.ndarray] | None = None, runs: int = 3) -> list[LayerProfile]:
        """Time and precision of each layer as executed: the mean of `runs` runs after one warm-up, in order.

        Builds a second, instrumented copy of the engine: counters in the first one would slow it down.

        Args:
            feeds: as for `run`; None for seeded random numbers.
        """

    def example_feeds(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Random inputs: standard normal floats, dimensions that vary taken as 1."""
        random = np.random.default_rng(seed)
        return {
            name: random.standard_normal([n or 1 for n in spec.shape]).astype(spec.dtype)
            for name, spec in self.inputs.items()
        }
