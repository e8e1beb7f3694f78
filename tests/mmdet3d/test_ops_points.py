"""Operators on points: numpy's against their definitions, the traced forms and mmcv's wrappers against numpy's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from qat.core.errors import UserError
from qat.families.mmdet3d.ops import points as host

if TYPE_CHECKING:
    import torch

needs_mmdet3d = pytest.mark.skipif(
    importlib.util.find_spec("mmdet3d") is None, reason="mmdet3d is not installed: pip install 'bevqat[mmdet3d]'"
)


def _cloud(count: int, seed: int, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-spread, spread, (count, 3)).astype(np.float32)


def _lattice(side: int) -> np.ndarray:
    """Points whose distances are often equal, exactly."""
    axis = np.arange(side, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


def _squared(centres: np.ndarray, points: np.ndarray) -> np.ndarray:
    x, y, z = np.moveaxis(centres[:, None] - points[None], -1, 0)
    return (x * x + y * y) + z * z


def _naive_sample(points: np.ndarray, count: int) -> list[int]:
    nearest, picked = np.full(len(points), 1e10, np.float32), [0]
    while len(picked) < count:
        nearest = np.minimum(nearest, _squared(points[picked[-1:]], points)[0])
        picked.append(int(nearest.argmax()))
    return picked


def _naive_balls(points: np.ndarray, centres: np.ndarray, low: float, high: float, count: int) -> np.ndarray:
    out = np.zeros((len(centres), count), np.int32)
    for row, distance in zip(out, _squared(centres, points), strict=True):
        radii = np.float32(low) ** 2, np.float32(high) ** 2
        near = np.flatnonzero((distance == 0) | ((distance >= radii[0]) & (distance < radii[1])))[:count]
        if len(near):
            row[:] = near[0]
            row[: len(near)] = near
    return out


CLOUDS = {
    "random": _cloud(700, 0),
    "lattice": _lattice(8),
    "one": _cloud(1, 1),
    "twice": np.repeat(_cloud(40, 2), 2, 0),
}
BALLS = [(0.0, 0.5, 8), (0.4, 1.0, 8), (0.0, 1.0, 3), (0.0, 1e-3, 4), (0.0, 50.0, 900)]


@pytest.mark.parametrize("name", CLOUDS)
def test_sampled_points_are_those_of_the_definition(name: str) -> None:
    points = CLOUDS[name]
    assert host.furthest_point_sample(points, 60).tolist() == _naive_sample(points, 60)
    table = _squared(points, points)
    assert host.furthest_point_sample_of_distances(table, 60).tolist() == _naive_sample(points, 60)


def test_sampling_takes_each_point_once_and_columns_beyond_z_do_not_matter() -> None:
    points = _cloud(257, 3)
    picked = host.furthest_point_sample(np.column_stack([points, np.random.default_rng(0).random((257, 2))]), 257)
    assert sorted(picked.tolist()) == list(range(257))
    assert picked.tolist() == _naive_sample(points, 257)


@pytest.mark.parametrize(("low", "high", "count"), BALLS)
@pytest.mark.parametrize("name", CLOUDS)
def test_balls_hold_the_points_of_the_definition(name: str, low: float, high: float, count: int) -> None:
    points = CLOUDS[name]
    centres = np.concatenate([points[::3], points[:5] + np.float32(0.3), np.full((1, 3), 99, np.float32)])
    found = host.ball_query(points, centres, high, count, low)
    np.testing.assert_array_equal(found, _naive_balls(points, centres, low, high, count))
    if name == "random" and high == 0.5:  # a control: another radius is another answer
        assert (found != host.ball_query(points, centres, 0.51, count, low)).any()


def test_points_of_nan_are_in_no_ball() -> None:
    points = _cloud(300, 4)
    points[::7] = np.nan
    found = host.ball_query(points, points[1:2], 9.0, 300)
    assert not set(found.ravel().tolist()) & set(range(0, 300, 7))
    assert (host.ball_query(points, points[:1], 9.0, 4) == 0).all()


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("count", [1, 3, 20])
def test_nearest_points_are_those_of_a_sort(name: str, count: int) -> None:
    points, centres = CLOUDS[name], _cloud(50, 5)
    distances, indices = host.nearest_points(points, centres, count)
    table = _squared(centres, points)
    order = np.argsort(table, 1, kind="stable")[:, :count]
    real = order.shape[1]
    np.testing.assert_array_equal(indices[:, :real], order)
    np.testing.assert_array_equal(distances[:, :real], np.take_along_axis(table, order, 1))
    assert (indices[:, real:] == 0).all()
    assert (distances[:, real:] == 1e10).all()


def test_points_in_boxes_are_those_of_the_definition() -> None:
    points = _cloud(2000, 6, 4.0)
    random = np.random.default_rng(7)
    boxes = np.column_stack(
        [random.uniform(-3, 3, (30, 3)), random.uniform(0.5, 4, (30, 3)), random.uniform(-7, 7, 30)]
    )
    expected = np.zeros((2000, 30), bool)
    for t, (x, y, z, dx, dy, dz, yaw) in enumerate(boxes):
        turn = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]])
        local = (points[:, :2].astype(float) - [x, y]) @ turn.T
        expected[:, t] = (np.abs(local) < [dx / 2, dy / 2]).all(1) & (np.abs(points[:, 2] - z - dz / 2) <= dz / 2)
    assert 1000 < expected.sum() < 30000
    assert (host.points_in_boxes(points, boxes) == expected).all()
    assert (host.points_in_boxes(points, boxes * [1, 1, 1, 1, 1, 1, -1]) != expected).any()  # a control


def test_a_side_face_is_outside_and_the_bottom_and_top_are_inside() -> None:
    box = np.array([[0, 0, 0, 2, 2, 2, 0]], np.float32)
    points = np.array([[1, 0, 1], [0, -1, 1], [0, 0, 0], [0, 0, 2], [0, 0, 2.001], [0.999, 0.999, 1]], np.float32)
    assert host.points_in_boxes(points, box)[:, 0].tolist() == [False, False, True, True, False, True]
    assert host.points_in_boxes(points, box[:0]).shape == (6, 0)
    assert host.points_in_boxes(points[:0], box).shape == (0, 1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: host.furthest_point_sample(np.zeros((0, 3)), 4), "an empty cloud"),
        (lambda: host.furthest_point_sample(np.zeros((5, 2)), 4), "points of shape [5, 2]"),
        (lambda: host.ball_query(np.zeros(3), np.zeros((1, 3)), 1.0, 4), "points of shape [3]"),
        (lambda: host.furthest_point_sample_of_distances(np.zeros((4, 3)), 2), "distances of shape [4, 3]"),
    ],
)
def test_bad_input_is_refused_in_words(call: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value)


@needs_mmdet3d
class TestMmcv:
    @pytest.fixture(autouse=True)
    def _install(self) -> None:
        from qat.families.mmdet3d import ops

        ops.install()

    def test_wrappers_give_what_numpys_functions_give(self) -> None:
        import torch
        from mmcv import ops

        clouds = np.stack([_cloud(300, 10), _cloud(300, 11)])
        xyz = torch.from_numpy(clouds)
        index = ops.furthest_point_sample(xyz, 32)
        assert index.dtype == torch.int32
        centres = torch.stack([cloud[at.long()] for cloud, at in zip(xyz, index, strict=True)])
        balls = ops.ball_query(0.2, 0.8, 6, xyz, centres)
        distance, nearest = ops.three_nn(xyz, centres)
        neighbours = ops.knn(7, xyz, centres)
        table = ops.furthest_point_sample_with_dist(torch.cdist(xyz, xyz), 20)
        for sample, cloud in enumerate(clouds):
            middle = centres[sample].numpy()
            assert index[sample].tolist() == host.furthest_point_sample(cloud, 32).tolist()
            np.testing.assert_array_equal(balls[sample], host.ball_query(cloud, middle, 0.8, 6, 0.2))
            squared, at = host.nearest_points(middle, cloud, 3)
            np.testing.assert_array_equal(nearest[sample], at)
            np.testing.assert_allclose(distance[sample], np.sqrt(squared), rtol=3e-7)
            np.testing.assert_array_equal(neighbours[sample].T, host.nearest_points(cloud, middle, 7)[1])
            assert len(set(table[sample].tolist())) == 20
        by_columns = ops.knn(7, xyz.transpose(1, 2), centres.transpose(1, 2), True)
        assert torch.equal(by_columns, neighbours)

    def test_containment_wrappers(self) -> None:
        import torch
        from mmcv import ops

        points, boxes = (
            _cloud(200, 12)[None],
            np.array([[[0, 0, -1, 2, 2, 2, 0.3], [0.5, 0, -1, 2, 3, 2, 1]]], np.float32),
        )
        expected = host.points_in_boxes(points[0], boxes[0])
        assert expected.all(1).any()
        everywhere = ops.points_in_boxes_all(torch.from_numpy(points), torch.from_numpy(boxes))
        np.testing.assert_array_equal(everywhere[0], expected)
        np.testing.assert_array_equal(
            ops.points_in_boxes_cpu(torch.from_numpy(points), torch.from_numpy(boxes))[0], expected
        )
        first = ops.points_in_boxes_part(torch.from_numpy(points), torch.from_numpy(boxes))
        np.testing.assert_array_equal(first[0], np.where(expected.any(1), expected.argmax(1), -1))
        assert (ops.points_in_boxes_part(torch.from_numpy(points), torch.zeros(1, 0, 7)) == -1).all()
        from mmdet3d.structures import LiDARInstance3DBoxes

        assert (
            LiDARInstance3DBoxes(torch.from_numpy(boxes[0])).points_in_boxes_part(torch.from_numpy(points[0])) == first
        ).all()

    def test_gradients_of_gathering_and_interpolation(self) -> None:
        import torch
        from mmcv import ops

        generator = torch.Generator().manual_seed(0)
        features = torch.randn(2, 3, 6, dtype=torch.double, generator=generator, requires_grad=True)
        index = torch.randint(0, 6, (2, 5, 3), generator=generator, dtype=torch.int32)
        weight = torch.rand(2, 5, 3, dtype=torch.double, generator=generator)
        assert torch.autograd.gradcheck(lambda f: ops.gather_points(f, index[..., 0].contiguous()), features)
        assert torch.autograd.gradcheck(lambda f: ops.grouping_operation(f, index), features)
        assert torch.autograd.gradcheck(lambda f: ops.three_interpolate(f, index, weight), features)
        expected = torch.einsum(
            "bcnk,bnk->bcn", torch.stack([f[:, i.long()] for f, i in zip(features, index, strict=True)]), weight
        )
        torch.testing.assert_close(ops.three_interpolate(features, index, weight), expected)

    @pytest.mark.parametrize("cloud", ["random", "lattice", "twice"])
    def test_forms_for_a_gpu_give_the_same_indices(self, cloud: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are plain torch: here on the CPU."""
        import torch
        from mmcv import ops

        from qat.families.mmdet3d.ops.mmcv_ext import points

        xyz = torch.from_numpy(CLOUDS[cloud])[None]
        boxes = torch.tensor([[[0, 0, -1, 2, 2, 4, 0.3], [1, 1, 0, 3, 2, 5, 1]]])
        calls = [
            lambda: ops.furthest_point_sample(xyz, 40),
            lambda: ops.furthest_point_sample_with_dist(points._squared(xyz[:, :, None], xyz[:, None]), 40),
            *(
                lambda low=low, high=high, n=n: ops.ball_query(low, high, n, xyz, xyz[:, :20].contiguous())
                for low, high, n in BALLS
            ),
            lambda: ops.points_in_boxes_all(xyz, boxes),
            lambda: ops.three_nn(xyz[:, :9], xyz)[0],
        ]
        eager = [call() for call in calls]
        monkeypatch.setattr(points, "plain", lambda *tensors: False)
        for call, expected in zip(calls, eager, strict=True):
            assert torch.equal(call(), expected)


