"""The training loop: seeded, resumable, with a checkpoint every few minutes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import qat
from qat.checkpoints.reading import float_weights, load_checkpoint, save_plain
from qat.core.errors import UserError
from qat.core.files import atomic_path, atomic_set, check_same_run, reading_left, sha256, write_json
from qat.core.locks import one_writer
from qat.core.progress import StepLog, counted, drawn_ahead, progress_bar
from qat.data import NuScenesDataset, images_digest
from qat.evaluate import evaluate_detections
from qat.families.bevfusion.config import need_boxes
from qat.families.bevfusion.detector import CameraBEVDetector, build_model
from qat.families.bevfusion.state import load_state
from qat.families.bevfusion.training.augment import TrainSet
from qat.families.bevfusion.training.auxiliary import PixelHead, pixel_loss, to_tensors
from qat.families.bevfusion.training.curve import draw_curve
from qat.families.bevfusion.training.features import FeatureCache
from qat.families.bevfusion.training.losses import depth_loss, head_loss
from qat.families.bevfusion.training.targets import make_targets
from qat.model.runners import detect

STAGES = ("all", "image", "bev")


@dataclass(frozen=True)
class TrainOptions:
    """steps: total optimiser steps. decay: share of the steps at the end over which the rate falls to 0 (before
    them it is constant after `warmup` steps, so `steps` may be changed between resumed runs).

    stage: "image" trains the image part (backbone, neck, depth net) on depth and on each pixel's object; "bev"
    trains the rest on the frozen image part's outputs, computed once for each of `variants` image augmentations of a
    keyframe; "all" trains the whole detector on the sum of all losses.
    """

    stage: str = "all"
    variants: int = 2
    steps: int = 4000
    batch: int = 2
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 200
    decay: float = 0.35
    depth_weight: float = 3.0
    pixel_weight: float = 1.0
    clip: float = 35.0
    seed: int = 0
    save_seconds: float = 120.0


def learning_rate(step: int, options: TrainOptions) -> float:
    """Linear warm-up, constant, then linear to 0 over the last `decay` of the steps."""
    rise = min(1.0, (step + 1) / options.warmup)
    fall = min(1.0, (options.steps - step) / max(1.0, options.decay * options.steps))
    return options.lr * min(rise, fall)


def save_float_checkpoint(
    path: str | Path, model: CameraBEVDetector, meta: Mapping[str, Any], **modules: nn.Module
) -> None:
    """Writes {"state_dict", "config", "meta"} and the state of each further module: plain tensors and containers."""

    def state(module: nn.Module) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}

    further = {name: state(module) for name, module in modules.items()}
    with atomic_path(path) as temporary:
        save_plain({"state_dict": state(model), "config": model.config, "meta": dict(meta), **further}, temporary)


class _State:
    """The state of a resumable run."""

    def __init__(
        self,
        config: Mapping[str, Any],
        options: TrainOptions,
        init: Path | None,
        device: torch.device,
        ema: bool = False,
    ) -> None:
        torch.manual_seed(options.seed)
        self.model = build_model(config).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if init is not None:
            saved = load_checkpoint(init, ema)
            if saved.get("format") == "bevqat-ptq":
                raise UserError(f"{init}: found a quantized checkpoint, expected a float one for --init; use that")
            load_state(self.model, float_weights(saved, init), str(init))
        self.pixels = PixelHead(self.model.vtransform.C, len(config["object_classes"])).to(device)
        if init is not None and "pixel_head" in saved:
            self.pixels.load_state_dict(saved["pixel_head"])
        trained = [p for p in self.model.parameters() if p.requires_grad] + list(self.pixels.parameters())
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.recent: list[dict[str, float]] = []

    def save(self, path: Path, run: Mapping[str, Any]) -> None:
        with atomic_path(path) as temporary:
            save_plain(
                {
                    "run": dict(run),
                    "model": self.model.state_dict(),
                    "pixel_head": self.pixels.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "step": self.step,
                    "history": self.history,
                    "recent": self.recent,
                },
                temporary,
            )

    def load(self, path: Path, run: Mapping[str, Any]) -> None:
        fix = "remove it or choose another --out"
        with reading_left(path, "does not fit this run", fix):
            saved = torch.load(path, map_location="cpu", weights_only=True)
            check_same_run(path, saved.get("run", {}), run, fix)
            self.model.load_state_dict(saved["model"])
            self.pixels.load_state_dict(saved["pixel_head"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.history, self.recent = saved["step"], saved["history"], saved["recent"]


def _run_of(
    config: Mapping[str, Any],
    datasets: Sequence[NuScenesDataset],
    options: TrainOptions,
    init: Path | None,
    ema: bool = False,
) -> dict[str, Any]:
    """Settings that must be equal in a resumed run and the killed one. Steps and rate may differ."""
    free = ("steps", "lr", "decay", "warmup", "save_seconds")
    tokens = "".join(token for dataset in datasets for token in dataset.tokens)
    return {
        **{name: value for name, value in asdict(options).items() if name not in free},
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "init": None if init is None else sha256(init) + (" ema" if ema else ""),
        "frames": hashlib.sha256(tokens.encode()).hexdigest(),
        "images": images_digest(datasets),
        "bevqat": qat.__version__,
    }


def _steps_of(path: Path) -> int | None:
    """The number of steps of a checkpoint; None if there is no checkpoint or it does not record them."""
    try:
        return load_checkpoint(path)["meta"]["step"] if path.exists() else None
    except (UserError, KeyError, TypeError):
        return None


class _Drawn:
    """Samples drawn again for each step, with their pooling patterns."""

    def __init__(self, sets: list[TrainSet], model: CameraBEVDetector) -> None:
        self.sets, self.model = sets, model
        self.where = [(i, j) for i, dataset in enumerate(sets) for j in range(len(dataset))]

    def __len__(self) -> int:
        return len(self.where)

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        i, j = self.where[index]
        sample = self.sets[i].draw(j, rng)
        matrices = (sample.camera_intrinsics, sample.camera2lidar, sample.img_aug_matrix, sample.lidar_aug_matrix)
        return {**vars(sample), "pattern": self.model.vtransform.pattern(*matrices)}


def _ahead(source: _Drawn | FeatureCache, options: TrainOptions, step: int) -> Iterator[list[dict[str, Any]]]:
    """The batches of steps `step`, `step` + 1, …, each drawn while the previous one is used. A step's batch
    depends only on the seed and the step."""
    per_epoch = max(1, len(source) // options.batch)

    def draw(step: int) -> list[dict[str, Any]]:
        epoch, position = divmod(step, per_epoch)
        order = np.random.default_rng([options.seed, 1, epoch]).permutation(len(source))
        rng = np.random.default_rng([options.seed, 2, step])
        return [source.draw(k, rng) for k in order[position * options.batch : (position + 1) * options.batch]]

    return drawn_ahead(draw, step, options.steps)


def _losses(
    state: _State,
    drawn: list[dict[str, Any]],
    head: Mapping[str, Any],
    config: Mapping[str, Any],
    options: TrainOptions,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The losses of one batch, weighted."""
    model = state.model
    losses: dict[str, torch.Tensor] = {}
    if options.stage == "bev":
        depth_weights, context = (torch.cat([d[name] for d in drawn]).float() for name in ("weights", "context"))
    else:
        img, depth = (torch.from_numpy(np.stack([d[name] for d in drawn])).to(device) for name in ("img", "depth"))
        depth_weights, context = model.lift(img, depth)
        dbound = config["model"]["encoders"]["camera"]["vtransform"]["dbound"]
        losses["depth"] = options.depth_weight * depth_loss(depth_weights, depth.flatten(0, 1), dbound)
        shown = pixel_loss(state.pixels(context), to_tensors([d["pixels"] for d in drawn], device))
        losses.update({name: options.pixel_weight * value for name, value in shown.items()})
    if options.stage != "image":
        maps = model.bev_head(model.pool(depth_weights, context, [d["pattern"] for d in drawn]))
        losses.update(head_loss(maps, [make_targets(d["boxes"], d["labels"], head) for d in drawn], head))
    return losses


