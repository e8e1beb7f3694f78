"""Turns the recording of make_recording.py into nuScenes-format data. A template: `Drive` reads, the tables above it say what things mean.

    python examples/own_data/convert.py --recording data/recording --out data/robot

Four things go wrong in every first converter, and each has its place below: units and order of quaternions (`matrix`), the
direction of an extrinsic (`Drive.calibration`), the lidar's axes (`TURN`), and where a box has its origin (`Drive.boxes`).
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pyquaternion import Quaternion

from qat.data.writer import Box, Calibration, NuScenesWriter, Picture

CAMERAS = ["cam_front", "cam_left", "cam_rear", "cam_right"]  # config.yaml lists the same

# The recording's types → the ten classes that nuScenes' metric knows. None: boxes to leave out. What is not named here is
# refused, so that a new type is a decision and not an accident.
CLASSES = {
    "PassengerCar": "car",
    "Lorry": "truck",
    "Excavator": "construction_vehicle",
    "Coach": "bus",
    "Trailer": "trailer",
    "Fence": "barrier",
    "Moped": "motorcycle",
    "Pushbike": "bicycle",
    "Person": "pedestrian",
    "Cone": "traffic_cone",
    "Ego": None,
}

# The network's BEV grid lies in the lidar's frame. One trained on nuScenes knows a lidar whose x points to the vehicle's
# right and y forward; this recording's, as ROS has it, has x forward and y left. So points are turned by 90 degrees, and
# the lidar's mounting with them: the scene is the same, the boxes do not come out rotated.
TURN = np.array([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # the recording's lidar axes → nuScenes'


def matrix(xyzw: Any, translation: Any) -> np.ndarray:
    """A pose [4,4]. Quaternions here are x, y, z, w, as in ROS; pyquaternion and nuScenes have w first."""
    x, y, z, w = map(float, xyzw)
    pose = np.eye(4)
    pose[:3, :3] = Quaternion(w, x, y, z).rotation_matrix
    pose[:3, 3] = [float(v) for v in translation]
    return pose


class Drive:
    """One drive's files. Stamps are nanoseconds, in file names and tables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rig = yaml.safe_load((folder / "rig.yaml").read_text())
        with (folder / "odometry.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        self.stamps = np.array([int(row["stamp_ns"]) for row in rows])
        self.poses = [matrix([row[f"q{k}"] for k in "xyzw"], [row[k] for k in "xyz"]) for row in rows]
        self.moments = [json.loads(line) for line in (folder / "objects.jsonl").read_text().splitlines()]
        self.images = {name: np.array(sorted(int(p.stem) for p in (folder / name).glob("*.png"))) for name in CAMERAS}

    def mounting(self, sensor: str) -> np.ndarray:
        """Sensor → vehicle. If yours is vehicle → sensor (OpenCV's extrinsics are world → camera), invert it here."""
        given = self.rig[sensor]["vehicle_from_sensor"]
        return matrix(given["q_xyzw"], given["t"])

    def calibration(self) -> dict[str, Calibration]:
        """Of the images as they are stored. Rectify lens distortion away before; resizing scales K too."""
        found = {}
        for name in CAMERAS:
            fx, fy, cx, cy = self.rig[name]["fx_fy_cx_cy"]
            found[name] = Calibration([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], camera2ego=self.mounting(name))
        return found

    def pose(self, stamp: int) -> np.ndarray:
        """Vehicle → odometry's frame at a sensor's own time, between the two rows around it."""
        after = int(np.clip(np.searchsorted(self.stamps, stamp), 1, len(self.stamps) - 1))
        t0, t1 = self.stamps[after - 1 : after + 1]
        part = (stamp - t0) / (t1 - t0)
        before, later = self.poses[after - 1], self.poses[after]
        between = np.eye(4)
        turned = Quaternion.slerp(Quaternion(matrix=before), Quaternion(matrix=later), part)
        between[:3, :3] = turned.rotation_matrix
        between[:3, 3] = (1 - part) * before[:3, 3] + part * later[:3, 3]
        return between

    def picture(self, camera: str, stamp: int) -> Picture:
        """The camera's image nearest to a moment, with the time and the pose at which it was taken."""
        taken = int(self.images[camera][np.abs(self.images[camera] - stamp).argmin()])
        return Picture(self.folder / camera / f"{taken}.png", taken // 1000, self.pose(taken))

    def points(self, stamp: int) -> np.ndarray:
        """x, y, z, intensity in nuScenes' lidar axes. Reflectivity is 0 to 1 here; nuScenes has 0 to 255."""
        points = np.fromfile(self.folder / "lidar" / f"{stamp}.xyzi", np.float32).reshape(-1, 4)
        points[:, :3] = points[:, :3] @ TURN[:3, :3].T
        points[:, 3] *= 255
        return points

    def boxes(self, objects: list[dict[str, Any]]) -> list[Box]:
        """In odometry's frame. The recording gives the bottom's centre, nuScenes the middle."""
        found = []
        for thing in objects:
            if thing["type"] in CLASSES and CLASSES[thing["type"]] is None:
                continue
            x, y, z = thing["bottom_centre"]
            size = thing["length_width_height"]
            found.append(Box(thing["type"], (x, y, z + size[2] / 2), size, thing["heading"], track=thing["id"]))
        return found


def convert(recording: Path, out: Path, calib: int) -> None:
    """Writes every drive as a scene: the first `calib` into split calib, the others into eval."""
    folders = sorted(path.parent for path in recording.glob("*/rig.yaml"))
    with NuScenesWriter(out, "v1.0-robot", cameras=CAMERAS, classes=CLASSES) as writer:
        for number, folder in enumerate(folders):
            drive = Drive(folder)
            scene = writer.add_scene(
                folder.name,
                split="calib" if number < calib else "eval",
                calibration=drive.calibration(),
                lidar2ego=drive.mounting("lidar") @ np.linalg.inv(TURN),
                vehicle="robot",
            )
            for moment in drive.moments:
                stamp = moment["stamp_ns"]
                images = {name: drive.picture(name, stamp) for name in CAMERAS}
                boxes = drive.boxes(moment["objects"])
                scene.add_keyframe(stamp // 1000, images, drive.points(stamp), drive.pose(stamp), boxes)
            print(f"{folder.name}: {scene.keyframes} keyframes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recording", type=Path, default=Path("data/recording"))
    parser.add_argument("--out", type=Path, default=Path("data/robot"), help="a new folder")
    parser.add_argument("--calib", type=int, default=2, metavar="N", help="drives to calibrate on (default 2)")
    args = parser.parse_args()
    convert(args.recording, args.out, args.calib)


if __name__ == "__main__":
    main()