class _Net:
    """Built where torch is there: every operator on points that a network's graph holds, one after the other."""

    def __new__(cls) -> torch.nn.Module:
        import torch
        from mmcv import ops
        from mmcv.ops.points_sampler import calc_square_dist

        class Net(torch.nn.Module):
            def forward(self, xyz: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
                index = ops.furthest_point_sample(xyz, 24)
                centres = ops.gather_points(xyz.transpose(1, 2).contiguous(), index).transpose(1, 2).contiguous()
                balls = ops.ball_query(0.1, 0.9, 8, xyz, centres)
                grouped = ops.grouping_operation(features, balls).amax(-1)
                distance, nearest = ops.three_nn(xyz, centres)
                weight = 1 / (distance + 1e-8)
                spread = ops.three_interpolate(grouped, nearest, weight / weight.sum(-1, keepdim=True))
                far = ops.furthest_point_sample_with_dist(calc_square_dist(centres, centres, norm=False), 5)
                return index, balls, ops.knn(4, xyz, centres), spread, far

        return Net().eval()


def _inputs(count: int, seed: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, 3, generator=generator), torch.randn(batch, 5, count, generator=generator)


@needs_mmdet3d
class TestExported:
    @pytest.fixture(autouse=True)
    def _install(self) -> None:
        from qat.families.mmdet3d import ops

        ops.install()

    def test_torch_export_gives_the_same_for_any_number_of_points(self) -> None:
        import torch

        net, points = _Net(), torch.export.Dim("points", min=32, max=4096)
        shapes = {"xyz": {1: points}, "features": {2: points}}
        program = torch.export.export(net, _inputs(200, 0), dynamic_shapes=shapes).module()
        for inputs in (_inputs(200, 1), _inputs(333, 2)):
            for found, expected in zip(program(*inputs), net(*inputs), strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        moved = [inputs[0] * 2, inputs[1]]  # a control
        assert not torch.equal(program(*moved)[1], net(*inputs)[1])

    def test_torch_export_takes_batches(self) -> None:
        import torch

        net = _Net()
        program = torch.export.export(net, _inputs(60, 0, batch=3)).module()
        for found, expected in zip(program(*_inputs(60, 1, 3)), net(*_inputs(60, 1, 3)), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    def test_onnx_runtime_and_openvino_give_the_same(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxscript")
        import onnxruntime
        import openvino
        import torch
        from mmcv.ops import furthest_point_sample_with_dist

        whole = _Net()

        class Net(torch.nn.Module):
            """Without sampling by a table, which OpenVINO does not take."""

            def forward(self, xyz: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return whole(xyz, features)[:-1]

        class Table(torch.nn.Module):
            def forward(self, table: torch.Tensor) -> torch.Tensor:
                return furthest_point_sample_with_dist(table, 9)

        def onnx_file(net: torch.nn.Module, *inputs: torch.Tensor) -> Path:
            file = tmp_path / f"{type(net).__name__}.onnx"
            torch.onnx.export(net.eval(), inputs, file, dynamo=True, optimize=False, external_data=False, verbose=False)
            return file

        def onnx_runtime(file: Path, *inputs: np.ndarray) -> list[np.ndarray]:
            session = onnxruntime.InferenceSession(file)
            return session.run(None, dict(zip([i.name for i in session.get_inputs()], inputs, strict=True)))

        file = onnx_file(Net(), *_inputs(200, 0))
        inputs = [value.numpy() for value in _inputs(200, 1)]
        compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for results in (onnx_runtime(file, *inputs), list(compiled(inputs).values())):
            for found, expected in zip(results, Net()(*_inputs(200, 1)), strict=True):
                np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
        file, table = onnx_file(Table(), torch.rand(1, 40, 40)), torch.rand(1, 40, 40)
        np.testing.assert_array_equal(onnx_runtime(file, table.numpy())[0], Table()(table))

    def test_torchscript_traces_and_its_exporter_is_refused_by_name(self, tmp_path: Path) -> None:
        import torch

        net = _Net()
        traced = torch.jit.trace(net, _inputs(150, 0))
        for found, expected in zip(traced(*_inputs(150, 1)), net(*_inputs(150, 1)), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        with pytest.raises(UserError) as error:
            torch.onnx.export(net, _inputs(150, 0), str(tmp_path / "net.onnx"), dynamo=False, opset_version=13)
        assert "furthest_point_sampling_forward is not exported by torch.onnx's TorchScript exporter" in str(
            error.value
        )

    def test_distances_of_features_are_those_of_mmcvs_cdist(self) -> None:
        import torch
        from mmcv.ops.points_sampler import calc_square_dist

        a, b = torch.randn(2, 40, 7), torch.randn(2, 30, 7)
        torch.testing.assert_close(calc_square_dist(a, b, norm=False), torch.cdist(a, b) ** 2, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(calc_square_dist(a, b), torch.cdist(a, b) / 7, rtol=1e-5, atol=1e-5)

    def test_what_is_computed_on_the_host_is_refused_by_name(self) -> None:
        import torch
        from mmcv.ops import nms

        class Net(torch.nn.Module):
            def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                return nms(boxes, scores, 0.5)[0]

        with pytest.raises(UserError) as error:
            torch.export.export(Net(), (torch.rand(5, 4), torch.rand(5)))
        assert "mmcv's operator nms cannot be exported" in str(error.value)
