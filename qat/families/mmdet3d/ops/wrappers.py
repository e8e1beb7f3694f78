"""mmcv's Python wrappers that allocate on CUDA, or ask for the current GPU, whatever they are given: the same for any device.

And one that uses torch.cdist, which ONNX has not.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch


def rebind() -> None:
    """Puts ours in the place of mmcv's, wherever mmcv and mmdet3d hold them by name."""
    # importlib: `mmcv.ops` has functions under the names of these modules.
    sampling = importlib.import_module("mmcv.ops.furthest_point_sample")
    neighbours = importlib.import_module("mmcv.ops.knn")
    containment = importlib.import_module("mmcv.ops.points_in_boxes")
    sampling.FurthestPointSampling.forward = staticmethod(_sample)
    neighbours.KNN.forward = staticmethod(_knn)
    sampler = importlib.import_module("mmcv.ops.points_sampler")
    for place, ours in (
        (containment, points_in_boxes_all),
        (containment, points_in_boxes_part),
        (sampler, calc_square_dist),
    ):
        theirs = getattr(place, ours.__name__)
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in ("mmcv", "mmdet3d") and vars(module).get(ours.__name__) is theirs:
                setattr(module, ours.__name__, ours)


def _extension() -> Any:
    return importlib.import_module("mmcv._ext")


def _sample(ctx: Any, points_xyz: torch.Tensor, num_points: int) -> torch.Tensor:
    """FurthestPointSampling.forward: points [B,N,3] to int32[B,num_points]."""
    batch, total = points_xyz.shape[:2]
    output = points_xyz.new_zeros((batch, num_points), dtype=torch.int32)
    temp = points_xyz.new_full((batch, total), 1e10)
    _extension().furthest_point_sampling_forward(points_xyz.contiguous(), temp, output, b=batch, n=total, m=num_points)
    ctx.mark_non_differentiable(output)
    return output


def _knn(
    ctx: Any, k: int, xyz: torch.Tensor, center_xyz: torch.Tensor | None = None, transposed: bool = False
) -> torch.Tensor:
    """KNN.forward: points [B,N,3] and centres [B,M,3], or [B,3,N] and [B,3,M] where transposed, to int32[B,k,M]."""
    centres = xyz if center_xyz is None else center_xyz
    if transposed:
        xyz, centres = xyz.transpose(2, 1), centres.transpose(2, 1)
    batch, total = centres.shape[:2]
    indices = centres.new_zeros((batch, total, k), dtype=torch.int32)
    distances = centres.new_zeros((batch, total, k))
    _extension().knn_forward(
        xyz.contiguous(), centres.contiguous(), indices, distances, b=batch, n=xyz.shape[1], m=total, nsample=k
    )
    indices = indices.transpose(2, 1).contiguous()
    ctx.mark_non_differentiable(indices)
    return indices


def points_in_boxes_all(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """int32[B,M,T], 1 where a point [B,M,3] lies in a box [B,T,7] of x, y, z of the bottom's middle, sizes and yaw."""
    out = points.new_zeros((*points.shape[:2], boxes.shape[1]), dtype=torch.int32)
    return _contained(_extension().points_in_boxes_all_forward, points, boxes, out)


def points_in_boxes_part(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """int32[B,M]: the first box [B,T,7] that each point [B,M,3] lies in, −1 for none."""
    out = points.new_full(points.shape[:2], -1, dtype=torch.int32)
    return _contained(_extension().points_in_boxes_part_forward, points, boxes, out)


def _contained(
    operator: Callable[..., None], points: torch.Tensor, boxes: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    if len(points) != len(boxes) or boxes.shape[2] != 7 or points.shape[2] != 3:
        raise ValueError(f"points {list(points.shape)} and boxes {list(boxes.shape)}: expected [B, M, 3] and [B, T, 7]")
    with torch.cuda.device_of(points):  # a compiled kernel runs on the current GPU
        operator(boxes.contiguous(), points.contiguous(), out)
    return out


def calc_square_dist(point_feat_a: torch.Tensor, point_feat_b: torch.Tensor, norm: bool = True) -> torch.Tensor:
    """Squared distances [B,N,M] of features [B,N,C] and [B,M,C]; norm: the distances over C, as mmcv has it.

    By a matrix product, as torch.cdist computes them from 26 points on.
    """
    squares = (point_feat_a**2).sum(-1)[:, :, None] + (point_feat_b**2).sum(-1)[:, None]
    squared = (squares - 2 * torch.matmul(point_feat_a, point_feat_b.transpose(1, 2))).clamp_min(0)
    return squared.sqrt() / point_feat_a.shape[-1] if norm else squared
