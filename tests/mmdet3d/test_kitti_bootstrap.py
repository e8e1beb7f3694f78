"""Draws of KITTI's AP equal the AP of the frames that were drawn, written out."""

from __future__ import annotations

import numpy as np
import pytest

from qat.core.errors import UserError
from qat.families.mmdet3d.metrics.kitti import average_precision
from qat.families.mmdet3d.metrics.kitti_bootstrap import Counted, interval, resample

NAMES = np.array(["Car", "Van", "Car", "DontCare", "Pedestrian"])


def anno(rng: np.random.Generator, count: int, near: dict | None = None) -> dict:
    """Objects, or detections near those of another anno: some moved too far, some with a name of their own."""
    names = rng.choice(NAMES, count)
    location = np.stack([rng.uniform(-10, 10, count), np.full(count, 1.6), rng.uniform(5, 40, count)], 1)
    turn, height = rng.uniform(-3, 3, count), rng.uniform(20, 60, count)
    if near is not None:
        names, location, turn, height = (near[key] for key in ("name", "location", "rotation_y", "height"))
        names = np.where((names == "DontCare") | (rng.random(count) < 0.1), "Car", names)
        location = location + rng.normal(0, 0.15, (count, 3)) * [1, 0.2, 1]
    corner = rng.uniform(0, 200, (count, 2))
    return {
        "name": names,
        "truncated": rng.choice([0, 0.2, 0.4], count),
        "occluded": rng.integers(0, 3, count),
        "alpha": turn,
        "bbox": np.concatenate([corner, corner + np.stack([height, height], 1)], 1),
        "dimensions": np.tile([4.6, 1.7, 1.95], (count, 1)),
        "location": location,
        "rotation_y": turn,
        "score": rng.random(count).round(1),  # with ties
        "height": height,
    }


@pytest.fixture(scope="module")
def sides():
    rng = np.random.default_rng(3)
    truth = [anno(rng, int(count)) for count in [0, *rng.integers(0, 9, 29)]]
    found = [anno(rng, len(own["name"]), own) for own in truth]
    return truth, found


@pytest.mark.parametrize("kind", ["3d", "bev"])
@pytest.mark.parametrize("difficulty", ["easy", "moderate", "hard"])
def test_a_draw_is_the_ap_of_the_frames_drawn(sides, kind, difficulty):
    truth, found = sides
    row = Counted(truth, found, "Car", kind, difficulty)
    rng = np.random.default_rng(5)
    for drawn in (np.arange(30), *rng.integers(0, 30, (4, 30))):
        own = average_precision([truth[i] for i in drawn], [found[i] for i in drawn], ["Car"], [kind])[kind]
        expected = own.ap40[0, ["easy", "moderate", "hard"].index(difficulty), 0]
        assert row.ap40(np.bincount(drawn, minlength=30)) == pytest.approx(expected, abs=1e-9)
        assert difficulty == "easy" or 2 < expected < 98


def test_blocks_are_drawn_whole_and_the_same_for_all_rows(sides):
    truth, found = sides
    worse = [{**own, "location": own["location"] + 0.4} for own in found]
    rows = {"a": Counted(truth, found, "Car"), "b": Counted(truth, worse, "Car"), "c": Counted(truth, found, "Car")}
    drawn = resample(rows, 10, 100)
    assert len(np.unique(drawn["a"][1:])) <= 10  # of three blocks there are ten draws
    assert interval(drawn["c"], drawn["a"]) == (0, 0, 0)
    change, low, high = interval(drawn["b"], drawn["a"])
    assert low <= change < 0 and low < high


def test_one_block_is_refused(sides):
    with pytest.raises(UserError, match="found 1 block of 40 frames, expected at least 2"):
        resample({"a": Counted(*sides, "Car")}, 40)
