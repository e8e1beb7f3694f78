"""The bootstrap against the devkit itself, over whole sets and over sets drawn from them."""

import numpy as np
import pytest

from qat.boxes.detections import Detections
from qat.core.errors import UserError
from qat.data import NuScenesDataset
from qat.data.synth import SynthOptions, generate
from qat.evaluate import evaluate_detections, paired_bootstrap
from qat.evaluate.bootstrap import match, metrics_of
from qat.evaluate.detection import sample_eval


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tiny_config):
    options = SynthOptions(scenes=4, seed=9, keyframes=2, width=96, height=54, azimuths=120, sweeps=0, splits={"a": 4})
    root = generate(tmp_path_factory.mktemp("bootstrap") / "set", options, quiet=True)
    return NuScenesDataset(root, "a", tiny_config)


def worse(dataset, seed, spread=0.7, lost=0.2):
    """The annotations moved, turned, partly lost, with inventions among them, and with scores that only half follow."""
    rng = np.random.default_rng(seed)
    found = {}
    for sample in dataset:
        keep = rng.random(len(sample.gt_boxes)) > lost
        boxes, labels = sample.gt_boxes[keep].copy(), sample.gt_labels[keep]
        boxes[:, :2] += rng.normal(0, spread, (len(boxes), 2))
        boxes[:, 6] += rng.normal(0, 0.5, len(boxes))
        boxes = np.concatenate([boxes, boxes[: len(boxes) // 2] + 1.5]).astype(np.float32)
        labels = np.concatenate([labels, labels[: len(labels) // 2]])
        scores = rng.random(len(boxes)).astype(np.float32)
        found[sample.token] = Detections(boxes, scores, labels)
    return found


def scenes(dataset, tokens):
    order = {}
    return {t: order.setdefault(dataset.nusc.get("sample", t)["scene_token"], len(order)) for t in tokens}


@pytest.mark.parametrize("seed", [1, 2])
def test_every_scene_once_is_what_the_devkit_says(dataset, seed):
    found = worse(dataset, seed)
    said = evaluate_detections(dataset, found)
    own = metrics_of(match(sample_eval(dataset, found), scenes(dataset, found)), np.ones(4, dtype=int))
    assert 0.05 < said["map"] < 0.95
    assert own == pytest.approx((said["map"], said["nds"]), abs=1e-9)


@pytest.mark.parametrize("drawn", [[0, 1], [3], [1, 2, 3]])
def test_some_scenes_are_what_the_devkit_says_of_them(dataset, drawn):
    found = worse(dataset, 3)
    where = scenes(dataset, found)
    part = {token: boxes for token, boxes in found.items() if where[token] in drawn}
    said = evaluate_detections(dataset, part)
    times = np.isin(np.arange(4), drawn).astype(int)
    own = metrics_of(match(sample_eval(dataset, found), where), times)
    assert own == pytest.approx((said["map"], said["nds"]), abs=1e-9)


def test_a_scene_drawn_twice_counts_twice(dataset):
    """Where everything is drawn twice, every recall and precision is reached again, so mAP hardly moves."""
    found = worse(dataset, 4)
    matches = match(sample_eval(dataset, found), scenes(dataset, found))
    once, twice = (metrics_of(matches, np.full(4, n)) for n in (1, 2))
    assert twice == pytest.approx(once, abs=0.03)
    assert metrics_of(matches, np.array([4, 0, 0, 0])) != pytest.approx(once, abs=0.03)


def test_intervals_hold_the_difference_and_are_the_same_again(dataset):
    reference = worse(dataset, 5)
    candidates = {"same": reference, "worse": worse(dataset, 5, spread=2.0, lost=0.5)}
    seen = []
    found = paired_bootstrap(dataset, reference, candidates, resamples=50, progress=seen.append)
    assert seen == [1, 2, 3]
    for metric in ("map", "nds"):
        same, lower = found["same"][metric], found["worse"][metric]
        assert (same.difference, same.low, same.high) == (0, 0, 0)
        assert lower.low < lower.difference < lower.high < 0
    assert found == paired_bootstrap(dataset, reference, candidates, resamples=50)
    said = [evaluate_detections(dataset, boxes)["map"] for boxes in (candidates["worse"], reference)]
    assert found["worse"]["map"].difference == pytest.approx(said[0] - said[1], abs=1e-9)


def test_one_scene_gives_no_interval(dataset):
    found = worse(dataset, 7)
    one = {token: boxes for token, boxes in found.items() if scenes(dataset, found)[token] == 0}
    with pytest.raises(UserError, match="found 1 scene, expected at least 2"):
        paired_bootstrap(dataset, one, {}, resamples=2)
    with pytest.raises(UserError, match="--resamples: found 0"):
        paired_bootstrap(dataset, found, {}, resamples=0)


def test_other_samples_cannot_be_paired(dataset):
    reference = worse(dataset, 6)
    fewer = dict(list(reference.items())[1:])
    with pytest.raises(ValueError, match="fewer: other samples"):
        paired_bootstrap(dataset, reference, {"fewer": fewer}, resamples=2)
