import numpy as np
import pytest

from qat.core.errors import UserError
from qat.core.geometry import create_frustum, frustum_to_lidar, pooling_pattern
from qat.runtime.pooling import PatternCache, pool

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


def test_result_does_not_depend_on_the_number_of_threads():
    random = np.random.default_rng(2)
    points = frustum_to_lidar(create_frustum(IMAGE, FEATURE, DBOUND), *matrices())
    pattern = pooling_pattern(points, XBOUND, YBOUND, [-10.0, 10.0, 20.0])
    tensors = random.random((3, 8, 4, 6), np.float32), random.random((3, 4, 6, 5), np.float32)
    np.testing.assert_array_equal(pool(pattern, *tensors, threads=2), pool(pattern, *tensors, threads=1))


def test_tensors_of_other_sizes_than_the_pattern_are_refused():
    points = frustum_to_lidar(create_frustum(IMAGE, FEATURE, DBOUND), *matrices())
    pattern = pooling_pattern(points, XBOUND, YBOUND, [-10.0, 10.0, 20.0])
    with pytest.raises(UserError, match="= 72 as in the pattern"):
        pool(pattern, np.ones((2, 8, 4, 6), np.float32), np.ones((2, 4, 6, 5), np.float32))
    with pytest.raises(UserError, match="fewer depth bins"):
        pool(pattern, np.ones((3, 7, 4, 6), np.float32), np.ones((3, 4, 6, 5), np.float32))


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
