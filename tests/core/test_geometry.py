"""Lift-splat geometry against plain float64 loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qat.boxes.geometry import box_corners, box_heading
from qat.core.geometry import rasterize_depth
from qat.families.bevfusion.pooling.geometry import (
    create_frustum,
    depth_bins,
    frustum_to_lidar,
    grid_size,
    pooling_pattern,
)

BOUNDS = ([-4.0, 4.0, 1.0], [-6.0, 6.0, 2.0], [-2.0, 2.0, 2.0])


def rotation(rng):
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


@pytest.fixture
def cameras():
    rng = np.random.default_rng(0)
    intrinsics, camera2lidar, aug = (np.tile(np.eye(4, dtype=np.float32), (3, 1, 1)) for _ in range(3))
    for n in range(3):
        intrinsics[n, :3, :3] = [[50 + n, 0, 20], [0, 52, 11], [0, 0, 1]]
        camera2lidar[n, :3, :3] = rotation(rng)
        camera2lidar[n, :3, 3] = rng.normal(size=3)
        aug[n, :2, :2] = 0.8 * np.array([[np.cos(0.1 * n), np.sin(0.1 * n)], [-np.sin(0.1 * n), np.cos(0.1 * n)]])
        aug[n, :2, 3] = [-3, -5 * n]
    lidar_aug = np.eye(4, dtype=np.float32)
    lidar_aug[:3, :3] = 1.05 * rotation(rng)
    lidar_aug[:3, 3] = [0.3, -0.2, 0.1]
    return intrinsics, camera2lidar, aug, lidar_aug


def test_the_frustum_spans_the_image_from_its_first_to_its_last_pixel():
    frustum = create_frustum((32, 64), (4, 8), (1.0, 4.0, 0.5))
    assert frustum.shape == (6, 4, 8, 3)
    assert frustum[0, 0, 0].tolist() == [0, 0, 1.0]
    assert frustum[-1, -1, -1].tolist() == [63, 31, 3.5]
    assert np.isclose(frustum[0, 1, 1, 0], 63 / 7)


def test_depth_bins_are_torch_aranges():
    torch = pytest.importorskip("torch")
    for bound in ((1.0, 60.0, 1.0), (1.0, 60.0, 0.5), (2.0, 58.0, 0.7)):
        assert np.allclose(depth_bins(bound), torch.arange(*bound, dtype=torch.float).numpy())


def test_frustum_points_project_back_to_their_pixels(cameras):
    intrinsics, camera2lidar, aug, lidar_aug = cameras
    frustum = create_frustum((32, 64), (4, 8), (1.0, 9.0, 2.0))
    points = frustum_to_lidar(frustum, *cameras)
    for n, d, h, w in [(0, 0, 0, 0), (1, 2, 3, 7), (2, 3, 1, 4)]:
        lidar = np.linalg.inv(lidar_aug.astype(float)) @ [*points[n, d, h, w], 1]
        camera = np.linalg.inv(camera2lidar[n].astype(float)) @ lidar
        assert np.isclose(camera[2], frustum[d, h, w, 2], atol=1e-4)
        pixel = intrinsics[n, :3, :3].astype(float) @ (camera[:3] / camera[2])
        seen = aug[n].astype(float) @ [pixel[0], pixel[1], 0, 1]
        assert np.allclose(seen[:2], frustum[d, h, w, :2], atol=1e-3)


def test_a_point_falls_into_the_cell_that_bevfusion_truncates_it_to():
    x, y, z = BOUNDS
    coordinates = [
        (-4.0, -6.0, -2.0),
        (-4.9, -6.0, 0.0),
        (3.99, 5.99, 1.99),
        (4.01, 0, 0),
        (-5.01, 0, 0),
        (0.5, 1.0, 0.5),
    ]
    points = np.array(coordinates, np.float32).reshape(1, len(coordinates), 1, 1, 3)
    pattern = pooling_pattern(points, x, y, z)
    expected = {}
    for i, point in enumerate(coordinates):
        index = [int((v - low) / step) for v, (low, _, step) in zip(point, BOUNDS, strict=True)]  # int() truncates
        if all(0 <= c < n for c, n in zip(index, (8, 6, 2), strict=True)):
            expected[i] = (index[2] * 8 + index[0]) * 6 + index[1]
    assert dict(zip(pattern.depth.tolist(), pattern.cell.tolist(), strict=True)) == expected
    assert 1 in expected and 4 not in expected  # up to one cell below the lower bound counts as cell 0
    assert grid_size(*BOUNDS) == (8, 6, 2)


def test_patterns_are_sorted_and_index_pixels_and_depths(cameras):
    frustum = create_frustum((32, 64), (4, 8), (1.0, 9.0, 2.0))
    points = frustum_to_lidar(frustum, *cameras)
    pattern = pooling_pattern(points, *BOUNDS)
    assert (np.diff(pattern.cell) >= 0).all()
    assert pattern.row_ptr[-1] == len(pattern.cell) and pattern.pixels == 3 * 32
    for k in range(0, len(pattern.cell), 7):
        n, _, h, w = np.unravel_index(pattern.depth[k], points.shape[:4])
        assert pattern.pixel[k] == (n * 4 + h) * 8 + w
        assert pattern.row_ptr[pattern.cell[k]] <= k < pattern.row_ptr[pattern.cell[k] + 1]
    row_ptr, order = pattern.by_pixel
    assert (np.diff(pattern.pixel[order]) >= 0).all() and row_ptr[-1] == len(order)


def test_every_frustum_point_is_where_double_precision_puts_it(cameras):
    intrinsics, camera2lidar, aug, lidar_aug = (matrix.astype(np.float64) for matrix in cameras)
    frustum = create_frustum((32, 64), (4, 8), (1.0, 60.0, 0.5))
    points = frustum_to_lidar(frustum, *cameras)
    for n in range(3):
        seen = (frustum.reshape(-1, 3) - aug[n, :3, 3]) @ np.linalg.inv(aug[n, :3, :3]).T
        seen[:, :2] *= seen[:, 2:]
        camera = seen @ np.linalg.inv(intrinsics[n, :3, :3]).T
        lidar = camera @ camera2lidar[n, :3, :3].T + camera2lidar[n, :3, 3]
        expected = lidar @ lidar_aug[:3, :3].T + lidar_aug[:3, 3]
        np.testing.assert_allclose(points[n].reshape(-1, 3), expected, atol=2e-4)


@settings(max_examples=60, deadline=None)
@given(
    arrays(
        np.float32,
        (2, 3, 2, 4, 3),
        elements=st.one_of(
            st.floats(-8, 8, width=32),
            st.sampled_from([np.nan, np.inf, -np.inf, 2.0**70, -(2.0**70), 3e9, -4.0, 4.0, -5.0, -0.0, 2.0]),
        ),
    )
)
def test_a_pattern_is_numpys_stable_sort_of_the_truncated_points(points):
    x, y, z = BOUNDS
    step = np.array([b[2] for b in BOUNDS], np.float32)
    low = np.array([b[0] + b[2] / 2 for b in BOUNDS], np.float32) - step / np.float32(2)
    with np.errstate(invalid="ignore", over="ignore"):
        index = np.trunc((points.reshape(-1, 3) - low) / step)
    inside = ((index >= 0) & (index < grid_size(*BOUNDS))).all(1)
    ix, iy, iz = index[inside].astype(int).T
    cell, depth = (iz * 8 + ix) * 6 + iy, np.flatnonzero(inside)
    order = np.argsort(cell, kind="stable")
    pattern = pooling_pattern(points, x, y, z)
    assert pattern.shape == (2, 8, 6) and pattern.cell.dtype == pattern.row_ptr.dtype == np.int32
    np.testing.assert_array_equal(pattern.cell, cell[order])
    np.testing.assert_array_equal(pattern.depth, depth[order])
    np.testing.assert_array_equal(pattern.pixel, depth[order] // 24 * 8 + depth[order] % 8)
    np.testing.assert_array_equal(np.repeat(np.arange(96), np.diff(pattern.row_ptr)), cell[order])


def test_depth_maps_equal_a_loop_in_which_the_last_point_wins(cameras):
    intrinsics, camera2lidar, aug, lidar_aug = cameras
    rng = np.random.default_rng(1)
    points = rng.normal(0, 6, (400, 5)).astype(np.float32)
    lidar2image = (intrinsics.astype(float) @ np.linalg.inv(camera2lidar.astype(float))).astype(np.float32)
    depth = rasterize_depth(points, lidar2image, aug, lidar_aug, (32, 64))
    expected = np.zeros((3, 1, 32, 64))
    for n in range(3):
        for point in points.astype(float):
            lidar = np.linalg.inv(lidar_aug.astype(float)) @ [*point[:3], 1]
            u, v, z, _ = lidar2image[n].astype(float) @ lidar
            clamped = min(max(z, 1e-5), 1e5)
            column, row, *_ = aug[n].astype(float) @ [u / clamped, v / clamped, clamped, 1]
            if 0 <= column < 64 and 0 <= row < 32:
                expected[n, 0, int(row), int(column)] = z
    assert (expected > 0).sum() > 20
    assert (np.abs(depth - expected) > 1e-3).mean() < 1e-3  # a point on a pixel's border may round either way


def test_two_points_on_one_pixel_leave_the_last_ones_depth():
    lidar2image = np.array([[[10, 0, 8, 0], [0, 10, 8, 0], [0, 0, 1, 0], [0, 0, 0, 1]]], np.float32)
    eye = np.eye(4, dtype=np.float32)
    for order in ((5.0, 9.0), (9.0, 5.0)):
        points = np.array([[0, 0, z] for z in order], np.float32)
        assert rasterize_depth(points, lidar2image, eye[None], eye, (16, 16))[0, 0, 8, 8] == order[1]


def test_yaw_zero_points_the_length_along_y():
    assert np.isclose(box_heading(np.array([0.0]))[0], -np.pi / 2)
    corners = box_corners(np.array([[1.0, 2.0, 3.0, 2.0, 4.0, 1.5, 0.0]]))[0]
    assert np.allclose(corners.min(0), [0, 0, 2.25]) and np.allclose(corners.max(0), [2, 4, 3.75])


def test_yaw_turns_clockwise():
    front = box_corners(np.array([[0.0, 0, 0, 1, 4, 1, 0.3]]))[0, :2].mean(0)[:2]
    assert np.isclose(np.arctan2(front[1], front[0]), -0.3 - np.pi / 2)
