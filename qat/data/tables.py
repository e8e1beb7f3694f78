"""The nuScenes v1.0 tables (https://www.nuscenes.org/nuscenes#data-format): their records, and a folder of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pyquaternion import Quaternion

from qat.core.files import atomic_directory

Record = dict[str, Any]

LIDAR = "LIDAR_TOP"  # the one lidar that the devkit and this package read
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
# The ten classes of nuScenes' detection task, each with a category that the devkit assigns to it.
CATEGORIES = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "construction_vehicle": "vehicle.construction",
    "bus": "vehicle.bus.rigid",
    "trailer": "vehicle.trailer",
    "barrier": "movable_object.barrier",
    "motorcycle": "vehicle.motorcycle",
    "bicycle": "vehicle.bicycle",
    "pedestrian": "human.pedestrian.adult",
    "traffic_cone": "movable_object.trafficcone",
}


def token(*parts: object) -> str:
    """A 32-digit token; equal parts give equal tokens."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def rotation_to_list(rotation: np.ndarray) -> list[float]:
    """Converts a rotation matrix to nuScenes' [w, x, y, z]."""
    return [float(v) for v in Quaternion(matrix=rotation, rtol=1e-4, atol=1e-5).elements]


def vocabulary(cameras: Iterable[str]) -> dict[str, list[Record]]:
    """The tables that do not depend on any scene, for one lidar and these cameras."""
    sensors = {LIDAR: "lidar", **dict.fromkeys(cameras, "camera")}
    return {
        "attribute": [{"token": token("attribute", n), "name": n, "description": ""} for n in ATTRIBUTES],
        "category": [{"token": token("category", n), "name": n, "description": ""} for n in CATEGORIES.values()],
        "visibility": [
            {"token": str(i + 1), "level": level, "description": f"visibility of whole object is between {level[1:]}%"}
            for i, level in enumerate(VISIBILITIES)
        ],
        "sensor": [{"token": token("sensor", n), "channel": n, "modality": m} for n, m in sensors.items()],
    }


def link(records: list[Record]) -> None:
    """Fills `prev` and `next` of records that follow each other in time."""
    for i, record in enumerate(records):
        record["prev"] = records[i - 1]["token"] if i else ""
        record["next"] = records[i + 1]["token"] if i + 1 < len(records) else ""


