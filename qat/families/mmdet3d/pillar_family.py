"""What the families of pillar detectors share with the stages that run PyTorch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from qat.core.errors import UserError
from qat.families.family import PartModule, Recipe, relative_error
from qat.families.mmdet3d.lidar import BEFORE_HEAD
from qat.families.mmdet3d.network import PillarNet, check_type
from qat.families.mmdet3d.pillars import batch_of_pillars, grid_of
from qat.families.mmdet3d.shared_family import Mmdet3dFamily
from qat.lean.equalize import INSIDE
from qat.lean.flavours import FLAVOURS

ENCODERS = {"PillarFeatureNet": 3, "BackwardPillarFeatureNet": 2}  # columns of the offset to the pillar's centre
SWEEPS = {
    "count": ("sweeps_num", 10),
    "pad_empty": ("pad_empty_sweeps", False),
    "remove_close": ("remove_close", False),
}


class PillarFamily(Mmdet3dFamily):
    """Detectors of mmdet3d over pillars: `PillarFeatureNet`, `PointPillarsScatter`, SECOND, SECONDFPN. A subclass has the head."""

    head_types: tuple[str, ...]
    own_keys = frozenset({"sweeps"})
    loss_weights = {"heads": 1.0}  # noqa: RUF012

    @abstractmethod
    def head_settings(self, head: Mapping[str, Any], model: Mapping[str, Any], stride: int) -> dict[str, Any]:
        """The manifest's `head` section of an mmdet3d head's description."""

    @abstractmethod
    def output_names(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """The maps in the order in which mmdet3d's head returns them."""

    def own_description(self, steps: Mapping[str, Any], source: str) -> dict[str, Any]:
        """As `Mmdet3dFamily.own_description`."""
        step = steps.get("LoadPointsFromMultiSweeps")
        return {
            "sweeps": {} if step is None else {own: step.get(theirs, usual) for own, (theirs, usual) in SWEEPS.items()}
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """As `Family.settings`."""
        source, model = str(config["source"]), config["model"]
        encoder = check_type(model, "voxel_encoder", tuple(ENCODERS), source)
        check_type(model, "middle_encoder", ("PointPillarsScatter",), source)
        backbone = check_type(model, "backbone", ("SECOND",), source)
        neck = check_type(model, "neck", ("SECONDFPN",), source)
        head = check_type(model, "bbox_head", self.head_types, source)
        layer = (model.get("data_preprocessor") or {}).get("voxel_layer")
        if not isinstance(layer, Mapping):
            raise UserError(f"{source}: model: data_preprocessor: found no voxel_layer, expected the one of 1.x")
        if str(model["data_preprocessor"].get("voxel_type", "hard")) != "hard":
            raise UserError(
                f"{source}: model: data_preprocessor: voxel_type: found dynamic, expected hard; export it whole"
            )
        most = layer.get("max_voxels", 20000)
        strides = [float(s) for s in backbone["layer_strides"]]
        ups = [float(u) for u in neck["upsample_strides"]]
        out = {prod(strides[: n + 1]) / up for n, up in enumerate(ups)}
        if len(out) != 1 or (stride := out.pop()) != int(stride):
            raise UserError(
                f"{source}: model: neck: upsample_strides: found {ups} over strides {strides}, expected one size of map"
            )
        channels = list(encoder.get("feat_channels", (64,)))
        return {
            "family": self.name,
            "classes": list(config["classes"]),
            "load_dim": int(config["load_dim"]),
            "columns": [int(column) for column in config["columns"]],
            "sweeps": dict(config["sweeps"]),
            "channels": int(channels[-1]),
            "voxel": {
                "size": [float(v) for v in layer["voxel_size"]],
                "range": [float(v) for v in layer["point_cloud_range"]],
                "max_points": int(layer["max_num_points"]),
                "max_voxels": int(most[1] if isinstance(most, list | tuple) else most),
            },
            "decoration": {
                "columns": len(config["columns"]),
                "cluster": bool(encoder.get("with_cluster_center", True)),
                "centre": ENCODERS[encoder["type"]] if encoder.get("with_voxel_center", True) else 0,
                "distance": bool(encoder.get("with_distance", False)),
                "legacy": bool(encoder.get("legacy", True)),
            },
            "head": self.head_settings(head, model, int(stride)),
        }

    def build(self, config: Mapping[str, Any]) -> PillarNet:
        """As `Family.build`."""
        return PillarNet(config, self.name)

    def pass_through(self, network: Any, flow: Any, frames: list[Any]) -> None:
        """As `Mmdet3dFamily.pass_through`."""
        features, cells, _ = batch_of_pillars(flow.feeds(frames)["points"], flow.settings)
        pillars = network.encode(torch.from_numpy(features))
        network.detect(network.scatter(pillars, torch.from_numpy(cells), grid_of(flow.settings)))

    def traced(self, network: Any) -> dict[str, str]:
        """As `Family.traced`."""
        return {"pts_voxel_encoder": "encode", "pts_backbone_neck_head": "detect"}

    def parts(self, network: Any, cores: Mapping[str, Any]) -> dict[str, PartModule]:
        """As `Family.parts`."""
        maps = self.output_names(self.settings(network.config))
        names = {
            "pts_voxel_encoder": (("input_features",), ("pillar_features",)),
            "pts_backbone_neck_head": (("spatial_features",), maps),
        }
        return {name: PartModule(core, *names[name]) for name, core in cores.items()}

    def ops(self, network: Any) -> Mapping[str, Any]:
        """As `Family.ops`: voxels by numpy, the scatter in torch."""
        settings = self.settings(network.config)
        grid = grid_of(settings)

        def voxelize(given: Mapping[str, Any]) -> dict[str, Any]:
            device = next(network.parameters()).device
            features, cells, _ = batch_of_pillars(given["points"], settings)
            return {
                "input_features": torch.from_numpy(features).to(device),
                "coors": torch.from_numpy(cells).to(device),
            }

        def scatter(given: Mapping[str, Any]) -> dict[str, Any]:
            pillars = given["pillar_features"]
            cells = torch.as_tensor(given["coors"]).to(pillars.device)  # numpy where another runner voxelized
            return {"spatial_features": network.scatter(pillars, cells, grid)}

        return {"voxelize": voxelize, "scatter": scatter}

    def recipe(self, config: Mapping[str, Any]) -> Recipe:
        """The encoder stays float: its features are metres, intensities up to 255 and offsets of centimetres side by side, and it
        is under a hundredth of the multiplications. Channels are equalized between layers, not the grid's: that cost 0.002 mAP and 5 dB
        with background that is kept exact."""
        return Recipe(
            parts_off={"encoder": tuple(FLAVOURS)},
            off_reason="metres, intensities and offsets of centimetres side by side, for under a hundredth of the multiplications",
            method="mse",
            equalize=INSIDE,
            round_outputs=True,
        )

    def dataset(
        self, root: Path, split: str, config: Mapping[str, Any], version: str | None = None, frames: int | None = None
    ) -> Any:
        """As `Family.dataset`: nuScenes-format keyframes, or .bin files."""
        from qat.families.mmdet3d.frames import lidar_frames

        return lidar_frames(root, split, self.settings(config), version, frames)

    def losses(
        self, student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], frames: int
    ) -> dict[str, torch.Tensor]:
        """The relative squared error of the head's maps."""
        return {"heads": relative_error(student, teacher, [name for name in teacher if name not in BEFORE_HEAD])}
