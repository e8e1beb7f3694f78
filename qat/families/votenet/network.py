"""VoteNet's network: mmdet3d's modules with given indices."""

from __future__ import annotations

from typing import Any

import torch

from qat.families.mmdet3d.network import ModelNet


def rows(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows of a table float[B,N,C] at indices int32[B,…] that count over all samples: float[B,…,C]."""
    return table.flatten(0, 1).index_select(0, indices.flatten()).view(*indices.shape, table.shape[2])


def abstracted(
    module: Any, xyz: torch.Tensor, features: Any, centres: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """mmdet3d's `PointSAModule` of one radius on given groups.

    xyz: float[B,N,3], features: float[B,C,N] or None, centres: float[B,M,3], groups: int32[B,M,S]. Returns float[B,C',M].
    """
    grouper = module.groupers[0]
    near = rows(xyz, groups) - centres.unsqueeze(2)
    if grouper.normalize_xyz:
        near = near / grouper.max_radius
    given = near
    if features is not None:
        own = rows(features.transpose(1, 2), groups)
        given = torch.cat([near, own], -1) if grouper.use_xyz else own
    pooled: torch.Tensor = module._pool_features(module.mlps[0](given.permute(0, 3, 1, 2)))
    return pooled


def propagated(
    module: Any, target: Any, source: torch.Tensor, nearest: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """mmdet3d's `PointFPModule` on given neighbours and weights.

    target: float[B,C,N] or None, source: float[B,C',M], nearest: int32[B,N,3], weights: float[B,N,3]. Returns float[B,C'',N].
    """
    parts = rows(source.transpose(1, 2), nearest) * weights.unsqueeze(-1)
    given = (parts[:, :, 0] + parts[:, :, 1] + parts[:, :, 2]).transpose(1, 2)
    if target is not None:
        given = torch.cat([given, target], 1)
    found: torch.Tensor = module.mlps(given.unsqueeze(-1)).squeeze(-1)
    return found


class VoteNetNet(ModelNet):
    """`vote` and `propose`, around the host's grouping of votes."""

    def vote(self, cloud: torch.Tensor, *indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From the cloud to votes.

        Args:
            cloud: float[B,N,C]: x, y, z and features. indices: those of `qat.families.votenet.indices.index_names`.

        Returns:
            vote_points float[B,V,3] (metres), vote_features float[B,C',V].
        """
        backbone: Any = self.backbone
        xyz = [cloud[..., :3]]
        features: list[Any] = [cloud[..., 3:].transpose(1, 2) if cloud.shape[2] > 3 else None]
        given = iter(indices)
        for module in backbone.SA_modules:
            centres = rows(xyz[-1], next(given))
            features.append(abstracted(module, xyz[-1], features[-1], centres, next(given)))
            xyz.append(centres)
        found = features.pop()
        for module in backbone.FP_modules:
            found = propagated(module, features.pop(), found, next(given), next(given))
        head: Any = self.bbox_head
        points, own, _ = head.vote_module(xyz[len(features)], found)
        return points, own

    def propose(
        self,
        vote_points: torch.Tensor,
        vote_features: torch.Tensor,
        aggregated_points: torch.Tensor,
        vote_groups: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From votes grouped around proposals to cls_preds float[B,2+classes,P] and reg_preds float[B,3+2·bins+4·sizes,P]."""
        head: Any = self.bbox_head
        features = abstracted(head.vote_aggregation, vote_points, vote_features, aggregated_points, vote_groups)
        found: tuple[torch.Tensor, torch.Tensor] = head.conv_pred(features)
        return found