class SceneTables:
    """One scene's records, collected keyframe by keyframe in time order.

    Args:
        key: unique among the data set's scenes; tokens are made of it, so the same scene has the
            same tokens.
        name: the scene's.
        cameras: channels, in the order of their records.
    """

    def __init__(self, key: Sequence[object], name: str, cameras: Iterable[str]) -> None:
        self.key, self.name = tuple(key), name
        self.samples: list[Record] = []
        self.poses: list[Record] = []
        self.data: dict[str, list[Record]] = {channel: [] for channel in (LIDAR, *cameras)}
        self.annotations: dict[Hashable, list[Record]] = {}
        self.calibrated = {channel: token("calibrated", *self.key, channel) for channel in self.data}

    def sample_token(self, frame: int) -> str:
        """The token of the keyframe with this number, which need not exist yet."""
        return token("sample", *self.key, frame)

    def add_sample(self, frame: int, timestamp: int) -> None:
        """A keyframe, at `timestamp` in microseconds."""
        scene = token("scene", *self.key)
        self.samples.append({"token": self.sample_token(frame), "timestamp": timestamp, "scene_token": scene})

    def add_data(
        self,
        channel: str,
        timestamp: int,
        frame: int,
        filename: str,
        ego2global: np.ndarray,
        size: tuple[int, int] = (0, 0),
        is_key: bool = True,
    ) -> None:
        """One sensor's reading for keyframe `frame`, or for a sweep before it.

        Args:
            timestamp: microseconds.
            filename: below the data set's root.
            ego2global: float[4,4] at `timestamp`.
            size: height and width of an image.
        """
        pose = token("pose", *self.key, channel, timestamp)
        self.poses.append(
            {
                "token": pose,
                "timestamp": timestamp,
                "rotation": rotation_to_list(ego2global[:3, :3]),
                "translation": ego2global[:3, 3].tolist(),
            }
        )
        self.data[channel].append(
            {
                "token": token("data", *self.key, channel, timestamp),
                "sample_token": self.sample_token(frame),
                "ego_pose_token": pose,
                "calibrated_sensor_token": self.calibrated[channel],
                "timestamp": timestamp,
                "fileformat": "pcd" if channel == LIDAR else filename.rpartition(".")[2],
                "is_key_frame": is_key,
                "height": size[0],
                "width": size[1],
                "filename": filename,
            }
        )

    def add_annotation(
        self,
        instance: Hashable,
        frame: int,
        centre: np.ndarray,
        size: Sequence[float],
        yaw: float,
        visibility: int,
        attribute: str | None,
        lidar_points: int,
        radar_points: int = 0,
    ) -> None:
        """A box in keyframe `frame`.

        Args:
            instance: the object; its boxes in several keyframes are one track, from which velocities come.
            centre: x, y, z of the box's middle in the global frame.
            size: length, width, height.
            yaw: the heading, anticlockwise from the global x.
            visibility: 1 to 4, into `VISIBILITIES`.
        """
        length, width, height = size
        self.annotations.setdefault(instance, []).append(
            {
                "token": token("annotation", *self.key, frame, instance),
                "sample_token": self.sample_token(frame),
                "instance_token": token("instance", *self.key, instance),
                "visibility_token": str(visibility),
                "attribute_tokens": [token("attribute", attribute)] if attribute else [],
                "translation": [round(float(v), 4) for v in centre],
                "size": [round(float(v), 4) for v in (width, length, height)],
                "rotation": [round(float(v), 7) for v in (np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2))],
                "num_lidar_pts": lidar_points,
                "num_radar_pts": radar_points,
            }
        )

    def finish(
        self,
        description: str,
        log: Mapping[str, str],
        map_file: str,
        classes: Mapping[Hashable, str],
        calibration: Iterable[tuple[str, np.ndarray, list[list[float]]]],
    ) -> dict[str, list[Record]]:
        """The scene's records, linked.

        Args:
            log: vehicle, date_captured, location.
            map_file: a mask below the data set's root.
            classes: for each instance with boxes, one of `CATEGORIES`.
            calibration: channel, sensor2ego float[4,4], and the intrinsic matrix or an empty list.
        """
        link(self.samples)
        for records in self.data.values():
            link(records)
        instances = []
        for instance, records in self.annotations.items():
            link(records)
            instances.append(
                {
                    "token": records[0]["instance_token"],
                    "category_token": token("category", CATEGORIES[classes[instance]]),
                    "nbr_annotations": len(records),
                    "first_annotation_token": records[0]["token"],
                    "last_annotation_token": records[-1]["token"],
                }
            )
        log_token = token("log", *self.key)
        return {
            "scene": [
                {
                    "token": token("scene", *self.key),
                    "log_token": log_token,
                    "nbr_samples": len(self.samples),
                    "first_sample_token": self.samples[0]["token"],
                    "last_sample_token": self.samples[-1]["token"],
                    "name": self.name,
                    "description": description,
                }
            ],
            "sample": self.samples,
            "sample_data": [record for records in self.data.values() for record in records],
            "ego_pose": self.poses,
            "sample_annotation": [record for records in self.annotations.values() for record in records],
            "instance": instances,
            "log": [{"token": log_token, "logfile": self.name, **log}],
            "map": [
                {
                    "token": token("map", *self.key),
                    "category": "semantic_prior",
                    "filename": map_file,
                    "log_tokens": [log_token],
                }
            ],
            "calibrated_sensor": [
                {
                    "token": self.calibrated[channel],
                    "sensor_token": token("sensor", channel),
                    "translation": sensor2ego[:3, 3].tolist(),
                    "rotation": rotation_to_list(sensor2ego[:3, :3]),
                    "camera_intrinsic": intrinsic,
                }
                for channel, sensor2ego, intrinsic in calibration
            ],
        }


def write_tables(
    folder: Path,
    cameras: Iterable[str],
    scenes: Iterable[Mapping[str, list[Record]]],
    splits: Mapping[str, list[str]],
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Writes the 13 tables and splits.json into `folder` (root / version), whole or not at all.

    Args:
        scenes: results of `SceneTables.finish`, in the data set's order.
        splits: names of each split's scenes.
        recipe: how the data was made; recipe.json.
    """
    tables: dict[str, list[Record]] = {name: [] for name in TABLES}
    tables.update(vocabulary(cameras))
    for scene in scenes:
        for name, records in scene.items():
            tables[name].extend(records)
    with atomic_directory(folder) as temporary:
        for name, records in tables.items():
            (temporary / f"{name}.json").write_text(json.dumps(records, separators=(",", ":")))
        (temporary / "splits.json").write_text(json.dumps(splits, indent=1) + "\n")
        if recipe is not None:
            (temporary / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
