"""mmcv's pooling of points in proposals (Part-A2, PointRCNN): which points is found on the host."""

from __future__ import annotations

import torch

from qat.families.mmdet3d.ops import rois as host
from qat.families.mmdet3d.ops.mmcv_ext.forms import untraced


def roiaware_pool3d_forward(
    rois: torch.Tensor,
    pts: torch.Tensor,
    pts_feature: torch.Tensor,
    argmax: torch.Tensor,
    pts_idx_of_voxels: torch.Tensor,
    pooled_features: torch.Tensor,
    pool_method: int,
) -> None:
    """Writes the features [N,C] of the points [N,3] in each cell of each roi [R,7], greatest (0) or mean (1), into [R,X,Y,Z,C].

    And what the gradient needs: which points each cell holds, int32[R,X,Y,Z,1+P], and whose the greatest are, int32[R,X,Y,Z,C].
    """
    untraced("roiaware_pool3d_forward")
    _, x, y, z, room = pts_idx_of_voxels.shape
    held = host.points_of_cells(pts.detach().cpu().numpy(), rois.detach().cpu().numpy(), (x, y, z), room)
    pooled, greatest = host.pool_cells(pts_feature.detach().cpu().numpy(), held, pool_method == 1)
    pts_idx_of_voxels.copy_(torch.from_numpy(held))
    pooled_features.copy_(torch.from_numpy(pooled))
    argmax.copy_(torch.from_numpy(greatest))


def roiaware_pool3d_backward(
    pts_idx_of_voxels: torch.Tensor,
    argmax: torch.Tensor,
    grad_out: torch.Tensor,
    grad_in: torch.Tensor,
    pool_method: int,
) -> None:
    """Adds gradients [R,X,Y,Z,C] to the features [N,C] that were pooled."""
    channels = grad_in.shape[1]
    if pool_method == 0:
        owner = argmax.long().reshape(-1, channels)
        gradient = grad_out.reshape(-1, channels) * (owner >= 0)
        grad_in.scatter_add_(0, owner.clamp_min(0), gradient)
        return
    held = pts_idx_of_voxels.long().reshape(-1, pts_idx_of_voxels.shape[-1])
    count = held[:, :1]
    cell, slot = torch.nonzero(torch.arange(held.shape[1] - 1, device=held.device) < count, as_tuple=True)
    grad_in.index_add_(0, held[cell, slot + 1], (grad_out.reshape(-1, channels) / count.clamp_min(1))[cell])


def roipoint_pool3d_forward(
    xyz: torch.Tensor,
    boxes3d: torch.Tensor,
    pts_feature: torch.Tensor,
    pooled_features: torch.Tensor,
    pooled_empty_flag: torch.Tensor,
) -> None:
    """Writes xyz and features [B,N,3], [B,N,C] of the first S points in each box [B,M,7] into [B,M,S,3+C], and 1 into int32[B,M]
    where a box has none."""
    untraced("roipoint_pool3d_forward")
    count = pooled_features.shape[2]
    for sample, (cloud, boxes) in enumerate(zip(xyz.detach(), boxes3d.detach(), strict=True)):
        at, empty = host.sample_in_boxes(cloud.cpu().numpy(), boxes.cpu().numpy(), count)
        rows, none = torch.from_numpy(at).to(xyz.device), torch.from_numpy(empty).to(xyz.device)
        pooled_features[sample] = torch.cat([cloud[rows], pts_feature[sample][rows]], -1) * ~none[:, None, None]
        pooled_empty_flag[sample] = none
