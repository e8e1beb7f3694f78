"""examples/own_data: what the converter writes is what the recording says, by the recording's own conventions."""

import copy
import importlib.util
import json

import numpy as np
import pytest
import yaml
from docs_pages import ROOT
from nuscenes.utils.geometry_utils import BoxVisibility, view_points
from pyquaternion import Quaternion

from qat.boxes.detections import Detections
from qat.core.errors import UserError
from qat.data import NuScenesDataset
from qat.data.overlay import draw_sample
from qat.evaluate import evaluate_detections
from qat.families.bevfusion.config import load_config

EXAMPLE = ROOT / "examples" / "own_data"


def load(name):
    spec = importlib.util.spec_from_file_location(f"own_data_{name}", EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The recording of two drives, and what convert.py makes of it."""
    root = tmp_path_factory.mktemp("robot")
    make = load("make_recording")
    for drive in range(2):
        make.make_drive(root / "recording" / f"drive-{drive}", (5, drive), 2, (96, 60), 90, 600.0 * drive)
    load("convert").convert(root / "recording", root / "robot", calib=1)
    return root / "recording", root / "robot"


@pytest.fixture(scope="module")
def config():
    """The example's, for images of 96 pixels instead of 480."""
    config = load_config(EXAMPLE / "config.yaml")
    (augment,) = [step for step in config["data"]["test"]["pipeline"] if step["type"] == "ImageAug3D"]
    assert np.allclose(augment["resize_lim"], 352 / 480)
    augment["resize_lim"] = [352 / 96] * 2
    return config


def pose(xyzw, translation):
    """[4,4] out of the quaternion's formula, written out."""
    x, y, z, w = map(float, xyzw)
    rotation = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, np.asarray(translation, float)
    return matrix


def odometry_at(folder, stamp):
    """The drive goes straight at one speed: a line through the first row and the last."""
    rows = np.genfromtxt(folder / "odometry.csv", delimiter=",", skip_header=1)
    stamps = [int(line.split(",")[0]) for line in (folder / "odometry.csv").read_text().splitlines()[1:]]
    part = (stamp - stamps[0]) / (stamps[-1] - stamps[0])
    return pose(rows[0, 4:8], rows[0, 1:4] + part * (rows[-1, 1:4] - rows[0, 1:4]))


def corners_in_odometry(thing):
    """Eight corners of an object as the recording describes it, [8,3], sorted."""
    length, width, height = thing["length_width_height"]
    c, s = np.cos(thing["heading"]), np.sin(thing["heading"])
    ends = [(x, y, z) for x in (-length / 2, length / 2) for y in (-width / 2, width / 2) for z in (0, height)]
    return np.array([[c * x - s * y, s * x + c * y, z] for x, y, z in ends]) + thing["bottom_centre"]


def test_the_devkit_projects_converted_boxes_to_where_the_recordings_own_conventions_do(folders, config):
    recording, robot = folders
    nusc = NuScenesDataset(robot, "all", config).nusc
    compared = 0
    for scene in nusc.scene:
        folder = recording / scene["name"]
        rig = yaml.safe_load((folder / "rig.yaml").read_text())
        moments = [json.loads(line) for line in (folder / "objects.jsonl").read_text().splitlines()]
        token = scene["first_sample_token"]
        for moment in moments:
            sample = nusc.get("sample", token)
            things = [thing for thing in moment["objects"] if thing["type"] != "Ego"]
            assert sample["timestamp"] * 1000 == moment["stamp_ns"] and len(sample["anns"]) == len(things)
            for camera in config["cameras"]:
                data = sample["data"][camera]
                stamp = nusc.get("sample_data", data)["timestamp"] * 1000
                assert (folder / camera / f"{stamp}.png").is_file()
                _, boxes, intrinsic = nusc.get_sample_data(
                    data, box_vis_level=BoxVisibility.NONE
                )  # all boxes, in the camera's frame
                by_token = {box.token: box for box in boxes}
                mount = rig[camera]["vehicle_from_sensor"]
                to_camera = np.linalg.inv(odometry_at(folder, stamp) @ pose(mount["q_xyzw"], mount["t"]))
                fx, fy, cx, cy = rig[camera]["fx_fy_cx_cy"]
                centres = np.array(
                    [nusc.get("sample_annotation", annotation)["translation"] for annotation in sample["anns"]]
                )
                for thing in things:
                    away = np.abs(centres - thing["bottom_centre"] - [0, 0, thing["length_width_height"][2] / 2]).max(1)
                    assert away.min() < 1e-3  # the odometry's frame is the global one
                    annotation = sample["anns"][int(away.argmin())]
                    local = corners_in_odometry(thing) @ to_camera[:3, :3].T + to_camera[:3, 3]
                    if (local[:, 2] < 1).any():
                        continue
                    ours = np.stack([fx * local[:, 0] / local[:, 2] + cx, fy * local[:, 1] / local[:, 2] + cy], 1)
                    theirs = view_points(by_token[annotation].corners(), intrinsic, normalize=True)[:2].T
                    distances = np.linalg.norm(ours[:, None] - theirs[None], axis=2)
                    assert distances.min(0).max() < 0.1 and distances.min(1).max() < 0.1  # pixels; tables have 0.1 mm
                    compared += 1
            token = sample["next"]
    assert compared > 20


def test_the_lidars_axes_are_turned_to_nuscenes_and_its_points_stay_in_the_boxes(folders, config):
    recording, robot = folders
    dataset = NuScenesDataset(robot, "calib", config)
    sample = dataset[0]
    forward = np.linalg.inv(sample.lidar2ego)[:3, :3] @ [1.0, 0.0, 0.0]
    np.testing.assert_allclose(forward, (0, 1, 0), atol=1e-6)  # the vehicle's forward is the lidar's y
    raw = np.fromfile(min((recording / "drive-0/lidar").iterdir()), np.float32).reshape(-1, 4)
    kept = dataset._read_points(
        dataset.nusc.get("sample_data", dataset.nusc.get("sample", sample.token)["data"]["LIDAR_TOP"])
    )
    np.testing.assert_allclose(kept[:, :4], np.stack([-raw[:, 1], raw[:, 0], raw[:, 2], raw[:, 3] * 255], 1), rtol=1e-6)
    assert (sample.gt_points > 0).mean() > 0.9  # the recording lists what the lidar has hit


def test_its_four_cameras_make_a_sheet_of_four(folders, config):
    sample = NuScenesDataset(folders[1], "eval", config)[0]
    assert sample.cameras == ("cam_front", "cam_left", "cam_rear", "cam_right") and sample.img.shape == (4, 3, 128, 352)
    assert draw_sample(sample).shape == (2 * 128, 2 * 352, 3)


def test_its_annotations_as_detections_are_perfect_for_the_classes_it_has(folders, config):
    dataset = NuScenesDataset(folders[1], "all", config)
    truth = [dataset[i] for i in range(len(dataset))]
    found = {s.token: Detections(s.gt_boxes, np.ones(len(s.gt_boxes), np.float32), s.gt_labels) for s in truth}
    figures = evaluate_detections(dataset, found)
    seen = [name for name, ap in figures["per_class_ap"].items() if ap > 0]
    assert len(seen) >= 3 and min(figures["per_class_ap"][name] for name in seen) > 0.99
    assert np.isclose(figures["map"], sum(figures["per_class_ap"].values()) / 10)  # a class without objects counts 0


def test_a_config_with_classes_that_the_metric_does_not_know_is_refused(folders, config):
    dataset = NuScenesDataset(folders[1], "calib", config | {"object_classes": ["car", "forklift"]})
    nothing = Detections(np.zeros((0, 9), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    with pytest.raises(UserError, match="object_classes: found forklift, expected nuScenes' ten"):
        evaluate_detections(dataset, {dataset.tokens[0]: nothing})


def test_the_config_is_camera_tinys_but_for_the_robots_cameras_and_resize():
    ours, tiny = load_config(EXAMPLE / "config.yaml"), load_config(ROOT / "model/camera-tiny/config.yaml")
    ours = copy.deepcopy(ours)
    assert ours.pop("cameras") == load("convert").CAMERAS
    for ours_step, step in zip(ours["data"]["test"]["pipeline"], tiny["data"]["test"]["pipeline"], strict=True):
        if step["type"] == "ImageAug3D":
            ours_step["resize_lim"] = step["resize_lim"]
    assert ours == {key: value for key, value in tiny.items() if key != "native_size"}


def test_quaternions_are_read_in_ros_order():
    turn = Quaternion(axis=[0.2, -0.5, 0.8], radians=1.1)
    w, x, y, z = turn.elements
    np.testing.assert_allclose(
        load("convert").matrix((x, y, z, w), (1, 2, 3)), pose((x, y, z, w), (1, 2, 3)), atol=1e-12
    )


def test_the_converter_stays_short():
    assert len((EXAMPLE / "convert.py").read_text().splitlines()) <= 150
