"""CenterPoint over pillars without torch: pillars, the scatter, boxes of heat maps.

    points ─► (voxelize) ─► input_features ─► pts_voxel_encoder ─► pillar_features ─► (scatter) ─► spatial_features
    spatial_features ─► pts_backbone_neck_head ─► heatmap, reg, height, dim, rot, vel

The names and their order are those that Autoware's runtime loads; of several tasks they are `{map}_{task}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qat.boxes.centerhead import decode, maps_from_tensors
from qat.boxes.detections import Detections
from qat.boxes.overlap import nms_rotated
from qat.core.checks import either, flag, listed, null, number, section, text
from qat.families.centerpoint import autoware
from qat.families.centerpoint.autoware import Thresholds, older
from qat.families.flow import InUnit
from qat.families.mmdet3d.description import OLDER
from qat.families.mmdet3d.lidar import PillarFlow, pillar_plan, pillar_settings
from qat.plan import Plan

MAPS = tuple(autoware.MAPS)
CONVENTION = "mmdet3d"
# unit, largest difference of FP32 runners, largest root mean square where one rounds
UNITS: dict[str, tuple[str, float, float]] = {
    "heatmap": ("probability", 1e-3, 0.03),
    "reg": ("cells", 1e-3, 0.1),
    "height": ("m", 1e-3, 0.2),
    "dim": ("log m", 1e-3, 0.15),
    "rot": ("rad", 1e-3, 0.3),
    "vel": ("m/s", 1e-3, 0.5),
}
HOT = 0.1  # heat above which a cell is an object's
_HEAD = section(
    optional={"layout": text},
    tasks=listed(listed(text, 1), 1),
    maps=listed(text, 1),
    channels=section(),
    stride=number(1, 1024, whole=True),
    norm_bbox=flag,
    boxes=text,
    bbox_coder=section(
        optional={"score_threshold": number(0, 1)},
        max_num=number(1, 1e6, whole=True),
        out_size_factor=number(1, 1024, whole=True),
        voxel_size=listed(number(1e-3, 100), 2),
        pc_range=listed(number(), 2),
        post_center_range=listed(number(), 6, 6),
    ),
    test_cfg=section(
        optional={
            "min_radius": either(null, listed(number(0, 1e6), 1)),
            "nms_thr": number(0, 1),
            "pre_max_size": number(1, 1e9, whole=True),
            "score_threshold": number(0, 1),
        },
        nms_type=text,
        post_max_size=number(1, 1e9, whole=True),
    ),
)


def names_of(tasks: int, maps: Sequence[str]) -> list[tuple[str, int, str]]:
    """(tensor, task, map) of every output in order."""
    return [(name if tasks == 1 else f"{name}_{task}", task, name) for task in range(tasks) for name in maps]


def suppress(boxes: np.ndarray, scores: np.ndarray, threshold: float, pre: int, post: int) -> np.ndarray:
    """mmdet3d's `nms_bev` of float[K,≥7] boxes, whose yaw turns from x towards y: kept indices, best first."""
    order = np.argsort(-scores, kind="stable")[:pre]
    return order[nms_rotated(boxes[order][:, [0, 1, 3, 4, 6]], scores[order], threshold)][:post]


class CenterPoint(PillarFlow):
    """The host's side of a pillar CenterPoint."""

    section = staticmethod(pillar_settings(head=_HEAD))
    state_names = ("pts_voxel_encoder.", "pts_backbone.", "pts_neck.", "pts_bbox_head.")

    @classmethod
    def plan_of(cls, settings: Mapping[str, Any]) -> Plan:
        """As `PillarFlow.plan_of`."""
        head = settings["head"]
        maps = {
            tensor: len(head["tasks"][task]) if name == "heatmap" else head["channels"][name]
            for tensor, task, name in names_of(len(head["tasks"]), head["maps"])
        }
        return pillar_plan(settings, maps, dict.fromkeys(maps, head["stride"]))

    def decode(self, tensors: Mapping[str, np.ndarray]) -> Detections:
        """Boxes from the head's maps, whose rows are y."""
        head = self.settings["head"]
        several = {}
        for task in range(len(head["tasks"])):
            maps = self.maps_of(tensors, task)
            several.update({f"{name}_{task}": value.swapaxes(2, 3) for name, value in maps.items()})
        return decode(maps_from_tensors(several), head, suppress, CONVENTION)

    def maps_of(self, tensors: Mapping[str, Any], task: int) -> dict[str, Any]:
        """One task's maps by their names, in mmdet3d's convention."""
        head = self.settings["head"]
        names = names_of(len(head["tasks"]), head["maps"])
        maps = {name: tensors[tensor] for tensor, own, name in names if own == task}
        return older(maps) if head["boxes"] == OLDER else maps

    def autoware_boxes(self, tensors: Mapping[str, np.ndarray], thresholds: Thresholds | None = None) -> Detections:
        """Boxes as Autoware's node makes them of the same maps (`qat.families.centerpoint.autoware.decode`), of a head with one task.

        thresholds: None for those of the parameter files that `bevqat export --layout autoware` writes.
        """
        maps = older(self.maps_of(tensors, 0))
        return autoware.decode(maps, self.settings, thresholds or Thresholds.of(self.settings))

    def in_units(self, tensors: Mapping[str, np.ndarray]) -> dict[str, InUnit]:
        """As `Flow.in_units`, of maps in mmdet3d's convention; yaw where the vector that gives it is long enough to mean one."""
        found = {}
        head = self.settings["head"]
        tasks = [self.maps_of(tensors, task) for task in range(len(head["tasks"]))]
        for tensor, task, name in names_of(len(tasks), head["maps"]):
            value, period = tasks[task][name], 0.0
            if name == "heatmap":
                value = 1 / (1 + np.exp(-value.astype(np.float64)))
            elif name == "rot":
                sure = np.hypot(value[:, 0], value[:, 1]) >= autoware.SURE
                value, period = np.where(sure, np.arctan2(value[:, 0], value[:, 1]), np.nan)[:, None], 2 * np.pi
            found[tensor] = InUnit(value, *UNITS[name], period)
        return found

    def regions(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As `Flow.regions`: cells of the maps with a pillar in them, and without."""
        stride = self.settings["head"]["stride"]
        filled = tensors["spatial_features"].any(axis=1)
        batch, ny, nx = filled.shape
        filled = filled[:, : ny // stride * stride, : nx // stride * stride]
        cells = filled.reshape(batch, ny // stride, stride, nx // stride, stride).any((2, 4))[:, None]
        return {"occupied": cells, "empty": ~cells}

    def objects(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Which values of the maps lie in a cell whose heat, of any class of the task, is over HOT."""
        head, found = self.settings["head"], {}
        names = names_of(len(head["tasks"]), head["maps"])
        for tensor, task, _ in names:
            heat = next(tensors[other] for other, same, name in names if same == task and name == "heatmap")
            there = heat.max(axis=1, keepdims=True) > np.log(HOT / (1 - HOT))
            found[tensor] = np.broadcast_to(there, tensors[tensor].shape)
        return found


FLOW = CenterPoint
