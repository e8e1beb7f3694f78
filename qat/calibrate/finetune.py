"""Quantization-aware training: the weights adapt to the rounding, with the float network's outputs as targets.

The student is the network of a PTQ checkpoint: batch norms folded, quantizers on, rounding with the straight-through
estimator (`qat.lean.learn`). The teacher is the float network of the same checkpoint. Frames need no annotation.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

import qat
from qat.calibrate.checkpoint import recipe_of, save_ptq, student_and_teacher
from qat.calibrate.distributed import agree, device, only_writers, place
from qat.checkpoints.reading import load_checkpoint, save_plain
from qat.core.errors import NotFiniteError, UserError
from qat.core.files import atomic_path, atomic_set, check_same_run, reading_left, sha256, write_json
from qat.core.locks import one_writer
from qat.core.progress import StepLog, drawn_ahead, progress_bar
from qat.core.provenance import made_by
from qat.data import images_digest, version_in
from qat.families.family import Family
from qat.lean.learn import learn_ranges, refresh_weight_ranges, settle_ranges, trained_parameters
from qat.model.quantized import QuantizedModel
from qat.model.runners import torch_feeds, torch_ops, torch_runners
from qat.plan import Plan, Runner, run


@dataclass(frozen=True)
class FinetuneOptions:
    """steps: total optimiser steps. batch: frames of a step, shared by the processes. lr: AdamW's, without weight
    decay; it rises over `warmup` steps and falls to 0 as a cosine. clip: largest norm of the gradient.

    ema: decay of an exponential average of the weights, which is then saved; 0 for none. learn_ranges: also train the
    ranges of activations, at `range_lr` in log2 units. augment: as in training of the float network.
    amp: bfloat16 layers on a GPU. weights: of the family's losses by name, instead of the family's defaults.
    """

    steps: int = 1000
    batch: int = 2
    lr: float = 3e-5
    warmup: int = 50
    clip: float = 35.0
    ema: float = 0.0
    learn_ranges: bool = False
    range_lr: float = 1e-3
    augment: bool = True
    amp: bool = True
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)
    save_seconds: float = 60.0


@dataclass
class FinetuneResult:
    """checkpoint: the file written, which `load_ptq` reads. history: a mean of each loss every few steps."""

    checkpoint: Path
    history: list[dict[str, float]]
    recipe: dict[str, Any]


def learning_rate(step: int, options: FinetuneOptions) -> float:
    """Linear warm-up times a cosine from 1 at the first step to 0 after the last."""
    rise = min(1.0, (step + 1) / max(1, options.warmup))
    return options.lr * rise * 0.5 * (1 + math.cos(math.pi * step / options.steps))


def check_options(options: FinetuneOptions, processes: int = 1) -> None:
    """Raises `UserError` for invalid values, by the name of the flag."""
    bounds: dict[str, tuple[float, float]] = {
        "steps": (1, math.inf),
        "batch": (1, math.inf),
        "warmup": (0, math.inf),
        "lr": (0.0, 1.0),
        "clip": (0.0, math.inf),
        "ema": (0.0, 0.99999),
        "range_lr": (0.0, 1.0),
        "seed": (0, 2**32 - 1),
        **{f"{name}_weight": (0.0, math.inf) for name in options.weights},
    }
    values = {**vars(options), **{f"{name}_weight": weight for name, weight in options.weights.items()}}
    for name, (low, high) in bounds.items():
        value = values[name]
        if not (low <= value <= high and math.isfinite(value)) or (name in ("lr", "clip") and value == 0):
            above = f"above {low:g}" if name in ("lr", "clip") else f"at least {low:g}"
            below = "" if math.isinf(high) else f" and at most {high:g}"
            flag = "--average, --ema" if name == "ema" else f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: found {value}, expected {above}{below}")
    if options.batch % processes:
        raise UserError(
            f"--batch: found {options.batch} frames for {processes} processes, expected a multiple of {processes}"
        )


def check_weights(options: FinetuneOptions, family: Family) -> None:
    """Raises `UserError` for a weight of a loss that the family does not have."""
    for name in options.weights:
        if name not in family.loss_weights:
            raise UserError(
                f"--loss-weight: found {name!r}, expected one of {', '.join(family.loss_weights) or 'none'}: the losses of "
                f"the family {family.name}"
            )


@dataclass
class _Batch:
    """This process's frames of a step, their inputs of the plan, and the results of the plan's geometry ops."""

    tokens: list[str]
    feeds: dict[str, Any]
    geometry: dict[str, Any]


@dataclass
class _Runners:
    """Runners of the plan's steps: the float network's, and the trained network's."""

    teacher: dict[str, Runner]
    student: dict[str, Runner]


