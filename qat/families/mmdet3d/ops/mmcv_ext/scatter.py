"""mmcv's dynamic scatter, the voxel features of dynamic voxelization, in plain torch."""

from __future__ import annotations

import torch

from qat.families.mmdet3d.ops.mmcv_ext.forms import untraced


def dynamic_point_to_voxel_forward(
    feats: torch.Tensor, coors: torch.Tensor, reduce_type: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reduces features [N,C] of points with the same cell int[N,D] by "sum", "mean" or "max".

    Returns features [V,C], cells [V,D] in ascending order, each point's voxel int32[N] (−1 where a coordinate is negative), points
    in each voxel int32[V].
    """
    untraced("dynamic_point_to_voxel_forward")
    outside = (coors < 0).any(-1)
    cells, where, counts = torch.unique(coors[~outside], dim=0, return_inverse=True, return_counts=True)
    index = where[:, None].expand(-1, feats.shape[1])
    empty = feats.new_zeros((len(cells), feats.shape[1]))
    inside = feats[~outside]
    if reduce_type == "max":
        reduced = empty.scatter_reduce(0, index, inside, "amax", include_self=False)
    else:
        reduced = empty.scatter_add(0, index, inside)
        if reduce_type == "mean":
            reduced = reduced / counts[:, None]
    of_point = torch.full((len(feats),), -1, dtype=torch.int32, device=feats.device)
    of_point[~outside] = where.int()
    return reduced, cells, of_point, counts.int()


def dynamic_point_to_voxel_backward(
    grad_feats: torch.Tensor,
    grad_reduced_feats: torch.Tensor,
    feats: torch.Tensor,
    reduced_feats: torch.Tensor,
    coors_map: torch.Tensor,
    reduce_count: torch.Tensor,
    reduce_type: str,
) -> None:
    """Writes gradients [N,C] of the points' features; of equal greatest ones the first point has it all."""
    grad_feats.zero_()
    inside = torch.nonzero(coors_map >= 0)[:, 0]
    where = coors_map[inside].long()
    if reduce_type == "max":
        index = where[:, None].expand(-1, feats.shape[1])
        number = inside[:, None].expand_as(index)
        greatest = feats[inside] == reduced_feats[where]
        none = torch.full_like(reduced_feats, len(feats), dtype=torch.int64)
        first = none.scatter_reduce(0, index, torch.where(greatest, number, len(feats)), "amin")
        found = first < len(feats)
        grad_feats.scatter_add_(0, first.clamp_max(len(feats) - 1), grad_reduced_feats * found)
        return
    gradient = grad_reduced_feats / reduce_count[:, None] if reduce_type == "mean" else grad_reduced_feats
    grad_feats[inside] = gradient[where]
