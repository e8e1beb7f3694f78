"""The first half of `end2end.onnx`: voxels to the bird's-eye grid, and the whole network in PyTorch by mmdet3d's own modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from qat.deploy.mmdeploy.compose import ALONE, GRID
from qat.deploy.mmdeploy.maps import INPUTS
from qat.export.graph import simplify, trace
from qat.families.flow import Flow
from qat.families.mmdet3d.pillars import grid_of
from qat.families.mmdet3d.tracing import FORMS

LARGEST = "1MB"  # of a constant that is computed ahead
SMALL = 4096  # values; zeros beyond that are the grid


class Front(nn.Module):
    """Decoration, pillar features and the scatter.

    voxels float32[N,P,C], num_points int32[N], coors int32[N,4] ─► spatial_features float32[1,·,ny,nx], alone float32[]

    Changed for tracing: mmdet3d's encoder is in its functional form. A row with num_points 0 is left out; mmdet3d divides by 0 there. It
    is written where the first other row is, with the same values. `alone` is 0, and NaN where coors has another cloud than 0: its pillars
    would be merged into the same grid.
    """

    def __init__(self, network: Any, grid: tuple[int, int]) -> None:
        super().__init__()
        self.encoder = network._of("voxel_encoder")
        self.form = FORMS[_form(self.encoder)]["forward"]
        self.grid = grid

    def forward(
        self, voxels: torch.Tensor, num_points: torch.Tensor, coors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        there = num_points > 0
        features = self.form(self.encoder, voxels, num_points + (~there).type_as(num_points), coors)
        features = features * there.unsqueeze(1).type_as(features)
        cells = (coors[:, 2] * self.grid[1] + coors[:, 3]) * there.type_as(coors)
        first = there.type_as(features).argmax()
        cells = torch.where(there, cells, cells[first]).long()
        features = torch.where(there.unsqueeze(1), features, features[first])
        # Scattered along the channels' rows: ScatterND would need the whole grid transposed, which takes twice as long on OpenVINO.
        canvas = features.new_zeros(features.shape[1], self.grid[0] * self.grid[1])
        filled = torch.scatter(canvas, 1, cells.unsqueeze(0).expand(features.shape[1], -1), features.t())
        others = (coors[:, 0] * there.type_as(coors)).type_as(features).abs().max()
        alone = torch.where(others > 0, features.new_tensor(float("nan")), features.new_tensor(0.0))
        return filled.reshape(1, -1, *self.grid), alone


def _form(encoder: nn.Module) -> str:
    return next(kind.__name__ for kind in type(encoder).__mro__ if kind.__name__ in FORMS)


def front_graph(network: Any, flow: Flow, feeds: Mapping[str, np.ndarray], opset: int) -> onnx.ModelProto:
    """The first half as a simplified graph. feeds: of any cloud, to trace with."""
    front = Front(network, grid_of(flow.settings)).eval()
    tensors = [torch.from_numpy(feeds[name]) for name in INPUTS]
    varying = {name: {0: "voxels_num"} for name in INPUTS}
    model = trace(front, tensors, INPUTS, (GRID, ALONE), opset, varying=varying)
    # Random integers are no cells of the grid: the composed file is compared on real clouds instead.
    model = simplify(model, "front", folded=LARGEST, compared=False)
    empty_by_shape(model)
    return model


def empty_by_shape(model: onnx.ModelProto) -> None:
    """Writes the empty grid as its shape: torch's tracer makes a constant of it, 55 MB of zeros for KITTI's."""
    graph = model.graph
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        values = numpy_helper.to_array(node.attribute[0].t)
        if values.size >= SMALL and not values.any():
            _replace(graph, node.output[0], values.shape)
            graph.node.remove(node)
    for initializer in list(graph.initializer):
        values = numpy_helper.to_array(initializer)
        if values.size >= SMALL and values.dtype == np.float32 and not values.any():
            _replace(graph, initializer.name, values.shape)
            graph.initializer.remove(initializer)


def _replace(graph: onnx.GraphProto, name: str, shape: tuple[int, ...]) -> None:
    sizes = f"{name}.shape"
    graph.initializer.append(numpy_helper.from_array(np.asarray(shape, np.int64), sizes))
    graph.node.insert(0, onnx.helper.make_node("ConstantOfShape", [sizes], [name], name=f"{name}.zeros"))


def mmdet3d_grid(network: Any, flow: Flow, device: str = "cpu") -> Callable[[Mapping[str, np.ndarray]], Any]:
    """From the file's inputs to the grid, a tensor, by mmdet3d's own encoder and scatter, not those that are traced."""
    network = network.to(device).eval()
    grid = grid_of(flow.settings)

    def compute(feeds: Mapping[str, np.ndarray]) -> torch.Tensor:
        voxels, counts, coors = (
            torch.from_numpy(feeds[name].copy()).to(device) for name in INPUTS
        )  # some write into them
        there = counts > 0
        if not there.any():
            return torch.zeros(1, flow.settings["channels"], *grid, device=device)
        with torch.inference_mode():
            features = network._of("voxel_encoder")(voxels[there], counts[there], coors[there])
            placed: torch.Tensor = network._of("middle_encoder")(features, coors[there], 1)
            return placed

    return compute


def mmdet3d_network(network: Any, flow: Flow, device: str = "cpu") -> Any:
    """A `qat.deploy.mmdeploy.detector.Network` of mmdet3d's own modules."""
    grid = mmdet3d_grid(network, flow, device)

    def compute(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            maps = network.detect(grid(feeds))
        return {name: value.cpu().numpy() for name, value in zip(flow.plan.outputs, maps, strict=True)}

    return compute
