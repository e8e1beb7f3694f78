"""The torch-free interface of a family: its plan, the host's ops, preparing raw input, decoding boxes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qat.boxes.detections import Detections
from qat.core.errors import UserError
from qat.core.tensors import digest
from qat.plan import Plan, Runner, next_state


@dataclass(frozen=True)
class InUnit:
    """An output as `bevqat agree` compares it.

    values: float array; NaN where it means nothing. unit: what they count; "" for the output's own numbers. exact: the largest difference
    that two FP32 runners may have; rounded: the largest root mean square if one rounds; None to judge by SQNR. period: of an angle.
    """

    values: np.ndarray
    unit: str = ""
    exact: float | None = None
    rounded: float | None = None
    period: float = 0.0


class Flow(ABC):
    """One model's host side, made from a manifest's `pipeline` section.

    plan: the model's plan. classes: names, in the order of `Detections.labels`. image: {"mean", "std"} of the pictures'
    normalisation, None without pictures. keep_buffers: ops may reuse the buffers that they returned before, because no caller
    keeps them. words: for `reported` labels, in the report. state_names: prefixes of the names in a state dict of the family,
    to find prefixes that wrappers added. geometry_step: the op that is cheap until the sensors move, for the benchmark;
    rebuilds: how often it was computed.
    """

    plan: Plan
    classes: list[str]
    image: Mapping[str, Any] | None = None
    words: Mapping[str, str] = {}
    state_names: tuple[str, ...] = ()
    geometry_step: str | None = None
    rebuilds: int = 0
    prepare_ms: dict[str, float]

    def __init__(self, settings: Mapping[str, Any], threads: int = 0, source: str = "pipeline") -> None:
        """threads: of the host's ops, 0 for one on each core. source: the settings' origin, for messages."""
        self.settings, self.threads, self.source = dict(settings), threads, source
        self.keep_buffers = False

    @classmethod
    @abstractmethod
    def check(cls, path: str | Path, settings: object, fix: str) -> None:
        """Raises `UserError`, for the file `path`, if a manifest's `pipeline` section does not fit this class."""

    @abstractmethod
    def ops(self) -> Mapping[str, Runner]:
        """A runner for each of the plan's ops, on numpy arrays of one sample."""

    @abstractmethod
    def feeds(self, frames: Sequence[Any]) -> dict[str, np.ndarray]:
        """The plan's inputs for a batch of preprocessed frames, without the state's."""

    def first_feeds(self, frames: Sequence[Any]) -> dict[str, np.ndarray]:
        """The plan's inputs for a batch of frames each of which begins a scene."""
        state = {name: np.repeat(value, len(frames), axis=0) for name, value in self.initial_state().items()}
        return {**self.feeds(frames), **state}

    @abstractmethod
    def prepare(self, *raw: Any) -> Any:
        """A preprocessed frame from sensor data: the arguments of `Pipeline.__call__`.

        Raises:
            UserError: they do not fit the model.
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, np.ndarray]) -> Detections:
        """Boxes from the plan's outputs (finite values) of one sample."""

    @abstractmethod
    def check_frame(self, frame: Any, token: str) -> None:
        """Raises `UserError` if a frame's arrays do not fit the parts."""

    @abstractmethod
    def made_frame(self, seed: int, noise: bool = False) -> Any:
        """A generated frame with the statistics of real ones (or plain noise); the same bits on every machine."""

    @abstractmethod
    def raw_frames(self, count: int, seed: int = 0) -> list[Any]:
        """Generated inputs of a benchmark, as expensive as real ones: objects with `name`, `raw` (the arguments of `prepare`)
        and `moved(place)`, the same with the sensors moved by `place` millimetres."""

    def recorded(self, root: Path, split: str, version: str | None, count: int | None) -> list[Any]:
        """The same for a data set's frames."""
        raise UserError("--data: this family only supports generated frames here; omit --data")

    def initial_state(self) -> dict[str, np.ndarray]:
        """The state for the first frame of a scene, by the plan's inputs."""
        return {}

    def objects(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """For each tensor of the last `judged` label, which values belong to objects: bool, of its shape; None if not known."""
        return None

    def in_units(self, tensors: Mapping[str, np.ndarray]) -> dict[str, InUnit]:
        """The plan's outputs of a frame, each in a unit of its own and in the family's own convention, whatever the layout."""
        return {name: InUnit(value) for name, value in tensors.items()}

    def regions(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Masks of the outputs' cells that are compared apart, each broadcastable to every output; none to compare all at once."""
        return {}

    def share(self, other: Any) -> None:  # noqa: B027
        """Uses another flow's caches of the same model."""

    def need_boxes(self, what: str, fix: str) -> None:
        """Raises `UserError` if the model has no boxes. what, fix: the beginning and the end of the message."""
        if not self.plan.boxes:
            raise UserError(f"{what}: found {self.without_boxes}, expected a whole detector; {fix}")

    without_boxes = "a model without boxes"


class Session:
    """Frames in order, with the state that each passes to the next one of its scene.

    keyed: `begin` returns a cache key of everything that a frame's tensors depend on; it reads every byte of the inputs.
    """

    def __init__(self, flow: Flow, keyed: bool = False) -> None:
        self.flow, self.keyed = flow, keyed
        self.reset()

    def reset(self) -> None:
        """Starts a new scene with the next frame."""
        self._scene: object = None
        self._state: dict[str, Any] | None = None
        self._key = ""

    def begin(self, frame: Any) -> tuple[dict[str, Any], str]:
        """The plan's inputs for a frame, and a key of everything that they depend on ("" unless `keyed`); for a plan with
        state, of all frames of the scene so far. A frame whose `scene` differs from the last one's begins a scene."""
        plan = self.flow.plan
        feeds = self.flow.feeds([frame])
        name = digest(feeds) if self.keyed else ""
        if not plan.state:
            return feeds, name
        scene = getattr(frame, "scene", None)
        if self._state is None or scene != self._scene:
            self._scene, self._state, self._key = scene, self.flow.initial_state(), ""
        if self.keyed:
            self._key = hashlib.sha256(f"{self._key} {name}".encode()).hexdigest()[:40]
        return {**feeds, **self._state}, self._key

    def end(self, tensors: Mapping[str, Any]) -> None:
        """Takes the next state from the frame's tensors."""
        if self.flow.plan.state:
            self._state = next_state(self.flow.plan, tensors)

    def saved(self) -> dict[str, Any]:
        """The state, for a cache; by `state.NAME`."""
        return {f"state.{name}": np.asarray(value) for name, value in (self._state or {}).items()}

    def restore(self, arrays: Mapping[str, Any]) -> bool:
        """Takes the state from a cache; False if the cache holds no state of this plan."""
        names = list(self.flow.plan.state.values())
        if any(f"state.{name}" not in arrays for name in names):
            return False
        if names:
            self._state = {name: arrays[f"state.{name}"] for name in names}
        return True
