"""Targets, losses, augmentation and resuming, against plain definitions."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from qat.boxes.centerhead import decode
from qat.boxes.geometry import box_heading
from qat.core.errors import UserError
from qat.data import NuScenesDataset
from qat.data.synth import SynthOptions, generate
from qat.families.bevfusion.augment import augment_boxes
from qat.families.bevfusion.detector import build_model
from qat.families.bevfusion.training import TrainOptions, train
from qat.families.bevfusion.training.augment import TrainSet
from qat.families.bevfusion.training.features import FeatureCache
from qat.families.bevfusion.training.loop import learning_rate
from qat.families.bevfusion.training.losses import depth_loss, gaussian_focal_loss, head_loss
from qat.families.bevfusion.training.targets import draw_gaussian, gaussian_radius, make_targets


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tiny_config):
    options = SynthOptions(scenes=2, seed=4, keyframes=2, width=192, height=128, azimuths=90, sweeps=0, splits={"a": 2})
    return NuScenesDataset(generate(tmp_path_factory.mktemp("train") / "set", options, quiet=True), "a", tiny_config)


def some_boxes():
    rng = np.random.default_rng(0)
    boxes = np.zeros((6, 9), np.float32)
    boxes[:, :2] = [[-10, -10], [-10, 5], [0, 0], [4, -8], [9, 9], [11, -3]]
    boxes[:, 2] = -1
    boxes[:, 3:6] = rng.uniform(0.5, 4, (6, 3))
    boxes[:, 6] = rng.uniform(-3, 3, 6)
    boxes[:, 7:] = rng.normal(0, 3, (6, 2))
    return boxes, np.array([0, 3, 5, 7, 8, 9])


def test_maps_made_of_the_targets_decode_to_the_boxes(tiny_config):
    """The targets and the decoder are two statements of one convention."""
    head = tiny_config["model"]["heads"]["object"]
    boxes, labels = some_boxes()
    maps = []
    for target in make_targets(boxes, labels, head):
        classes, nx, ny = target.heatmap.shape
        task = {
            "heatmap": np.log(np.clip(target.heatmap, 1e-4, 0.9999) / (1 - np.clip(target.heatmap, 1e-4, 0.9999)))[None]
        }
        start = 0
        for name, width in (("reg", 2), ("height", 1), ("dim", 3), ("rot", 2), ("vel", 2)):
            flat = np.zeros((width, nx * ny), np.float32)
            flat[:, target.index] = target.boxes[:, start : start + width].T
            task[name] = flat.reshape(1, width, nx, ny)
            start += width
        assert classes == task["heatmap"].shape[1]
        maps.append(task)
    found = decode(maps, head)
    sure = found.scores > 0.99
    for box, label in zip(boxes, labels, strict=True):
        near = found.boxes[sure & (found.labels == label)]
        k = np.argmin(np.abs(near[:, :2] - box[:2]).sum(1))
        assert np.allclose(near[k, :6], box[:6], atol=1e-3)
        assert np.allclose(np.exp(1j * near[k, 6]), np.exp(1j * box[6]), atol=1e-3)
        assert np.allclose(near[k, 7:], box[7:], atol=1e-4)


def test_a_gaussian_is_one_at_its_centre_and_keeps_the_larger_of_two():
    heatmap = np.zeros((9, 7), np.float32)
    draw_gaussian(heatmap, 2, 3, 2)
    assert heatmap[2, 3] == 1
    assert heatmap[3, 4] == pytest.approx(np.exp(-2 / (2 * (5 / 6) ** 2)))
    before = heatmap.copy()
    draw_gaussian(heatmap, 8, 6, 1)
    assert (heatmap >= before).all() and heatmap[8, 6] == 1


def test_gaussian_radius_is_cornernets():
    length, width, overlap = 6.0, 3.0, 0.1
    roots = [
        (9 + np.sqrt(81 - 4 * 18 * 0.9 / 1.1)) / 2,
        (18 + np.sqrt(18**2 - 16 * 0.9 * 18)) / 2,
        (-1.8 + np.sqrt(1.8**2 + 16 * 0.1 * 0.9 * 18)) / 2,
    ]
    assert gaussian_radius(length, width, overlap) == pytest.approx(min(roots))


def test_focal_loss_of_one_positive_and_one_negative():
    logits, target = torch.tensor([0.3, -0.7]), torch.tensor([1.0, 0.5])
    p, q = torch.sigmoid(logits)
    expected = -torch.log(p) * (1 - p) ** 2 - torch.log(1 - q) * q**2 * 0.5**4
    assert torch.isclose(gaussian_focal_loss(logits, target), expected)


def test_perfect_maps_have_no_box_loss(tiny_config):
    head = tiny_config["model"]["heads"]["object"]
    targets = make_targets(*some_boxes(), head)
    maps = []
    for target in targets:
        classes, nx, ny = target.heatmap.shape
        flat = torch.zeros(10, nx * ny)
        flat[:, target.index] = torch.from_numpy(target.boxes).T
        parts = dict(
            zip(("reg", "height", "dim", "rot", "vel"), flat.view(1, 10, nx, ny).split([2, 1, 3, 2, 2], 1), strict=True)
        )
        maps.append({**parts, "heatmap": torch.zeros(1, classes, nx, ny)})
    losses = head_loss(maps, [targets], head)
    assert losses["box"] == 0 and losses["heat"] > 0


def test_depth_loss_reads_the_nearest_point_of_each_cell():
    weights = torch.full((1, 4, 1, 2), 0.1)
    weights[0, 2, 0, 0] = 0.7
    depth = torch.zeros(1, 1, 8, 16)
    depth[0, 0, 3, 3], depth[0, 0, 5, 5] = 3.2, 4.0  # bins at 1, 2, 3, 4 m: the nearer is bin 2
    assert torch.isclose(
        depth_loss(weights, depth, [1.0, 5.0, 1.0]), torch.tensor(-np.log(0.7 + 1e-6), dtype=torch.float32)
    )


@pytest.mark.parametrize("flip", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_augmented_boxes_move_as_points_do(flip):
    boxes, _ = some_boxes()
    out, matrix = augment_boxes(boxes, 0.4, 1.1, np.array(flip, float), np.array([0.5, -2.0, 0.1]))
    assert np.allclose(out[:, :3], boxes[:, :3] @ matrix[:3, :3].T + matrix[:3, 3], atol=1e-5)
    assert np.allclose(matrix[:3, 3], 1.1 * np.array([0.5 * flip[0], -2.0 * flip[1], 0.1]), atol=1e-6)
    for before, after in zip(boxes, out, strict=True):
        heading = box_heading(before[6:7])[0]
        tip = before[:3] + before[4] / 2 * np.array([np.cos(heading), np.sin(heading), 0])
        heading = box_heading(after[6:7])[0]
        tip_moved = after[:3] + after[4] / 2 * np.array([np.cos(heading), np.sin(heading), 0])
        assert np.allclose(tip_moved, tip @ matrix[:3, :3].T + matrix[:3, 3], atol=1e-4)
    assert np.allclose(out[:, 7:9], boxes[:, 7:9] @ matrix[:2, :2].T, atol=1e-5)


def test_an_augmented_depth_map_agrees_with_the_augmented_image(dataset, tiny_config):
    """Depth is drawn through img_aug_matrix: undoing it gives back points that project to those pixels."""
    train_set = TrainSet(dataset, tiny_config)
    sample = train_set.draw(1, np.random.default_rng(3))
    raw = train_set._keyframe(1)
    row, column = np.argwhere(sample.depth[0, 0] > 0)[5]
    depth = sample.depth[0, 0, row, column]
    undone = np.linalg.inv(sample.img_aug_matrix[0].astype(float)) @ [column + 0.5, row + 0.5, 0, 1]
    direction = np.linalg.inv(sample.camera_intrinsics[0, :3, :3].astype(float)) @ [undone[0], undone[1], 1]
    point = sample.camera2lidar[0].astype(float) @ [*(direction * depth), 1]
    assert np.linalg.norm(raw.points[:, :3] - point[:3], axis=1).min() < 0.02 * depth + 0.05


def test_the_rate_rises_stays_and_falls():
    options = TrainOptions(steps=100, warmup=10, decay=0.2, lr=1.0)
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[10:80] == [1.0] * 70
    assert np.allclose(np.diff(rates[80:]), -0.05)


def test_a_killed_run_resumes_to_the_same_weights(dataset, tiny_config, tmp_path):
    torch.set_num_threads(1)
    options = TrainOptions(steps=4, batch=1, warmup=2, save_seconds=0.0)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(tiny_config, [dataset], whole, options, log=lambda _: None)

    class Killed(Exception):
        pass

    real = torch.optim.AdamW.step
    calls = []

    def step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(Killed):
            train(tiny_config, [dataset], cut, options, log=lambda _: None)
    assert (cut / "resume.pth").exists() and not (cut / "model.pth").exists()
    train(tiny_config, [dataset], cut, options, log=lambda _: None)
    assert (cut / "curve.png").stat().st_size > 1000
    assert (cut / "history.json").read_text() == (whole / "history.json").read_text()  # means over all steps
    a, b = (torch.load(folder / "model.pth", weights_only=True)["state_dict"] for folder in (whole, cut))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def moved(before, after):
    """Groups of parameters of which any differs."""
    return {".".join(n.split(".")[:3]) for n in before if not torch.equal(before[n], after[n])}


def test_the_image_stage_then_the_bev_stage_then_all(dataset, tiny_config, tmp_path):
    """Each stage trains its own part, from the checkpoint of the one before."""
    torch.set_num_threads(1)
    image_part = {f"encoders.camera.{name}" for name in ("backbone", "neck")}
    before, pixel_head = None, None
    for stage, init in (("image", None), ("bev", "image"), ("all", "bev")):
        options = TrainOptions(stage=stage, steps=3, batch=2, warmup=1)
        start = init and tmp_path / init / "model.pth"
        train(tiny_config, [dataset], tmp_path / stage, options, init=start, log=lambda _: None)
        saved = torch.load(tmp_path / stage / "model.pth", weights_only=True)
        after = saved["state_dict"]
        groups = moved(before, after) if before else set()
        history = json.loads((tmp_path / stage / "history.json").read_text())["history"][0]
        if stage == "image":
            assert {"depth", "class", "shape"} <= set(history) and "heat" not in history
        elif stage == "bev":
            assert "heat" in history and "depth" not in history
            assert not groups & image_part and {"decoder.backbone.0", "heads.object.shared_conv"} <= groups
            kept = [n for n in after if "vtransform.depthnet" in n or "vtransform.dtransform" in n]
            assert kept and all(torch.equal(before[n], after[n]) for n in kept)
            assert any("vtransform.downsample" in n and not torch.equal(before[n], after[n]) for n in after)
            assert torch.equal(saved["pixel_head"]["layer.weight"], pixel_head)
        else:
            assert image_part <= groups and {"depth", "heat", "class"} <= set(history)
            assert not torch.equal(saved["pixel_head"]["layer.weight"], pixel_head)
        before, pixel_head = after, saved["pixel_head"]["layer.weight"]


def test_cached_features_give_the_maps_that_the_images_give(dataset, tiny_config):
    """The same draw through the cache and through the detector, to half precision."""
    torch.manual_seed(0)
    model = build_model(tiny_config).eval()
    train_set = TrainSet(dataset, tiny_config)
    cache = FeatureCache(model, [train_set], 2, 5, torch.device("cpu"), lambda _: None)
    assert len(cache) == 2 * len(train_set)
    index = len(train_set) + 1  # the second variant of keyframe 1
    found = cache.draw(index, np.random.default_rng(9))
    sample = train_set.draw(1, np.random.default_rng([5, 3, 1, 0, 1]))
    boxes, labels, lidar_aug = train_set.draw_boxes(1, np.random.default_rng(9))
    assert np.array_equal(found["boxes"], boxes) and np.array_equal(found["labels"], labels)
    with torch.inference_mode():
        weights, context = model.lift(torch.from_numpy(sample.img)[None], torch.from_numpy(sample.depth)[None])
        pattern = model.vtransform.pattern(
            sample.camera_intrinsics, sample.camera2lidar, sample.img_aug_matrix, lidar_aug
        )
        expected = model.pool(weights, context, [pattern])
        pooled = model.pool(found["weights"].float(), found["context"].float(), [found["pattern"]])
    assert torch.allclose(pooled, expected, atol=2e-3 * float(expected.abs().max()))


def test_an_unknown_stage_is_refused(dataset, tiny_config, tmp_path):
    with pytest.raises(UserError, match="expected one of all, image, bev"):
        train(tiny_config, [dataset], tmp_path, TrainOptions(stage="depth"), log=lambda _: None)


def test_a_finished_run_draws_nothing_more(dataset, tiny_config, tmp_path, monkeypatch):
    """The same command again writes the same files, without going over the data."""
    options = TrainOptions(stage="bev", steps=2, batch=1)
    train(tiny_config, [dataset], tmp_path, options, log=lambda _: None)
    monkeypatch.setattr(TrainSet, "_keyframe", None)
    train(tiny_config, [dataset], tmp_path, options, log=lambda _: None)


def test_what_another_run_left_is_not_resumed(dataset, tiny_config, tmp_path):
    options = TrainOptions(steps=1, batch=1)
    train(tiny_config, [dataset], tmp_path, options, log=lambda _: None)
    for change, named in (
        ({"seed": 1}, "seed: found 0, expected 1"),
        ({"batch": 2}, "batch"),
        ({"stage": "image"}, "stage"),
    ):
        with pytest.raises(UserError, match=f"resume.pth: left by a run with another {named}"):
            train(tiny_config, [dataset], tmp_path, replace(options, **change), log=lambda _: None)
    with pytest.raises(UserError, match="another init"):
        train(tiny_config, [dataset], tmp_path, options, init=tmp_path / "model.pth", log=lambda _: None)
    with pytest.raises(UserError, match="another frames"):
        train(tiny_config, [dataset, dataset], tmp_path, options, log=lambda _: None)
    train(tiny_config, [dataset], tmp_path, replace(options, steps=2, lr=2e-3), log=lambda _: None)
    other = copy.deepcopy(tiny_config)
    other["model"]["heads"]["object"]["share_conv_channel"] = 4
    with pytest.raises(UserError, match="another config"):
        train(other, [dataset], tmp_path, replace(options, steps=2), log=lambda _: None)
