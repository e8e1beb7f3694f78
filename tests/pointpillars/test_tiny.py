"""pointpillars-tiny: its training sees what generated scenes in KITTI's form hold, and its anchors fit them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from lidar import need_mmdet3d

from qat.boxes.overlap import box_iou_rotated
from qat.data.synth import SynthOptions
from qat.families.mmdet3d.kitti_form import generate_kitti
from qat.families.mmdet3d.ops.points import points_in_boxes
from qat.families.mmdet3d.pillars import batch_of_pillars, grid_of
from qat.families.mmdet3d.training import encoded
from qat.families.pointpillars.flow import PointPillars
from qat.model.opening import open_model, random_model, read_config
from qat.model.runners import flow_for, run_frame, to_numpy

need_mmdet3d()
CONFIG = Path(__file__).resolve().parents[2] / "model/pointpillars-tiny/config.py"
CAR = 2  # its label


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pointpillars_tiny_train", CONFIG.with_name("train.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def settings() -> dict:
    family, described = read_config(CONFIG)
    return family.settings(described)


@pytest.fixture(scope="module")
def network(train):
    network = random_model(CONFIG, 0).network
    train.prepare(network)
    return network


@pytest.fixture(scope="module")
def frames(train, settings, tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny") / "kitti"
    generate_kitti(root, SynthOptions(6, 8100, 1, 208, 63, 600, 0, 95, {"val": 6}, "kitti"), 1, quiet=True)
    return train.frames_of(root, "val", settings["classes"])


def targets(head, truth):
    """Labels int64[A] of all anchors, those with a box, and that box, float32[P,7]."""
    from mmdet3d.structures import LiDARInstance3DBoxes

    anchors = head.prior_generator.grid_anchors([(136, 144)], device="cpu")[0]
    flat = anchors.reshape(-1, 7)
    found = head.anchor_target_3d(
        [[anchors]], [truth], [{"box_type_3d": LiDARInstance3DBoxes}], num_classes=3, label_channels=18
    )
    labels, offsets, weights = found[0][0][0], found[2][0][0], found[3][0][0]
    positive = torch.where(weights.sum(-1) > 0)[0]
    return labels, positive, head.bbox_coder.decode(flat[positive], offsets[positive])


def test_every_object_in_range_has_an_anchor_and_comes_back_from_it(train, network, frames, settings):
    seen = 0
    for _, boxes, labels in frames:
        truth = train.instances(boxes, labels, settings)
        found, positive, decoded = targets(network.bbox_head, truth)
        own = truth.bboxes_3d.tensor
        between = torch.cdist(own[:, :6].double(), decoded[:, :6].double())
        assert (between.min(1).values < 1e-3).all()
        best = between.argmin(1)
        assert (found[positive[best]] == truth.labels_3d).all()
        seen += len(own)
    assert seen > 10


def test_augmentation_moves_points_and_boxes_together(train):
    rng = np.random.default_rng(0)
    boxes = np.zeros((6, 7), np.float32)
    boxes[:, :3] = rng.uniform(-20, 20, (6, 3))
    boxes[:, 3:6] = rng.uniform(1, 5, (6, 3))
    boxes[:, 6] = rng.uniform(-np.pi, np.pi, 6)
    heading = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1)
    points = np.zeros((6, 4), np.float32)
    points[:, :2] = boxes[:, :2] + heading * boxes[:, 3:4] / 2
    points[:, 2] = boxes[:, 2] + boxes[:, 5]
    for seed in range(5):
        moved, changed = train.augmented(points, boxes, np.random.default_rng(seed))
        heading = np.stack([np.cos(changed[:, 6]), np.sin(changed[:, 6])], 1)
        np.testing.assert_allclose(moved[:, :2], changed[:, :2] + heading * changed[:, 3:4] / 2, atol=1e-4)
        np.testing.assert_allclose(moved[:, 2], changed[:, 2] + changed[:, 5], atol=1e-4)
        assert not np.allclose(changed[:, 6], boxes[:, 6]) and not np.allclose(changed[:, 3:6], boxes[:, 3:6])


def test_the_encoder_without_padding_is_the_padded_one(network, settings):
    clouds = [PointPillars(settings).made_frame(seed).points for seed in (0, 1)]
    rows = [np.concatenate([np.full((len(c), 1), n, np.float32), c], 1) for n, c in enumerate(clouds)]
    features, cells, _ = batch_of_pillars(np.concatenate(rows), settings)
    network.eval()
    with torch.no_grad():
        pillars = network.encode(torch.from_numpy(features))
        expected = network.scatter(pillars, torch.from_numpy(cells), grid_of(settings))
        found = encoded(network, clouds, settings)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_the_trained_part_of_the_grid_sees_is_what_the_whole_sees_there(train, network):
    family, described = read_config(CONFIG)
    part = family.settings(train.cropped(described))
    whole = family.settings(described)
    assert (grid_of(whole), grid_of(part)) == ((272, 288), (224, 256))
    assert part["head"]["anchors"]["ranges"] == [[0, -22.4, -1.73, 51.2, 22.4, -1.73]] * 3
    rng = np.random.default_rng(2)
    cells = np.stack([rng.integers(0, 256, 3000), rng.integers(0, 224, 3000)], 1)
    points = np.zeros((3000, 4), np.float32)
    points[:, :2] = (cells + rng.uniform(0.1, 0.9, (3000, 2))) * 0.2 + [0, -22.4]
    points[:, 2:] = rng.uniform([-2.5, 0], [0.5, 1], (3000, 2))
    network.eval()
    with torch.no_grad():
        of_part, of_whole = (encoded(network, [points], settings) for settings in (part, whole))
    torch.testing.assert_close(of_whole[:, :, 24:248, :256], of_part, atol=2e-4, rtol=2e-4)
    assert of_part.abs().max() > 1 and float(of_whole.sum()) == pytest.approx(float(of_part.sum()), rel=1e-4)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(train, frames, tmp_path, monkeypatch, capsys):
    data = frames[0][0].parents[2]
    calls = []

    def stopping(*given):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encoded(*given)

    def run(name: str) -> dict[str, torch.Tensor]:
        out = tmp_path / f"{name}.pth"
        given = ["train.py", f"{data}:val", str(out), "--steps", "8", "--batch", "2", "--float32"]
        monkeypatch.setattr("sys.argv", given)
        train.main()
        return torch.load(out)["state_dict"]

    monkeypatch.setattr(train, "SAVED", 5)
    whole = run("whole")
    monkeypatch.setattr(train, "encoded", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("twice")
    again = run("twice")
    assert "goes on at step 5" in capsys.readouterr().out and len(calls) == 9
    assert all(torch.allclose(whole[key].float(), again[key].float(), atol=1e-3) for key in whole)
    begun = random_model(CONFIG, 0).network.state_dict()
    key = "backbone.blocks.0.0.weight"
    assert (whole[key].float() - begun[key]).abs().max() > 2e-3


def test_the_shipped_checkpoint_finds_the_cars_of_generated_scenes(frames):
    """Of cars with 20 points or more, nine in ten with an overlap of 0.5 from above."""
    network = open_model(CONFIG.with_name("pointpillars-tiny.pth"), CONFIG).network
    flow, overlaps = flow_for(network), []
    for path, boxes, labels in frames:
        points = np.fromfile(path, np.float32).reshape(-1, 4)
        cars = boxes[(labels == CAR) & (np.abs(boxes[:, 1]) < 20) & (boxes[:, 0] < 50)]
        cars = cars[points_in_boxes(points, cars).sum(0) >= 20]
        with torch.no_grad():
            found = flow.decode(to_numpy(run_frame(network, flow.prepare(points))))
        sure = (found.scores > 0.3) & (found.labels == CAR)
        own = found.boxes[sure]
        flat = [rows[:, [0, 1, 3, 4, 6]].astype(np.float64) for rows in (cars, own)]
        best = box_iou_rotated(*flat)
        overlaps += best.max(1).tolist() if len(own) else [0.0] * len(cars)
    assert len(overlaps) >= 10
    assert np.mean(np.array(overlaps) > 0.5) >= 0.9
