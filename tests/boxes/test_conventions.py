"""Round all conventions, beside what they say of a box's corners."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qat.boxes.centerhead import decode
from qat.boxes.conventions import CONVENTIONS, convert
from qat.boxes.detections import Detections
from qat.boxes.geometry import box_corners


@pytest.fixture
def boxes():
    """Decoded from head maps on a grid that is no square, 8 cells along x and 4 along y: an exchange of axes would show."""
    rng = np.random.default_rng(0)
    shape = (8, 4)
    maps = {
        "heatmap": np.full((1, 1, *shape), -9.0, np.float32),
        "reg": rng.random((1, 2, *shape)).astype(np.float32),
        "height": rng.normal(size=(1, 1, *shape)).astype(np.float32),
        "dim": rng.normal(0, 0.4, (1, 3, *shape)).astype(np.float32),
        "rot": rng.normal(size=(1, 2, *shape)).astype(np.float32),
        "vel": rng.normal(size=(1, 2, *shape)).astype(np.float32),
    }
    maps["heatmap"][0, 0, 7, 1] = maps["heatmap"][0, 0, 2, 3] = maps["heatmap"][0, 0, 0, 0] = 3.0
    head = {
        "bbox_coder": {
            "max_num": 3,
            "pc_range": [-8.0, -2.0],
            "voxel_size": [0.5, 0.25],
            "out_size_factor": 4,
            "post_center_range": [-50, -50, -50, 50, 50, 50],
        },
        "test_cfg": {"nms_type": "circle", "min_radius": [0.01], "post_max_size": 9},
        "tasks": [["car"]],
    }
    found = decode([maps], head).boxes
    assert len(found) == 3 and found[:, 0].max() > 5 and np.abs(found[:, 1]).max() < 2.5
    return found


def corners(boxes, name):
    """float64[K,8,3], by the convention's own words and nothing of `convert`; corners in no order."""
    if name == "bevfusion":
        return box_corners(boxes)
    x, y, z, first, second, height, heading = boxes[:, :7].astype(np.float64).T
    length, width = (first, second) if name in ("mmdet3d", "autoware", "depth") else (second, first)
    base = z if name in ("mmdet3d", "depth") else z - height / 2
    found = []
    for a, b, c in itertools.product((-0.5, 0.5), (-0.5, 0.5), (0, 1)):
        along, across = a * length, b * width
        found.append(
            [
                x + np.cos(heading) * along - np.sin(heading) * across,
                y + np.sin(heading) * along + np.cos(heading) * across,
                base + c * height,
            ]
        )
    return np.array(found).transpose(2, 0, 1)


def ordered(points):
    rounded = np.round(points, 3) + 0.0
    return np.array([box[np.lexsort(box.T)] for box in rounded])


@pytest.mark.parametrize("name", CONVENTIONS)
def test_each_convention_says_where_the_corners_are(boxes, name):
    found = convert(boxes, "bevfusion", name)
    np.testing.assert_allclose(ordered(corners(found, name)), ordered(box_corners(boxes)), atol=2e-3)


def test_all_of_them_in_turn_give_the_boxes_back(boxes):
    for order in itertools.permutations(CONVENTIONS):
        found = boxes
        for source, target in zip(order, (*order[1:], order[0]), strict=True):
            found = (
                convert(found, source, target)
                if source != order[0] or found is not boxes
                else convert(convert(boxes, "bevfusion", order[0]), source, target)
            )
        back = convert(found, order[0], "bevfusion")
        np.testing.assert_allclose(back[:, :6], boxes[:, :6], atol=1e-5)
        turned = np.abs(np.mod(back[:, 6] - boxes[:, 6] + np.pi, 2 * np.pi) - np.pi)
        assert turned.max() < 1e-5 and np.array_equal(back[:, 7:], boxes[:, 7:])


def test_detections_without_velocities_have_none_that_move(boxes):
    own = Detections(convert(boxes, "bevfusion", "mmdet3d")[:, :7], np.ones(3), np.zeros(3, int), "mmdet3d")
    found = own.converted()
    np.testing.assert_allclose(found.boxes[:, :6], boxes[:, :6], atol=1e-6)
    assert found.convention == "bevfusion" and not found.boxes[:, 7:].any()
    again = Detections.of(own.arrays("3"), "3")
    assert np.array_equal(again.boxes, found.boxes)
