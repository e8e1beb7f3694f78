"""mmcv's assign_score_withk, PAConv's weighted sum of neighbours, in plain torch."""

from __future__ import annotations

import torch


def assign_score_withk_forward(
    points: torch.Tensor,
    centers: torch.Tensor,
    scores: torch.Tensor,
    knn_idx: torch.Tensor,
    output: torch.Tensor,
    **sizes: int,
) -> None:
    """Writes into [B,O,N1,K]: Σ_m scores[b,n,k,m] · (points[b,idx[n,k],m] − centers[b,idx[n,0],m]).

    points and centers [B,N0,M,O], scores [B,N1,K,M], knn_idx int[B,N1,K]; an index outside the points gives 0. mmcv's kernels
    sum, whatever `aggregate` asks for.
    """
    edges, valid = _edges(points, centers, knn_idx)
    output.copy_((torch.matmul(scores[..., None, :], edges)[..., 0, :] * valid[..., None]).permute(0, 3, 1, 2))


def assign_score_withk_backward(
    grad_out: torch.Tensor,
    points: torch.Tensor,
    centers: torch.Tensor,
    scores: torch.Tensor,
    knn_idx: torch.Tensor,
    grad_points: torch.Tensor,
    grad_centers: torch.Tensor,
    grad_scores: torch.Tensor,
    **sizes: int,
) -> None:
    """Adds the gradients of points, centers and scores. grad_out [B,O,N1,K]."""
    edges, valid = _edges(points, centers, knn_idx)
    gradient = grad_out.permute(0, 2, 3, 1) * valid[..., None]
    grad_scores.add_(torch.matmul(edges, gradient[..., None])[..., 0])
    spread = (scores[..., None] * gradient[..., None, :]).flatten(0, 2).flatten(1)
    rows, middles = _rows(knn_idx, points.shape[1])
    grad_points.view(-1, spread.shape[1]).index_add_(0, rows, spread)
    grad_centers.view(-1, spread.shape[1]).index_add_(0, middles, -spread)


def _edges(points: torch.Tensor, centers: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each neighbour less its centre [B,N1,K,M,O], and which indices are in range, bool[B,N1,K]."""
    total = points.shape[1]
    rows, middles = _rows(indices, total)
    near, middle = points.flatten(0, 1).index_select(0, rows), centers.flatten(0, 1).index_select(0, middles)
    return (near - middle).unflatten(0, indices.shape), (indices >= 0) & (indices < total)


def _rows(indices: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of [B·N0, …] of neighbours and of centres (each row's first neighbour): int64[B·N1·K] twice."""
    batch = torch.arange(indices.shape[0], device=indices.device)[:, None, None] * total
    at = indices.long().clamp(0, total - 1) + batch
    return at.flatten(), at[..., :1].expand(indices.shape).flatten()
