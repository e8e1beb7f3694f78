"""Makes the recording that convert.py reads: a robot with four cameras, in a layout that is not nuScenes'.

    python examples/own_data/make_recording.py --out data/recording

Your robot makes this by driving; here a generated street is rendered. README.md describes the files.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from pyquaternion import Quaternion

from qat.data.synth.generate import Moment
from qat.data.synth.rig import LIDAR_MAX_RANGE, Camera, lidar_rays, pose
from qat.data.synth.shade import Light, shade
from qat.data.synth.world import World, sample_world

START_NS = 1_760_000_000_000_000_000
PERIOD = 0.5  # seconds between annotated moments
TYPES = {  # this maker's names of what the generated street has
    "car": "PassengerCar",
    "truck": "Lorry",
    "construction_vehicle": "Excavator",
    "bus": "Coach",
    "trailer": "Trailer",
    "barrier": "Fence",
    "motorcycle": "Moped",
    "bicycle": "Pushbike",
    "pedestrian": "Person",
    "traffic_cone": "Cone",
}
# name: where it is mounted in the vehicle's frame (x forward, y left, z up; metres), its yaw in degrees, seconds before the lidar
MOUNTS = {
    "cam_front": ((0.9, 0.0, 1.45), 0.0, 0.030),
    "cam_left": ((0.4, 0.4, 1.45), 90.0, 0.022),
    "cam_rear": ((-0.5, 0.0, 1.45), 180.0, 0.014),
    "cam_right": ((0.4, -0.4, 1.45), -90.0, 0.006),
}
LIDAR_MOUNT = pose(np.eye(3), (0.3, 0.0, 1.9))  # x forward, as ROS has it: not as nuScenes mounts its own


def xyzw(rotation: np.ndarray) -> list[float]:
    """A rotation matrix as a quaternion in ROS' order."""
    w, x, y, z = Quaternion(matrix=rotation, rtol=1e-4, atol=1e-5).elements
    return [float(v) for v in (x, y, z, w)]


def cameras(width: int, height: int) -> list[Camera]:
    """Four cameras of 96 degrees."""
    focal = width / 2 / np.tan(np.deg2rad(48))
    intrinsic = np.array([[focal, 0, width / 2 - 0.5], [0, focal, height * 0.53], [0, 0, 1.0]])
    rig = []
    for name, (position, degrees, delay) in MOUNTS.items():
        yaw = np.deg2rad(degrees)
        axes = np.array([[np.sin(yaw), 0.0, np.cos(yaw)], [-np.cos(yaw), 0.0, np.sin(yaw)], [0.0, -1.0, 0.0]])
        rig.append(Camera(name, pose(axes, position), intrinsic, delay))
    return rig


def stamp(time: float) -> int:
    """Nanoseconds since 1970, to the microsecond."""
    return START_NS + round(time * 1e6) * 1000


def image(
    moment: Moment, world: World, camera: Camera, light: Light, rng: np.random.Generator, size: tuple[int, int]
) -> np.ndarray:
    """What the camera sees, uint8[h,w,3]."""
    camera2street = moment.ego2street @ camera.sensor2ego
    rays = np.ascontiguousarray(camera.rays(*size) @ camera2street[:3, :3].T.astype(np.float32))
    origin = camera2street[:3, 3].astype(np.float32)
    hit, distance = moment.caster.nearest(np.ascontiguousarray(np.broadcast_to(origin, rays.shape)), rays)
    look = (moment.colours, moment.materials, world.street, light)
    forward = moment.ego2street[:3, 0]
    return shade(moment.caster, *look, origin, forward, rays, hit, distance, (size[1], size[0]), rng)


