"""Recordings that a user writes: what is read back is what was given, and what cannot be right is refused in one line."""

import resource

import numpy as np
import pytest
import yaml
from nuscenes.eval.detection.utils import category_to_detection_name
from PIL import Image

from qat.boxes.geometry import box_heading
from qat.core.errors import UserError
from qat.data import NuScenesDataset
from qat.data.tables import CATEGORIES
from qat.data.writer import Box, Calibration, NuScenesWriter, Picture
from qat.families.bevfusion.config import camera_names, check_config
from tests.messages import refused

TIME = 1_700_000_000_000_000
K = [[80.0, 0, 47.5], [0, 80.0, 31.0], [0, 0, 1]]
AXES = np.array(
    [[0, 0, 1.0, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]]
)  # a camera that looks along the ego car's x


def pose(yaw=0.0, x=0.0, y=0.0, z=0.0):
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, z], [0, 0, 0, 1.0]])


LIDAR = pose(-np.pi / 2, 0.5, 0, 1.8)
CALIBRATION = {
    "eye": Calibration(K, camera2ego=pose(0.0, 1, 0, 1.5) @ AXES),
    "tail": Calibration(K, camera2lidar=np.linalg.inv(LIDAR) @ pose(np.pi, 0, 0, 1.5) @ AXES),
}
EGO = pose(0.4, 30.0, -7.0, 0.2)


def cloud(columns=4):
    rng = np.random.default_rng(0)
    return np.concatenate(
        [rng.uniform(-12, 12, (800, 2)), rng.uniform(-2, 1, (800, 1)), np.ones((800, columns - 3))], 1
    )


def keyframe(**changes):
    image = np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8)
    given = {
        "timestamp": TIME,
        "images": {"eye": image, "tail": image},
        "points": cloud(),
        "ego2global": EGO,
        "boxes": [Box("Sedan", (40.0, -5.0, 1.0), (4.5, 2.0, 1.6), 0.9, track=7)],
    }
    return given | changes


def writer(tmp_path, **changes):
    given = {"cameras": ["eye", "tail"], "classes": {"Sedan": "car", "Person": "pedestrian", "Dog": None}} | changes
    return NuScenesWriter(tmp_path / "robot", "v1.0-robot", **given)


def scene(out, name="a", **changes):
    return out.add_scene(name, **({"split": "calib", "calibration": CALIBRATION, "lidar2ego": LIDAR} | changes))


@pytest.fixture
def robot_config(small_config):
    small_config["cameras"] = ["eye", "tail"]
    return small_config


def test_the_data_set_reads_back_what_was_given(tmp_path, robot_config):
    Image.new("RGB", (96, 64), (200, 100, 50)).save(tmp_path / "front.png")
    images = keyframe()["images"] | {"eye": Picture(tmp_path / "front.png", TIME - 20_000, pose(0.4, 29.9, -7.0, 0.2))}
    with writer(tmp_path) as out:
        first = scene(out)
        first.add_sweep(TIME - 250_000, cloud(5), pose(0.4, 29.0, -7.0, 0.2))
        first.add_keyframe(**keyframe(images=images))
        first.add_keyframe(
            **keyframe(timestamp=TIME + 500_000, boxes=[Box("Sedan", (41.0, -5.5, 1.0), (4.5, 2.0, 1.6), 0.9, track=7)])
        )
        scene(out, "b", split="eval").add_keyframe(**keyframe(boxes=[]))
    assert (tmp_path / "robot/v1.0-robot/splits.json").exists()
    dataset = NuScenesDataset(tmp_path / "robot", "calib", robot_config)
    assert len(dataset) == 2 and dataset.cameras == ("eye", "tail")
    frame = dataset.read(dataset.tokens[0])
    assert (frame.images[0] == (200, 100, 50)).all() and frame.images[1].shape == (64, 96, 3)
    tail = CALIBRATION["tail"].camera2lidar
    np.testing.assert_allclose(frame.camera2lidar[1], tail, atol=1e-5)
    # The first was taken before, where the vehicle was then.
    moved = np.linalg.inv(EGO @ LIDAR) @ pose(0.4, 29.9, -7.0, 0.2) @ CALIBRATION["eye"].camera2ego
    np.testing.assert_allclose(frame.camera2lidar[0], moved, atol=1e-5)
    np.testing.assert_allclose(frame.ego2global, EGO, atol=1e-9)
    box = frame.gt_boxes[0]
    there = EGO @ LIDAR @ [*box[:3], 1.0]
    np.testing.assert_allclose(there[:3], (40.0, -5.0, 1.0), atol=1e-3)
    np.testing.assert_allclose(box[3:6], (2.0, 4.5, 1.6), atol=1e-3)  # width, length, height
    assert np.isclose(np.mod(box_heading(box[6]) + 0.4 - np.pi / 2, 2 * np.pi), 0.9, atol=1e-3)
    velocity = (EGO @ LIDAR)[:3, :3] @ [*box[7:9], 0.0]
    np.testing.assert_allclose(
        velocity[:2], (2.0, -1.0), atol=1e-3
    )  # of the track: a metre and half of one in half a second
    points = dataset._read_points(
        dataset.nusc.get("sample_data", dataset.nusc.get("sample", frame.token)["data"]["LIDAR_TOP"])
    )
    np.testing.assert_array_equal(points[:, :4], cloud().astype(np.float32))
    assert len(NuScenesDataset(tmp_path / "robot", "eval", robot_config)) == 1


