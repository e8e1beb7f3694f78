"""Pictures for lidar: boxes are where they should be seen from above and in the image, differences between two sets show."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qat.boxes.detections import Detections
from qat.deploy.mmdeploy.picture import BAR, LONG, OTHERS, PALETTE, draw

LIMITS = [0.0, -10.0, -3.0, 20.0, 10.0, 1.0]
POINTS = np.array([[0, -10, 0], [0, 10, 0], [20, -10, 0], [20, 10, 0]], np.float32)  # so that all of LIMITS is shown
# A camera at the sensor that looks along x: 100 pixels focal length, 200 × 100 pixels.
LIDAR2IMG = np.array([[100, -100, 0, 0], [50, 0, -100, 0], [1, 0, 0, 0], [0, 0, 0, 1]], np.float64)


def box(x: float, y: float, yaw: float = 0.0, score: float = 0.9, label: int = 0) -> Detections:
    """4 × 2 × 1.5 m, its bottom at z −1.5."""
    boxes = np.array([[x, y, -1.5, 4, 2, 1.5, yaw]], np.float32)
    return Detections(boxes, np.float32([score]), np.array([label]), "mmdet3d")


def picture(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def places(found: np.ndarray, colour: tuple[int, int, int], within: int = 60) -> np.ndarray:
    """Rows and columns of a colour, a line's softened rims included."""
    return np.argwhere((np.abs(found - colour) <= within).all(-1))


def metres(rows_columns: np.ndarray) -> np.ndarray:
    """x, y of pixels of a panel that shows LIMITS and AROUND of 3 m."""
    scale = LONG / 26
    return np.array([23.0, 13.0]) - (rows_columns - [BAR, 0]) / scale


@pytest.mark.parametrize("yaw", [0.0, np.pi / 2])
def test_a_box_is_where_it_is_and_its_front_is_marked(tmp_path, yaw):
    found = picture(draw(POINTS, box(10, 4, yaw), tmp_path / "a.png", limits=LIMITS))
    at = metres(places(found, PALETTE[0]))
    size = [4, 2] if yaw == 0 else [2, 4]
    assert np.ptp(at, axis=0) == pytest.approx(size, abs=0.15)
    assert (at.min(0) + at.max(0)) / 2 == pytest.approx([10, 4], abs=0.1)
    # More is drawn in front of the middle than behind it.
    axis = 0 if yaw == 0 else 1
    ahead = (at[:, axis] > [10, 4][axis]).sum()
    assert ahead > 1.3 * (len(at) - ahead)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_where_the_camera_looks_is_up(tmp_path, quarters):
    """A scene and its camera turned by quarters look like the scene itself."""
    turn = np.eye(4)
    angle = quarters * np.pi / 2
    turn[:2, :2] = np.round([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    image = np.full((100, 200, 3), 90, np.uint8)
    straight = picture(draw(POINTS, box(10, 4, 0.3), tmp_path / "a.png", image, LIDAR2IMG, limits=LIMITS))
    points = (POINTS @ turn[:3, :3].T).astype(np.float32)
    x, y = turn[:2, :2] @ [10, 4]
    corners = np.array([LIMITS[:3], LIMITS[3:]]) @ turn[:3, :3].T
    limits = [*corners.min(0), *corners.max(0)]
    matrix = LIDAR2IMG @ np.linalg.inv(turn)
    turned = picture(draw(points, box(x, y, 0.3 + angle), tmp_path / "b.png", image, matrix, limits=limits))
    assert turned.shape == straight.shape and (np.abs(turned - straight) > 40).any(-1).mean() < 1e-3


def test_scores_below_the_threshold_are_not_drawn(tmp_path):
    weak = picture(draw(POINTS, box(10, 4, score=0.2), tmp_path / "a.png", score_thr=0.3, limits=LIMITS))
    assert len(places(weak, PALETTE[0])) == 0


def test_what_differs_between_two_sets_is_white(tmp_path):
    def white(second: Detections) -> int:
        sets = {"onnxruntime": box(10, 4), "pytorch": second}
        found = picture(draw(POINTS, sets, tmp_path / "a.png", limits=LIMITS))
        assert len(places(found, PALETTE[0])) > 200
        return len(places(found[BAR:], OTHERS, 2))

    assert white(box(10, 4)) == 0 and white(box(10.5, 4)) > 100


def test_boxes_over_the_image(tmp_path):
    image = np.full((100, 200, 3), 90, np.uint8)
    one = picture(draw(POINTS, box(10, 0), tmp_path / "a.png", image, LIDAR2IMG, ["Car"], limits=LIMITS))
    alone = picture(draw(POINTS, box(10, 0), tmp_path / "b.png", classes=["Car"], limits=LIMITS))
    assert len(one) > len(alone) + 400
    below = one[BAR + LONG + 8 : -26]
    at = places(below, PALETTE[0]) * 200 / LONG
    # The near face, 8 m away, is 2 m wide and from 0 to 1.5 m below the camera.
    assert at.min(0) == pytest.approx([50, 100 - 100 / 8], abs=1) and at.max(0) == pytest.approx(
        [50 + 150 / 8, 100 + 100 / 8], abs=1
    )


def test_empty_clouds_and_no_boxes(tmp_path):
    draw(np.zeros((0, 4), np.float32), Detections.empty(), tmp_path / "a.png")
    draw(np.array([[np.nan, 0, 0, 0]], np.float32), {"a": Detections.empty(), "b": box(3, 3)}, tmp_path / "b.png")
    assert picture(tmp_path / "b.png").shape[1] > picture(tmp_path / "a.png").shape[1]
