"""A model as one object: its parts, the host's steps between them, and the decoding of boxes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qat.boxes.detections import Detections
from qat.core.errors import UserError
from qat.core.frame import Calibration, SampleTensors
from qat.engine import BACKENDS, Options
from qat.families import flow_of
from qat.families.flow import Session
from qat.manifest import load_manifest, pipeline_of
from qat.plan import run
from qat.runtime.axes import check_profiles
from qat.runtime.engines import build_part, is_engines, load_engines, part_precisions

__all__ = ["Calibration", "PartRunner", "Pipeline", "SampleTensors"]


class PartRunner(Protocol):
    """A runner of one part: an `Engine`, or the PyTorch module that it came from."""

    def run(self, feeds: Mapping[str, np.ndarray], /) -> dict[str, np.ndarray]:
        """Input arrays by tensor name to output arrays by tensor name."""


class Pipeline:
    """A model made of parts.

    flow: its family's host side, with the plan. timing_ms: milliseconds of each step in the latest call, and of preprocess and
    decode. classes, cameras: names, in the order of `Detections.labels` and of the inputs.

    A model with state carries it from call to call; `reset` begins a scene.
    """

    def __init__(
        self, parts: Mapping[str, PartRunner], settings: Mapping[str, Any], threads: int = 0, source: str = "pipeline"
    ) -> None:
        """Puts a model together from runners.

        Args:
            parts: a runner for each part of the plan.
            settings: a manifest's `pipeline` section.
            threads: for the host's steps, 0 for one on each core.
            source: where the parts came from, for messages.
        """
        self.parts = dict(parts)
        self.settings = dict(settings)
        self.flow = flow_of(settings, threads, source)
        self.classes = self.flow.classes
        self.cameras: list[str] = list(getattr(self.flow, "cameras", ()))
        self.session = Session(self.flow)
        self.timing_ms: dict[str, float] = {}
        self._source = source
        if missing := [name for name in self.flow.plan.parts if name not in self.parts]:
            raise UserError(f"{source}: found no part {', '.join(missing)}, expected {', '.join(self.flow.plan.parts)}")
        self._ops = self.flow.ops()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        backend: str | None = None,
        precision: str | None = None,
        options: Options | None = None,
    ) -> Pipeline:
        """Loads a folder of built engines, or builds every part of an exported one; both are checked against their manifest.

        Args:
            folder: where `bevqat build` wrote engines, or export the ONNX parts.
            backend: a backend of `qat.engine`. For a folder of engines: None, or the backend they were built for.
            precision: None for the manifest's. An fp16 folder's graphs are FP32-typed, so "fp32" is right for it too.
            options: threads, engine cache and the like. Built engines run with the options stored when they were built, except for
                fields that differ from the default ones (`qat.runtime.engines.run_options`).

        Raises:
            UserError: the folder is incomplete or was changed, or its graphs are not of this precision; engines are
                another backend's or precision's, or were built by another version of it or for another device.
        """
        folder = Path(folder)
        if is_engines(folder):
            engines, manifest, options = load_engines(folder, backend, precision, options)
            return cls(engines, pipeline_of(folder, manifest), options.threads, str(folder))
        manifest = load_manifest(folder)
        if backend is None:
            raise UserError(
                f"{folder}: found ONNX parts, expected a backend for them too: one of {', '.join(BACKENDS)}"
            )
        options = options or Options()
        precisions = part_precisions(folder, manifest, precision, backend)
        check_profiles(manifest, options, folder)
        parts = {
            name: build_part(folder, manifest["parts"][name], backend, wanted, options)
            for name, wanted in precisions.items()
        }
        return cls(parts, manifest["pipeline"], options.threads, str(folder))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.timing_ms[stage] = (time.perf_counter() - begin) * 1e3

    def __call__(self, *raw: Any) -> Detections:
        """Detects objects in the current sensor data.

        Args:
            raw: the arguments of the family's `prepare`; for BEVFusion images, points and a `Calibration`.

        Raises:
            UserError: like `prepare`; or the parts belong to a model without boxes.
        """
        self._need_boxes()
        self.timing_ms = {}
        with self._timed("preprocess"):
            frame = self.flow.prepare(*raw)
        self.timing_ms.update(getattr(self.flow, "prepare_ms", {}))
        return self._detect(frame)

    def detect_sample(self, sample: Any) -> Detections:
        """Detects objects in one preprocessed frame; raises as a call does."""
        self._need_boxes()
        self.timing_ms = {}
        return self._detect(sample)

    def forward(self, sample: Any) -> dict[str, Any]:
        """Every tensor of the plan that is computed for one preprocessed frame, by its name."""
        self.timing_ms = {}
        tensors = self._forward(sample)
        return {name: value for name, value in tensors.items() if isinstance(value, np.ndarray)}

    def reset(self) -> None:
        """Starts a new scene with the next frame."""
        self.session.reset()

    def decode(self, tensors: Mapping[str, np.ndarray]) -> Detections:
        """Boxes from the plan's outputs among `forward`'s tensors; raises as a call does."""
        self._need_boxes()
        with self._timed("decode"):
            outputs = {name: tensors[name] for name in self.flow.plan.outputs}
            with np.errstate(
                invalid="ignore", over="ignore"
            ):  # values that are not finite are reported below, in one line
                # A sum is finite if all its terms are, unless it overflows float32.
                finite = all(np.isfinite(values.sum()) or np.isfinite(values).all() for values in outputs.values())
            if not finite:
                first = next(name for name, values in tensors.items() if not np.isfinite(values).all())
                raise UserError(
                    f"{self._source}: {first}: found NaN or infinity, expected finite values; run `bevqat health` on the "
                    "checkpoint, and look at the images, points and calibration"
                )
            return self.flow.decode(outputs)

    def _detect(self, sample: Any) -> Detections:
        self.flow.keep_buffers = True
        try:
            tensors = self._forward(sample)
        finally:
            self.flow.keep_buffers = False
        return self.decode({name: value for name, value in tensors.items() if isinstance(value, np.ndarray)})

    def _need_boxes(self) -> None:
        self.flow.need_boxes(self._source, "use `Pipeline.forward` for its tensors")

    def _forward(self, sample: Any) -> dict[str, Any]:
        feeds, _ = self.session.begin(sample)
        runners = {**{name: part.run for name, part in self.parts.items()}, **self._ops}
        tensors = run(self.flow.plan, runners, feeds, timed=self._timed)
        self.session.end(tensors)
        return {name: value for name, value in tensors.items() if name not in feeds}
