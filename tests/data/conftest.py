"""A small generated data set, and one assembled by hand."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from PIL import Image
from pyquaternion import Quaternion

from qat.data import CAMERAS
from qat.data.synth import SynthOptions, generate

SMALL = SynthOptions(
    scenes=2, seed=3, keyframes=3, width=96, height=54, azimuths=90, sweeps=1, splits={"calib": 1, "held": 1}
)


@pytest.fixture(scope="session")
def synth_root(tmp_path_factory):
    """Two generated scenes of three keyframes, tiny images."""
    return generate(tmp_path_factory.mktemp("synth") / "set", SMALL, quiet=True)


def _pose(yaw: float, translation: list[float]) -> dict:
    return {"rotation": list(Quaternion(axis=[0, 0, 1], radians=yaw).elements), "translation": translation}


@pytest.fixture
def hand_made(tmp_path):
    """Two keyframes with two earlier sweeps between, written by hand; returns the root and its tables."""
    root = tmp_path / "hand"
    version = root / "v1.0-hand"
    version.mkdir(parents=True)
    camera_axes = Quaternion(matrix=np.array([[0, 0, 1.0], [-1, 0, 0], [0, -1, 0]]))  # looks along the ego car's x
    tables: dict[str, list[dict]] = {name: [] for name in ("attribute", "visibility", "log", "map", "instance")}
    tables["category"] = [{"token": "car", "name": "vehicle.car", "description": ""}]
    tables["attribute"] = [{"token": "moving", "name": "vehicle.moving", "description": ""}]
    tables["visibility"] = [{"token": "4", "level": "v80-100", "description": ""}]
    tables["log"] = [{"token": "log", "logfile": "", "vehicle": "", "date_captured": "2020-01-01", "location": "here"}]
    tables["map"] = [{"token": "map", "category": "semantic_prior", "filename": "maps/m.png", "log_tokens": ["log"]}]
    tables["sensor"] = [{"token": "LIDAR_TOP", "channel": "LIDAR_TOP", "modality": "lidar"}]
    tables["sensor"] += [{"token": name, "channel": name, "modality": "camera"} for name in CAMERAS]
    tables["calibrated_sensor"] = [
        {
            "token": "LIDAR_TOP",
            "sensor_token": "LIDAR_TOP",
            "camera_intrinsic": [],
            **_pose(-np.pi / 2, [1.0, 0.0, 1.8]),
        }
    ]
    for name in CAMERAS:
        tables["calibrated_sensor"].append(
            {
                "token": name,
                "sensor_token": name,
                "rotation": list(camera_axes.elements),
                "translation": [1.5, 0.2, 1.5],
                "camera_intrinsic": [[80.0, 0, 47.5], [0, 80.0, 27.0], [0, 0, 1]],
            }
        )
    tables["scene"] = [
        {
            "token": "scene",
            "log_token": "log",
            "nbr_samples": 2,
            "first_sample_token": "s0",
            "last_sample_token": "s1",
            "name": "hand-0",
            "description": "",
        }
    ]
    tables["sample"] = [
        {"token": "s0", "timestamp": 0, "prev": "", "next": "s1", "scene_token": "scene"},
        {"token": "s1", "timestamp": 500_000, "prev": "s0", "next": "", "scene_token": "scene"},
    ]
    tables["ego_pose"], tables["sample_data"] = [], []
    rng = np.random.default_rng(0)

    def add(channel: str, time: int, sample: str, key: bool, ego: dict) -> None:
        token = f"{channel}-{time}"
        suffix, fileformat = (".pcd.bin", "pcd") if channel == "LIDAR_TOP" else (".jpg", "jpg")
        name = f"samples/{channel}/{time}{suffix}"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if channel == "LIDAR_TOP":
            points = rng.uniform(-20, 20, (60, 5)).astype(np.float32)
            points[0, :3] = [0.5, -0.5, 0.0]  # close to the sensor
            points[1, :3] = [60.0, 0.0, 0.0]  # out of range
            points.tofile(root / name)
        else:
            Image.fromarray(rng.integers(0, 255, (54, 96, 3), np.uint8)).save(root / name)
        tables["ego_pose"].append({"token": token, "timestamp": time, **ego})
        tables["sample_data"].append(
            {
                "token": token,
                "sample_token": sample,
                "ego_pose_token": token,
                "calibrated_sensor_token": channel,
                "timestamp": time,
                "fileformat": fileformat,
                "is_key_frame": key,
                "height": 54 if fileformat == "jpg" else 0,
                "width": 96 if fileformat == "jpg" else 0,
                "filename": name,
                "prev": "",
                "next": "",
            }
        )

    for time, sample in ((0, "s0"), (500_000, "s1")):
        for name in CAMERAS:
            add(name, time - 20_000, sample, True, _pose(0.3 + time * 1e-7, [100 + time * 8e-6 - 0.2, 50.0, 0.0]))
    lidar_start = len(tables["sample_data"])
    for time, sample, key in ((0, "s0", True), (150_000, "s1", False), (300_000, "s1", False), (500_000, "s1", True)):
        add("LIDAR_TOP", time, sample, key, _pose(0.3 + time * 1e-7, [100 + time * 8e-6, 50.0, 0.0]))
    chain = tables["sample_data"][lidar_start:]
    for before, after in itertools.pairwise(chain):
        before["next"], after["prev"] = after["token"], before["token"]
    tables["instance"] = [
        {
            "token": "i",
            "category_token": "car",
            "nbr_annotations": 2,
            "first_annotation_token": "a0",
            "last_annotation_token": "a1",
        }
    ]
    tables["sample_annotation"] = [
        {
            "token": f"a{k}",
            "sample_token": f"s{k}",
            "instance_token": "i",
            "visibility_token": "4",
            "attribute_tokens": ["moving"],
            "translation": [110.0 + 2.0 * k, 52.0, 0.9],
            "size": [2.0, 4.5, 1.6],
            "rotation": list(Quaternion(axis=[0, 0, 1], radians=0.5).elements),
            "prev": "" if k == 0 else "a0",
            "next": "a1" if k == 0 else "",
            "num_lidar_pts": 5,
            "num_radar_pts": 0,
        }
        for k in range(2)
    ]
    (root / "maps").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / "maps" / "m.png")

    def write() -> None:
        for name, records in tables.items():
            (version / f"{name}.json").write_text(json.dumps(records))
        (version / "splits.json").write_text(json.dumps({"hand": ["hand-0"]}))

    write()
    return root, tables, write
