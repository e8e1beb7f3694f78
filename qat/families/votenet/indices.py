"""The host's computations around VoteNet's two graphs: sampling and grouping of points.

At test time every index except the last ball query depends only on the points' coordinates: PointNet++'s furthest point
sampling, ball queries and three nearest neighbours (Qi et al., NeurIPS 2017) as in mmdet3d's `PointNet2SASSG`. The last one
groups votes around proposals (`VoteHead`, Qi et al., ICCV 2019). With given indices, the graphs need only plain gathers.

Indices are int32 and count from the first point of the batch's first cloud, so that a graph gathers rows of one table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qat.families.mmdet3d.ops.points import ball_query, furthest_point_sample, nearest_points

FLOOR = 0.99  # percent of a cloud's points below its floor, as in mmdet3d
SEED = 0
NEAR = np.float32(1e-8)  # metres, added to distances


def sampled(points: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """Samples the model's points from one cloud, like mmdet3d's `PointSample` but the same ones each time.

    Args:
        points: float32[M,≥3], M ≥ 1. settings: "points", their number; "height": whether height above the floor is a column.

    Returns:
        float32[points,C]: x, y, z, the height, and the other columns. Points repeat if M is too small.
    """
    if settings["height"]:
        height = points[:, 2] - np.percentile(points[:, 2], FLOOR)
        points = np.concatenate(
            [points[:, :3], height[:, None], points[:, 3:]], 1, dtype=np.float32, casting="same_kind"
        )
    count = settings["points"]
    # RandomState's stream is the same in every version of numpy.
    return points[np.random.RandomState(SEED).choice(len(points), count, replace=len(points) < count)]


def batch_of_clouds(points: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """`sampled` of several clouds: float32[M,1+C], the number of its cloud first, to float32[B,points,·]. Each number from 0 on occurs."""
    number = points[:, 0].astype(np.int64)
    return np.stack([sampled(points[number == n, 1:], settings) for n in range(int(number.max(initial=0)) + 1)])


def each(function: Callable[..., Any], *batches: np.ndarray) -> tuple[np.ndarray, ...]:
    """A function's results for each sample of these batches, stacked."""
    found = [function(*sample) for sample in zip(*batches, strict=True)]
    return tuple(np.stack(values) for values in zip(*found, strict=True))


def flattened(indices: np.ndarray, count: int) -> np.ndarray:
    """Indices int[B,…] into the `count` points of each cloud as indices into those of all clouds: int32."""
    start = np.arange(len(indices), dtype=np.int32) * count
    return (indices + start.reshape(-1, *[1] * (indices.ndim - 1))).astype(np.int32)


def taken(points: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Points float32[B,N,3] at flattened indices int32[B,…]: float32[B,…,3]."""
    return points.reshape(-1, points.shape[-1])[indices]


def weights_of(distances: np.ndarray) -> np.ndarray:
    """Weights float32[…,3] of three neighbours by their squared distances, as in `PointFPModule`."""
    inverse = np.float32(1) / (np.sqrt(distances) + NEAR)
    return (inverse / inverse.sum(-1, keepdims=True)).astype(np.float32)


def backbone_indices(cloud: np.ndarray, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every index of the backbone.

    Args:
        cloud: float32[B,N,≥3]. settings: "sa", a list of {points, radius, samples}; "fp", how many feature propagations.

    Returns:
        of each set abstraction n, from 1 on: `sa{n}_centres` int32[B,points], which points of the level before it are its own, and
        `sa{n}_groups` int32[B,points,samples], which of them are near each; of each feature propagation `fp{n}_nearest`
        int32[B,points,3] and `fp{n}_weights` float32[B,points,3]; and `seed_points` float32[B,points,3].
    """
    levels = [np.ascontiguousarray(cloud[..., :3])]
    found: dict[str, np.ndarray] = {}
    for n, sa in enumerate(settings["sa"], 1):
        before = levels[-1]

        def grouped(xyz: np.ndarray, sa: Mapping[str, Any] = sa) -> tuple[np.ndarray, np.ndarray]:
            centres = furthest_point_sample(xyz, sa["points"])
            return centres, ball_query(xyz, xyz[centres], sa["radius"], sa["samples"])

        centres, groups = each(grouped, before)
        found[f"sa{n}_centres"], found[f"sa{n}_groups"] = (flattened(i, before.shape[1]) for i in (centres, groups))
        levels.append(taken(before, found[f"sa{n}_centres"]))
    for n in range(1, settings["fp"] + 1):
        source, target = levels[-n], levels[-n - 1]
        distances, nearest = each(lambda s, t: nearest_points(s, t, 3), source, target)
        found[f"fp{n}_nearest"], found[f"fp{n}_weights"] = flattened(nearest, source.shape[1]), weights_of(distances)
    found["seed_points"] = levels[len(settings["sa"]) - settings["fp"]]
    return found


def proposals(spread: np.ndarray, count: int) -> np.ndarray:
    """The points of float32[B,N,3] from which the proposals start: flattened indices int32[B,count]."""
    (picked,) = each(lambda xyz: (furthest_point_sample(xyz, count),), spread)
    return flattened(picked, spread.shape[1])


def vote_groups(votes: np.ndarray, centres: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """The votes float32[B,N,3] near each proposal's centre float32[B,P,3]: flattened indices int32[B,P,samples].

    settings: {radius, samples}.
    """
    (groups,) = each(lambda xyz, at: (ball_query(xyz, at, settings["radius"], settings["samples"]),), votes, centres)
    return flattened(groups, votes.shape[1])


def index_names(levels: int, propagations: int) -> Sequence[str]:
    """The names of `backbone_indices`' results that the graph reads, in order."""
    found = [f"sa{n}_{what}" for n in range(1, levels + 1) for what in ("centres", "groups")]
    return [*found, *(f"fp{n}_{what}" for n in range(1, propagations + 1) for what in ("nearest", "weights"))]
