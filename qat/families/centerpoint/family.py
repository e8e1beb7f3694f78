"""CenterPoint over pillars for the stages that run PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from qat.core.errors import UserError
from qat.families.centerpoint import autoware
from qat.families.centerpoint.autoware import older
from qat.families.centerpoint.flow import MAPS, names_of
from qat.families.family import PartModule, Recipe
from qat.families.mmdet3d.description import MMDET3D, OLDER, UNKNOWN, boxes_of, plain
from qat.families.mmdet3d.network import PillarNet
from qat.families.mmdet3d.pillar_family import PillarFamily

LAST = "detector.quant_*task_heads_*"  # quantizers inside the maps' own branches


class CenterPointNet(PillarNet):
    """`PillarNet` whose maps come in Autoware's order, task after task."""

    def detect(self, spatial_features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `PillarNet.detect`: heatmap, reg, height, dim, rot, vel of each task."""
        x = self._of("backbone")(spatial_features)
        x = self._of("neck")(x)
        return tuple(task[0][name] for task in self._of("bbox_head")(x) for name in MAPS if name in task[0])


class OlderMaps(PartModule):
    """Backbone, neck and head. Changed for tracing: `dim` and `rot` are in the convention from before mmdet3d 1.0 (`older`)."""

    whole = False

    def forward(self, *inputs: torch.Tensor) -> Any:
        """As the core's, two maps turned."""
        maps = dict(zip(self.outputs, self.core(*inputs), strict=True))
        return tuple(older(maps)[name] for name in self.outputs)


class CenterPointFamily(PillarFamily):
    """mmdet3d's CenterPoint with a `PillarFeatureNet` and a `CenterHead`."""

    name = "centerpoint"
    head_types = ("CenterHead",)

    def head_settings(self, head: Mapping[str, Any], model: Mapping[str, Any], stride: int) -> dict[str, Any]:
        """As `PillarFamily.head_settings`.

        Raises:
            UserError: another coder, or another separate head.
        """
        coder = head.get("bbox_coder", {})
        if coder.get("type") != "CenterPointBBoxCoder":
            raise UserError(f"model: bbox_head: bbox_coder: found {coder.get('type')!r}, expected CenterPointBBoxCoder")
        test = model.get("test_cfg") or {}
        test = plain(test.get("pts", test))
        common = {name: int(shape[0]) for name, shape in head["common_heads"].items()}
        keys = ("max_num", "score_threshold", "out_size_factor", "voxel_size", "pc_range", "post_center_range")
        kept = (
            "nms_type",
            "min_radius",
            "nms_thr",
            "pre_max_size",
            "post_max_size",
            "score_threshold",
            "post_center_limit_range",
        )
        ours = {key: _listed(coder[key]) for key in keys if key in coder}
        ours.setdefault("pc_range", _listed(test.get("pc_range", (0, 0))))
        return {
            "tasks": [list(task["class_names"]) for task in head["tasks"]],
            "maps": [name for name in MAPS if name == "heatmap" or name in common],
            "channels": common,
            "stride": stride,
            "norm_bbox": bool(head.get("norm_bbox", True)),
            "bbox_coder": ours,
            "test_cfg": {key: _listed(test[key]) for key in kept if key in test},
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """As `Family.settings`; `head.boxes` is the convention of the maps that its parts return."""
        found = super().settings(config)
        layout = {"layout": config["layout"]} if "layout" in config else {}
        boxes = OLDER if layout or config.get("boxes") == OLDER else MMDET3D
        return {**found, "head": {**found["head"], "boxes": boxes, **layout}}

    def trained_with(self, config: Mapping[str, Any], meta: Mapping[str, Any], source: str) -> Mapping[str, Any]:
        """As `Family.trained_with`: the convention of the boxes that the head was trained with."""
        return {**config, "boxes": boxes_of(meta)}

    def random(self, config: Mapping[str, Any], seed: int) -> Any:
        """As `Mmdet3dFamily.random`."""
        return super().random({**config, "boxes": MMDET3D}, seed)

    def in_layout(self, config: Mapping[str, Any], options: Any) -> Mapping[str, Any]:
        """As `Family.in_layout`: Autoware's."""
        if options.layout != autoware.LAYOUT:
            raise UserError(f"layout: found {options.layout!r}, expected {autoware.LAYOUT}")
        if config.get("boxes", UNKNOWN) == UNKNOWN:
            raise UserError(
                f"layout {autoware.LAYOUT}: found a checkpoint whose meta has neither mmengine_version nor mmdet3d_version, expected one: "
                "whether its boxes are from before mmdet3d 1.0 decides what is turned; save it with "
                "meta=dict(mmdet3d_version='1.4.0'), or '0.17.0'"
            )
        autoware.check(self.settings(config), options)
        return {**config, "layout": options.layout}

    def companions(self, manifest: Mapping[str, Any]) -> Mapping[str, str]:
        """As `Family.companions`: Autoware's parameter files."""
        return autoware.parameter_files(manifest) if "layout" in manifest["pipeline"]["head"] else {}

    def parts(self, network: Any, cores: Mapping[str, Any]) -> dict[str, PartModule]:
        """As `PillarFamily.parts`; in a layout the maps of a head that was trained with mmdet3d's boxes are turned."""
        found = super().parts(network, cores)
        config, last = network.config, "pts_backbone_neck_head"
        if "layout" in config and config["boxes"] != OLDER:
            found[last] = OlderMaps(cores[last], found[last].inputs, found[last].outputs)
        return found

    def recipe(self, config: Mapping[str, Any]) -> Recipe:
        """As `PillarFamily.recipe`; before a map's last convolution nothing is clipped: few cells have objects, and fewer have large
        ones (sizes 42 dB instead of 30 there, lidar-tiny)."""
        return replace(super().recipe(config), by_layer=((LAST, "max"),))

    def output_names(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """As `PillarFamily.output_names`, in Autoware's order."""
        head = settings["head"]
        return tuple(tensor for tensor, _, _ in names_of(len(head["tasks"]), head["maps"]))

    def build(self, config: Mapping[str, Any]) -> CenterPointNet:
        """As `Family.build`."""
        return CenterPointNet(config, self.name)


def _listed(value: Any) -> Any:
    return [_listed(entry) for entry in value] if isinstance(value, list | tuple) else value


FAMILY = CenterPointFamily()
