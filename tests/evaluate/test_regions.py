"""mAP by overlap and by distance: against values known by construction, and shapely's overlaps."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from qat.boxes.detections import Detections
from qat.evaluate import evaluate_detections
from qat.evaluate.detection import sample_eval
from qat.evaluate.regions import distance_figures, iou_3d, overlap_figures

DATA = Path(__file__).resolve().parents[2] / "example-data"


@pytest.fixture(scope="module")
def frames():
    pytest.importorskip("mmdet3d")
    from qat.model.opening import read_config

    family, config = read_config(DATA.parent / "model" / "lidar-tiny" / "config.py")
    dataset = family.dataset(DATA, "eval", config, None, 4)
    return dataset, list(dataset)


def detections(frame, moved=0.0, least=0.0, raised=0.0):
    """The annotated boxes beyond `least` metres, moved along x and raised."""
    kept = np.hypot(*frame.gt_boxes[:, :2].T) >= least
    boxes = frame.gt_boxes[kept].copy()
    boxes[:, 0] += moved
    boxes[:, 2] += raised
    return Detections(boxes, np.ones(len(boxes), np.float32), frame.gt_labels[kept])


def figures_of(frames, **changes):
    dataset, loaded = frames
    return sample_eval(dataset, {frame.token: detections(frame, **changes) for frame in loaded})


def test_the_annotated_boxes_are_all_right(frames):
    found = overlap_figures(figures_of(frames))
    assert found["map_iou50"] == pytest.approx(1) and found["boxes_per_frame"] > 5
    assert all(value is None or value > 0.95 for value in distance_figures(figures_of(frames)).values())


def test_boxes_far_off_or_above_are_wrong(frames):
    """The devkit looks at centres from above; an overlap in 3D sees height too."""
    assert overlap_figures(figures_of(frames, moved=30.0))["map_iou50"] < 0.02
    high = figures_of(frames, raised=3.5)
    assert overlap_figures(high)["map_iou50"] < 0.1
    assert high.evaluate()[0].mean_ap > 0.5


def test_missing_near_objects_are_seen_in_the_nearest_ring(frames):
    rings = distance_figures(figures_of(frames, least=22.0))
    assert list(rings) == ["0–20 m", "20–40 m", "over 40 m"]
    assert rings["0–20 m"] < 0.1 < rings["20–40 m"]


def test_results_have_them_on_request(frames):
    dataset, loaded = frames
    found = {frame.token: detections(frame) for frame in loaded}
    assert "map_iou50" not in evaluate_detections(dataset, found)
    assert set(evaluate_detections(dataset, found, more=True)) >= {"map_iou50", "by_distance", "boxes_per_frame"}


def test_overlap_of_turned_boxes_is_shapelys():
    from shapely import affinity
    from shapely.geometry import box

    rng = np.random.default_rng(0)
    a, b = (
        np.column_stack([rng.uniform(-2, 2, (12, 3)), rng.uniform(0.5, 4, (12, 3)), rng.uniform(-4, 4, 12)])
        for _ in "ab"
    )

    def seen(x, y, z, length, width, height, yaw):
        upright = box(x - length / 2, y - width / 2, x + length / 2, y + width / 2)
        return affinity.rotate(upright, yaw, origin=(x, y), use_radians=True), z - height / 2, z + height / 2

    for i, one in enumerate(a):
        for j, other in enumerate(b):
            (p, low, high), (q, bottom, top) = seen(*one), seen(*other)
            common = p.intersection(q).area * max(0.0, min(high, top) - max(low, bottom))
            whole = p.area * one[5] + q.area * other[5] - common
            assert iou_3d(a, b)[i, j] == pytest.approx(common / whole, abs=1e-6)


def test_perfect_boxes_score_one_and_not_more(frames):
    """The devkit's own sum is 1.0000000000000004, which a results file may not hold."""
    dataset, (frame, *_) = frames
    alone = copy.copy(dataset)
    alone.tokens = [frame.token]
    seen = frame.gt_points > 0
    boxes = Detections(frame.gt_boxes[seen], np.ones(seen.sum(), np.float32), frame.gt_labels[seen])
    found = evaluate_detections(alone, {frame.token: boxes}, more=True)
    assert max(found["per_class_ap"].values()) == 1.0 and 0 < found["map"] <= 1.0 and found["nds"] <= 1.0
    assert all(value <= 1.0 for value in found["by_distance"].values() if value is not None)