class _Source:
    """Frames of all data sets, augmented or as in the test pipeline."""

    def __init__(self, datasets: Sequence[Any], model: QuantizedModel, options: FinetuneOptions) -> None:
        self.options, self.flow = options, model.flow
        self.ops = torch_ops(model)
        self.sets = [
            model.family.augmented(dataset, model.config) if options.augment else dataset for dataset in datasets
        ]
        self.where = [(i, j) for i, dataset in enumerate(datasets) for j in range(len(dataset))]
        if len(self.where) < options.batch:
            raise UserError(f"--batch: found {options.batch}, --data has {len(self.where)} keyframes")

    def batch(self, step: int) -> _Batch:
        """This process's frames of a step, which depend only on the seed, the step and the rank. All processes together get the
        frames of a single process."""
        rank, size = place()
        epoch, position = divmod(step, len(self.where) // self.options.batch)
        order = np.random.default_rng([self.options.seed, 1, epoch]).permutation(len(self.where))
        start = position * self.options.batch
        drawn: list[Any] = []
        for k in range(rank, self.options.batch, size):
            i, j = self.where[order[start + k]]
            chosen = self.sets[i]
            if self.options.augment:
                drawn.append(chosen.draw(j, np.random.default_rng([self.options.seed, 2, step, k])))
            else:
                drawn.append(chosen[j])
        feeds = self.flow.first_feeds(drawn)  # gradients do not cross frames
        geometry: dict[str, Any] = {}
        for op in self.flow.plan.geometry:
            geometry |= self.ops[op.name]({name: feeds[name] for name in op.inputs})
        return _Batch([d.token for d in drawn], feeds, geometry)

    def ahead(self, step: int) -> Iterator[_Batch]:
        """The batches of `step` and all later steps, each drawn while the previous one is used."""
        return drawn_ahead(self.batch, step, self.options.steps)


class _State:
    """The student, its optimiser, and the rest of what a resumed run needs."""

    def __init__(self, checkpoint: Path, options: FinetuneOptions, where: torch.device) -> None:
        torch.manual_seed(options.seed)
        read = load_checkpoint(checkpoint)
        self.student, self.teacher, self.float_model = student_and_teacher(read, checkpoint)
        self.recipe = dict(read["recipe"])
        self.student.absorb_background()
        self.student.to(device=where, memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups: list[dict[str, Any]] = [{"params": list(trained_parameters(self.student).values()), "share": 1.0}]
        if options.learn_ranges:
            ranges = list(learn_ranges(self.student).values())
            groups.append({"params": ranges, "share": options.range_lr / options.lr})
        self.parameters: dict[str, nn.Parameter] = dict(self.student.parts.named_parameters())
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.0)
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()} if options.ema else None
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.recent: list[dict[str, float]] = []

    def save(self, path: Path, run: Mapping[str, Any]) -> None:
        with atomic_path(path) as temporary:
            save_plain(
                {
                    "run": dict(run),
                    "step": self.step,
                    "history": self.history,
                    "recent": self.recent,
                    "parameters": {name: p.detach() for name, p in self.parameters.items()},
                    "optimizer": self.optimizer.state_dict(),
                    "ema": self.ema,
                },
                temporary,
            )

    def load(self, path: Path, run: Mapping[str, Any]) -> None:
        fix = "remove it or choose another --out"
        with reading_left(path, "damaged, or of another version", fix):
            saved = torch.load(path, map_location="cpu", weights_only=True)
            check_same_run(path, saved["run"], run, fix)
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(saved["parameters"][name])
                    if self.ema is not None:
                        self.ema[name].copy_(saved["ema"][name])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.history, self.recent = saved["step"], saved["history"], saved["recent"]

    def update_ema(self, decay: float) -> None:
        """The average follows faster at first, so that it does not keep the first step's weights."""
        if self.ema is None:
            return
        decay = min(decay, self.step / (self.step + 10))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.ema[name].lerp_(parameter, 1 - decay)

    def settle(self) -> None:
        """The student to save: with averaged weights if there are any, and plain ranges."""
        if self.ema is not None:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.ema[name])
        settle_ranges(self.student)
        refresh_weight_ranges(self.student)
        self.student.to(device="cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]


@contextmanager
def _deferred_interrupts() -> Iterator[list[int]]:
    """Inside the block Ctrl-C and SIGTERM only append to the list, so that the run finishes a step before it stops. A second
    signal stops at once."""
    seen: list[int] = []

    def note(number: int, _: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, the only one that receives signals
        before = {}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _average(parameters: Sequence[nn.Parameter], figures: torch.Tensor) -> torch.Tensor:
    """Averages the gradients, in place, and `figures` over the processes; returns the figures' average."""
    _, size = place()
    if size == 1:
        return figures
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(g.reshape(-1) for g in gradients), figures])
    distributed.all_reduce(flat)
    flat /= size
    start = 0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = flat[start : start + gradient.numel()].view_as(gradient)
        start += gradient.numel()
    return flat[start:]


