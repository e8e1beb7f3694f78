"""Trains pointpillars-tiny on data in KITTI's form with mmdet3d's own modules and losses; goes on where a killed run stopped.

python model/pointpillars-tiny/train.py DATA:SPLIT OUT.pth --steps 3000

The same options give the same weights, up to rounding, however often the run was interrupted. Beside OUT.pth is OUT.resume. One thread: set
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qat.families.mmdet3d.config import read
from qat.families.mmdet3d.inputs import read_info_file
from qat.families.mmdet3d.library import load
from qat.families.mmdet3d.metrics.kitti_annos import CAMERA, camera_to_lidar, truth_annos
from qat.families.mmdet3d.network import PillarNet
from qat.families.mmdet3d.training import SAVED, encoded, fit
from qat.model.opening import read_config

HERE = Path(__file__).resolve().parent
# A pillar's features are relative to it, so what a part of the grid learns holds on all of it; this one takes two thirds of the time.
NEAR, FAR = (0, -22.4), (51.2, 22.4)
TURN, SCALE = np.pi / 16, 0.05


def frames_of(root: Path, split: str, classes: list[str]) -> list[tuple[Path, np.ndarray, np.ndarray]]:
    """Each frame's points file (of what the camera sees), boxes float32[K,7] in mmdet3d's lidar convention and labels int64[K]."""
    infos = read_info_file(root / f"kitti_infos_{split}.pkl")
    frames = []
    for record, anno in zip(infos["data_list"], truth_annos(infos), strict=True):
        kept = np.isin(anno["name"], classes)
        boxes = np.concatenate([anno["location"], anno["dimensions"], anno["rotation_y"][:, None]], 1)[kept]
        lidar = camera_to_lidar(boxes, np.array(record["images"][CAMERA]["lidar2cam"])).astype(np.float32)
        labels = np.array([classes.index(name) for name in anno["name"][kept]], np.int64)
        frames.append((root / "training/velodyne_reduced" / record["lidar_points"]["lidar_path"], lidar, labels))
    return frames


def augmented(points: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Turns by up to 11.25°, scales by up to 5 %. points: float32[M,≥3]. boxes: float32[K,7] in mmdet3d's convention."""
    points, boxes = points.copy(), boxes.copy()
    angle, scale = rng.uniform(-TURN, TURN), rng.uniform(1 - SCALE, 1 + SCALE)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], np.float32)
    points[:, :2] = points[:, :2] @ turn
    boxes[:, :2] = boxes[:, :2] @ turn
    boxes[:, 6] += angle
    points[:, :3] *= scale
    boxes[:, :6] *= scale
    return points, boxes


def instances(boxes: np.ndarray, labels: np.ndarray, settings: Mapping[str, Any]) -> Any:
    """A frame's objects as mmdet3d's head takes them, of those whose centre is in range."""
    from mmdet3d.structures import LiDARInstance3DBoxes
    from mmengine.structures import InstanceData

    low, high = np.asarray(settings["voxel"]["range"]).reshape(2, 3)[:, :2]
    inside = ((boxes[:, :2] >= low) & (boxes[:, :2] < high)).all(1)
    return InstanceData(
        bboxes_3d=LiDARInstance3DBoxes(torch.from_numpy(boxes[inside])), labels_3d=torch.from_numpy(labels[inside])
    )


def prepare(network: PillarNet) -> None:
    """The head's targets, and its layers as mmdet3d begins with them: scores of 0.01."""
    from mmengine.config import ConfigDict

    head = network.bbox_head
    head.train_cfg = ConfigDict(read(HERE / "config.py").model.train_cfg)
    head._init_assigner_sampler()
    random = torch.Generator().manual_seed(0)
    for layer in (head.conv_cls, head.conv_reg, head.conv_dir_cls):
        torch.nn.init.normal_(layer.weight, std=0.01, generator=random)
    torch.nn.init.constant_(head.conv_cls.bias, -4.6)


def cropped(described: Mapping[str, Any]) -> dict[str, Any]:
    """The checked config with the part of the grid between NEAR and FAR (x, y in metres)."""
    model = copy.deepcopy(described["model"])
    encoder = model["voxel_encoder"]
    for ranges in (
        [model["data_preprocessor"]["voxel_layer"]["point_cloud_range"], encoder["point_cloud_range"]],
        model["bbox_head"]["anchor_generator"]["ranges"],
    ):
        for each in ranges:
            each[:2], each[3:5] = NEAR, FAR
    model["middle_encoder"]["output_shape"] = [round((FAR[n] - NEAR[n]) / encoder["voxel_size"][n]) for n in (1, 0)]
    return {**described, "model": model}


def step_loss(network: PillarNet, canvas: torch.Tensor, truth: list[Any], half: bool) -> dict[str, torch.Tensor]:
    """mmdet3d's losses of a batch; convolutions in bfloat16 if `half`."""
    from mmdet3d.structures import LiDARInstance3DBoxes

    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        maps = network.bbox_head(network.neck(network.backbone(canvas)))
    maps = tuple([level.float() for level in kind] for kind in maps)
    losses = network.bbox_head.loss_by_feat(*maps, truth, [{"box_type_3d": LiDARInstance3DBoxes}] * len(truth))
    return {name: sum(levels) for name, levels in losses.items()}  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--float32", action="store_true", help="no bfloat16, for CPUs without it")
    args = parser.parse_args()
    load()
    torch.set_num_threads(1)
    family, described = read_config(HERE / "config.py")
    described = cropped(described)
    settings = family.settings(described)
    root, _, split = args.data.rpartition(":")
    frames = frames_of(Path(root), split, settings["classes"])
    network = family.random(described, 0).train()
    assert isinstance(network, PillarNet)
    prepare(network)

    def losses(chosen: Sequence[int], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        clouds, truth = [], []
        for k in chosen:
            path, boxes, labels = frames[k]
            points, moved = augmented(np.fromfile(path, np.float32).reshape(-1, 4), boxes, rng)
            clouds.append(points)
            truth.append(instances(moved, labels, settings))
        return step_loss(network, encoded(network, clouds, settings), truth, not args.float32)

    fit(network, args.out, len(frames), losses, args.steps, args.batch, args.lr, every=SAVED)


if __name__ == "__main__":
    main()
