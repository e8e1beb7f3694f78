"""Computes every row's boxes on every keyframe, and the distance of its tensors from the reference's.

Keyframe by keyframe, all rows on one keyframe before the next: each is loaded once, and the reference's tensors need
not be kept. A cache keeps each row's results on each keyframe, so that an interrupted run resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qat.boxes.detections import Detections
from qat.compare.rows import Row
from qat.core.errors import NotFiniteError
from qat.core.files import read_arrays, write_arrays
from qat.core.tensors import decibels
from qat.families.flow import Session
from qat.plan import Plan, flat


@dataclass
class RowAccuracy:
    """One row's boxes by sample token, and energies float64[labels, 2] of signal and noise over all samples."""

    labels: tuple[str, ...]
    detections: dict[str, Detections] = field(default_factory=dict)
    energies: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        self.energies = np.zeros((len(self.labels), 2))

    def sqnr_db(self) -> dict[str, float]:
        """10·log10(Σ reference² / Σ (reference − row)²) for each label of the plan's `reported`."""
        result = {}
        for name, (signal, noise) in zip(self.labels, self.energies, strict=True):
            if signal > 0:
                result[name] = decibels(signal, noise)
        return result


def _energies(plan: Plan, reference: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> np.ndarray:
    labels = list(plan.reported)
    result = np.zeros((len(labels), 2))
    for label, tensor in flat(plan.reported):
        expected = reference[tensor].ravel()
        difference = expected - found[tensor].ravel()
        result[labels.index(label)] += np.dot(expected, expected), np.dot(difference, difference)
    return result


ARRAYS = ("boxes", "scores", "labels")


class _Cache:
    """One file per keyframe with each row's results, by its key and the reference's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> dict[str, np.ndarray]:
        return read_arrays(self.folder / f"{name}.npz")

    def write(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        write_arrays(self.folder / f"{name}.npz", arrays)


def run_accuracy(
    rows: Sequence[Row],
    dataset: Any,
    cache: Path,
    keep: Callable[[int, Any], None],
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[RowAccuracy], list[float]]:
    """Runs every row on every keyframe.

    Args:
        rows: the reference first.
        cache: folder of earlier results.
        keep: called with each keyframe's index and content.
        progress: called with the number of keyframes done.

    Returns:
        each row's boxes and energies; milliseconds that each newly run keyframe's pooling pattern took to compute.

    Raises:
        NotFiniteError: a row returned a value that is not finite.
    """
    store = _Cache(cache)
    reference = rows[0]
    flow = reference.pipeline.flow
    plan = flow.plan
    labels = tuple(plan.reported)
    results = [RowAccuracy(labels) for _ in rows]
    rebuilds: list[float] = []
    walk = Session(flow, keyed=True)  # identifies the frames; each row has its own state
    for row in rows:  # the geometry, computed once for all rows
        row.pipeline.flow.share(flow)
        row.pipeline.reset()
    for index in range(len(dataset)):
        sample = dataset[index]
        keep(index, sample)
        feeds, name = walk.begin(sample)
        walk.end(feeds | {output: feeds[given] for output, given in plan.state.items()})
        known = store.read(name)
        names = [f"{reference.key}-{row.key}" for row in rows]
        if any(f"{key}.energies" not in known for key in names):
            before = flow.rebuilds
            expected = reference.pipeline.forward(sample)
            if flow.rebuilds > before and flow.geometry_step is not None:
                rebuilds.append(reference.pipeline.timing_ms[flow.geometry_step])
            for row, key in zip(rows, names, strict=True):
                if f"{key}.energies" in known:
                    continue
                tensors = expected if row is reference else row.pipeline.forward(sample)
                energies = _energies(plan, expected, tensors)
                if not np.isfinite(energies).all():
                    where = labels[int(np.argmax(~np.isfinite(energies).all(1)))]
                    raise NotFiniteError(f"{row.name}: sample {sample.token}: {where} has values that are not finite")
                found = row.pipeline.decode(tensors)
                known |= {f"{key}.{what}": array for what, array in found.arrays().items()}
                known[f"{key}.energies"] = energies
                known |= {f"{key}.{state}": array for state, array in row.pipeline.session.saved().items()}
            store.write(name, known)
        for row, result, key in zip(rows, results, names, strict=True):
            row.pipeline.session.restore({k.removeprefix(f"{key}."): x for k, x in known.items()})
            result.detections[sample.token] = Detections.of({what: known[f"{key}.{what}"] for what in ARRAYS})
            result.energies += known[f"{key}.energies"]
        progress(index + 1)
    return results, rebuilds
