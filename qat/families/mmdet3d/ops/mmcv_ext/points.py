"""mmcv's operators on points: sampling, neighbours, gathering and its gradients, interpolation, containment.

Squared distances are (dx² + dy²) + dz² in float32 in every form, so the same indices come out of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qat.families.mmdet3d.ops import points as host
from qat.families.mmdet3d.ops.mmcv_ext.forms import plain, traced

FAR = 1e10  # mmcv's greatest squared distance


# Furthest point sampling


def furthest_point_sampling_forward(
    points_xyz: torch.Tensor, temp: torch.Tensor, output: torch.Tensor, *, m: int, **sizes: int
) -> None:
    """Writes into int32[B,M] indices of points [B,N,3]. `temp` is not used."""
    if plain(points_xyz):
        for cloud, picked in zip(points_xyz.detach(), output, strict=True):
            picked.copy_(torch.from_numpy(host.furthest_point_sample(cloud.numpy(), m)))
    elif torch.compiler.is_compiling():
        output.copy_(_sampling_scan(points_xyz, m))
    else:
        output.copy_(_picked(points_xyz[..., 0], m, lambda last: _squared(points_xyz, _row(points_xyz, last)[:, None])))


def furthest_point_sampling_with_dist_forward(
    points_dist: torch.Tensor, temp: torch.Tensor, output: torch.Tensor, *, m: int, **sizes: int
) -> None:
    """The same by a table of distances [B,N,N]."""
    if plain(points_dist):
        for table, picked in zip(points_dist.detach(), output, strict=True):
            picked.copy_(torch.from_numpy(host.furthest_point_sample_of_distances(table.numpy(), m)))
    elif torch.compiler.is_compiling():
        output.copy_(_table_scan(points_dist, m))
    else:
        output.copy_(_picked(points_dist[:, 0], m, lambda last: _row(points_dist, last)))


def _sampling_scan(points: torch.Tensor, count: int) -> torch.Tensor:
    """Furthest point sampling that torch.export takes and ONNX has as a Scan: points [B,N,3] to int64[B,count].

    OpenVINO's Scan runs once where nothing is scanned, and does not see tensors from outside: so the points are carried, and the
    scanned zeros are added to what comes out.
    """
    from torch._higher_order_ops.scan import scan

    def step(carry: list[torch.Tensor], zero: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        nearest, last, points = carry
        distance = _squared(points, _row(points, last)[:, None])
        nearest = torch.where(distance < nearest, distance, nearest)
        return [nearest, nearest.argmax(-1), points.clone()], last + zero

    # FAR made of the input keeps its type and shape in ONNX.
    first = [points[..., 0] * 0 + FAR, points.new_zeros(points.shape[0], dtype=torch.int64), points]
    _, picked = scan(step, first, torch.zeros(count, points.shape[0], dtype=torch.int64, device=points.device))
    return picked.transpose(0, 1)


def _table_scan(distances: torch.Tensor, count: int) -> torch.Tensor:
    """As `_sampling_scan`, by a table [B,N,N]. That is too large to be carried, so OpenVINO does not take this one."""
    from torch._higher_order_ops.scan import scan

    def step(carry: list[torch.Tensor], zero: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        nearest, last = carry
        distance = _row(distances, last)
        nearest = torch.where(distance < nearest, distance, nearest)
        return [nearest, nearest.argmax(-1)], last + zero

    first = [distances[:, 0] * 0 + FAR, distances.new_zeros(len(distances), dtype=torch.int64)]
    _, picked = scan(step, first, torch.zeros(count, len(distances), dtype=torch.int64, device=distances.device))
    return picked.transpose(0, 1)


def _picked(like: torch.Tensor, count: int, distances_from: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The same as a Python loop, for tensors on a GPU (it never waits for the host) and torch.jit.trace: int64[B,count].

    like: any [B,N]. distances_from: squared distances [B,N] from one point of each sample, int64[B].
    """
    nearest = torch.full_like(like, FAR)
    picked = [torch.zeros_like(like[:, 0], dtype=torch.int64)]
    while len(picked) < count:
        distance = distances_from(picked[-1])
        nearest = torch.where(distance < nearest, distance, nearest)
        picked.append(nearest.argmax(-1))
    return torch.stack(picked, 1)


