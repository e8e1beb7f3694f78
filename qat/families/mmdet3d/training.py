"""What the training scripts of pillar detectors share (model/*/train.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qat.families.mmdet3d.network import PillarNet
from qat.families.mmdet3d.ops.voxels import voxelize
from qat.families.mmdet3d.pillars import decorate, grid_of

SAVED = 50  # steps between two resume files
WIDTHS = (2, 4, 8, 16)  # points of a pillar that are computed together, if it has fewer


def encoded(network: PillarNet, clouds: Sequence[np.ndarray], settings: Mapping[str, Any]) -> torch.Tensor:
    """Clouds float32[M,C] on the grid: float32[B,C,ny,nx], by the network's own PillarFeatureNet of one layer.

    Pillars of few points are not padded to the full width, which most of the time would be spent on; each has at least one empty place, as
    in mmdet3d, unless it is full. So batch norm sees fewer zeros than in mmdet3d's training; its running statistics fit either.
    """
    voxel = settings["voxel"]
    found = [voxelize(c, voxel["size"], voxel["range"], voxel["max_points"], voxel["max_voxels"]) for c in clouds]
    voxels, cells, counts = (np.concatenate([part[i] for part in found]) for i in range(3))
    number = np.repeat(np.arange(len(clouds)), [len(part[1]) for part in found])
    layer = network.voxel_encoder_layer()
    group = np.digitize(counts, WIDTHS)
    order, features = [], []
    for g, width in enumerate((*WIDTHS, voxel["max_points"])):
        rows = np.flatnonzero(group == g)
        order.append(rows)
        features.append(torch.from_numpy(decorate(voxels[rows, :width], counts[rows], cells[rows], settings)))
    x = torch.cat([part.flatten(0, 1) for part in features])
    x = torch.relu(layer.norm(layer.linear(x)))
    widest, begin = [], 0
    for part in features:
        n, width, _ = part.shape
        widest.append(x[begin : begin + n * width].view(n, width, x.shape[1]).amax(1))
        begin += n * width
    at = np.concatenate(order)
    ny, nx = grid_of(settings)
    flat = (number[at] * ny + cells[at, 1]) * nx + cells[at, 2]
    filled = torch.cat(widest)
    canvas = filled.new_zeros(len(clouds) * ny * nx, filled.shape[1])
    canvas = canvas.index_copy(0, torch.from_numpy(flat.astype(np.int64)), filled)
    return canvas.view(len(clouds), ny, nx, -1).permute(0, 3, 1, 2)


def half_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights to save: matrices and convolutions in half precision, vectors as they are."""
    return {
        name: value.contiguous().half() if value.dim() > 1 else value for name, value in network.state_dict().items()
    }


def fit(
    network: nn.Module,
    out: Path,
    count: int,
    losses_of: Callable[[Sequence[int], np.random.Generator], Mapping[str, torch.Tensor]],
    steps: int,
    batch: int,
    lr: float,
    cycle: int | None = None,
    cool: int | None = None,
    every: int = SAVED,
) -> None:
    """Trains with AdamW and writes `out`, weights in half precision; goes on from out.resume, where a run was stopped.

    Args:
        count: frames, drawn in another order every epoch. losses_of: of the frames of a step, whose random numbers come with them.
        cycle: steps of the learning rate's cycle up to `lr`, None for `steps`. cool: the step from which the rate falls to 0 at `steps`
            instead. every: steps between two resume files.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, cycle or steps, pct_start=0.25)
    resume, begin = out.with_suffix(".resume"), 0
    if resume.exists():
        saved = torch.load(resume, weights_only=False)
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        begin = saved["step"]
        print(f"goes on at step {begin}", flush=True)
    begun, recent = time.time(), []
    for step in range(begin, steps):
        epoch, place = divmod(step * batch, count // batch * batch)
        order = np.random.default_rng([1, epoch]).permutation(count)
        losses = losses_of(order[place : place + batch].tolist(), np.random.default_rng([2, step]))
        total: torch.Tensor = sum(losses.values())  # type: ignore[assignment]
        optimizer.zero_grad()
        total.backward()
        if cool is not None and step >= cool:
            optimizer.param_groups[0]["lr"] = schedule.get_last_lr()[0] * (steps - step) / (steps - cool)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 35)
        optimizer.step()
        schedule.step()
        recent.append([float(value.detach()) for value in losses.values()])
        if (step + 1) % 25 == 0:
            pace = (time.time() - begun) / len(recent)
            parts = zip(losses, np.mean(recent[-25:], 0), strict=True)
            print(f"step {step + 1}: {', '.join(f'{n} {v:.3f}' for n, v in parts)}, {pace:.2f} s a step", flush=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            saved = {
                "model": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step + 1,
            }
            torch.save(saved, resume.with_suffix(".tmp"))
            resume.with_suffix(".tmp").rename(resume)
    torch.save({"state_dict": half_weights(network), "meta": {"mmdet3d_version": "1.4.0", "steps": steps}}, out)
