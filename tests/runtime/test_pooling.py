from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.core.errors import UserError
from qat.families.bevfusion.pooling.cpu import PatternCache, pool
from qat.families.bevfusion.pooling.geometry import create_frustum, frustum_to_lidar, pooling_pattern
from tests.messages import refused

XBOUND, YBOUND = [-8.0, 8.0, 1.0], [-6.0, 6.0, 0.5]
DBOUND = [1.0, 9.0, 1.0]
IMAGE, FEATURE = (32, 48), (4, 6)


def matrices(seed=0, cameras=3):
    random = np.random.default_rng(seed)
    intrinsics = np.tile(np.eye(4, dtype=np.float32), (cameras, 1, 1))
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = 30
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = 24, 16
    camera2lidar = np.tile(np.eye(4, dtype=np.float32), (cameras, 1, 1))
    for n in range(cameras):
        angle = 2 * np.pi * n / cameras + random.uniform(0, 0.1)
        c, s = np.cos(angle), np.sin(angle)
        camera2lidar[n, :3, :3] = [[s, 0, c], [-c, 0, s], [0, -1, 0]]
        camera2lidar[n, :3, 3] = random.uniform(-0.3, 0.3, 3)
    augment = np.tile(np.eye(4, dtype=np.float32), (cameras, 1, 1))
    return intrinsics, camera2lidar, augment, np.eye(4, dtype=np.float32)


def naive(points, weights, features, bounds):
    """BEVFusion's definition: every frustum point adds weight · feature to its cell; double precision."""
    counts = [int((b[1] - b[0]) / b[2]) for b in bounds]
    out = np.zeros((counts[2], features.shape[-1], counts[0], counts[1]))
    n, d, h, w, _ = points.shape
    low, step = (np.array([b[i] for b in bounds], np.float32) for i in (0, 2))
    for index in np.ndindex(n, d, h, w):
        x, y, z = np.trunc((points[index] - low) / step).astype(int)
        if 0 <= x < counts[0] and 0 <= y < counts[1] and 0 <= z < counts[2]:
            camera, _, row, column = index
            out[z, :, x, y] += np.float64(weights[index]) * features[camera, row, column]
    return out.reshape(1, -1, *out.shape[2:])


@pytest.mark.parametrize("zbound", [[-10.0, 10.0, 20.0], [-3.0, 3.0, 2.0]], ids=["one layer", "three layers"])
def test_pooling_equals_the_naive_sum(zbound):
    random = np.random.default_rng(1)
    points = frustum_to_lidar(create_frustum(IMAGE, FEATURE, DBOUND), *matrices())
    weights = random.random((3, 8, 4, 6), np.float32)
    features = random.standard_normal((3, 4, 6, 5)).astype(np.float32)
    got = pool(pooling_pattern(points, XBOUND, YBOUND, zbound), weights, features)
    expected = naive(points, weights, features, (XBOUND, YBOUND, zbound))
    assert got.dtype == np.float32 and got.shape == expected.shape and np.count_nonzero(expected) > 100
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def pattern_of(cells, bins, plane, shape, cameras=1):
    """The pattern in which point i of [cameras, bins, 1, plane] falls into cells[i] = (x, y, z), made from real points."""
    nz, nx, ny = shape
    points = (np.asarray(cells, np.float32).reshape(cameras, bins, 1, plane, 3) + np.float32(0.5)).astype(np.float32)
    return pooling_pattern(points, [0.0, nx, 1.0], [0.0, ny, 1.0], [0.0, nz, 1.0])


def scattered(pattern, weights, features):
    """The definition in double precision, by numpy's own scatter-add over the pattern's entries."""
    nz, nx, ny = pattern.shape
    channels = features.shape[-1]
    out = np.zeros((nz * nx * ny, channels))
    values = weights.reshape(-1)[pattern.depth].astype(np.float64)
    np.add.at(out, pattern.cell, values[:, None] * features.reshape(-1, channels)[pattern.pixel])
    return out.reshape(nz, nx, ny, channels).transpose(0, 3, 1, 2).reshape(1, nz * channels, nx, ny)


def random_case(seed, bins, plane, shape, channels, cameras=2):
    random = np.random.default_rng(seed)
    nz, nx, ny = shape
    cells = random.integers(-1, [nx + 1, ny + 1, nz + 1], (cameras * bins * plane, 3))
    weights = random.random((cameras, bins, 1, plane), np.float32)
    features = random.standard_normal((cameras, 1, plane, channels)).astype(np.float32)
    return pattern_of(cells, bins, plane, shape, cameras), weights, features


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bins=st.integers(1, 6),
    plane=st.integers(1, 12),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 70)),
    channels=st.sampled_from([1, 5, 16, 17, 32, 40, 48, 64, 80, 90, 112, 161]),
)
def test_any_pattern_and_any_number_of_channels_give_the_naive_sum(seed, bins, plane, shape, channels):
    case = random_case(seed, bins, plane, shape, channels)
    np.testing.assert_allclose(pool(*case), scattered(*case), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((1, 160, 176), 80), ((1, 157, 179), 23), ((2, 96, 170), 16)],
    ids=["whole blocks", "nothing whole", "two layers"],
)
def test_result_is_the_same_bits_with_any_number_of_threads(shape, channels):
    case = random_case(2, 20, 1000, shape, channels)  # enough that five threads are worth their start
    alone = pool(*case, threads=1)
    np.testing.assert_allclose(alone, scattered(*case), rtol=1e-5, atol=2e-5)
    for threads in (2, 3, 5, 0):
        np.testing.assert_array_equal(pool(*case, threads=threads), alone)


