"""The training loop: seeded, resumable, with a checkpoint every few minutes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import qat
from qat.core.centerhead import Detections, decode
from qat.core.errors import UserError
from qat.core.files import atomic_path, write_json
from qat.data import NuScenesDataset
from qat.evaluate import evaluate_detections
from qat.models import CameraBEVDetector, build_model, load_checkpoint, load_state
from qat.train.augment import TrainSample, TrainSet
from qat.train.curve import draw_curve
from qat.train.losses import depth_loss, head_loss
from qat.train.targets import make_targets


@dataclass(frozen=True)
class TrainOptions:
    """steps: optimiser steps in all. decay: share of the steps at the end over which the rate falls to 0 (before
    them it is constant after `warmup` steps, so `steps` may be changed between resumed runs)."""

    steps: int = 4000
    batch: int = 2
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 200
    decay: float = 0.35
    depth_weight: float = 3.0
    ema: float = 0.998
    clip: float = 35.0
    seed: int = 0
    save_seconds: float = 120.0


def learning_rate(step: int, options: TrainOptions) -> float:
    """Linear warm-up, constant, then linear to 0 over the last `decay` of the steps."""
    rise = min(1.0, (step + 1) / options.warmup)
    fall = min(1.0, (options.steps - step) / max(1.0, options.decay * options.steps))
    return options.lr * min(rise, fall)


def save_float_checkpoint(path: str | Path, model: CameraBEVDetector, meta: Mapping[str, Any]) -> None:
    """Writes {"state_dict", "config", "meta"}: plain tensors and containers."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(path) as temporary:
        torch.save({"state_dict": state, "config": model.config, "meta": dict(meta)}, temporary)


def detect(
    model: nn.Module, dataset: NuScenesDataset, progress: Callable[[int], None] | None = None
) -> dict[str, Detections]:
    """Boxes of every sample: {token: Detections}. `model` has CameraBEVDetector's interface and a `config`."""
    head = dataset_head(model)
    device = next(model.parameters()).device
    out = {}
    with torch.inference_mode():
        for i, sample in enumerate(dataset):
            patterns = model.patterns(  # type: ignore[operator]
                sample.camera_intrinsics[None],
                sample.camera2lidar[None],
                sample.img_aug_matrix[None],
                sample.lidar_aug_matrix[None],
            )
            img, depth = torch.from_numpy(sample.img)[None].to(device), torch.from_numpy(sample.depth)[None].to(device)
            maps = model(img, depth, patterns)
            out[sample.token] = decode([{k: v.float().cpu().numpy() for k, v in task.items()} for task in maps], head)
            if progress:
                progress(i + 1)
    return out


def dataset_head(model: nn.Module) -> dict[str, Any]:
    """The head's config of a detector."""
    return model.config["model"]["heads"]["object"]  # type: ignore[index, return-value]


def _batch(
    samples: list[TrainSample], model: CameraBEVDetector, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    img = torch.from_numpy(np.stack([s.img for s in samples])).to(device)
    depth = torch.from_numpy(np.stack([s.depth for s in samples])).to(device)
    patterns = [
        model.vtransform.pattern(s.camera_intrinsics, s.camera2lidar, s.img_aug_matrix, s.lidar_aug_matrix)
        for s in samples
    ]
    return img, depth, patterns


class _State:
    """What a resumed run needs."""

    def __init__(
        self, config: Mapping[str, Any], options: TrainOptions, init: Path | None, device: torch.device
    ) -> None:
        torch.manual_seed(options.seed)
        self.model = build_model(config).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if init is not None:
            load_state(self.model, load_checkpoint(init)["state_dict"], str(init))
        self.average = copy.deepcopy(self.model).eval()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr)
        self.step = 0
        self.history: list[dict[str, float]] = []

    def save(self, path: Path) -> None:
        with atomic_path(path) as temporary:
            torch.save(
                {
                    "model": self.model.state_dict(),
                    "average": self.average.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "step": self.step,
                    "history": self.history,
                },
                temporary,
            )

    def load(self, path: Path) -> None:
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.average.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, KeyError, ValueError, EOFError) as error:
            raise UserError(
                f"{path}: does not fit this run ({str(error).splitlines()[0]}); remove it or choose another --out"
            ) from None
        self.step, self.history = saved["step"], saved["history"]

    def follow(self, ema: float) -> None:
        """Moves the average towards the model; slower as training goes on."""
        keep = min(ema, (1 + self.step) / (10 + self.step))
        own, average = self.model.state_dict(), self.average.state_dict()
        for name, value in average.items():
            if value.is_floating_point():
                value.lerp_(own[name].to(value.dtype), 1 - keep)
            else:
                value.copy_(own[name])