@pytest.mark.parametrize(("frame", "there"), [("ego", EGO), ("lidar", EGO @ LIDAR)])
def test_boxes_may_be_in_the_vehicles_or_the_lidars_frame(tmp_path, robot_config, frame, there):
    with writer(tmp_path, boxes_in=frame) as out:
        scene(out).add_keyframe(**keyframe(boxes=[Box("Sedan", (6.0, 2.0, 0.5), (4, 2, 1.5), 0.3)]))
    dataset = NuScenesDataset(tmp_path / "robot", "calib", robot_config)
    (annotation,) = dataset.nusc.sample_annotation
    np.testing.assert_allclose(annotation["translation"], (there @ [6.0, 2.0, 0.5, 1])[:3], atol=1e-3)
    yaw = 2 * np.arctan2(annotation["rotation"][3], annotation["rotation"][0])
    turn = np.arctan2(there[1, 0], there[0, 0])
    assert np.isclose(np.cos(yaw - 0.3 - turn), 1, atol=1e-6)


def test_points_inside_a_box_are_counted(tmp_path):
    inside = np.array([[2.0, 6.0, 0.0], [2.0, 7.9, 0.0], [2.0, 8.1, 0.0], [3.1, 6.0, 0.0]])
    points = np.concatenate([inside, cloud(3) - [0, 40, 0], cloud(3) * [1, 1, 1] + [0, 0, 30]])
    with writer(tmp_path, boxes_in="lidar", check_overlap=False) as out:
        scene(out).add_keyframe(
            **keyframe(points=points, boxes=[Box("Sedan", (2.0, 6.0, 0.0), (4, 2, 1.5), np.pi / 2)])
        )
    tables = (tmp_path / "robot/v1.0-robot/sample_annotation.json").read_text()
    assert '"num_lidar_pts":2' in tables


def test_the_ten_classes_are_what_the_devkit_counts():
    assert {category_to_detection_name(category): category for category in CATEGORIES.values()} == CATEGORIES


def with_nan(values):
    array = np.array(values, np.float64)
    array.flat[1] = np.nan
    return array


MIRRORED = np.diag([1.0, -1, 1, 1])
KEYFRAMES = [
    ({"timestamp": 1.7e9}, "timestamp: found 1700000000.0, expected whole microseconds"),
    ({"timestamp": TIME * 1000}, "expected whole microseconds (nanoseconds // 1000)"),
    ({"images": {"eye": np.zeros((64, 96, 3), np.uint8)}}, "images: found ['eye'], expected ['eye', 'tail']"),
    ({"images": dict.fromkeys(("eye", "tail"), np.zeros((64, 96), np.uint8))}, "found uint8[64, 96], expected a path"),
    (
        {"images": dict.fromkeys(("eye", "tail"), np.zeros((16, 24, 3), np.uint8))},
        "intrinsic matrix may be for another resolution",
    ),
    ({"images": dict.fromkeys(("eye", "tail"), "nowhere.jpg")}, "nowhere.jpg: no such file"),
    ({"images": dict.fromkeys(("eye", "tail"), "x.bmp")}, "expected a .jpg or .png file"),
    ({"images": dict.fromkeys(("eye", "tail"), Picture("x.jpg", TIME - 900_000, EGO))}, "0.90 s from its keyframe"),
    ({"points": np.zeros((0, 4))}, "points: found shape [0, 4]"),
    ({"points": with_nan(cloud())}, "1 of 800 are NaN or infinite"),
    ({"ego2global": EGO[:3]}, "ego2global: found shape [3, 4], expected [4, 4]"),
    ({"ego2global": with_nan(EGO)}, "ego2global: found NaN"),
    ({"ego2global": EGO.T}, "is it transposed?"),
    ({"ego2global": EGO @ MIRRORED}, "found a mirrored frame"),
    ({"ego2global": EGO * [[2], [2], [2], [1]]}, "off a rotation"),
    ({"boxes": [Box("Bus", (0, 0, 0), (1, 1, 1), 0)]}, "boxes[0] (Bus): unknown class"),
    ({"boxes": [Box("Sedan", (0, 0), (1, 1, 1), 0)]}, "centre: found shape [2]"),
    ({"boxes": [Box("Sedan", (0, 0, 0), (1, 0, 1), 0)]}, "size: found [1.0, 0.0, 1.0]"),
    ({"boxes": [Box("Sedan", (0, 0, 0), (1, 1, 1), float("nan"))]}, "yaw: found NaN"),
    ({"boxes": [Box("Sedan", (0, 0, 0), (1, 1, 1), 0, attribute="fast")]}, "attribute: found 'fast'"),
    ({"boxes": [Box("Sedan", (0, 0, 0), (1, 1, 1), 0, track=1)] * 2}, "track 1 twice"),
]


