"""BEV pooling on a real GPU, against the CPU's."""

import numpy as np
import pytest

from qat.core.errors import UserError
from qat.engine import cuda

pytest.importorskip("PIL", reason="qat.runtime needs Pillow, which a TensorRT lab may lack")
pytest.importorskip("llvmlite", reason="pooling on the CPU, which is compared with, needs llvmlite")
from qat.core.geometry import camera_ring
from qat.families.bevfusion.pooling.cpu import pool
from qat.families.bevfusion.pooling.cuda import DevicePattern, gpu_problem, pool_device
from qat.families.bevfusion.pooling.geometry import create_frustum, frustum_to_lidar, pooling_pattern

# The driver, the GPU or NVRTC; not the kernel: where that does not compile, these tests fail.
PROBLEM = gpu_problem()
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))


def ok(answer):
    status, *results = answer
    assert status.value == 0, status
    return results[0] if results else None


class DeviceArray:
    """A numpy array's copy on GPU 0, in the primary context."""

    def __init__(self, array):
        from cuda.bindings import driver

        self.driver, self.array = driver, np.ascontiguousarray(array)
        self.address = int(ok(driver.cuMemAlloc(self.array.nbytes)))
        ok(driver.cuMemcpyHtoD(self.address, self.array.ctypes.data, self.array.nbytes))
        ok(driver.cuCtxSynchronize())
        self.__cuda_array_interface__ = {
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }

    def numpy(self):
        found = np.empty_like(self.array)
        ok(self.driver.cuCtxSynchronize())
        ok(self.driver.cuMemcpyDtoH(found.ctypes.data, self.address, found.nbytes))
        return found


@pytest.fixture(scope="module")
def device():
    """The driver, GPU 0's primary context made current."""
    from cuda.bindings import driver

    ok(driver.cuInit(0))
    context = ok(driver.cuDevicePrimaryCtxRetain(ok(driver.cuDeviceGet(0))))
    ok(driver.cuCtxPushCurrent(context))
    yield driver
    driver.cuCtxPopCurrent()


def case(channels=80, zbound=(-10.0, 10.0, 20.0), turn=0.0, seed=0):
    """A third of full size: six cameras, 59 bins, 16 × 44 pixels."""
    random = np.random.default_rng(seed)
    intrinsics, camera2lidar = (matrix.astype(np.float32) for matrix in camera_ring(6, (256, 704)))
    camera2lidar[:, 0, 3] += turn
    identity = np.eye(4, dtype=np.float32)
    frustum = create_frustum((256, 704), (16, 44), (1.0, 60.0, 1.0))
    points = frustum_to_lidar(frustum, intrinsics, camera2lidar, np.tile(identity, (6, 1, 1)), identity)
    pattern = pooling_pattern(points, (-54.0, 54.0, 0.6), (-54.0, 54.0, 0.6), zbound)
    weights = random.random((6, 59, 16, 44), np.float32)
    return (
        pattern,
        weights / weights.sum(1, keepdims=True),
        random.standard_normal((6, 16, 44, channels)).astype(np.float32),
    )


@pytest.mark.parametrize("zbound", [(-10.0, 10.0, 20.0), (-10.0, 10.0, 5.0)], ids=["one layer", "four layers"])
@pytest.mark.parametrize("channels", [10, 80, 150])
def test_the_gpu_gives_the_cpus_sums(device, channels, zbound):
    pattern, weights, features = case(channels, zbound)
    expected = pool(pattern, weights, features)
    out = DeviceArray(np.full(expected.shape, np.nan, np.float32))
    with DevicePattern(pattern) as on_device:
        pool_device(on_device, DeviceArray(weights), DeviceArray(features), out)
        found = out.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.count_nonzero(expected) > 1000


def test_halves_are_summed_in_single_precision_and_rounded_once(device):
    pattern, weights, features = case()
    weights, features = weights.astype(np.float16), features.astype(np.float16)
    expected = pool(pattern, weights.astype(np.float32), features.astype(np.float32))
    out = DeviceArray(np.full(expected.shape, np.nan, np.float16))
    with DevicePattern(pattern) as on_device:
        pool_device(on_device, DeviceArray(weights), DeviceArray(features), out)
        np.testing.assert_allclose(out.numpy(), expected, rtol=2**-10, atol=1e-7)


