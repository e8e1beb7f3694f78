"""The one real nuScenes keyframe, where it is at hand, and the drawing."""

from pathlib import Path

import numpy as np
import pytest

from qat.boxes.geometry import box_heading
from qat.data import NuScenesDataset
from qat.data.frame import load_frame
from qat.data.overlay import PALETTE, draw_boxes, draw_sample, project
from qat.families.bevfusion.config import load_config

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "nuscenes-sample"


@pytest.fixture(scope="module")
def real():
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not here: the real keyframe's licence keeps it out of the repository")
    config = load_config(
        ROOT / "model/camera-tiny/config.yaml"
    )  # of 400×225: 1600×900 pixels are resized to 352×198 too
    return load_frame(REAL, config), config


def test_annotators_counts_of_points_in_real_boxes_are_ours(real):
    """nuScenes says how many lidar points each box holds: independent of our geometry."""
    import json

    sample, config = real
    info = json.loads((REAL / "info.json").read_text())
    names = {index: name for name, index in info["categories"].items()}
    counts = [
        i["num_lidar_pts"]
        for i in info["sample"]["instances"]
        if names.get(i["bbox_label_3d"]) in config["object_classes"]
    ]
    points = np.fromfile(REAL / "LIDAR_TOP.bin", np.float32).reshape(-1, 5)[:, :3]
    agree = 0
    for box, count in zip(sample.gt_boxes, counts, strict=True):
        heading = box_heading(box[6:7])[0]
        offset = points - box[:3]
        along = offset[:, 0] * np.cos(heading) + offset[:, 1] * np.sin(heading)
        across = -offset[:, 0] * np.sin(heading) + offset[:, 1] * np.cos(heading)
        inside = (np.abs(along) <= box[4] / 2) & (np.abs(across) <= box[3] / 2)
        inside &= np.abs(offset[:, 2]) <= box[5] / 2
        agree += abs(int(inside.sum()) - count) <= max(1, 0.1 * count)
    assert agree >= 0.9 * len(counts)


def test_real_depth_maps_hold_plausible_depths_in_every_camera(real):
    depth = real[0].depth
    share = (depth > 0).mean(axis=(1, 2, 3))
    assert (share > 0.01).all()
    assert depth.max() < 80
    # the ground is nearer at the bottom of the image than at the horizon
    front = depth[0, 0]
    assert np.median(front[100:][front[100:] > 0]) < np.median(front[:60][front[:60] > 0])


def test_projection_equals_the_devkits(synth_root, tiny_config):
    dataset = NuScenesDataset(synth_root, "held", tiny_config)
    sample = dataset[0]
    record = dataset.nusc.get("sample", sample.token)
    _, boxes, intrinsic = dataset.nusc.get_sample_data(record["data"]["CAM_FRONT"])
    corners = np.concatenate([box.center[None] for box in boxes])
    centres = sample.gt_boxes[:, :3].astype(np.float64).copy()
    uv, depth = project(centres, sample.lidar2image[0], np.eye(4))
    for centre in corners:
        k = np.argmin(np.abs(depth - centre[2]) + np.abs(uv[:, 0] - (intrinsic @ centre)[0] / centre[2]))
        expected = (intrinsic @ centre)[:2] / centre[2]
        assert np.allclose(uv[k], expected, atol=0.05 * max(1.0, 50 / centre[2]))


def test_a_box_in_front_is_drawn_and_one_behind_is_not():
    lidar2image = np.array([[50, 0, 48, 0], [0, 50, 32, 0], [0, 0, 1, 0], [0, 0, 0, 1]], float)
    for z, drawn in ((10.0, True), (-10.0, False)):
        image = np.zeros((64, 96, 3), np.uint8)
        draw_boxes(image, np.array([[0, 0, z, 2, 2, 2, 0.0, 0, 0]]), [0], lidar2image, np.eye(4))
        assert bool(image.any()) is drawn
    assert len(set(PALETTE)) == 10


def test_a_sheet_shows_six_cameras(synth_root, tiny_config):
    sheet = draw_sample(NuScenesDataset(synth_root, "held", tiny_config)[0])
    assert sheet.shape == (128, 288, 3)
    assert all(sheet[r : r + 64, c : c + 96].any() for r in (0, 64) for c in (0, 96, 192))
