"""mmdet3d's modules in a form that torch.export and torch.onnx can trace, with the same result.

What a trace cannot follow: Python numbers taken out of tensors (`coors[-1, 0].item()`), writes into slices (which the opset-13
exporter loses without a word), masks that choose rows. `FORMS` has the functional form of each such method, by class.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from qat.core.errors import UserError
from qat.families.mmdet3d.tree import leaves, rebuild


def pillar_features(
    self: Any, features: torch.Tensor, num_points: torch.Tensor, coors: torch.Tensor, *_: Any, axes: int = 3, **__: Any
) -> torch.Tensor:
    """mmdet3d's `PillarFeatureNet.forward`, without writing into slices or into its input.

    Args:
        features: voxels float[N,P,C]. num_points: int[N]. coors: int[N,4], sample, z, y, x. axes: how many of x, y, z of the
            offset to the pillar's centre are taken.

    Returns:
        float[N,channels].
    """
    xyz = features[:, :, :3]
    decorated = [features]
    cluster = None
    if self._with_cluster_center:
        mean = xyz.sum(dim=1, keepdim=True) / num_points.type_as(features).view(-1, 1, 1)
        cluster = xyz - mean
    if self._with_voxel_center:
        sizes = ((3, self.vx, self.x_offset), (2, self.vy, self.y_offset), (1, self.vz, self.z_offset))[:axes]
        middle = [coors[:, column].type_as(features).unsqueeze(1) * size + offset for column, size, offset in sizes]
        centred = torch.stack([xyz[:, :, axis] - middle[axis] for axis in range(axes)], dim=-1)
        if self.legacy:  # there the offsets replace the coordinates that they were computed from
            decorated = [torch.cat([centred, features[:, :, axes:]], dim=-1)]
            xyz = decorated[0][:, :, :3]
    if cluster is not None:
        decorated.append(cluster)
    if self._with_voxel_center:
        decorated.append(centred)
    if self._with_distance:
        decorated.append(torch.norm(xyz, 2, 2, keepdim=True))
    joined = torch.cat(decorated, dim=-1)
    slots = torch.arange(joined.shape[1], dtype=num_points.dtype, device=joined.device)
    mask = (num_points.unsqueeze(1) > slots.unsqueeze(0)).unsqueeze(-1).type_as(joined)
    joined = joined * mask
    for layer in self.pfn_layers:
        joined = layer(joined, num_points)
    return joined.squeeze(1)


def scatter_pillars(
    self: Any, voxel_features: torch.Tensor, coors: torch.Tensor, batch_size: Any = None
) -> torch.Tensor:
    """mmdet3d's `PointPillarsScatter.forward` of one sample: float[N,C] → [1,C,ny,nx]. A canvas of zeros is expanded in the
    graph, so the file does not hold it."""
    channels, cells = voxel_features.shape[1], self.ny * self.nx
    index = coors[:, 2].long() * self.nx + coors[:, 3].long()
    canvas = voxel_features.new_zeros(1, 1).expand(channels, cells)
    filled = torch.scatter(canvas, 1, index.unsqueeze(0).expand(channels, -1), voxel_features.t())
    return filled.view(1, channels, self.ny, self.nx)


def voxelnet_features(self: Any, batch_inputs_dict: Mapping[str, Any]) -> Any:
    """mmdet3d's `VoxelNet.extract_feat` of one sample."""
    given = batch_inputs_dict["voxels"]
    x = self.voxel_encoder(given["voxels"], given["num_points"], given["coors"])
    x = self.backbone(self.middle_encoder(x, given["coors"], 1))
    return self.neck(x) if self.with_neck else x


def mvx_forward(self: Any, inputs: Mapping[str, Any], data_samples: Any = None, **_: Any) -> Any:
    """What `MVXTwoStageDetector._forward`, which takes no arguments, was meant to be."""
    metas = [sample.metainfo for sample in data_samples or ()]
    images, points = self.extract_feat(inputs, metas)
    return self.pts_bbox_head(points if self.with_pts_bbox else images)


# Changed for tracing, by class: method → its functional form. `BROKEN` are those that mmdet3d itself cannot run.
FORMS: dict[str, dict[str, Callable[..., Any]]] = {
    "PillarFeatureNet": {"forward": pillar_features},
    "PointPillarsScatter": {"forward": scatter_pillars},
    "VoxelNet": {"extract_feat": voxelnet_features},
}
BROKEN: dict[str, dict[str, Callable[..., Any]]] = {"MVXTwoStageDetector": {"_forward": mvx_forward}}


@contextlib.contextmanager
def _replaced(model: nn.Module, forms: Mapping[str, Mapping[str, Callable[..., Any]]]) -> Iterator[None]:
    changed: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        for kind in type(module).__mro__:
            for method, form in forms.get(kind.__name__, {}).items():
                defined = next(k for k in type(module).__mro__ if method in vars(k))
                if defined.__name__ == kind.__name__:  # a subclass with a form of its own keeps it
                    setattr(module, method, types.MethodType(form, module))
                    changed.append((module, method))
    try:
        yield
    finally:
        for module, method in changed:
            delattr(module, method)


def runnable(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside the block, `mode="tensor"` runs where mmdet3d forgot to write it; nothing else is changed."""
    return _replaced(model, BROKEN)


def traceable(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside the block, the model is in the form that is traced."""
    return _replaced(model, {**BROKEN, **FORMS})


class Flat(nn.Module):
    """A model that takes and gives plain tensors: the nested input is rebuilt around them.

    Changed for tracing: values that are no tensors, and tensors that are not among `paths`, are constants.
    """

    def __init__(self, model: nn.Module, inputs: Any, samples: Any, paths: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.tree = (inputs,)  # in a tuple: no module, and not searched for tensors
        self.samples = (samples,)
        self.paths = paths

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(self.paths, tensors, strict=True))
        nested = rebuild(self.tree[0], "inputs", given)
        result = self.model(nested, self.samples[0], mode="tensor")
        found = tuple(leaf.value for leaf in leaves(result, "outputs") if leaf.is_tensor)
        if not found:
            raise UserError(
                f"{type(self.model).__name__}: mode='tensor' returned no tensors, expected some; it cannot be exported"
            )
        return found


@contextlib.contextmanager
def naming_failures(model: nn.Module) -> Iterator[list[str]]:
    """Inside the block, the yielded list is the path of the module that runs, outermost first; after an exception it is where
    it was raised."""
    names = {module: name for name, module in model.named_modules()}
    active: list[str] = []
    handles = []

    def enter(module: nn.Module, _inputs: Any) -> None:
        active.append(names[module])

    def leave(module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        if active:
            active.pop()

    for module in names:
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield active
    finally:
        for handle in handles:
            handle.remove()