def _row(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """One row of each sample: [B,N,C] at int64[B] is [B,C]."""
    return torch.gather(rows, 1, index[:, None, None].expand(-1, 1, rows.shape[2]))[:, 0]


# Neighbours


def ball_query_forward(
    center_xyz: torch.Tensor,
    xyz: torch.Tensor,
    idx: torch.Tensor,
    *,
    min_radius: float,
    max_radius: float,
    nsample: int,
    **sizes: int,
) -> None:
    """Writes into int32[B,M,nsample] the first points [B,N,3] in the ball (or shell) around each centre [B,M,3]."""
    if plain(center_xyz, xyz):
        for centres, cloud, near in zip(center_xyz.detach(), xyz.detach(), idx, strict=True):
            near.copy_(
                torch.from_numpy(host.ball_query(cloud.numpy(), centres.numpy(), max_radius, nsample, min_radius))
            )
    else:
        idx.copy_(_balls(center_xyz, xyz, min_radius, max_radius, nsample))


def _balls(
    centres: torch.Tensor, points: torch.Tensor, min_radius: float, max_radius: float, count: int
) -> torch.Tensor:
    """Distances, then the `count` smallest of the near points' indices by top-k."""
    low, high = (float(radius) for radius in host.squared_radii(min_radius, max_radius))
    distance = _squared(centres[:, :, None], points[:, None])
    near = (distance < high) if low == 0 else (distance == 0) | ((distance >= low) & (distance < high))
    total = points.shape[1]
    none = 2.0**24  # above every index: float32 holds those exactly up to here
    index = torch.arange(total, dtype=torch.float32, device=points.device)
    key = torch.where(near, index, torch.full_like(index, none))
    if count > total:
        key = torch.nn.functional.pad(key, (0, count - total), value=none)
    first = (-key).topk(count, dim=-1).values.neg()
    lead = first[..., :1]
    lead = torch.where(lead < none, lead, torch.zeros_like(lead))
    return torch.where(first < none, first, lead).to(torch.int32)


def three_nn_forward(
    target: torch.Tensor, source: torch.Tensor, dist2: torch.Tensor, idx: torch.Tensor, **sizes: int
) -> None:
    """Writes squared distances [B,N,3] and indices int32[B,N,3] of the source's points [B,M,3] nearest to each target [B,N,3]."""
    _nearest(source, target, dist2, idx)


def knn_forward(
    xyz: torch.Tensor,
    center_xyz: torch.Tensor,
    idx: torch.Tensor,
    dist2: torch.Tensor,
    **sizes: int,
) -> None:
    """Writes indices int32[B,M,nsample] and squared distances of the points [B,N,3] nearest to each centre [B,M,3]."""
    _nearest(xyz, center_xyz, dist2, idx)


def _nearest(points: torch.Tensor, centres: torch.Tensor, distances: torch.Tensor, indices: torch.Tensor) -> None:
    count = indices.shape[-1]
    if plain(points, centres):
        for sample, (cloud, middle) in enumerate(zip(points.detach(), centres.detach(), strict=True)):
            far, at = host.nearest_points(cloud.numpy(), middle.numpy(), count)
            distances[sample].copy_(torch.from_numpy(far))
            indices[sample].copy_(torch.from_numpy(at))
        return
    distance = _squared(centres[:, :, None], points[:, None])
    if count > points.shape[1]:
        distance = torch.nn.functional.pad(distance, (0, count - points.shape[1]), value=FAR)
    nearest = distance.topk(count, dim=-1, largest=False)
    distances.copy_(nearest.values)
    indices.copy_(torch.where(nearest.indices < points.shape[1], nearest.indices, torch.zeros_like(nearest.indices)))


def _squared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared distances of points [...,3] that broadcast: three products in a fixed order, and no [...,3] between."""
    x, y, z = (a[..., axis] - b[..., axis] for axis in range(3))
    return x * x + y * y + z * z


# Gathering and its gradients


def gather_points_forward(features: torch.Tensor, indices: torch.Tensor, output: torch.Tensor, **sizes: int) -> None:
    """Writes columns of features [B,C,N] into [B,C,M]; indices int[B,M]."""
    output.copy_(_taken(features, indices))


def gather_points_backward(
    grad_out: torch.Tensor, idx: torch.Tensor, grad_features: torch.Tensor, **sizes: int
) -> None:
    """Adds gradients [B,C,M] to the columns [B,C,N] that were taken."""
    _returned(grad_features, idx, grad_out)


def group_points_forward(
    features: torch.Tensor,
    indices: torch.Tensor,
    output: torch.Tensor,
    **sizes: int,
) -> None:
    """Writes columns of features [B,C,N] into [B,C,M,S]; indices int[B,M,S]."""
    output.copy_(_taken(features, indices))


def group_points_backward(
    grad_out: torch.Tensor,
    idx: torch.Tensor,
    grad_features: torch.Tensor,
    **sizes: int,
) -> None:
    """Adds gradients [B,C,M,S] to the columns [B,C,N] that were taken."""
    _returned(grad_features, idx, grad_out)


def three_interpolate_forward(
    features: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    output: torch.Tensor,
    **sizes: int,
) -> None:
    """Writes into [B,C,N] the sums of three columns of features [B,C,M]: indices int[B,N,3], weights [B,N,3]."""
    parts = _taken(features, indices) * weight[:, None]
    output.copy_(parts[..., 0] + parts[..., 1] + parts[..., 2])


def three_interpolate_backward(
    grad_out: torch.Tensor,
    idx: torch.Tensor,
    weight: torch.Tensor,
    grad_features: torch.Tensor,
    **sizes: int,
) -> None:
    """Adds gradients [B,C,N], weighted, to the columns [B,C,M] that were summed."""
    _returned(grad_features, idx, grad_out[..., None] * weight[:, None])


def _taken(features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Columns of [B,C,N] at int[B,…]: [B,C,…]."""
    if (
        traced()
    ):  # whole rows of [B·N,C]: OpenVINO takes 24 ms for 128 channels of 32,768 points where elements take it 80
        start = torch.arange(features.shape[0], device=features.device) * features.shape[2]
        rows = indices.long() + start.reshape(-1, *[1] * (indices.ndim - 1))
        taken = features.transpose(1, 2).flatten(0, 1).index_select(0, rows.flatten())
        return taken.unflatten(0, indices.shape).movedim(-1, 1)
    flat = indices.long().flatten(1)[:, None].expand(-1, features.shape[1], -1)
    return torch.gather(features, 2, flat).unflatten(2, indices.shape[1:])


def _returned(columns: torch.Tensor, indices: torch.Tensor, gradients: torch.Tensor) -> None:
    columns.scatter_add_(2, indices.long().flatten(1)[:, None].expand(-1, columns.shape[1], -1), gradients.flatten(2))


# Containment


def points_in_boxes_all_forward(boxes: torch.Tensor, points: torch.Tensor, out: torch.Tensor) -> None:
    """Writes 1 into int32[B,M,T] where a point [B,M,3] lies in a box [B,T,7]."""
    out.copy_(torch.stack([_inside(cloud, some) for cloud, some in zip(points, boxes, strict=True)]))


def points_in_boxes_part_forward(boxes: torch.Tensor, points: torch.Tensor, out: torch.Tensor) -> None:
    """Writes into int32[B,M] the first box [B,T,7] that each point [B,M,3] lies in, −1 for none."""
    if boxes.shape[1] == 0:
        out.fill_(-1)
        return
    hits = torch.stack([_inside(cloud, some) for cloud, some in zip(points, boxes, strict=True)])
    out.copy_(torch.where(hits.any(-1), hits.int().argmax(-1), -1))


def points_in_boxes_cpu_forward(boxes: torch.Tensor, points: torch.Tensor, out: torch.Tensor) -> None:
    """Of one sample: writes 1 into int32[T,M] where a point [M,3] lies in a box [T,7]."""
    out.copy_(_inside(points, boxes).T)


def _inside(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """bool[M,T], as `host.points_in_boxes` has it."""
    if plain(points, boxes):
        return torch.from_numpy(host.points_in_boxes(points.detach().numpy(), boxes.detach().numpy()))
    half = boxes[:, 3:6] * 0.5
    dx, dy = points[:, 0:1] - boxes[:, 0], points[:, 1:2] - boxes[:, 1]
    dz = points[:, 2:3] - (boxes[:, 2] + half[:, 2])
    cos, sin = torch.cos(boxes[:, 6]), torch.sin(boxes[:, 6])
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    return (dz.abs() <= half[:, 2]) & (along.abs() < half[:, 0]) & (across.abs() < half[:, 1])
