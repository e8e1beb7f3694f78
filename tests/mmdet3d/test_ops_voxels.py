"""Voxelization against mmdet3d's VoxelGenerator and the definition."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from qat.core.errors import UserError
from qat.families.mmdet3d.ops.voxels import grid_size, point_cells, voxelize

needs_mmdet3d = pytest.mark.skipif(
    importlib.util.find_spec("mmdet3d") is None, reason="mmdet3d is not installed: pip install 'bevqat[mmdet3d]'"
)
SIZE, RANGE = (0.4, 0.5, 2.0), (-10.0, -8.0, -3.0, 10.0, 8.0, 1.0)


def _cloud(count: int, seed: int = 0, columns: int = 5) -> np.ndarray:
    random = np.random.default_rng(seed)
    points = random.normal(0, (6, 5, 1, *[1] * (columns - 3)), (count, columns)).astype(np.float32)
    return points


def _naive(points: np.ndarray, size: tuple, bounds: tuple, most_points: int, most_voxels: int) -> dict:
    """Cells in order of appearance and the points of each, in a dictionary."""
    low, high, size = np.float32(bounds[:3]), np.float32(bounds[3:]), np.float32(size)
    grid = np.round((high - low) / size)
    cells: dict[tuple, list[np.ndarray]] = {}
    for point in points:
        cell = np.floor((point[:3] - low) / size)
        if not ((cell >= 0) & (cell < grid)).all():
            continue
        key = tuple(cell[::-1].astype(int))
        if key not in cells and len(cells) == most_voxels:
            continue
        if len(cells.setdefault(key, [])) < most_points:
            cells[key].append(point)
    return cells


def _check(found: tuple, cells: dict) -> None:
    voxels, coords, counts = found
    assert [tuple(c) for c in coords.tolist()] == list(cells)
    assert counts.tolist() == [len(v) for v in cells.values()]
    for voxel, held in zip(voxels, cells.values(), strict=True):
        np.testing.assert_array_equal(voxel[: len(held)], held)
        assert not voxel[len(held) :].any()


@pytest.mark.parametrize(("most_points", "most_voxels"), [(32, 5000), (3, 5000), (3, 100), (1, 1)])
def test_voxels_are_those_of_the_definition(most_points: int, most_voxels: int) -> None:
    points = _cloud(3000)
    cells = _naive(points, SIZE, RANGE, most_points, most_voxels)
    assert len(cells) == most_voxels or most_voxels == 5000
    _check(voxelize(points, SIZE, RANGE, most_points, most_voxels), cells)


def test_nan_infinite_and_outside_points_are_left_out() -> None:
    points = np.zeros((9, 4), np.float32)
    points[0, 0], points[1, 1], points[2, 2] = np.nan, np.inf, -np.inf
    points[3, 0], points[4, 0], points[5, 2] = (
        10.0,
        np.nextafter(np.float32(-10), np.float32(-11)),
        1.0,
    )  # the end is outside
    points[6, 0], points[7, 3] = -10.0, np.nan  # the start is inside; a feature may be anything
    voxels, coords, counts = voxelize(points, SIZE, RANGE, 4, 10)
    assert counts.tolist() == [1, 2]
    assert coords.tolist() == [[1, 16, 0], [1, 16, 25]]
    assert np.isnan(voxels[1, 0, 3])
    assert point_cells(points, SIZE, RANGE)[:6].tolist() == [[-1, -1, -1]] * 6


@pytest.mark.parametrize("count", [0, 1])
def test_an_empty_cloud_and_a_single_point(count: int) -> None:
    voxels, coords, counts = voxelize(np.zeros((count, 4), np.float32), SIZE, RANGE, 8, 16)
    assert voxels.shape == (count, 8, 4)
    assert coords.shape == (count, 3)
    assert counts.tolist() == [1] * count


def test_a_cell_is_computed_in_float32_as_mmcv_does() -> None:
    # 0.3 / 0.1 is 3.0000001 in float32 and 2.9999999999999996 in float64.
    points = np.array([[0.3, 0, 0]], np.float32)
    assert point_cells(points, (0.1, 1, 1), (0, 0, 0, 1, 1, 1)).tolist() == [[0, 0, 3]]


def test_a_grid_of_a_billion_cells_takes_no_table_of_it() -> None:
    points = _cloud(2000)
    size, bounds = (0.01, 0.01, 0.01), (-20.0, -20.0, -4.0, 20.0, 20.0, 4.0)
    assert grid_size(size, bounds).tolist() == [4000, 4000, 800]
    _check(voxelize(points, size, bounds, 2, 9999), _naive(points, size, bounds, 2, 9999))


@pytest.mark.parametrize(
    ("points", "size", "bounds", "most", "words"),
    [
        (np.zeros((4, 2)), SIZE, RANGE, 5, "points of shape [4, 2]"),
        (np.zeros(4), SIZE, RANGE, 5, "points of shape [4]"),
        (np.zeros((4, 4)), (0.4, 0.0, 1.0), RANGE, 5, "three positive sizes"),
        (np.zeros((4, 4)), (0.4, 0.4), RANGE, 5, "three positive sizes"),
        (np.zeros((4, 4)), SIZE, RANGE[3:] + RANGE[:3], 5, "each above from"),
        (np.zeros((4, 4)), SIZE, RANGE, 0, "at least 1"),
    ],
)
def test_bad_input_is_refused_in_words(points: np.ndarray, size: tuple, bounds: tuple, most: int, words: str) -> None:
    with pytest.raises(UserError) as error:
        voxelize(points, size, bounds, most, most)
    assert words in str(error.value)


@needs_mmdet3d
@pytest.mark.parametrize(("most_points", "most_voxels"), [(32, 5000), (2, 5000), (4, 150)])
def test_voxels_are_those_of_mmdet3ds_generator(most_points: int, most_voxels: int) -> None:
    from qat.families.mmdet3d import ops

    ops.install()
    from mmdet3d.models.task_modules import VoxelGenerator

    points = _cloud(4000, 1)
    inside = ((points[:, :3] >= RANGE[:3]) & (points[:, :3] < RANGE[3:])).all(1)
    generator = VoxelGenerator(SIZE, RANGE, most_points, most_voxels)
    for a, b in zip(
        voxelize(points, SIZE, RANGE, most_points, most_voxels), generator.generate(points[inside]), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@needs_mmdet3d
def test_mmcvs_layer_gives_the_same_and_dynamic_cells() -> None:
    from qat.families.mmdet3d import ops

    ops.install()
    import torch
    from mmcv.ops import Voxelization

    points = _cloud(2000, 2, columns=4)
    points[5] = np.nan
    layer = Voxelization(list(SIZE), list(RANGE), 5, (300, 200)).eval()
    for a, b in zip(layer(torch.from_numpy(points)), voxelize(points, SIZE, RANGE, 5, 200), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(layer.train()(torch.from_numpy(points))[0]) == 300
    cells = Voxelization(list(SIZE), list(RANGE), -1, (-1, -1))(torch.from_numpy(points))
    assert cells.dtype == torch.int32
    np.testing.assert_array_equal(cells, point_cells(points, SIZE, RANGE))
    assert cells[5].tolist() == [-1, -1, -1]