@one_writer("out", inside=True)
def train(
    config: Mapping[str, Any],
    datasets: list[NuScenesDataset],
    out: Path,
    options: TrainOptions,
    held_out: NuScenesDataset | None = None,
    init: Path | None = None,
    log: Callable[[str], None] = print,
    ema: bool = False,
) -> dict[str, Any] | None:
    """Trains a detector and writes `out/model.pth`, `out/history.json`, `out/curve.png` and, at times, `out/resume.pth`.

    A killed run resumes from `resume.pth`; a step's samples and augmentations depend only on the seed and the step. Returns the
    held-out metrics if `held_out` is given. init: a float checkpoint to start from; ema: from its averaged weights.
    """
    if options.stage not in STAGES:
        raise UserError(f"--stage: found {options.stage!r}, expected one of {', '.join(STAGES)}")
    need_boxes(config, "train", "use the whole detector's config")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = _State(config, options, init, device, ema)
    resume = out / "resume.pth"
    run = _run_of(config, datasets, options, init, ema)
    if resume.exists():
        state.load(resume, run)
        log(f"resumed at step {state.step} from {resume}")
    began = state.step
    sets = [TrainSet(dataset, config) for dataset in datasets]
    head = config["model"]["heads"]["object"]
    samples = sum(len(dataset) for dataset in sets)
    source: _Drawn | FeatureCache = _Drawn(sets, state.model)
    if options.stage == "bev" and state.step < options.steps:
        state.model.eval()
        source = FeatureCache(state.model, sets, options.variants, options.seed, device, log)
    saved_at = time.monotonic()
    steps = StepLog(state.history, log, state.step, options.steps, digits=3, recent=state.recent)
    state.model.train()
    left = _ahead(source, options, state.step)
    for drawn in counted("training", left, options.steps, state.step):
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, options)
        losses = _losses(state, drawn, head, config, options, device)
        total = torch.stack(list(losses.values())).sum()
        if not bool(torch.isfinite(total)):
            raise UserError(f"step {state.step}: the loss is not finite; lower --lr and resume from {resume}")
        state.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(state.model.parameters(), options.clip)
        state.optimizer.step()
        state.step += 1
        figures = {name: float(value.detach()) for name, value in losses.items()}
        steps.add(state.step, learning_rate(state.step - 1, options), figures)
        if time.monotonic() - saved_at > options.save_seconds:
            state.save(resume, run)
            saved_at = time.monotonic()
    state.save(resume, run)
    meta = {"options": asdict(options), "samples": samples, "step": state.step, "bevqat": qat.__version__}
    # Figures of an earlier model do not apply to this one; those of a run that had already finished stay.
    figures_of = () if _steps_of(out / "model.pth") == began == options.steps else (out / "metrics.json",)
    with atomic_set(out / "model.pth", out / "history.json", out / "curve.png", *figures_of) as stage:
        save_float_checkpoint(stage / "model.pth", state.model, meta, pixel_head=state.pixels)
        write_json(stage / "history.json", {"options": asdict(options), "history": state.history})
        draw_curve(state.history, stage / "curve.png")
    if held_out is None or options.stage == "image":
        return None
    with progress_bar("held out", len(held_out)) as done:
        metrics = evaluate_detections(held_out, detect(state.model.eval(), held_out, done))
    write_json(out / "metrics.json", metrics)
    return metrics
