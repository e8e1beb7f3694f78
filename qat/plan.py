"""A model's plan as data: its tensors, and the steps between them in order. No torch.

A step is a *part*, a graph that is exported and built separately, or an *op*, which the host computes between the parts (BEV
pooling, voxelizing, a memory's update). `run` walks the steps. A runner computes a step, and every stage plugs in its runners:
PyTorch in float, with fake quantization or recording statistics, an ONNX file, a built engine.

    plan = flow.plan
    tensors = run(plan, runners, flow.feeds([frame]))       # {tensor: array}, inputs included
    tensors = run(plan, others, tensors, start="fuser")     # everything before `fuser` as it was
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

BATCH = "B"  # the axis of samples

Runner = Callable[[dict[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Axis:
    """Sizes of an axis that varies: the smallest, the usual and the largest (None: any).

    The manifest records them; an engine is built for the usual size and refuses sizes outside the bounds.
    """

    least: int = 1
    usual: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.usual <= (self.usual if self.most is None else self.most):
            raise ValueError(f"axis: found {self.least}, {self.usual}, {self.most}, expected 0 ≤ least ≤ usual ≤ most")

    def holds(self, size: int) -> bool:
        """Whether the axis may have this size."""
        return self.least <= size and (self.most is None or size <= self.most)

    def __str__(self) -> str:
        return f"{self.least} or more" if self.most is None else f"{self.least} to {self.most}"


@dataclass(frozen=True)
class Tensor:
    """shape: sizes; the name of an axis that varies (BATCH, or one of `Plan.axes`); None if only the preceding part decides it.

    exact: coordinates, whose small differences matter: they, and tensors computed only from them, are not rounded to FP16.
    """

    shape: tuple[int | str | None, ...]
    dtype: str = "float32"
    exact: bool = False

    def sizes(self, axes: Mapping[str, int]) -> tuple[int, ...] | None:
        """The shape for these sizes of the axes that vary; None if it is not known."""
        found = [axes[n] if isinstance(n, str) else n for n in self.shape]
        return None if None in found else tuple(n for n in found if n is not None)


@dataclass(frozen=True)
class Part:
    """A graph. inputs: its input's name → the tensor that goes in. outputs: its outputs, which are tensors of the same name.

    scope: prefix of the paths of its quantizers in a PTQ checkpoint.
    """

    name: str
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    scope: str


@dataclass(frozen=True)
class Op:
    """A step that the host computes. inputs, outputs: tensors."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


Step = Part | Op


@dataclass(frozen=True)
class Plan:
    """A model's plan.

    inputs: those of a frame, and those that `state` feeds. outputs: the model's: boxes are decoded from them if it has
    `boxes`. state: output → the input of the next frame that it becomes; a scene begins with `Flow.initial_state`.
    reported: what a comparison reports, in order: label → tensors. judged: the same for sensitivity, which ranks by the last.
    """

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    reported: Mapping[str, tuple[str, ...]]
    judged: Mapping[str, tuple[str, ...]]
    boxes: bool = True
    axes: Mapping[str, Axis] = field(default_factory=dict)
    state: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = set(self.inputs)
        for step in self.steps:
            for name in taken_by(step):
                if name not in known:
                    raise ValueError(f"plan: {step.name} reads {name!r}, which no earlier step computes")
            known |= set(step.outputs)
        labels = [name for group in (*self.reported.values(), *self.judged.values()) for name in group]
        for name in (*self.outputs, *self.state, *labels):
            if name not in known:
                raise ValueError(f"plan: no step computes {name!r}")
        if wrong := set(self.state.values()) - set(self.inputs):
            raise ValueError(f"plan: state goes into {', '.join(sorted(wrong))}, expected inputs of the plan")

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by name, in order."""
        return {step.name: step for step in self.steps if isinstance(step, Part)}

    @property
    def scopes(self) -> dict[str, str]:
        """Each part's scope → its name."""
        return {part.scope: name for name, part in self.parts.items()}

    @property
    def part_inputs(self) -> set[str]:
        """The tensors that the parts read."""
        return {name for part in self.parts.values() for name in part.inputs.values()}

    @property
    def frame_inputs(self) -> tuple[str, ...]:
        """A frame's inputs: all except the state's."""
        return tuple(name for name in self.inputs if name not in self.state.values())

    def between(self, start: str | None = None, until: str | None = None) -> tuple[Step, ...]:
        """The steps from `start` on, up to `until`, both included; None for the first and the last."""
        names = [step.name for step in self.steps]
        first = 0 if start is None else names.index(start)
        last = len(names) if until is None else names.index(until) + 1
        return self.steps[first:last]

    def needed_from(self, start: str) -> set[str]:
        """The tensors that `start` and later steps read but do not compute."""
        steps = self.between(start)
        computed: set[str] = set()
        needed: set[str] = set()
        for step in steps:
            needed |= set(taken_by(step)) - computed
            computed |= set(step.outputs)
        return needed

    @property
    def geometry(self) -> tuple[Op, ...]:
        """Ops that read only inputs of a frame that no part reads: their results do not depend on the parts' runners."""
        own = set(self.frame_inputs) - self.part_inputs
        return tuple(step for step in self.steps if isinstance(step, Op) and set(step.inputs) <= own)

    def is_raw(self, part: Part) -> bool:
        """Whether a part reads only the plan's inputs."""
        return set(taken_by(part)) <= set(self.inputs)


def taken_by(step: Step) -> tuple[str, ...]:
    """The tensors that a step reads."""
    return tuple(step.inputs.values()) if isinstance(step, Part) else step.inputs


def run(
    plan: Plan,
    runners: Mapping[str, Runner],
    feeds: Mapping[str, Any],
    start: str | None = None,
    until: str | None = None,
    done: Collection[str] = (),
    timed: Callable[[str], AbstractContextManager[None]] = lambda step: nullcontext(),
) -> dict[str, Any]:
    """Walks the plan.

    Args:
        runners: for each step, a function from its inputs (of a part, by the part's names for them) to its outputs.
        feeds: the plan's inputs, or with `start` the tensors that the steps from there on read.
        start, until: the first and the last step to run. done: steps to leave out, whose outputs are among `feeds`.
        timed: a context for each step, by its name.

    Returns:
        `feeds` and every computed tensor, by name.
    """
    found = dict(feeds)
    for step in plan.between(start, until):
        if step.name in done:
            continue
        names = step.inputs if isinstance(step, Part) else {name: name for name in step.inputs}
        given = {own: found[tensor] for own, tensor in names.items()}
        with timed(step.name):
            result = runners[step.name](given)
        found.update((name, result[name]) for name in step.outputs)
    return found


def next_state(plan: Plan, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The state for the next frame of the scene, by the input that it becomes."""
    return {given: tensors[name] for name, given in plan.state.items()}


def axes_at(plan: Plan, batch: int) -> dict[str, int]:
    """The usual size of each axis that varies, for a batch."""
    return {BATCH: batch, **{name: axis.usual for name, axis in plan.axes.items()}}


def flat(groups: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """(label, tensor) of each tensor of labelled groups."""
    for label, names in groups.items():
        for name in names:
            yield label, name
