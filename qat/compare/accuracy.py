"""Every row's boxes on every keyframe, and how far its tensors are from the reference's.

Keyframe by keyframe, all rows on one keyframe before the next: each is loaded once, and the reference's tensors need
not be kept. What a row found on a keyframe is kept in a cache, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qat.boxes.detections import Detections
from qat.compare.rows import Row
from qat.core.errors import NotFiniteError
from qat.core.files import read_arrays, write_arrays
from qat.core.tensors import decibels, frame_digest
from qat.data import NuScenesDataset, Sample

# In the order in which they arise; "heads" stands for all of the head's maps.
TENSORS = ("camera_feature", "camera_depth_weights", "feat_in", "feat_out", "middle", "heads")


@dataclass
class RowAccuracy:
    """One row's boxes by sample token, and energies float64[len(TENSORS), 2] of signal and noise over all samples."""

    detections: dict[str, Detections] = field(default_factory=dict)
    energies: np.ndarray = field(default_factory=lambda: np.zeros((len(TENSORS), 2)))

    def sqnr_db(self) -> dict[str, float]:
        """10·log10(Σ reference² / Σ (reference − row)²) for each tensor that the detector has."""
        result = {}
        for name, (signal, noise) in zip(TENSORS, self.energies, strict=True):
            if signal > 0:
                result[name] = decibels(signal, noise)
        return result


def _energies(reference: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], maps: Sequence[str]) -> np.ndarray:
    result = np.zeros((len(TENSORS), 2))
    for n, name in enumerate(TENSORS):
        for tensor in maps if name == "heads" else (name,):
            if tensor in reference:
                expected = reference[tensor].ravel()
                difference = expected - found[tensor].ravel()
                result[n] += np.dot(expected, expected), np.dot(difference, difference)
    return result


class _Cache:
    """One file a keyframe: what each row, by its key and the reference's, found on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> dict[str, np.ndarray]:
        return read_arrays(self.folder / f"{name}.npz")

    def write(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        write_arrays(self.folder / f"{name}.npz", arrays)


def run_accuracy(
    rows: Sequence[Row],
    dataset: NuScenesDataset,
    cache: Path,
    keep: Callable[[int, Sample], None],
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[RowAccuracy], list[float]]:
    """Runs every row on every keyframe.

    Args:
        rows: the reference first.
        cache: folder of what was found before.
        keep: called with each keyframe's index and content.
        progress: called with the number of keyframes done.

    Returns:
        each row's boxes and energies; milliseconds that each newly run keyframe's pooling pattern took to compute.

    Raises:
        NotFiniteError: a row gave a value that is not finite.
    """
    store = _Cache(cache)
    reference = rows[0]
    results = [RowAccuracy() for _ in rows]
    rebuilds: list[float] = []
    shared = reference.pipeline.patterns
    for row in rows:  # one geometry, computed once for all rows
        row.pipeline.patterns = shared
    for index in range(len(dataset)):
        sample = dataset[index]
        keep(index, sample)
        name = frame_digest(sample)
        known = store.read(name)
        names = [f"{reference.key}-{row.key}" for row in rows]
        if any(f"{key}.energies" not in known for key in names):
            before = shared.rebuilds
            expected = reference.pipeline.forward(sample)
            if shared.rebuilds > before:
                rebuilds.append(reference.pipeline.timing_ms["pattern"])
            for row, key in zip(rows, names, strict=True):
                if f"{key}.energies" in known:
                    continue
                tensors = expected if row is reference else row.pipeline.forward(sample)
                energies = _energies(expected, tensors, row.pipeline.settings["head_maps"])
                if not np.isfinite(energies).all():
                    where = TENSORS[int(np.argmax(~np.isfinite(energies).all(1)))]
                    raise NotFiniteError(f"{row.name}: sample {sample.token}: {where} has values that are not finite")
                found = row.pipeline.decode(tensors)
                for what, array in (("boxes", found.boxes), ("scores", found.scores), ("labels", found.labels)):
                    known[f"{key}.{what}"] = array
                known[f"{key}.energies"] = energies
            store.write(name, known)
        for result, key in zip(results, names, strict=True):
            result.detections[sample.token] = Detections(
                *(known[f"{key}.{what}"] for what in ("boxes", "scores", "labels"))
            )
            result.energies += known[f"{key}.energies"]
        progress(index + 1)
    return results, rebuilds
