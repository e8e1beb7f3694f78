"""The nuScenes v1.0 tables (https://www.nuscenes.org/nuscenes#data-format), one record at a time."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from pyquaternion import Quaternion

from qat.data.synth.catalogue import CLASSES
from qat.data.synth.rig import CAMERAS

Record = dict[str, Any]

TABLES = (
    "attribute",
    "calibrated_sensor",
    "category",
    "ego_pose",
    "instance",
    "log",
    "map",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
    "sensor",
    "visibility",
)
ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.stopped",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "pedestrian.moving",
)
VISIBILITIES = ("v0-40", "v40-60", "v60-80", "v80-100")
SENSORS = {"LIDAR_TOP": "lidar", **dict.fromkeys(CAMERAS, "camera")}


def token(*parts: object) -> str:
    """A 32-digit token, the same for the same parts."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def rotation_to_list(rotation: np.ndarray) -> list[float]:
    """A rotation matrix as nuScenes' [w, x, y, z]."""
    return [float(v) for v in Quaternion(matrix=rotation, rtol=1e-4, atol=1e-5).elements]


def vocabulary() -> dict[str, list[Record]]:
    """The tables that do not depend on any scene."""
    return {
        "attribute": [{"token": token("attribute", n), "name": n, "description": ""} for n in ATTRIBUTES],
        "category": [{"token": token("category", c[0]), "name": c[0], "description": ""} for c in CLASSES.values()],
        "visibility": [
            {"token": str(i + 1), "level": level, "description": f"visibility of whole object is between {level[1:]}%"}
            for i, level in enumerate(VISIBILITIES)
        ],
        "sensor": [{"token": token("sensor", n), "channel": n, "modality": m} for n, m in SENSORS.items()],
    }


def link(records: list[Record]) -> None:
    """Fills `prev` and `next` of records that follow each other in time."""
    for i, record in enumerate(records):
        record["prev"] = records[i - 1]["token"] if i else ""
        record["next"] = records[i + 1]["token"] if i + 1 < len(records) else ""
