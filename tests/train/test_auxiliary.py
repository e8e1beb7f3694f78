"""What each feature pixel shows: drawn boxes against a plain projection, and the losses on them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from qat.families.bevfusion.training.auxiliary import IGNORED, PixelHead, pixel_loss, pixel_targets, to_tensors

FORWARD = np.array(
    [[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]], np.float32
)  # a camera along the lidar's y


def drawn(boxes, labels=None, seen=None, img_aug=None):
    """One camera of 96×64 pixels and focal length 80 at the lidar's origin, stride 8, ten classes."""
    boxes = np.asarray(boxes, np.float32).reshape(-1, 9)
    intrinsic = np.eye(4, dtype=np.float32)
    intrinsic[[0, 1], [0, 1]] = 80.0
    intrinsic[:2, 2] = 48.0, 32.0
    return pixel_targets(
        boxes,
        np.zeros(len(boxes), np.int64) if labels is None else np.asarray(labels),
        np.ones(len(boxes), bool) if seen is None else np.asarray(seen),
        (intrinsic @ np.linalg.inv(FORWARD))[None],
        FORWARD[None],
        np.eye(4, dtype=np.float32)[None] if img_aug is None else img_aug[None],
        (64, 96),
        8,
        10,
    )


def box(x, y, size=(2.0, 2.0, 2.0), heading=0.0):
    return [x, y, 0.0, *size, -heading - np.pi / 2, 0, 0]


def test_a_box_covers_the_pixels_that_it_projects_to():
    """A 2 m cube 10 m ahead has its near face at 9 m: 80/9 px to each side of the middle."""
    label = drawn([box(0, 10)], [3]).label[0]
    columns, rows = np.meshgrid(np.arange(12) * 8 + 4, np.arange(8) * 8 + 4)
    inside = (np.abs(columns - 48) < 80 / 9) & (np.abs(rows - 32) < 80 / 9)
    assert inside.any() and (label == np.where(inside, 3, 10)).all()


def test_the_nearer_of_two_boxes_is_shown():
    for order in (slice(None), slice(None, None, -1)):
        label = drawn([box(0, 20, (8, 8, 8)), box(0, 8)][order], [1, 2][order]).label[0]
        assert label[4, 6] == 2 and (label == 1).any()


def test_a_box_that_reaches_behind_the_camera_is_drawn():
    target = drawn([box(2.5, 0, (2, 2, 2), 0.0), box(3, 2, (2, 9, 2), np.pi / 2)], [4, 5])
    assert (target.label[0] == 5).sum() > 4 and not (target.label[0] == 4).any()


def test_a_box_smaller_than_a_pixel_keeps_its_own():
    target = drawn([box(0.05, 40, (0.3, 0.3, 0.3))], [9])
    assert (target.label[0] == 9).sum() == 1 and target.weight.max() == 1


def test_a_box_that_the_lidar_does_not_see_is_ignored():
    target = drawn([box(0, 10)], [3], [False])
    assert set(np.unique(target.label)) == {IGNORED, 10} and not target.weight.any()


def test_weights_of_an_object_grow_with_the_root_of_its_pixels():
    target = drawn([box(-2, 10), box(8, 20)], [0, 1])
    for label in (0, 1):
        shown = target.label[0] == label
        assert target.weight[0][shown].sum() == pytest.approx(np.sqrt(shown.sum()))


@pytest.mark.parametrize("heading", [0.0, 0.4, 2.0, -1.2])
def test_the_code_is_size_and_the_heading_from_the_camera(heading):
    target = drawn([box(0, 10, (1.5, 3.0, 2.0), heading)])
    code = target.code[0][:, target.label[0] == 0].T
    expected = [*np.log([1.5, 3.0, 2.0]), np.sin(heading - np.pi / 2), np.cos(heading - np.pi / 2)]
    assert np.allclose(code, expected, atol=1e-5)


def test_a_mirrored_picture_shows_a_mirrored_object():
    mirror = np.eye(4, dtype=np.float32)
    mirror[0, 0], mirror[0, 3] = -1, 96
    plain, mirrored = (drawn([box(3, 10, heading=0.7)], img_aug=m) for m in (None, mirror))
    assert (mirrored.label[0] == plain.label[0][:, ::-1]).mean() > 0.95
    a, b = (t.code[0][3:, t.label[0] == 0][:, 0] for t in (plain, mirrored))
    assert np.allclose(b, [-a[0], a[1]], atol=1e-5)


def test_no_boxes_leave_background():
    target = drawn(np.zeros((0, 9)))
    assert (target.label == 10).all() and not target.weight.any()


def test_the_losses_are_their_formulas():
    targets = to_tensors(
        [drawn([box(-2, 10), box(8, 20)], [0, 1], [True, True]), drawn([box(0, 9)], [7], [False])], torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 11, 8, 12, generator=generator, requires_grad=True)
    code = torch.randn(2, 5, 8, 12, generator=generator)
    found = pixel_loss((logits, code), targets)
    p = logits.detach().softmax(1)
    foreground, behind, shape, total = 0.0, 0.0, 0.0, 0.0
    objects = 0
    for n, i, j in np.ndindex(2, 8, 12):
        label, weight = int(targets["label"][n, i, j]), float(targets["weight"][n, i, j])
        if label == IGNORED:
            continue
        right = float(p[n, label, i, j])
        if label == 10:
            behind += -np.log(right) * (1 - right) ** 2
        else:
            objects += 1
            total += weight
            foreground += -np.log(right) * weight
            shape += float((code[n, :, i, j] - targets["code"][n, :, i, j]).abs().sum()) * weight
    assert float(found["class"].detach()) == pytest.approx(foreground / total + behind / objects, rel=1e-5)
    assert float(found["shape"]) == pytest.approx(shape / total, rel=1e-5)
    found["class"].backward()
    assert not logits.grad[:, :, targets["label"][1] == IGNORED][1].any()


def test_the_head_splits_classes_from_code():
    head = PixelHead(6, 10)
    logits, code = head(torch.ones(2, 6, 3, 4))
    assert logits.shape == (2, 11, 3, 4) and code.shape == (2, 5, 3, 4)
    assert torch.equal(
        torch.cat([logits, code], 1), F.conv2d(torch.ones(2, 6, 3, 4), head.layer.weight, head.layer.bias)
    )
