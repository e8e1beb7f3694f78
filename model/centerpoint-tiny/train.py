"""Trains centerpoint-tiny on nuScenes-format keyframes with mmdet3d's own losses; goes on where a killed run stopped.

python model/centerpoint-tiny/train.py DATA:SPLIT OUT.pth --steps 3000
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from qat.boxes.conventions import convert
from qat.families.mmdet3d.config import read
from qat.families.mmdet3d.frames import keyframes
from qat.families.mmdet3d.library import load
from qat.families.mmdet3d.network import PillarNet
from qat.families.mmdet3d.pillars import batch_of_pillars, grid_of
from qat.model.opening import read_config

HERE = Path(__file__).resolve().parent


def augmented(points: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Flips along x and y, turns by up to 22.5°, scales by up to 5 %. boxes: mmdet3d's convention, velocities last."""
    points, boxes = points.copy(), boxes.copy()
    for axis in (0, 1):
        if rng.random() < 0.5:
            points[:, axis] *= -1
            boxes[:, [axis, 7 + axis]] *= -1
            boxes[:, 6] = np.pi - boxes[:, 6] if axis == 0 else -boxes[:, 6]
    angle, scale = rng.uniform(-np.pi / 8, np.pi / 8), rng.uniform(0.95, 1.05)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], np.float32)
    points[:, :2] = points[:, :2] @ turn
    boxes[:, :2], boxes[:, 7:9] = boxes[:, :2] @ turn, boxes[:, 7:9] @ turn
    boxes[:, 6] += angle
    points[:, :3] *= scale
    boxes[:, :6] *= scale
    boxes[:, 7:9] *= scale
    return points, boxes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=4e-3)
    args = parser.parse_args()
    load()
    from mmdet3d.registry import MODELS
    from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes
    from mmengine.config import ConfigDict
    from mmengine.structures import InstanceData

    family, described = read_config(HERE / "config.py")
    settings = family.settings(described)
    root, _, split = args.data.rpartition(":")
    frames = keyframes(Path(root), split, settings, None, None)
    torch.manual_seed(0)
    network = family.random(described, 0).train()
    assert isinstance(network, PillarNet)
    raw = read(HERE / "config.py").model
    head_config = ConfigDict(raw.pts_bbox_head.to_dict(), train_cfg=raw.train_cfg.pts, test_cfg=raw.test_cfg.pts)
    criterion = MODELS.build(head_config)
    network.pts_bbox_head.train_cfg = criterion.train_cfg
    torch.nn.init.constant_(network.pts_bbox_head.task_heads[0].heatmap[-1].bias, -2.19)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.3)
    resume, begin = args.out.with_suffix(".resume"), 0
    if resume.exists():
        saved = torch.load(resume, weights_only=False)
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        begin = saved["step"]
    cache = {}
    grid, begun, recent = grid_of(settings), time.time(), []
    for step in range(begin, args.steps):
        epoch, place = divmod(step * args.batch, len(frames) // args.batch * args.batch)
        order = np.random.default_rng([1, epoch]).permutation(len(frames))
        rng = np.random.default_rng([2, step])
        rows, samples = [], []
        for n, k in enumerate(order[place : place + args.batch]):
            if k not in cache:
                frame = frames[int(k)]
                seen = frame.gt_points != 0
                cache[k] = frame.points, convert(frame.gt_boxes[seen], "bevfusion", "mmdet3d"), frame.gt_labels[seen]
            points, boxes, labels = cache[k]
            points, boxes = augmented(points, boxes, rng)
            rows.append(np.concatenate([np.full((len(points), 1), n, np.float32), points], 1))
            inside = (np.abs(boxes[:, :2]) < 51.2).all(1)
            sample = Det3DDataSample()
            sample.gt_instances_3d = InstanceData(
                bboxes_3d=LiDARInstance3DBoxes(torch.from_numpy(boxes[inside].astype(np.float32)), box_dim=9),
                labels_3d=torch.from_numpy(labels[inside]),
            )
            samples.append(sample)
        features, cells, _ = batch_of_pillars(np.concatenate(rows).astype(np.float32), settings)
        pillars = network.encode(torch.from_numpy(features))
        x = network.pts_neck(network.pts_backbone(network.scatter(pillars, torch.from_numpy(cells), grid)))
        losses = network.pts_bbox_head.loss(x, samples)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 35)
        optimizer.step()
        schedule.step()
        recent.append(float(total.detach()))
        if (step + 1) % 25 == 0:
            print(
                f"step {step + 1}: loss {np.mean(recent[-25:]):.3f}, {(time.time() - begun) / len(recent):.2f} s a step",
                flush=True,
            )
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            saved = {
                "model": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step + 1,
            }
            torch.save(saved, resume.with_suffix(".tmp"))
            resume.with_suffix(".tmp").rename(resume)
    torch.save(
        {"state_dict": network.state_dict(), "meta": {"mmdet3d_version": "1.4.0", "steps": args.steps}}, args.out
    )


if __name__ == "__main__":
    main()
