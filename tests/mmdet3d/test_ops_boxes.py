"""Overlap and suppression of boxes against shapely and their definitions, and mmcv's wrappers over ours."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
from shapely.affinity import rotate
from shapely.geometry import Polygon, box

from qat.boxes.overlap import box_iou_rotated, nms_rotated, nms_upright, rotated_corners

needs_mmdet3d = pytest.mark.skipif(
    importlib.util.find_spec("mmdet3d") is None, reason="mmdet3d is not installed: pip install 'bevqat[mmdet3d]'"
)


def _boxes(count: int, seed: int, spread: float = 6.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    angles = random.choice([0, np.pi / 2, *random.uniform(-4, 4, 6)], count)
    return np.column_stack([random.uniform(-spread, spread, (count, 2)), random.uniform(0.4, 6, (count, 2)), angles])


def _polygon(values: np.ndarray, sign: float = 1.0) -> Polygon:
    x, y, width, height, angle = values[:5]
    upright = box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return rotate(upright, sign * angle, origin=(x, y), use_radians=True)


def _shapely(a: np.ndarray, b: np.ndarray, of_first: bool = False, sign: float = 1.0) -> np.ndarray:
    first, second = [_polygon(v, sign) for v in a], [_polygon(v, sign) for v in b]
    out = np.zeros((len(a), len(b)))
    for i, p in enumerate(first):
        for j, q in enumerate(second):
            common = p.intersection(q).area
            whole = p.area if of_first else p.area + q.area - common
            out[i, j] = common / whole if whole else 0
    return out


@pytest.mark.parametrize("of_first", [False, True])
def test_overlaps_equal_shapelys(of_first: bool) -> None:
    a, b = _boxes(40, 1), _boxes(50, 2)
    expected = _shapely(a, b, of_first)
    assert (expected > 0).sum() > 200
    np.testing.assert_allclose(box_iou_rotated(a, b, of_first), expected, atol=1e-12)
    np.testing.assert_allclose(
        box_iou_rotated(a, b[:40], of_first, aligned=True), np.diag(expected[:, :40]), atol=1e-12
    )
    assert np.abs(box_iou_rotated(a, b, of_first) - _shapely(a, b, of_first, sign=-1)).max() > 0.1  # a control


def test_far_from_the_origin_overlaps_stay_exact() -> None:
    a, b = _boxes(20, 3), _boxes(20, 4)
    moved = [np.column_stack([v[:, :2] + 4096, v[:, 2:]]) for v in (a, b)]
    np.testing.assert_allclose(box_iou_rotated(*moved), box_iou_rotated(a, b), atol=1e-9)


@pytest.mark.parametrize("angle", [0.0, 0.3, np.pi / 4, np.pi])
def test_identical_touching_nested_and_empty_boxes(angle: float) -> None:
    along = np.array([np.cos(angle), np.sin(angle)])

    def at(distance: float, width: float = 4, height: float = 2) -> np.ndarray:
        return np.array([[*(along * distance + 7), width, height, angle]])

    assert box_iou_rotated(at(0), at(0))[0, 0] == pytest.approx(1, abs=1e-12)
    assert box_iou_rotated(at(0), at(0) + [0, 0, 0, 0, np.pi])[0, 0] == pytest.approx(1, abs=1e-12)
    assert box_iou_rotated(at(0), at(4))[0, 0] == pytest.approx(0, abs=1e-12)
    assert box_iou_rotated(at(0), at(2))[0, 0] == pytest.approx(1 / 3, abs=1e-12)
    assert box_iou_rotated(at(0, 2, 1), at(0))[0, 0] == pytest.approx(1 / 4, abs=1e-12)
    assert box_iou_rotated(at(0, 2, 1), at(0), of_first=True)[0, 0] == pytest.approx(1, abs=1e-12)
    for empty in (at(0, 0, 2), at(0, 0, 0)):
        assert box_iou_rotated(at(0), empty)[0, 0] == 0 == box_iou_rotated(empty, empty)[0, 0]
        assert box_iou_rotated(empty, at(0), of_first=True)[0, 0] == 0


def test_no_boxes() -> None:
    none = np.zeros((0, 5))
    assert box_iou_rotated(none, _boxes(3, 0)).shape == (0, 3)
    assert box_iou_rotated(none, none, aligned=True).shape == (0,)
    assert len(nms_rotated(none, np.zeros(0), 0.5)) == len(nms_upright(none, np.zeros(0), 0.5)) == 0


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.9])
def test_suppression_keeps_what_the_greedy_definition_keeps(threshold: float) -> None:
    boxes = _boxes(90, 5)
    boxes[7:9, 2] = 0  # empty boxes overlap nothing
    scores = np.random.default_rng(6).choice(40, 90) / 40  # some are equal
    overlaps = _shapely(boxes, boxes)
    expected: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        if all(overlaps[i, j] <= max(threshold, 1e-12) for j in expected):
            expected.append(int(i))
    assert 2 < len(expected) <= 90
    assert nms_rotated(boxes, scores, threshold).tolist() == expected


def test_a_box_of_nan_suppresses_nothing_and_stays() -> None:
    boxes = np.array([[0, 0, 2, 2, 0], [np.nan, 0, 2, 2, 0], [0.1, 0, 2, 2, 0]])
    assert nms_rotated(boxes, np.array([0.5, 0.9, 0.4]), 0.3).tolist() == [1, 0]


@pytest.mark.parametrize("offset", [0, 1])
def test_upright_suppression_keeps_what_the_greedy_definition_keeps(offset: int) -> None:
    random = np.random.default_rng(7)
    low = random.integers(0, 30, (120, 2))
    boxes = np.concatenate([low, low + random.integers(0, 12, (120, 2))], 1).astype(np.float32)
    scores = random.random(120).astype(np.float32)

    def overlap(a: np.ndarray, b: np.ndarray) -> float:
        sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) + offset
        common = np.prod(np.maximum(sides, 0))
        whole = np.prod(a[2:] - a[:2] + offset) + np.prod(b[2:] - b[:2] + offset) - common
        return common / whole if whole else 0.0

    expected: list[int] = []
    for i in np.argsort(-scores):
        if all(overlap(boxes[i], boxes[j]) <= 0.3 for j in expected):
            expected.append(int(i))
    assert 20 < len(expected) < 120
    assert nms_upright(boxes, scores, 0.3, offset).tolist() == expected


def test_corners_turn_from_x_towards_y() -> None:
    corners = rotated_corners(np.array([[10, 20, 4, 2, math.pi / 2]]))
    np.testing.assert_allclose(corners[0], [[11, 18], [11, 22], [9, 22], [9, 18]], atol=1e-12)


@needs_mmdet3d
class TestMmcv:
    @pytest.fixture(autouse=True)
    def _install(self) -> None:
        from qat.families.mmdet3d import ops

        ops.install()

    @pytest.mark.parametrize("mode", ["iou", "iof"])
    @pytest.mark.parametrize("clockwise", [True, False])
    def test_box_iou_rotated(self, mode: str, clockwise: bool) -> None:
        import torch
        from mmcv.ops import box_iou_rotated as of_mmcv

        a, b = torch.from_numpy(_boxes(12, 8)).float(), torch.from_numpy(_boxes(12, 9)).float()
        expected = _shapely(a.double().numpy(), b.double().numpy(), mode == "iof", 1 if clockwise else -1)
        np.testing.assert_allclose(of_mmcv(a, b, mode, clockwise=clockwise), expected, atol=1e-6)
        aligned = of_mmcv(a, b, mode, aligned=True, clockwise=clockwise)
        np.testing.assert_allclose(aligned, np.diag(expected), atol=1e-6)

    def test_nms_rotated_does_not_look_at_labels_and_batched_nms_does(self) -> None:
        import torch
        from mmcv.ops import batched_nms
        from mmcv.ops import nms_rotated as of_mmcv

        boxes, scores, labels = torch.tensor([[0, 0, 4, 2, 0.1], [0.2, 0, 4, 2, 0.1]]), torch.tensor([0.4, 0.9]), [0, 1]
        kept, index = of_mmcv(boxes, scores, 0.5, torch.tensor(labels))
        assert index.tolist() == [1]
        np.testing.assert_allclose(kept, [[0.2, 0, 4, 2, 0.1, 0.9]])
        settings = {"type": "nms_rotated", "iou_threshold": 0.5}
        assert batched_nms(boxes, scores, torch.tensor(labels), settings)[1].tolist() == [1, 0]
        assert batched_nms(boxes, scores, torch.tensor([1, 1]), settings)[1].tolist() == [1]

    def test_nms_and_its_score_threshold(self) -> None:
        import torch
        from mmcv.ops import nms

        boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 10, 10]])
        kept, index = nms(boxes, torch.tensor([0.8, 0.9, 0.1, 0.7]), iou_threshold=0.5)
        assert index.tolist() == [1, 2]
        assert kept.shape == (2, 5)
        assert nms(boxes, torch.tensor([0.8, 0.9, 0.1, 0.7]), 0.5, score_threshold=0.2)[1].tolist() == [1]
        assert nms(boxes[:0], torch.zeros(0), 0.5)[1].tolist() == []

    def test_nms3d_and_its_upright_form(self) -> None:
        import torch
        from mmcv.ops import nms3d, nms3d_normal

        flat = _boxes(60, 10, 4)
        boxes = np.column_stack([flat[:, :2], np.zeros(60), flat[:, 2:4], np.ones(60), flat[:, 4]])
        scores = np.random.default_rng(11).random(60)
        found = nms3d(torch.from_numpy(boxes).float(), torch.from_numpy(scores).float(), 0.25)
        assert found.tolist() == nms_rotated(flat.astype(np.float32), scores, 0.25).tolist()
        upright = np.column_stack([flat[:, :4], np.zeros(60)])
        found = nms3d_normal(torch.from_numpy(boxes).float(), torch.from_numpy(scores).float(), 0.25)
        assert found.tolist() == nms_rotated(upright, scores, 0.25).tolist() != nms_rotated(flat, scores, 0.25).tolist()
