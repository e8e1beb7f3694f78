"""The reader against explicit transforms on a data set made by hand."""

import copy

import numpy as np
import pytest
from pyquaternion import Quaternion

from qat.boxes.geometry import box_corners, box_heading
from qat.core.errors import UserError
from qat.data import NuScenesDataset
from tests.messages import refused


def matrix(record):
    out = np.eye(4)
    out[:3, :3] = Quaternion(record["rotation"]).rotation_matrix
    out[:3, 3] = record["translation"]
    return out


@pytest.fixture
def config(tiny_config):
    out = copy.deepcopy(tiny_config)
    for step in out["data"]["test"]["pipeline"]:
        if step["type"] == "ImageAug3D":
            step.update(final_dim=[64, 96], resize_lim=[1.25, 1.25])
    return out


def pipeline(config, kind, **changes):
    out = copy.deepcopy(config)
    for step in out["data"]["test"]["pipeline"]:
        if step["type"] == kind:
            step.update(changes)
    return out


def test_camera_to_lidar_goes_through_both_ego_poses(hand_made, config):
    root, tables, _ = hand_made
    sample = NuScenesDataset(root, "hand", config)[1]
    calibrated = {record["token"]: record for record in tables["calibrated_sensor"]}
    poses = {record["token"]: record for record in tables["ego_pose"]}
    camera = matrix(poses["CAM_FRONT-480000"]) @ matrix(calibrated["CAM_FRONT"])
    lidar = matrix(poses["LIDAR_TOP-500000"]) @ matrix(calibrated["LIDAR_TOP"])
    expected = np.linalg.inv(lidar) @ camera
    assert np.allclose(sample.camera2lidar[0], expected, atol=1e-4)
    intrinsic = np.eye(4)
    intrinsic[:3, :3] = calibrated["CAM_FRONT"]["camera_intrinsic"]
    assert np.allclose(sample.lidar2image[0], intrinsic @ np.linalg.inv(expected), atol=1e-2)


def test_shapes_and_types(hand_made, config):
    sample = NuScenesDataset(hand_made[0], "hand", config)[0]
    assert sample.img.shape == (6, 3, 64, 96) and sample.img.dtype == np.float32
    assert sample.depth.shape == (6, 1, 64, 96) and sample.depth.dtype == np.float32
    assert sample.images.shape == (6, 64, 96, 3) and sample.images.dtype == np.uint8
    assert sample.cameras[:2] == ("CAM_FRONT", "CAM_FRONT_RIGHT")


def test_a_box_keeps_place_size_heading_and_velocity(hand_made, config):
    root, tables, _ = hand_made
    sample = NuScenesDataset(root, "hand", config)[1]
    annotation = tables["sample_annotation"][1]
    lidar2global = sample.ego2global @ sample.lidar2ego.astype(np.float64)
    (box,) = sample.gt_boxes.astype(np.float64)
    centre = lidar2global @ [*box[:3], 1]
    assert np.allclose(centre[:3], annotation["translation"], atol=1e-3)
    assert np.allclose(box[3:6], annotation["size"], atol=1e-6)
    heading = box_heading(box[6:7])[0]
    forward = lidar2global[:3, :3] @ [np.cos(heading), np.sin(heading), 0]
    assert np.isclose(np.arctan2(forward[1], forward[0]), 0.5, atol=1e-5)
    assert np.allclose(lidar2global[:3, :3] @ [*box[7:9], 0], [4.0, 0, 0], atol=1e-3)  # 2 m in half a second


def test_sweeps_come_newest_first_in_the_keyframes_frame(hand_made, config):
    root, tables, _ = hand_made
    sample = NuScenesDataset(root, "hand", pipeline(config, "LoadPointsFromMultiSweeps", sweeps_num=2))[1]
    assert np.allclose(np.unique(sample.points[:, 4]), [0, 0.2, 0.35], atol=1e-6)
    assert (np.diff(sample.points[:, 4]) >= -1e-6).all()
    calibrated = {record["token"]: record for record in tables["calibrated_sensor"]}
    poses = {record["token"]: record for record in tables["ego_pose"]}
    lidar = matrix(calibrated["LIDAR_TOP"])
    move = np.linalg.inv(matrix(poses["LIDAR_TOP-500000"]) @ lidar) @ matrix(poses["LIDAR_TOP-300000"]) @ lidar
    cloud = np.fromfile(root / "samples/LIDAR_TOP/300000.pcd.bin", np.float32).reshape(-1, 5)
    moved = cloud[:, :3] @ move[:3, :3].T + move[:3, 3]
    expected = next(p for p in moved[2:] if (np.abs(p[:2]) < 51).all() and -5 < p[2] < 3)
    assert np.abs(sample.points[:, :3] - expected).sum(1).min() < 1e-3