def _check_teacher(plan: Plan, tensors: Mapping[str, Any], tokens: Sequence[str]) -> None:
    """Raises `NotFiniteError` for a frame on which the float network's values are not finite."""
    first = tensors[next(iter(plan.judged.values()))[0]]
    finite = first.reshape(len(tokens), -1).isfinite().all(1)
    if not bool(finite.all()):
        token = tokens[int((~finite).nonzero()[0])]
        raise NotFiniteError(
            f"frame {token}: the float network's values are not finite; drop the frame, or fix the checkpoint"
        )


def _step(
    state: _State,
    runners: _Runners,
    batches: Iterator[_Batch],
    options: FinetuneOptions,
    where: torch.device,
    stop: bool,
) -> tuple[dict[str, float], bool]:
    """One step of the optimiser, on the next batch. Returns the losses, averaged over the processes, and whether any process
    was asked to stop.

    Raises:
        UserError: a frame that cannot be read or that the teacher cannot process, in any process; or a loss that is not
            finite.
    """
    plan, error = state.student.plan, None
    done = [op.name for op in plan.geometry]
    try:
        batch = next(batches)
        feeds = {**batch.geometry, **torch_feeds(state.student, batch.feeds)}
        with torch.no_grad():
            wanted = run(plan, runners.teacher, feeds, done=done)
        _check_teacher(plan, wanted, batch.tokens)
    except UserError as found_error:
        error = found_error
    agree(error)  # the others would wait for this process's gradients
    refresh_weight_ranges(state.student)
    found = run(plan, runners.student, feeds, done=done)
    losses = state.student.family.losses(found, wanted, len(batch.tokens))
    weights = {**state.student.family.loss_weights, **options.weights}
    total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
    state.optimizer.zero_grad(set_to_none=True)
    total.backward()
    parameters = list(state.parameters.values())
    figures = torch.stack([*(value.detach() for value in losses.values()), torch.tensor(float(stop), device=where)])
    *means, stopping = _average(parameters, figures).tolist()
    norm = nn.utils.clip_grad_norm_(parameters, options.clip)
    if not (math.isfinite(sum(means)) and bool(torch.isfinite(norm))):
        # The same in every process: these are averages.
        raise UserError(
            f"step {state.step}: the loss or its gradient is not finite; run again with a lower --lr (it was "
            f"{options.lr:g}) and another --out"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, options) * group["share"]
    state.optimizer.step()
    state.step += 1
    state.update_ema(options.ema)
    return {**dict(zip(losses, means, strict=True)), "norm": float(norm)}, stopping > 0


