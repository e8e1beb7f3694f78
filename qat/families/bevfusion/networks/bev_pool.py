"""BEV pooling as a sparse·dense product.

BEV[cells, C] = S[cells, pixels] · F[pixels, C], where S holds the depth weights in a pattern that the geometry
fixes. It equals BEVFusion's sum over the frustum tensor [N,D,H,W,C] without ever making that tensor.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from qat.families.bevfusion.pooling.geometry import PoolPattern


def _quieten() -> None:
    """Triggers and hides torch's one-time warning that sparse CSR tensors are in beta, which users cannot act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


_quieten()


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, depth_weights: torch.Tensor, context: torch.Tensor, pattern: PoolPattern) -> torch.Tensor:
        device = context.device

        def index(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        values = depth_weights.reshape(-1)[index(pattern.depth).long()]
        features = context.permute(0, 2, 3, 1).reshape(pattern.pixels, -1)
        size = (len(pattern.row_ptr) - 1, pattern.pixels)
        with torch.sparse.check_sparse_tensor_invariants(False):
            matrix = torch.sparse_csr_tensor(index(pattern.row_ptr), index(pattern.pixel), values, size)
        ctx.save_for_backward(values, features)
        ctx.pattern, ctx.shapes = pattern, (depth_weights.shape, context.shape)
        return matrix @ features

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        values, features = ctx.saved_tensors
        pattern: PoolPattern = ctx.pattern
        depth_shape, context_shape = ctx.shapes
        gradient = gradients[0].contiguous()
        device = gradient.device
        row_ptr, order = pattern.by_pixel
        entries = torch.from_numpy(order).to(device)
        cell = torch.from_numpy(pattern.cell).to(device)
        with torch.sparse.check_sparse_tensor_invariants(False):
            transposed = torch.sparse_csr_tensor(
                torch.from_numpy(row_ptr).to(device),
                cell[entries],
                values[entries],
                (pattern.pixels, len(pattern.row_ptr) - 1),
            )
        n, c, h, w = context_shape
        context_gradient = (transposed @ gradient).view(n, h, w, c).permute(0, 3, 1, 2)
        pixel = torch.from_numpy(pattern.pixel).to(device)
        depth_gradient = torch.zeros(depth_shape, dtype=values.dtype, device=device).view(-1)
        depth = torch.from_numpy(pattern.depth).to(device).long()
        for start in range(0, len(cell), 1 << 15):  # in blocks, to avoid a [P,C] tensor
            part = slice(start, start + (1 << 15))
            depth_gradient[depth[part]] = torch.linalg.vecdot(
                gradient.index_select(0, cell[part]), features.index_select(0, pixel[part])
            )
        return depth_gradient.view(depth_shape), context_gradient, None


def bev_pool(depth_weights: torch.Tensor, context: torch.Tensor, pattern: PoolPattern) -> torch.Tensor:
    """Pools one sample's cameras onto the BEV grid.

    Args:
        depth_weights: [N,D,fH,fW]. context: [N,C,fH,fW]. pattern: where each of their products goes.

    Returns:
        [C·nz, nx, ny], x first; differentiable in both tensors.
    """
    nz, nx, ny = pattern.shape
    pooled = _Pool.apply(depth_weights, context, pattern)
    return pooled.view(nz, nx, ny, -1).permute(0, 3, 1, 2).reshape(-1, nx, ny)
