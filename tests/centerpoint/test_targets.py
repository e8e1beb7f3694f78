"""Boxes of annotated keyframes come back through mmdet3d's targets and our decoding with the yaw, place, sizes and velocities that the
devkit scores, on a grid that is not square; and lidar-tiny's training changes points and boxes together."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from lidar import need_mmdet3d

from qat.boxes.conventions import convert
from qat.boxes.detections import Detections
from qat.evaluate import evaluate_detections
from qat.families.centerpoint.flow import MAPS, CenterPoint
from qat.families.mmdet3d.config import read
from qat.families.mmdet3d.frames import keyframes
from qat.families.mmdet3d.model import build
from qat.families.mmdet3d.pillars import batch_of_pillars, grid_of
from qat.model.opening import random_model, read_config

need_mmdet3d()

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "model/lidar-tiny/config.py"
HOT, COLD = 6.0, -12.0  # logits at an object's cell and elsewhere
FRAMES = 8


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("lidar_tiny_train", CONFIG.with_name("train.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def settings():
    family, described = read_config(CONFIG)
    return family.settings(described)


@pytest.fixture(scope="module")
def head():
    from mmengine.config import ConfigDict

    config = read(CONFIG)
    found = build(config).pts_bbox_head
    found.train_cfg = ConfigDict(config.model.train_cfg.pts)
    return found


@pytest.fixture(scope="module")
def frames(settings):
    return keyframes(ROOT / "example-data", "eval", settings, None, FRAMES)


def maps_of_targets(head, truth):
    """The maps that a head would return if it had learnt its targets of one keyframe to the last bit."""
    heatmaps, boxes, places, masks = head.get_targets([truth])
    heat = heatmaps[0][0].numpy()
    ny, nx = heat.shape[1:]
    maps = {"heatmap": np.where(heat == 1, np.float32(HOT), np.float32(COLD))[None]}
    at = places[0][0][masks[0][0].bool()].numpy()
    values = boxes[0][0][masks[0][0].bool()].numpy()
    begin = 0
    for name, channels in (("reg", 2), ("height", 1), ("dim", 3), ("rot", 2), ("vel", 2)):
        flat = np.zeros((channels, ny * nx), np.float32)
        flat[:, at] = values[:, begin : begin + channels].T
        maps[name] = flat.reshape(1, channels, ny, nx)
        begin += channels
    return {name: maps[name] for name in MAPS}


def decoded(frame, train, head, settings):
    """A keyframe's objects through targets and decoding, and the same objects as annotated (BEVFusion's convention)."""
    seen = frame.gt_points != 0
    boxes = convert(frame.gt_boxes[seen], "bevfusion", "mmdet3d")
    truth = train.instances(boxes, frame.gt_labels[seen], settings)
    found = CenterPoint(settings).decode(maps_of_targets(head, truth))
    assert found.convention == "mmdet3d"
    low, high = np.asarray(settings["voxel"]["range"]).reshape(2, 3)[:, :2]
    inside = ((boxes[:, :2] >= low) & (boxes[:, :2] < high)).all(1)
    return found.converted(), frame.gt_boxes[seen][inside], frame.gt_labels[seen][inside]


def test_the_grid_is_not_square(settings, head):
    ny, nx = grid_of(settings)
    assert (ny, nx) == (416, 208)
    assert head.train_cfg["grid_size"][:2] == [nx, ny]


def test_annotated_boxes_come_back_from_the_targets(frames, train, head, settings):
    compared, headings = 0, []
    for frame in frames:
        found, boxes, labels = decoded(frame, train, head, settings)
        assert len(found) >= 0.97 * len(boxes)  # two objects may share a cell, or overlap for NMS
        for box, label in zip(boxes, labels, strict=True):
            distance = np.hypot(*(found.boxes[:, :2] - box[:2]).T)
            nearest = int(np.argmin(np.where(found.labels == label, distance, np.inf)))
            if distance[nearest] > 0.01:
                continue
            np.testing.assert_allclose(found.boxes[nearest, :6], box[:6], atol=1e-3)
            np.testing.assert_allclose(found.boxes[nearest, 7:9], box[7:9], atol=1e-3)
            turned = found.boxes[nearest, 6] - box[6]
            assert abs(np.angle(np.exp(1j * turned))) < 1e-3
            headings.append(box[6])
            compared += 1
    assert compared > 100
    assert len({int(quarter) for quarter in np.floor(np.mod(headings, 2 * np.pi) / (np.pi / 2))}) == 4  # all directions


def test_the_devkit_finds_no_error_in_boxes_decoded_from_the_targets(frames, train, head, settings):
    found = {frame.token: decoded(frame, train, head, settings)[0] for frame in frames}
    figures = evaluate_detections(frames, found)
    errors = figures["tp_errors"]
    for name in ("trans_err", "scale_err", "orient_err", "vel_err"):
        assert errors[name] < 1e-3, (name, errors[name])
    assert figures["map"] > 0.9  # what is beyond the grid is not found


def test_the_devkit_sees_boxes_that_are_turned_round(frames, train, head, settings):
    """The measurement would show it: half a turn is π rad, and a quarter of one π/2."""
    for turn in (np.pi, np.pi / 2):
        found = {}
        for frame in frames:
            own = decoded(frame, train, head, settings)[0]
            boxes = own.boxes.copy()
            boxes[:, 6] += np.float32(turn)
            found[frame.token] = Detections(boxes, own.scores, own.labels)
        per_class = evaluate_detections(frames, found)["per_class_tp_errors"]
        assert abs(per_class["car"]["orient_err"] - turn) < 1e-3


def test_augmentation_moves_points_and_boxes_together(train):
    """A point that is fixed in a box stays fixed in it, one that its velocity carries on stays with it, and lengths keep their ratio."""
    rng = np.random.default_rng(0)
    boxes = np.zeros((6, 9), np.float32)
    boxes[:, :3] = rng.uniform(-20, 20, (6, 3))
    boxes[:, 3:6] = rng.uniform(1, 5, (6, 3))
    boxes[:, 6] = rng.uniform(-np.pi, np.pi, 6)
    boxes[:, 7:9] = rng.uniform(-8, 8, (6, 2))
    heading = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1)
    front = boxes[:, :2] + heading * boxes[:, 3:4] / 2
    left = boxes[:, :2] + np.stack([-heading[:, 1], heading[:, 0]], 1) * boxes[:, 4:5] / 2
    later = boxes[:, :2] + 0.5 * boxes[:, 7:9]
    points = np.zeros((18, 5), np.float32)
    points[:, :2] = np.concatenate([front, left, later])
    flipped = set()
    for seed in range(20):
        moved, changed = train.augmented(points, boxes, np.random.default_rng(seed))
        heading = np.stack([np.cos(changed[:, 6]), np.sin(changed[:, 6])], 1)
        across = np.stack([-heading[:, 1], heading[:, 0]], 1)
        np.testing.assert_allclose(moved[:6, :2], changed[:, :2] + heading * changed[:, 3:4] / 2, atol=1e-4)
        np.testing.assert_allclose(moved[6:12, :2], changed[:, :2] + across * changed[:, 4:5] / 2, atol=1e-4)
        np.testing.assert_allclose(moved[12:, :2], changed[:, :2] + 0.5 * changed[:, 7:9], atol=1e-4)
        flipped.add(bool(np.cos(changed[0, 6] - boxes[0, 6]) < 0))
    assert flipped == {True, False}


def test_the_encoder_without_padding_is_the_padded_one(train, settings):
    network = random_model(CONFIG, 0).network.eval()
    clouds = [CenterPoint(settings).made_frame(seed).points for seed in (0, 1)]
    rows = [np.concatenate([np.full((len(c), 1), n, np.float32), c], 1) for n, c in enumerate(clouds)]
    features, cells, _ = batch_of_pillars(np.concatenate(rows), settings)
    with torch.no_grad():
        expected = network.scatter(
            network.encode(torch.from_numpy(features)), torch.from_numpy(cells), grid_of(settings)
        )
        found = train.encoded(network, clouds, settings)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