@pytest.mark.parametrize(("change", "message"), KEYFRAMES, ids=[message[:30] for _, message in KEYFRAMES])
def test_a_keyframe_that_cannot_be_right_is_refused_and_nothing_is_written(tmp_path, change, message):
    with pytest.raises(UserError) as caught, writer(tmp_path) as out:
        scene(out).add_keyframe(**keyframe(**change))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


BAD = Calibration(K, camera2ego=np.eye(4))
SCENES = [
    ({"split": "train"}, "one of nuScenes' splits"),
    ({"calibration": {"eye": BAD}}, "calibration: found ['eye']"),
    ({"calibration": CALIBRATION | {"eye": Calibration(K)}}, "expected one of camera2ego and camera2lidar"),
    ({"calibration": CALIBRATION | {"eye": Calibration(np.eye(3) * 5, np.eye(4))}}, "expected [[fx, 0, cx]"),
    ({"lidar2ego": MIRRORED}, "mirrored"),
    ({"name": "a/b"}, "expected a name that can be part of a file's"),
]


@pytest.mark.parametrize(("change", "message"), SCENES, ids=[message[:30] for _, message in SCENES])
def test_a_scene_that_cannot_be_right_is_refused(tmp_path, change, message):
    with pytest.raises(UserError) as caught, writer(tmp_path) as out:
        scene(out, **change)
    assert message in str(caught.value) and not (tmp_path / "robot").exists()


def test_times_that_do_not_grow_are_refused(tmp_path):
    with pytest.raises(UserError, match=rf"found timestamp {TIME} after {TIME}"), writer(tmp_path) as out:
        first = scene(out)
        first.add_keyframe(**keyframe())
        first.add_keyframe(**keyframe())


def test_an_extrinsic_that_is_its_inverse_is_told_by_points_that_no_image_has(tmp_path):
    inverse = {"eye": Calibration(K, camera2ego=np.linalg.inv(pose(0, 40, 0, 1.5) @ AXES)), "tail": CALIBRATION["tail"]}
    with refused("eye", "no lidar point", "inverse"), writer(tmp_path) as out:
        scene(out, calibration=inverse).add_keyframe(**keyframe())


def test_a_folder_that_is_there_and_an_empty_set_are_refused(tmp_path):
    with pytest.raises(UserError, match="found no scenes"), writer(tmp_path):
        pass
    with pytest.raises(UserError, match="found no keyframes"), writer(tmp_path) as out:
        scene(out)
    (tmp_path / "robot").mkdir()
    (tmp_path / "robot/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="found an existing folder or file"):
        writer(tmp_path)
    assert (tmp_path / "robot/mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": []}, "cameras: found"),
        ({"cameras": ["LIDAR_TOP"]}, "none of them LIDAR_TOP"),
        ({"classes": {"Dog": "dog"}}, "classes: Dog: found 'dog', expected one of car, truck"),
        ({"boxes_in": "world"}, "boxes_in: found 'world'"),
    ],
)
def test_a_writer_for_what_cannot_be_written_is_refused(tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        writer(tmp_path, **change)
    assert message in str(caught.value)


@pytest.mark.parametrize("names", [[], "CAM_FRONT", ["a", "a"], [1]])
def test_a_configs_cameras_are_a_list_of_names(small_config, names):
    small_config["cameras"] = names
    with pytest.raises(UserError, match="cameras: found"):
        check_config(small_config)
    small_config["cameras"] = ["front", "rear"]
    check_config(small_config)
    assert camera_names(yaml.safe_load(yaml.safe_dump(small_config))) == ("front", "rear")


def test_cameras_of_other_names_than_the_configs_are_told(tmp_path, make_config):
    with writer(tmp_path) as out:
        scene(out).add_keyframe(**keyframe())
    with refused("has no CAM_FRONT, but LIDAR_TOP, eye, tail", "list them in the config's `cameras`"):
        NuScenesDataset(tmp_path / "robot", "calib", make_config())[0]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    """A limit on the size of a file stands for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match="robot: cannot write here: "), writer(tmp_path) as out:
            made = scene(out)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
            made.add_keyframe(**keyframe())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
