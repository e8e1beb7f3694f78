"""What the training scripts of pillar detectors share (model/*/train.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from qat.families.mmdet3d.network import PillarNet
from qat.families.mmdet3d.ops.voxels import voxelize
from qat.families.mmdet3d.pillars import decorate, grid_of

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