def sweep(moment: Moment, azimuths: int, things: int) -> tuple[np.ndarray, np.ndarray]:
    """One revolution, float32[M,4]: x, y, z, reflectivity from 0 to 1; and how many of its points are on each thing."""
    lidar2street = moment.ego2street @ LIDAR_MOUNT
    directions, _ = lidar_rays(azimuths, 0.0)
    rays = np.ascontiguousarray(directions @ lidar2street[:3, :3].T.astype(np.float32))
    origins = np.ascontiguousarray(np.broadcast_to(lidar2street[:3, 3].astype(np.float32), rays.shape))
    hit, distance = moment.caster.nearest(origins, rays)
    kept = (hit >= 0) & (distance < LIDAR_MAX_RANGE)
    points = np.concatenate([directions * distance[:, None], moment.colours[hit].mean(1)[:, None]], 1)[kept]
    owners = moment.owners(hit)[kept]
    return points.astype(np.float32), np.bincount(owners[owners >= 0], minlength=things)


def make_drive(
    folder: Path, seed: tuple[int, int], keyframes: int, size: tuple[int, int], azimuths: int, begin: float
) -> None:
    """Writes one drive."""
    rng = np.random.default_rng(seed)
    times = np.arange(keyframes) * PERIOD
    world, light, rig = sample_world(rng, times), Light.sample(rng), cameras(*size)
    odom2street = world.ego2street(0.0)  # odometry begins at zero where the robot was switched on
    street2odom = np.linalg.inv(odom2street)
    for name in ("lidar", *MOUNTS):
        (folder / name).mkdir(parents=True)
    mounts = {"lidar": LIDAR_MOUNT, **{camera.name: camera.sensor2ego for camera in rig}}
    calibration: dict[str, dict[str, object]] = {
        name: {"vehicle_from_sensor": {"q_xyzw": xyzw(matrix[:3, :3]), "t": matrix[:3, 3].tolist()}}
        for name, matrix in mounts.items()
    }
    for camera in rig:
        k = camera.intrinsic
        calibration[camera.name]["fx_fy_cx_cy"] = [float(v) for v in (k[0, 0], k[1, 1], k[0, 2], k[1, 2])]
    (folder / "rig.yaml").write_text(yaml.safe_dump(calibration))
    with (folder / "odometry.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["stamp_ns", "x", "y", "z", "qx", "qy", "qz", "qw"])
        for time in np.arange(-0.1, times[-1] + 0.1, 0.05):  # 20 Hz
            there = street2odom @ world.ego2street(float(time))
            rows.writerow([stamp(begin + float(time)), *there[:3, 3].tolist(), *xyzw(there[:3, :3])])
    turn = np.arctan2(street2odom[1, 0], street2odom[0, 0])
    with (folder / "objects.jsonl").open("w") as stream:
        for time in map(float, times):
            moment = Moment(world, time)
            points, counts = sweep(moment, azimuths, len(world.things))
            points.tofile(folder / "lidar" / f"{stamp(begin + time)}.xyzi")
            for camera in rig:
                before = time - camera.delay
                picture = image(Moment(world, before), world, camera, light, rng, size)
                Image.fromarray(picture).save(folder / camera.name / f"{stamp(begin + before)}.png")
            objects = [
                {
                    "id": i,
                    "type": TYPES[thing.name],
                    "bottom_centre": (street2odom @ [*thing.at(time), 1.0])[:3].tolist(),
                    "length_width_height": list(map(float, thing.size)),
                    "heading": float(thing.yaw + turn),
                }
                for i, thing in enumerate(world.things)
                if counts[i]
            ]
            objects.append(
                {"id": -1, "type": "Ego", "bottom_centre": (street2odom @ moment.ego2street)[:3, 3].tolist()}
            )
            stream.write(json.dumps({"stamp_ns": stamp(begin + time), "objects": objects}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/recording"), help="a new folder")
    parser.add_argument("--drives", type=int, default=4)
    parser.add_argument("--keyframes", type=int, default=4, help="annotated moments of each drive, 0.5 s apart")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 300), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--azimuths", type=int, default=360, help="lidar columns")
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    for drive in range(args.drives):
        size = (args.size[0], args.size[1])
        seed = (args.seed, drive)
        make_drive(args.out / f"drive-{drive:02d}", seed, args.keyframes, size, args.azimuths, 600.0 * drive)
        print(args.out / f"drive-{drive:02d}")


if __name__ == "__main__":
    main()
