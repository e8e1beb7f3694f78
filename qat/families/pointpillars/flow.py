"""PointPillars without torch: pillars, the scatter, anchors.

    points ─► (voxelize) ─► input_features ─► pts_voxel_encoder ─► pillar_features ─► (scatter) ─► spatial_features
    spatial_features ─► pts_backbone_neck_head ─► cls_score0, bbox_pred0, dir_cls_pred0

The maps have MMDeploy's names (1.2 and later).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qat.boxes.detections import Detections
from qat.core.checks import flag, listed, number, section
from qat.families.mmdet3d.lidar import PillarFlow, pillar_plan, pillar_settings
from qat.families.pointpillars.anchors import AnchorDecoder
from qat.plan import Plan

CLASSES, BOXES, DIRECTIONS = "cls_score0", "bbox_pred0", "dir_cls_pred0"
HOT = 0.1  # score above which a place belongs to an object
_ANCHORS = section(
    ranges=listed(listed(number(), 6, 6), 1),
    sizes=listed(listed(number(), 3, 3), 1),
    rotations=listed(number(), 1),
    scale=number(1e-3, 1e3),
    custom_values=listed(number(), 0, 8),
    size_per_range=flag,
    aligned=flag,
    align_corner=flag,
)
_HEAD = section(
    classes=number(1, 1000, whole=True),
    sigmoid=flag,
    directions=flag,
    rotate=flag,
    nms_pre=number(-1, 1e9, whole=True),
    nms_thr=number(0, 1),
    score_thr=number(0, 1),
    max_num=number(1, 1e6, whole=True),
    dir_offset=number(),
    dir_limit_offset=number(),
    stride=number(1, 1024, whole=True),
    anchors=_ANCHORS,
)


class PointPillars(PillarFlow):
    """The host's side of PointPillars."""

    section = staticmethod(pillar_settings(head=_HEAD))
    state_names = ("voxel_encoder.", "bbox_head.", "pts_voxel_encoder.", "pts_bbox_head.")

    def __init__(self, settings: Mapping[str, Any], threads: int = 0, source: str = "pipeline") -> None:
        super().__init__(settings, threads, source)
        self._decoder = AnchorDecoder(settings["head"])

    @classmethod
    def plan_of(cls, settings: Mapping[str, Any]) -> Plan:
        """As `PillarFlow.plan_of`."""
        head = settings["head"]
        anchors = head["anchors"]
        each = len(anchors["sizes"]) * len(anchors["rotations"])
        maps = {CLASSES: each * head["classes"], BOXES: each * (7 + len(anchors["custom_values"]))}
        if head["directions"]:
            maps[DIRECTIONS] = each * 2
        return pillar_plan(settings, maps, dict.fromkeys(maps, head["stride"]))

    def decode(self, tensors: Mapping[str, np.ndarray]) -> Detections:
        """Boxes from the head's maps."""
        return self._decoder(tensors[CLASSES], tensors[BOXES], tensors.get(DIRECTIONS))

    def objects(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Which values of the maps are at a place where any anchor's score is over HOT."""
        there = tensors[CLASSES].max(axis=1, keepdims=True) > np.log(HOT / (1 - HOT))
        return {name: np.broadcast_to(there, tensors[name].shape) for name in self.plan.outputs}


FLOW = PointPillars