def train(
    config: Mapping[str, Any],
    datasets: list[NuScenesDataset],
    out: Path,
    options: TrainOptions,
    held_out: NuScenesDataset | None = None,
    init: Path | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Trains a detector and writes `out/model.pth`, `out/history.json`, `out/curve.png` and, at times, `out/resume.pth`.

    A run that was killed goes on from `resume.pth`; which samples and augmentations a step sees depends on the seed
    and the step alone. Returns the held-out metrics if `held_out` is given.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = _State(config, options, init, device)
    resume = out / "resume.pth"
    if resume.exists():
        state.load(resume)
        log(f"resumed at step {state.step} from {resume}")
    sets = [TrainSet(dataset, config) for dataset in datasets]
    where = [(i, j) for i, dataset in enumerate(sets) for j in range(len(dataset))]
    head = config["model"]["heads"]["object"]
    dbound = config["model"]["encoders"]["camera"]["vtransform"]["dbound"]
    per_epoch = max(1, len(where) // options.batch)
    saved_at = started = time.monotonic()
    first_step = state.step
    recent: list[dict[str, float]] = []
    state.model.train()
    while state.step < options.steps:
        epoch, position = divmod(state.step, per_epoch)
        order = np.random.default_rng([options.seed, 1, epoch]).permutation(len(where))
        rng = np.random.default_rng([options.seed, 2, state.step])
        chosen = [where[k] for k in order[position * options.batch : (position + 1) * options.batch]]
        samples = [sets[i].draw(j, rng) for i, j in chosen]
        img, depth, patterns = _batch(samples, state.model, device)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, options)
        depth_weights, context = state.model.lift(img, depth)
        maps = state.model.bev_head(state.model.pool(depth_weights, context, patterns))
        losses = head_loss(maps, [make_targets(s.boxes, s.labels, head) for s in samples], head)
        losses["depth"] = options.depth_weight * depth_loss(depth_weights, depth.flatten(0, 1), dbound)
        total = torch.stack(list(losses.values())).sum()
        if not bool(torch.isfinite(total)):
            raise UserError(f"step {state.step}: the loss is not finite; lower --lr and resume from {resume}")
        state.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(state.model.parameters(), options.clip)
        state.optimizer.step()
        state.step += 1
        state.follow(options.ema)
        recent.append({name: float(value.detach()) for name, value in losses.items()})
        if state.step % 25 == 0 or state.step == options.steps:
            mean = {name: float(np.mean([r[name] for r in recent])) for name in recent[0]}
            recent.clear()
            state.history.append({"step": state.step, "lr": learning_rate(state.step - 1, options), **mean})
            rate = (time.monotonic() - started) / (state.step - first_step)
            left = rate * (options.steps - state.step) / 60
            figures = " ".join(f"{name} {value:.3f}" for name, value in mean.items())
            log(f"step {state.step}/{options.steps} {figures} | {rate:.2f} s/step, {left:.0f} min left")
        if time.monotonic() - saved_at > options.save_seconds:
            state.save(resume)
            saved_at = time.monotonic()
    state.save(resume)
    meta = {"options": asdict(options), "samples": len(where), "step": state.step, "bevqat": qat.__version__}
    save_float_checkpoint(out / "model.pth", state.average, meta)
    write_json(out / "history.json", {"options": asdict(options), "history": state.history})
    draw_curve(state.history, out / "curve.png")
    if held_out is None:
        return None
    metrics = evaluate_detections(held_out, detect(state.average, held_out))
    write_json(out / "metrics.json", metrics)
    return metrics
