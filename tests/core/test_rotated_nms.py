"""The common area of rotated boxes against shapely, and greedy suppression against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from shapely.geometry import Polygon

from qat.boxes._nms_kernel import intersection_area
from qat.boxes.centerhead import rotated_nms
from qat.boxes.geometry import box_corners_bev


def _boxes(count: int, seed: int, spread: float = 6.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    boxes = np.zeros((count, 9), np.float32)
    boxes[:, :2] = random.uniform(-spread, spread, (count, 2))
    boxes[:, 3:5] = random.uniform(0.4, 6, (count, 2))
    boxes[:, 6] = random.choice([0, np.pi / 2, *random.uniform(-4, 4, 6)], count)
    return boxes


def _shapely(a: np.ndarray, b: np.ndarray) -> float:
    first, second = Polygon(a), Polygon(b)
    common = first.intersection(second).area
    return common / (first.area + second.area - common)


def test_common_area_of_many_pairs_equals_shapely() -> None:
    a, b = box_corners_bev(_boxes(400, 1)), box_corners_bev(_boxes(400, 2))
    expected = [Polygon(p).intersection(Polygon(q)).area for p, q in zip(a, b, strict=True)]
    assert sum(area > 0 for area in expected) > 50
    found = [intersection_area(p, q) for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-7)
    mirrored = [intersection_area(p, q[::-1].copy()) for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(mirrored, expected, atol=1e-7)


@pytest.mark.parametrize(
    ("size", "shift", "expected"),
    [((2, 4), (0, 0), 8), ((2, 4), (2, 0), 0), ((2, 4), (1, 0), 4), ((1, 2), (0, 0), 2), ((2, 4), (9, 9), 0)],
)
@pytest.mark.parametrize("yaw", [0.0, 0.7, np.pi / 2])
def test_common_area_with_shared_edges_and_corners(size: tuple, shift: tuple, expected: float, yaw: float) -> None:
    turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])

    def rectangle(width: float, length: float, centre: tuple) -> np.ndarray:
        corners = np.array([[-width, -length], [width, -length], [width, length], [-width, length]]) / 2
        return (corners + centre) @ turn.T

    assert intersection_area(rectangle(2, 4, (0, 0)), rectangle(*size, shift)) == pytest.approx(expected, abs=1e-9)


def test_nms_keeps_what_the_greedy_definition_keeps() -> None:
    boxes = _boxes(120, 3, spread=15)
    scores = np.random.default_rng(4).random(120).astype(np.float32)
    corners = box_corners_bev(boxes)
    expected: list[int] = []
    for i in np.argsort(-scores):
        if all(_shapely(corners[i], corners[j]) <= 0.2 for j in expected):
            expected.append(int(i))
    assert 10 < len(expected) < 120
    assert rotated_nms(boxes, scores, 0.2, 1000, 500).tolist() == expected
    assert rotated_nms(boxes, scores, 0.2, 1000, 5).tolist() == expected[:5]


def test_nms_of_no_boxes() -> None:
    assert len(rotated_nms(np.zeros((0, 9), np.float32), np.zeros(0, np.float32), 0.2, 1000, 500)) == 0