def test_pooling_may_be_called_from_several_threads_at_once():
    case = random_case(3, 20, 1000, (1, 160, 176), 16)
    alone = pool(*case, threads=1)
    with ThreadPoolExecutor(4) as callers:
        for found in callers.map(lambda _: pool(*case, threads=2), range(12)):
            np.testing.assert_array_equal(found, alone)


def test_one_cell_may_hold_everything():
    random = np.random.default_rng(4)
    pattern = pattern_of(np.tile([3, 40, 0], (40 * 500, 1)), 40, 500, (1, 8, 64))
    weights = random.random((1, 40, 1, 500), np.float32)
    features = random.random((1, 1, 500, 20), np.float32)
    got = pool(pattern, weights, features)
    expected = np.einsum("dp,pc->c", weights[0, :, 0].astype(np.float64), features[0, 0])
    np.testing.assert_allclose(got[0, :, 3, 40], expected, rtol=2e-5)
    got[0, :, 3, 40] = 0
    assert not got.any()


def test_no_point_in_the_grid_gives_zeros():
    pattern = pattern_of(np.full((6, 3), -5), 2, 3, (2, 5, 7))
    assert len(pattern.cell) == 0 and pattern.bins == 2
    got = pool(pattern, np.ones((1, 2, 1, 3), np.float32), np.ones((1, 1, 3, 17), np.float32))
    assert got.shape == (1, 34, 5, 7) and not got.any()


def test_result_is_written_into_the_callers_memory():
    case = random_case(5, 4, 30, (1, 12, 16), 18)
    expected = pool(*case)
    whole = np.full(18 * 12 * 16 + 1, np.nan, np.float32)
    for start in (0, 1):  # of these at most one begins at a whole cache line
        out = whole[start : start + 18 * 12 * 16].reshape(1, 18, 12, 16)
        assert pool(*case, out=out) is out
        np.testing.assert_array_equal(out, expected)
    again = pool(*case, out=expected.copy())
    np.testing.assert_array_equal(again, expected)


def test_memory_that_the_result_does_not_fit_is_refused():
    case = random_case(5, 4, 30, (1, 12, 16), 18)
    with refused("out", "found float32[1, 18, 16, 12]", "expected", "float32[1, 18, 12, 16]"):
        pool(*case, out=np.empty((1, 18, 16, 12), np.float32))
    with pytest.raises(UserError, match=r"found float64\[1, 18, 12, 16\]"):
        pool(*case, out=np.empty((1, 18, 12, 16)))
    with pytest.raises(UserError, match="strided"):
        pool(*case, out=np.empty((1, 18, 12, 32), np.float32)[..., ::2])
    locked = np.empty((1, 18, 12, 16), np.float32)
    locked.flags.writeable = False
    with pytest.raises(UserError, match="read-only"):
        pool(*case, out=locked)


def test_tensors_of_other_sizes_than_the_pattern_are_refused():
    points = frustum_to_lidar(create_frustum(IMAGE, FEATURE, DBOUND), *matrices())
    pattern = pooling_pattern(points, XBOUND, YBOUND, [-10.0, 10.0, 20.0])
    bins = pattern.bins
    with pytest.raises(UserError, match=f"= 72 and D = {bins} as in the pattern"):
        pool(pattern, np.ones((2, bins, 4, 6), np.float32), np.ones((2, 4, 6, 5), np.float32))
    for found in (bins - 1, bins + 1):  # more of them would be read at the wrong places
        with refused(f"found depth weights [3, {found}, 4, 6]", f"D = {bins} as in the pattern"):
            pool(pattern, np.ones((3, found, 4, 6), np.float32), np.ones((3, 4, 6, 5), np.float32))


def test_pattern_cache_rebuilds_only_for_new_geometry_and_forgets_the_oldest():
    cache = PatternCache(IMAGE, FEATURE, XBOUND, YBOUND, [-10.0, 10.0, 20.0], DBOUND, size=2)
    first = cache.get(*matrices(0))
    assert cache.get(*matrices(0)) is first and cache.rebuilds == 1
    moved = cache.get(*matrices(1))
    assert cache.rebuilds == 2 and not np.array_equal(moved.cell, first.cell)
    cache.get(*matrices(2))
    assert cache.get(*matrices(1)) is moved and cache.rebuilds == 3
    again = cache.get(*matrices(0))
    assert cache.rebuilds == 4
    np.testing.assert_array_equal(again.pixel, first.pixel)
