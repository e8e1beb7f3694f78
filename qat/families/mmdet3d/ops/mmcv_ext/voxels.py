"""mmcv's voxelization: on the host, whatever the device (a cloud is small, and the first points of a cell stay the first)."""

from __future__ import annotations

import torch

from qat.families.mmdet3d.ops.mmcv_ext.forms import untraced
from qat.families.mmdet3d.ops.voxels import point_cells, voxelize


def dynamic_voxelize_forward(
    points: torch.Tensor, voxel_size: torch.Tensor, coors_range: torch.Tensor, coors: torch.Tensor, **options: int
) -> None:
    """Writes each point's cell (z, y, x) into int32[N,3], −1 for points that lie in none."""
    untraced("dynamic_voxelize_forward")
    coors.copy_(torch.from_numpy(point_cells(points.detach().cpu().numpy(), voxel_size.tolist(), coors_range.tolist())))


def hard_voxelize_forward(
    points: torch.Tensor,
    voxel_size: torch.Tensor,
    coors_range: torch.Tensor,
    voxels: torch.Tensor,
    coors: torch.Tensor,
    num_points_per_voxel: torch.Tensor,
    voxel_num: torch.Tensor,
    *,
    max_points: int,
    max_voxels: int,
    **options: int,
) -> None:
    """Writes voxels [V,P,C], their cells int32[V,3] and points in each int32[V], and how many of the V rows there are.

    Deterministic, whatever is asked for.
    """
    untraced("hard_voxelize_forward")
    cloud = points.detach().cpu().numpy()
    found = voxelize(cloud, voxel_size.tolist(), coors_range.tolist(), max_points, max_voxels)
    for array, out in zip(found, (voxels, coors, num_points_per_voxel), strict=True):
        out[: len(array)].copy_(torch.from_numpy(array))
    voxel_num.fill_(len(found[0]))
