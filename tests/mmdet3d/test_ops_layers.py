"""mmcv's layers over ours: deformable convolutions, PAConv's sum, RoI pools and dynamic scatter, against their definitions."""

from __future__ import annotations

import importlib.util
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if importlib.util.find_spec("mmdet3d") is None:
    pytest.skip("mmdet3d is not installed: pip install 'bevqat[mmdet3d]'", allow_module_level=True)

from qat.families.mmdet3d import ops

ops.install()

from mmcv.ops import (  # noqa: E402
    DynamicScatter,
    RoIAwarePool3d,
    RoIPointPool3d,
    assign_score_withk,
    deform_conv2d,
    dynamic_scatter,
    modulated_deform_conv2d,
)

from qat.families.mmdet3d.ops.points import points_in_boxes  # noqa: E402


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed)) * scale


def _naive_deformed(
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    sizes: tuple,
    groups: int,
    parts: int,
) -> torch.Tensor:
    """Output by output, tap by tap, corner by corner. sizes: (stride, padding, dilation) as pairs."""
    (sy, sx), (py, px), (dy, dx) = sizes
    batch, channels, height, width = x.shape
    outs, _, rows, columns = weight.shape
    result = torch.zeros(batch, outs, *offset.shape[2:], dtype=x.dtype)
    for n, o, i, j in itertools.product(*map(range, result.shape)):
        for c, r, s in itertools.product(*map(range, weight.shape[1:])):
            source = o // (outs // groups) * (channels // groups) + c
            part = source // (channels // parts)
            tap = part * rows * columns + r * columns + s
            y = i * sy - py + r * dy + offset[n, 2 * tap, i, j].item()
            at = j * sx - px + s * dx + offset[n, 2 * tap + 1, i, j].item()
            low_y, low_x = int(np.floor(y)), int(np.floor(at))
            value = 0.0
            for v, u in itertools.product((low_y, low_y + 1), (low_x, low_x + 1)):
                if 0 <= v < height and 0 <= u < width:
                    value += (1 - abs(y - v)) * (1 - abs(at - u)) * x[n, source, v, u].item()
            result[n, o, i, j] += weight[o, c, r, s] * mask[n, tap, i, j] * value
    return result