def test_every_run_gives_the_same_bits_on_a_stream_of_the_caller(device):
    pattern, weights, features = case()
    stream = ok(device.cuStreamCreate(device.CUstream_flags.CU_STREAM_NON_BLOCKING))
    arrays = DeviceArray(weights), DeviceArray(features)
    results = []
    with DevicePattern(pattern) as on_device:
        for _ in range(5):
            out = DeviceArray(np.full((1, 80, 180, 180), np.nan, np.float32))
            pool_device(on_device, *arrays, out, stream)
            ok(device.cuStreamSynchronize(stream))
            results.append(out.numpy())
    for found in results[1:]:
        np.testing.assert_array_equal(found, results[0])
    ok(device.cuStreamDestroy(stream))


def test_another_geometry_takes_the_patterns_place(device):
    with DevicePattern(case()[0]) as on_device:
        for turn in (0.4, -2.0):
            pattern, weights, features = case(turn=turn)
            expected = pool(pattern, weights, features)
            on_device.upload(pattern)
            out = DeviceArray(np.full(expected.shape, np.nan, np.float32))
            pool_device(on_device, DeviceArray(weights), DeviceArray(features), out)
            np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_pattern_whose_memory_is_gone_is_refused(device):
    pattern, weights, features = case(channels=16)
    given = DeviceArray(weights), DeviceArray(features), DeviceArray(np.zeros((1, 16, 180, 180), np.float32))
    on_device = DevicePattern(pattern)
    on_device.close()
    with pytest.raises(UserError, match="was closed or whose upload failed"):
        pool_device(on_device, *given)
    on_device.upload(pattern)
    pool_device(on_device, *given)
    np.testing.assert_allclose(given[2].numpy(), pool(pattern, weights, features), rtol=1e-5, atol=1e-6)


def test_an_engines_own_stream_is_taken_and_page_locked_memory_refused(device):
    pattern, weights, features = case(channels=16)
    expected, stream = pool(pattern, weights, features), cuda.Stream()
    out = DeviceArray(np.full(expected.shape, np.nan, np.float32))
    with DevicePattern(pattern) as on_device:
        pool_device(on_device, DeviceArray(weights), DeviceArray(features), out, stream)
        stream.synchronize()
        np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-6)
        pinned = cuda.PinnedBuffer(expected.nbytes)
        out.__cuda_array_interface__ = out.__cuda_array_interface__ | {"data": (pinned.pointer, False)}
        with pytest.raises(UserError, match="out: found an array in the host's memory"):
            pool_device(on_device, DeviceArray(weights), DeviceArray(features), out, stream)


def test_other_depth_bins_than_the_patterns_are_refused(device):
    pattern, weights, features = case(channels=16)
    out = DeviceArray(np.zeros((1, 16, 180, 180), np.float32))
    with DevicePattern(pattern) as on_device:
        for found in (weights[:, :-1], np.concatenate([weights, weights[:, :1]], 1)):
            with pytest.raises(UserError, match="D = 59 as in the pattern"):
                pool_device(on_device, DeviceArray(found), DeviceArray(features), out)


def test_a_launch_can_be_captured_in_a_graph(device):
    pattern, weights, features = case(channels=16)
    expected = pool(pattern, weights, features)
    stream = ok(device.cuStreamCreate(device.CUstream_flags.CU_STREAM_NON_BLOCKING))
    arrays = DeviceArray(weights), DeviceArray(features)
    out = DeviceArray(np.full(expected.shape, np.nan, np.float32))
    with DevicePattern(pattern) as on_device:
        pool_device(on_device, *arrays, out, stream)  # compiles the kernel, which cannot be captured
        ok(device.cuStreamSynchronize(stream))
        ok(device.cuMemsetD8(out.address, 0xFF, out.array.nbytes))
        ok(device.cuCtxSynchronize())
        ok(device.cuStreamBeginCapture(stream, device.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        pool_device(on_device, *arrays, out, stream)
        graph = ok(device.cuStreamEndCapture(stream))
        executable = ok(device.cuGraphInstantiate(graph, 0))
        ok(device.cuGraphLaunch(executable, stream))
        ok(device.cuStreamSynchronize(stream))
        np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-6)
    ok(device.cuGraphExecDestroy(executable))
    ok(device.cuGraphDestroy(graph))
    ok(device.cuStreamDestroy(stream))