def _train(
    state: _State,
    runners: _Runners,
    source: _Source,
    options: FinetuneOptions,
    where: torch.device,
    save: Callable[[], None],
    log: Callable[[str], None],
) -> None:
    """Runs all remaining steps.

    Raises:
        KeyboardInterrupt: the run was interrupted; finished steps are saved.
    """
    rank, _ = place()
    saved_at = time.monotonic()
    steps = StepLog(state.history, log, state.step, options.steps, digits=4, recent=state.recent)
    with (
        _deferred_interrupts() as interrupts,
        progress_bar("training", options.steps, state.step, show=rank == 0) as done,
    ):
        batches = source.ahead(state.step)
        while state.step < options.steps:
            figures, stopping = _step(state, runners, batches, options, where, bool(interrupts))
            done(state.step, " ".join(f"{name} {value:.4f}" for name, value in figures.items()))
            steps.add(state.step, learning_rate(state.step - 1, options), figures, stopping)
            if stopping:
                save()
                raise KeyboardInterrupt
            if time.monotonic() - saved_at > options.save_seconds:
                save()
                saved_at = time.monotonic()


def _is_of(result: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether a run with this recipe wrote the checkpoint; an earlier run may have left another."""
    try:
        return bool(recipe_of(result).get("finetune") == recipe["finetune"])
    except UserError:
        return False


@one_writer("out", inside=True, lock=only_writers)
def finetune(
    checkpoint: Path,
    data: Sequence[tuple[Path, str]],
    out: Path,
    options: FinetuneOptions,
    version: str | None = None,
    log: Callable[[str], None] = print,
) -> FinetuneResult:
    """Trains the network of a PTQ checkpoint and writes `out/qat.pth`, `out/history.json` and, at times, `out/resume.pth`.

    A killed run resumes from `resume.pth` and ends with the same weights; a finished run does nothing. Under torchrun
    (inside `process_group`) the processes share each step's frames, and rank 0 writes.

    Args:
        checkpoint: from `calibrate`, or from an earlier `finetune`, whose weights continue with the same teacher.
        data: (root, split) of each data set. version: of all of them, if a root holds several.

    Raises:
        UserError: bad input, or a loss that is not finite. KeyboardInterrupt: interrupted; finished steps are saved.
    """
    rank, size = place()
    where = device()
    quiet: Callable[[str], None] = log if rank == 0 else lambda _: None
    error = None
    resume, result = out / "resume.pth", out / "qat.pth"
    try:
        check_options(options, size)
        state = _State(checkpoint, options, where)
        config = state.student.config
        check_weights(options, state.student.family)
        family = state.student.family
        datasets = [family.dataset(root, split, config, version_in(root, version)) for root, split in data]
        tokens = "".join(token for dataset in datasets for token in dataset.tokens)
        run = {
            **{name: value for name, value in asdict(options).items() if name != "save_seconds"},
            "checkpoint": sha256(checkpoint),
            "frames": hashlib.sha256(tokens.encode()).hexdigest(),
            "images": images_digest(datasets),
            "bevqat": qat.__version__,
        }
        if resume.exists():
            state.load(resume, run)
            quiet(f"{resume}: resumed at step {state.step}")
        source = _Source(datasets, state.student, options)
        reference, float_model = state.teacher, state.float_model
    except UserError as found:
        error = found
    agree(error)

    def save() -> None:
        if rank == 0:
            state.save(resume, run)

    recipe = {
        **state.recipe,
        "made": {**state.recipe.get("made", {}), "finetune": made_by()},
        "finetune": {
            **asdict(options),
            "processes": size,
            "data": [f"{root.name}:{split}" for root, split in data],
            "keyframes": len(source.where),
            "frames_sha256": run["frames"],
            "ptq_checkpoint": {"file": checkpoint.name, "sha256": run["checkpoint"]},
        },
    }
    if state.step < options.steps:
        reference.to(device=where, memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
        amp = (
            partial(torch.autocast, where.type, torch.bfloat16) if options.amp and where.type == "cuda" else nullcontext
        )
        runners = _Runners(torch_runners(reference), torch_runners(state.student, amp))
        _train(state, runners, source, options, where, save, quiet)
        save()
    elif _is_of(result, recipe) and (out / "history.json").exists():
        return FinetuneResult(result, state.history, recipe)
    state.settle()
    float_model.cpu()
    if rank == 0:
        with atomic_set(result, out / "history.json", out / "metrics.json") as stage:
            save_ptq(stage / result.name, state.student, float_model, recipe, trained=True)
            write_json(stage / "history.json", {"options": asdict(options), "history": state.history})
    return FinetuneResult(result, state.history, recipe)
