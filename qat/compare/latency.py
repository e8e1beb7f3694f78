"""Latency of all rows, interleaved, so that a slow moment of the machine affects all rows alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from qat.compare.rows import Row
from qat.core.rounds import no_collection, turned
from qat.runtime import SampleTensors


@dataclass
class Timings:
    """Milliseconds of one row's runs: the whole, and each of its stages."""

    total: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)

    def summary(self) -> dict[str, float | int]:
        """results.json's `latency_ms`."""
        return {
            "median": float(np.median(self.total)),
            "p99": float(np.percentile(self.total, 99)),
            "samples": len(self.total),
        }

    def stage_medians(self, percentile: float = 50) -> dict[str, float]:
        """results.json's `stages_ms`, without the pattern, which is cached as long as the geometry does not change."""
        return {
            name: float(np.percentile(values, percentile)) for name, values in self.stages.items() if name != "pattern"
        }


def measure(
    rows: Sequence[Row],
    samples: Sequence[SampleTensors],
    rounds: int,
    repeats: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Timings]:
    """Times the whole detector, from preprocessed tensors to boxes.

    In each round every row runs one sample `repeats` times, after one run that is not counted (it brings the row's weights
    back into the caches, as in a separate process). The order of rows rotates by one place each round. Simulated rows are slow
    and their times meaningless: they run once in total.

    Args:
        progress: called with the number of rounds done.

    Returns:
        a `Timings` for each row.
    """
    timings = [Timings() for _ in rows]
    with no_collection():
        for turn in range(rounds):
            sample = samples[turn % len(samples)]
            for row, timing in turned(list(zip(rows, timings, strict=True)), turn):
                if row.simulated and turn:
                    continue
                if not row.simulated:
                    row.pipeline.detect_sample(sample)
                for _ in range(1 if row.simulated else repeats):
                    begin = time.perf_counter()
                    row.pipeline.detect_sample(sample)
                    timing.total.append((time.perf_counter() - begin) * 1e3)
                    for name, value in row.pipeline.timing_ms.items():
                        timing.stages.setdefault(name, []).append(value)
            progress(turn + 1)
    return timings