def test_close_points_leave_the_sweeps_and_not_the_keyframe(hand_made, config):
    root = hand_made[0]

    def count(remove, seconds):
        steps = pipeline(config, "LoadPointsFromMultiSweeps", sweeps_num=9, remove_close=remove)
        points = NuScenesDataset(root, "hand", steps)[1].points
        return int(np.isclose(points[:, 4], seconds, atol=1e-4).sum())

    assert count(True, 0.0) == count(False, 0.0)
    assert count(True, 0.2) == count(False, 0.2) - 1


def test_empty_sweeps_are_padded_with_the_keyframe(hand_made, config):
    root = hand_made[0]
    padded = pipeline(config, "LoadPointsFromMultiSweeps", sweeps_num=3, pad_empty_sweeps=True, remove_close=False)
    plain = pipeline(config, "LoadPointsFromMultiSweeps", sweeps_num=3, pad_empty_sweeps=False)
    assert len(NuScenesDataset(root, "hand", padded)[0].points) == 4 * len(
        NuScenesDataset(root, "hand", plain)[0].points
    )


def test_the_range_filter_drops_what_is_outside(hand_made, config):
    points = NuScenesDataset(hand_made[0], "hand", config)[0].points
    assert (np.abs(points[:, :2]) < 51.2).all() and (points[:, 2] > -5).all() and (points[:, 2] < 3).all()


def test_frames_are_spread_over_the_split(synth_root, config):
    whole = NuScenesDataset(synth_root, "all", config)
    some = NuScenesDataset(synth_root, "all", config, frames=3)
    assert some.tokens == [whole.tokens[0], whole.tokens[2], whole.tokens[5]]  # numpy rounds 2.5 to 2


def test_lidar_points_fall_inside_the_boxes_that_count_them(synth_root, config):
    for sample in NuScenesDataset(synth_root, "held", config):
        for box, count in zip(sample.gt_boxes, sample.gt_points, strict=True):
            heading = box_heading(box[6:7])[0]
            offset = sample.points[:, :3] - box[:3]
            along = offset[:, 0] * np.cos(heading) + offset[:, 1] * np.sin(heading)
            across = -offset[:, 0] * np.sin(heading) + offset[:, 1] * np.cos(heading)
            slack = 0.08  # range noise
            inside = (np.abs(along) < box[4] / 2 + slack) & (np.abs(across) < box[3] / 2 + slack)
            inside &= np.abs(offset[:, 2]) < box[5] / 2 + slack
            if np.abs(box_corners(box[None])[0, :, :2]).max() < 51:
                assert inside.sum() >= count


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("jpeg", "not a readable picture"),
        ("missing image", "no such file"),
        ("size", "sample_data.json says"),
        ("nan", "not finite"),
        ("points", "expected points of load_dim"),
        ("camera", "has no CAM_FRONT"),
    ],
)
def test_damaged_data_is_named(hand_made, config, spoil, message):
    root, tables, write = hand_made
    image = root / "samples/CAM_FRONT/-20000.jpg"
    if spoil == "jpeg":
        image.write_bytes(image.read_bytes()[:200])
    elif spoil == "missing image":
        image.unlink()
    elif spoil == "size":
        tables["sample_data"][0]["width"] = 97
    elif spoil == "nan":
        tables["calibrated_sensor"][1]["translation"][0] = float("nan")
    elif spoil == "points":
        (root / "samples/LIDAR_TOP/0.pcd.bin").write_bytes(b"\0" * 12)
    else:
        tables["sample_data"] = tables["sample_data"][1:]
    write()
    with pytest.raises(UserError, match=message):
        NuScenesDataset(root, "hand", config)[0]


def test_missing_root_version_and_split_are_named(hand_made, config, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        NuScenesDataset(tmp_path / "nowhere", "hand", config)
    with pytest.raises(UserError, match="no version folder"):
        NuScenesDataset(tmp_path, "hand", config)
    with pytest.raises(UserError, match=r"'v1.0-mini' not found; there is v1.0-hand"):
        NuScenesDataset(hand_made[0], "hand", config, version="v1.0-mini")
    with pytest.raises(UserError, match=r"split 'none' not found; there is hand"):
        NuScenesDataset(hand_made[0], "none", config)


def test_an_unknown_pipeline_step_is_refused_by_name(hand_made, config):
    changed = copy.deepcopy(config)
    changed["data"]["test"]["pipeline"].append({"type": "Mixup"})
    with pytest.raises(UserError, match="Mixup"):
        NuScenesDataset(hand_made[0], "hand", changed)


def test_augmentation_at_test_time_is_refused(hand_made, config):
    with pytest.raises(UserError, match=r"data\.test\.pipeline\.\d+\.reduce_beams: found 4, expected 32 or null"):
        NuScenesDataset(hand_made[0], "hand", pipeline(config, "LoadPointsFromFile", reduce_beams=4))
    with refused("is_train", "found True", "expected false: test data is not augmented"):
        NuScenesDataset(hand_made[0], "hand", pipeline(config, "ImageAug3D", is_train=True))
