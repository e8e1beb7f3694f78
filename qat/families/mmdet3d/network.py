"""Networks of mmdet3d's own modules; a pillar detector's is cut at the scatter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from qat.core.errors import UserError
from qat.families.mmdet3d.library import load
from qat.families.mmdet3d.tree import leaves


class ModelNet(nn.Module):
    """The modules of an mmdet3d model with their names, so that its checkpoints load.

    config: a family's, with "model", mmdet3d's own description. family: its name.
    """

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        super().__init__()
        load()
        from qat.families.mmdet3d.model import build

        self.config, self.family = config, family
        built = build(SimpleNamespace(model=config["model"], source=config["source"]))
        for name, child in built.named_children():
            if name != "data_preprocessor":  # which has no weights
                self.add_module(name, child)


@contextmanager
def settle_norms(network: nn.Module) -> Iterator[None]:
    """What runs inside the block gives batch norms their statistics, the mean over all calls."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        yield
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
        norm.eval()


class PillarNet(ModelNet):
    """A pillar detector: `encode` and `detect` around the scatter."""

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        super().__init__(config, family)
        self.prefix = "pts_" if hasattr(self, "pts_bbox_head") else ""

    def _of(self, name: str) -> Any:
        return getattr(self, f"{self.prefix}{name}")

    def voxel_encoder_layer(self) -> Any:
        """The only layer of the pillars' encoder, of a detector that has one: linear, norm."""
        (layer,) = self._of("voxel_encoder").pfn_layers
        return layer

    def encode(self, input_features: torch.Tensor) -> torch.Tensor:
        """Decorated points of pillars → their features. float[N,P,·] → [N,1,C]."""
        x = input_features
        for layer in self._of("voxel_encoder").pfn_layers:
            x = layer(x, None)
        return x

    def detect(self, spatial_features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The grid → the head's maps, in the order in which mmdet3d returns them."""
        x = self._of("backbone")(spatial_features)
        if hasattr(self, f"{self.prefix}neck"):
            x = self._of("neck")(x)
        return tuple(leaf.value for leaf in leaves(self._of("bbox_head")(x), "outputs"))

    def scatter(self, features: torch.Tensor, cells: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """`qat.families.mmdet3d.pillars.scatter`, differentiable."""
        from qat.families.mmdet3d.pillars import places

        inside, flat, clouds = places(cells, grid)
        canvas = features.new_zeros(clouds * grid[0] * grid[1], features.shape[2])
        filled = canvas.index_copy(0, flat.long(), features[inside, 0])
        return filled.view(clouds, *grid, -1).permute(0, 3, 1, 2).contiguous()


def check_type(model: Mapping[str, Any], key: str, expected: tuple[str, ...], source: str) -> Mapping[str, Any]:
    """A module's description in an mmdet3d config, by its key with or without `pts_`.

    Raises:
        UserError: it is not there, or of another type.
    """
    for name in (f"pts_{key}", key):
        if isinstance(found := model.get(name), Mapping):
            if found.get("type") not in expected:
                raise UserError(
                    f"{source}: model: {name}: found {found.get('type')!r}, expected {' or '.join(expected)}; export it whole, with "
                    "export-mmdet3d"
                )
            return found
    raise UserError(f"{source}: model: found no {key}, expected a {' or '.join(expected)}")
