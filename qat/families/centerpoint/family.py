"""CenterPoint over pillars for the stages that run PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qat.core.errors import UserError
from qat.families.centerpoint.flow import MAPS, names_of
from qat.families.mmdet3d.description import plain
from qat.families.mmdet3d.network import PillarNet
from qat.families.mmdet3d.pillar_family import PillarFamily


class CenterPointNet(PillarNet):
    """`PillarNet` whose maps come in Autoware's order, task after task."""

    def detect(self, spatial_features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `PillarNet.detect`: heatmap, reg, height, dim, rot, vel of each task."""
        x = self._of("backbone")(spatial_features)
        x = self._of("neck")(x)
        return tuple(task[0][name] for task in self._of("bbox_head")(x) for name in MAPS if name in task[0])


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