GEOMETRIES = [((1, 1), (1, 1), (1, 1), 1, 1), ((2, 1), (0, 2), (1, 2), 2, 1), ((1, 2), (2, 1), (2, 1), 1, 2)]


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups", "parts"), GEOMETRIES)
def test_deformable_convolutions_are_those_of_the_definition(
    stride: tuple, padding: tuple, dilation: tuple, groups: int, parts: int
) -> None:
    x, weight = _random(2, 4, 6, 7), _random(4, 4 // groups, 3, 2, seed=1)
    shape = F.conv2d(x, weight, None, stride, padding, dilation, groups).shape[2:]
    offset = _random(2, parts * 12, *shape, seed=2, scale=2.0)  # some land outside
    mask = torch.rand(2, parts * 6, *shape, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    sizes = (stride, padding, dilation)
    plain = deform_conv2d(x, offset, weight, *sizes, groups, parts)
    torch.testing.assert_close(plain, _naive_deformed(x, offset, torch.ones_like(mask), weight, sizes, groups, parts))
    bias = _random(4, seed=4)
    masked = modulated_deform_conv2d(x, offset, mask, weight, bias, *sizes, groups, parts)
    expected = _naive_deformed(x, offset, mask, weight, sizes, groups, parts) + bias[:, None, None]
    torch.testing.assert_close(masked, expected)
    swapped = offset.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)  # a control: x before y
    assert (deform_conv2d(x, swapped, weight, *sizes, groups, parts) - plain).abs().max() > 0.1


def test_without_offsets_they_are_convolutions() -> None:
    x, weight = _random(1, 3, 8, 9), _random(5, 3, 3, 3, seed=1)
    none, ones = torch.zeros(1, 18, 8, 9, dtype=torch.double), torch.ones(1, 9, 8, 9, dtype=torch.double)
    expected = F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(deform_conv2d(x, none, weight, 1, 1), expected)
    torch.testing.assert_close(modulated_deform_conv2d(x, none, ones, weight, None, 1, 1), expected)


def test_gradients_of_deformable_convolutions() -> None:
    x, weight = _random(2, 2, 4, 5).requires_grad_(), _random(2, 2, 2, 2, seed=1).requires_grad_()
    # Off the pixels, where the reading is smooth.
    offset = (0.2 + 0.5 * torch.rand(2, 8, 3, 4, dtype=torch.double)).requires_grad_()
    mask, bias = torch.rand(2, 4, 3, 4, dtype=torch.double).requires_grad_(), _random(2, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: deform_conv2d(*a, 1, 0), (x, offset, weight))
    assert torch.autograd.gradcheck(lambda *a: modulated_deform_conv2d(*a, 1, 0), (x, offset, mask, weight, bias))


def test_deformable_convolutions_export_to_both_backends(tmp_path: object) -> None:
    pytest.importorskip("onnxscript")
    import onnxruntime
    import openvino

    class Net(torch.nn.Module):
        def forward(
            self, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor
        ) -> torch.Tensor:
            return modulated_deform_conv2d(deform_conv2d(x, offset, weight, 1, 1), offset, mask, weight, None, 1, 1)

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        shapes = (1, 4, 8, 9), (1, 18, 8, 9), (1, 9, 8, 9), (4, 4, 3, 3)
        return tuple(_random(*shape, seed=seed + i).float() for i, shape in enumerate(shapes))

    file = f"{tmp_path}/net.onnx"
    torch.onnx.export(Net(), inputs(0), file, dynamo=True, optimize=False, external_data=False, verbose=False)
    feeds, expected = [v.numpy() for v in inputs(9)], Net()(*inputs(9)).numpy()
    session = onnxruntime.InferenceSession(file)
    found = session.run(None, dict(zip([i.name for i in session.get_inputs()], feeds, strict=True)))[0]
    np.testing.assert_allclose(found, expected, atol=2e-4)
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(next(iter(compiled(feeds).values())), expected, atol=2e-4)


def test_paconvs_sum_and_its_gradients() -> None:
    points, centers = _random(2, 5, 3, 4).requires_grad_(), _random(2, 5, 3, 4, seed=1).requires_grad_()
    scores = _random(2, 6, 2, 3, seed=2).requires_grad_()
    index = torch.randint(0, 5, (2, 6, 2), generator=torch.Generator().manual_seed(3))
    index[0, 1, 1], index[1, 2, 1] = 5, -1  # outside: nothing
    expected = torch.zeros(2, 4, 6, 2, dtype=torch.double)
    for b, n, k in itertools.product(range(2), range(6), range(2)):
        if 0 <= index[b, n, k] < 5:
            edges = points[b, index[b, n, k]] - centers[b, index[b, n, 0]]
            expected[b, :, n, k] = (scores[b, n, k, :, None] * edges).sum(0)
    torch.testing.assert_close(assign_score_withk(scores, points, centers, index), expected)
    assert torch.autograd.gradcheck(lambda s, p, c: assign_score_withk(s, p, c, index), (scores, points, centers))


def _rois() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(0)
    points = random.uniform(-3, 3, (400, 3)).astype(np.float32)
    rois = np.array([[0, 0, -2, 3, 2, 3, 0.4], [1, -1, -1, 4, 4, 2, -2], [50, 0, 0, 1, 1, 1, 0]], np.float32)
    return (
        torch.from_numpy(points),
        torch.from_numpy(rois),
        torch.from_numpy(random.normal(size=(400, 5)).astype(np.float32)),
    )


@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize("room", [128, 3])
def test_roi_aware_pooling_is_that_of_the_definition(mode: str, room: int) -> None:
    points, rois, features = _rois()
    features.requires_grad_()
    cells = (3, 2, 4)
    held: dict[tuple, list[int]] = {}
    for r, roi in enumerate(rois.double().numpy()):
        cos, sin = np.cos(roi[6]), np.sin(roi[6])
        for i, point in enumerate(points.double().numpy()):
            dx, dy, dz = point - roi[:3]
            local = np.array([dx * cos + dy * sin + roi[3] / 2, dy * cos - dx * sin + roi[4] / 2, dz]) / roi[3:6]
            if ((local > 0) & (local < 1)).all():
                held.setdefault((r, *(local * cells).astype(int)), []).append(i)
    expected = torch.zeros(3, *cells, 5)
    for cell, index in held.items():
        some = features[index[: room - 1]]
        expected[cell] = some.amax(0) if mode == "max" else some.mean(0)
    found = RoIAwarePool3d(cells, room, mode)(rois, points, features)
    torch.testing.assert_close(found, expected)
    assert len(held) > 30
    assert not found[2].any()
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((value * weights).sum(), features)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_roi_point_pooling_takes_the_first_points_and_repeats_them() -> None:
    points, rois, features = _rois()
    pooled, empty = RoIPointPool3d(40)(points[None], features[None], rois[None])
    inside = points_in_boxes(points.numpy(), rois.numpy())
    assert 0 < inside[:, 0].sum() < 40 < inside[:, 1].sum()  # one repeats, one is cut
    for t in range(2):
        index = np.resize(np.flatnonzero(inside[:, t])[:40], 40)
        torch.testing.assert_close(pooled[0, t], torch.cat([points, features], 1)[index])
    assert empty.tolist() == [[0, 0, 1]]
    assert not pooled[0, 2].any()


@pytest.mark.parametrize("how", ["max", "mean", "sum"])
def test_dynamic_scatter_is_that_of_the_definition(how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(-1, 3, (60, 3), generator=generator, dtype=torch.int32)
    features = _random(60, 4).requires_grad_()
    groups: dict[tuple, list[int]] = {}
    for i, cell in enumerate(cells.tolist()):
        if min(cell) >= 0:
            groups.setdefault(tuple(cell), []).append(i)
    reduced, where = dynamic_scatter(features, cells, how)
    assert [tuple(c) for c in where.tolist()] == sorted(groups)
    reduce = {"max": lambda v: v.amax(0), "mean": lambda v: v.mean(0), "sum": lambda v: v.sum(0)}[how]
    torch.testing.assert_close(reduced, torch.stack([reduce(features[groups[key]]) for key in sorted(groups)]))
    assert torch.autograd.gradcheck(lambda f: dynamic_scatter(f, cells, how)[0], features)


def test_dynamic_scatter_gives_the_gradient_of_equal_greatest_points_to_the_first() -> None:
    features = torch.tensor([[1.0], [2.0], [2.0]], requires_grad=True)
    dynamic_scatter(features, torch.zeros(3, 3, dtype=torch.int32), "max")[0].sum().backward()
    assert features.grad.tolist() == [[0], [1], [0]]


def test_dynamic_scatter_of_a_batch_and_of_no_points() -> None:
    layer = DynamicScatter([1, 1, 1], [0, 0, 0, 4, 4, 4], True)
    cells = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.int32)
    reduced, where = layer(torch.tensor([[1.0], [3.0], [5.0]]), cells)
    assert reduced.tolist() == [[2], [5]]
    assert where.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    reduced, where = dynamic_scatter(torch.zeros(0, 4), torch.zeros(0, 3, dtype=torch.int32), "max")
    assert reduced.shape == (0, 4)
    assert where.shape == (0, 3)
