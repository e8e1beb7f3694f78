"""The rows of peers_latency.py, each made and run in a process of its own (`qat.benchmark.worker.Worker`)."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qat.benchmark.worker import memory_mb, stored_mb, until_stable
from qat.core.errors import UserError
from qat.core.rounds import no_collection
from qat.engine import Options, build

Feeds = dict[str, np.ndarray]


class TimedRow(ABC):
    """What is asked of every row. A subclass sets `feeds` and `size_mb`, and runs."""

    feeds: Sequence[Feeds]
    size_mb: float

    @abstractmethod
    def run(self, feed: Feeds) -> Any:
        """Once, arrays to arrays."""

    def _once(self, feed: Feeds) -> float:
        begin = time.perf_counter()
        self.run(feed)
        return (time.perf_counter() - begin) * 1e3

    def warm_up(self) -> dict[str, Any]:
        """Until two windows of runs agree."""
        return until_stable(lambda: self._once(self.feeds[0]))

    def turn(self, number: int, repeats: int) -> list[float]:
        """One run that is not counted, then milliseconds of `repeats` that are."""
        feed = self.feeds[number % len(self.feeds)]
        with no_collection():
            self._once(feed)
            return [self._once(feed) for _ in range(repeats)]

    def finish(self) -> dict[str, Any]:
        """After the last run."""
        return {"memory_peak_mb": memory_mb("VmHWM"), "size_mb": round(self.size_mb, 3)}


class EngineRow(TimedRow):
    """A graph on a backend, as `qat.engine` builds it: peers' graphs too, so that settings are the same for all."""

    def __init__(
        self, file: Path, backend: str, precision: str, threads: int, feeds: Sequence[Feeds], bfloat16: bool = False
    ) -> None:
        self.engine = build(file, backend, precision, Options(threads=threads, cache=None, bfloat16=bfloat16))
        self.feeds, self.size_mb = feeds, stored_mb(file)

    def run(self, feed: Feeds) -> Any:
        return self.engine.run(feed)

    def profile(self, most: int) -> list[Mapping[str, Any]]:
        """The slowest layers: name, type, precision, ms."""
        layers = self.engine.profile(self.feeds[0] if self.feeds else None)
        return [dict(layer) for layer in sorted(layers, key=lambda layer: -layer["ms"])[:most]]


class OpenVinoAsItComes(TimedRow):
    """A model on OpenVINO with no setting but the threads and the latency hint: on CPUs that multiply bfloat16, what is not
    INT8 then runs in that."""

    def __init__(self, file: Path, threads: int, feeds: Sequence[Feeds]) -> None:
        import openvino as ov

        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"} | (
            {"INFERENCE_NUM_THREADS": threads} if threads else {}
        )
        compiled = ov.Core().compile_model(ov.Core().read_model(file), "CPU", settings)
        self.described = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.request = compiled.create_infer_request()
        self.feeds, self.size_mb = feeds, stored_mb(file)

    def run(self, feed: Feeds) -> Any:
        results = self.request.infer(feed, share_inputs=True, share_outputs=True)
        return [value.copy() for value in results.values()]


class TorchRow(TimedRow):
    """The float network's part in PyTorch, channels-last; compiled: through inductor, with its constants folded in."""

    def __init__(
        self, config: Mapping[str, Any], state: Path, part: str, compiled: bool, threads: int, feeds: Sequence[Feeds]
    ) -> None:
        import torch

        from qat.families.bevfusion.detector import build_model
        from qat.model.runners import TorchPart, part_modules

        if threads:
            torch.set_num_threads(threads)
        model = build_model(dict(config)).eval()
        model.load_state_dict(torch.load(state, weights_only=True))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        wrapper = part_modules(model)[part]
        self.part = TorchPart(wrapper)
        self.feeds, self.size_mb = feeds, state.stat().st_size / 1e6
        if compiled:
            import torch._inductor.config as inductor

            inductor.freezing = True
            module: Any = torch.compile(wrapper)
            module.inputs, module.outputs = wrapper.inputs, wrapper.outputs
            self.part = TorchPart(module)
            try:
                self.run(feeds[0])
            except Exception as error:  # inductor's, the C++ compiler's and dynamo's have no common base class
                first = str(error).strip().splitlines() or [type(error).__name__]
                raise UserError(f"torch.compile does not compile here: {type(error).__name__}: {first[0]}") from None

    def run(self, feed: Feeds) -> Any:
        return self.part.run(feed)
