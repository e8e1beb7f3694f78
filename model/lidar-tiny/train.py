"""Trains lidar-tiny on nuScenes-format keyframes with mmdet3d's own modules and losses; goes on where a killed run stopped.

python model/lidar-tiny/train.py DATA:SPLIT OUT.pth

The same options give the same weights, up to rounding, however often the run was interrupted. Beside OUT.pth are the merged points of all
keyframes (OUT.points.npy, OUT.boxes.npz) and OUT.resume. One thread: set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qat.boxes.conventions import convert
from qat.families.mmdet3d.config import read
from qat.families.mmdet3d.frames import keyframes
from qat.families.mmdet3d.library import load
from qat.families.mmdet3d.network import PillarNet
from qat.families.mmdet3d.training import encoded, fit
from qat.model.opening import read_config

HERE = Path(__file__).resolve().parent
MARGIN = 10.0  # metres beyond the range, from where a turn may bring points into it
TURN, SCALE = np.pi / 8, 0.05


def merged(frames: Any, out: Path) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """All keyframes' points with their sweeps, one after another in a file: float32[M,5]; and of each keyframe the rows [2] there,
    boxes float32[K,9] in mmdet3d's convention and labels int64[K], of objects with a point."""
    points, index = out.with_suffix(".points.npy"), out.with_suffix(".boxes.npz")
    if not index.exists():
        counts, boxes, labels = [], [], []
        raw = points.with_suffix(".tmp")
        with raw.open("wb") as file:
            for k in range(len(frames)):
                frame = frames[k]
                seen = frame.gt_points != 0
                counts.append(len(frame.points))
                boxes.append(convert(frame.gt_boxes[seen], "bevfusion", "mmdet3d"))
                labels.append(frame.gt_labels[seen])
                file.write(frame.points.astype(np.float32).tobytes())
                if (k + 1) % 500 == 0:
                    print(f"merged {k + 1} of {len(frames)} keyframes", flush=True)
        raw.rename(points)
        np.savez(
            index.with_suffix(".tmp.npz"),
            counts=counts,
            objects=[len(found) for found in labels],
            boxes=np.concatenate(boxes),
            labels=np.concatenate(labels),
        )
        index.with_suffix(".tmp.npz").rename(index)
    saved = np.load(index)
    if len(saved["counts"]) != len(frames):
        raise SystemExit(f"{index}: found {len(saved['counts'])} keyframes, expected {len(frames)}; remove it")
    ends, places = np.cumsum(saved["counts"]), np.cumsum(saved["objects"])[:-1]
    rows = np.stack([ends - saved["counts"], ends], 1)
    everything = np.memmap(points, np.float32, "r").reshape(-1, 5)
    return everything, list(rows), np.split(saved["boxes"], places), np.split(saved["labels"], places)


def augmented(points: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Flips along both axes at once or none, turns by up to 22.5°, scales by up to 5 %.

    A flip along one axis would make traffic keep left, and with it take away what shows which end of a parked car is its front.

    points: float32[M,≥3]. boxes: float32[K,9] in mmdet3d's convention, velocities last.
    """
    points, boxes = points.copy(), boxes.copy()
    angle, scale = rng.uniform(-TURN, TURN) + np.pi * rng.integers(2), rng.uniform(1 - SCALE, 1 + SCALE)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], np.float32)
    points[:, :2] = points[:, :2] @ turn
    boxes[:, :2], boxes[:, 7:9] = boxes[:, :2] @ turn, boxes[:, 7:9] @ turn
    boxes[:, 6] += angle
    points[:, :3] *= scale
    boxes[:, :6] *= scale
    boxes[:, 7:9] *= scale
    return points, boxes


def instances(boxes: np.ndarray, labels: np.ndarray, settings: Mapping[str, Any]) -> Any:
    """A keyframe's objects as mmdet3d's head takes them, of those whose centre is in range."""
    from mmdet3d.structures import LiDARInstance3DBoxes
    from mmengine.structures import InstanceData

    low, high = np.asarray(settings["voxel"]["range"]).reshape(2, 3)[:, :2]
    inside = ((boxes[:, :2] >= low) & (boxes[:, :2] < high)).all(1)
    return InstanceData(
        bboxes_3d=LiDARInstance3DBoxes(torch.from_numpy(boxes[inside].astype(np.float32)), box_dim=9),
        labels_3d=torch.from_numpy(labels[inside]),
    )


def step_loss(network: PillarNet, canvas: torch.Tensor, truth: list[Any], half: bool) -> dict[str, torch.Tensor]:
    """mmdet3d's losses of a batch; convolutions in bfloat16 if `half`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        tasks = network.pts_bbox_head(network.pts_neck(network.pts_backbone(canvas)))
    tasks = tuple([{name: value.float() for name, value in maps.items()} for maps in task] for task in tasks)
    losses: dict[str, torch.Tensor] = network.pts_bbox_head.loss_by_feat(tasks, truth)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--cycle", type=int, default=4000, help="steps of the learning rate's cycle")
    parser.add_argument("--cool", type=int, default=2050, help="step from which the rate falls to 0 at --steps instead")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--float32", action="store_true", help="no bfloat16, for CPUs without it")
    args = parser.parse_args()
    load()
    from mmengine.config import ConfigDict

    torch.set_num_threads(1)
    family, described = read_config(HERE / "config.py")
    settings = family.settings(described)
    low, high = np.asarray(settings["voxel"]["range"]).reshape(2, 3)
    wide = [*(low[:2] - MARGIN), low[2], *(high[:2] + MARGIN), high[2]]
    root, _, split = args.data.rpartition(":")
    frames = keyframes(Path(root), split, {**settings, "voxel": {**settings["voxel"], "range": wide}}, None, None)
    everything, rows, boxes, labels = merged(frames, args.out)

    network = family.random(described, 0).train()
    assert isinstance(network, PillarNet)
    head = network.pts_bbox_head
    head.train_cfg = ConfigDict(read(HERE / "config.py").model.train_cfg.pts)
    torch.nn.init.constant_(head.task_heads[0].heatmap[-1].bias, -2.19)

    def losses(chosen: Sequence[int], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        clouds, truth = [], []
        for k in chosen:
            first, last = rows[k]
            points, moved = augmented(everything[first:last], boxes[k], rng)
            clouds.append(points)
            truth.append(instances(moved, labels[k], settings))
        return step_loss(network, encoded(network, clouds, settings), truth, not args.float32)

    fit(network, args.out, len(frames), losses, args.steps, args.batch, args.lr, args.cycle, args.cool)


if __name__ == "__main__":
    main()
