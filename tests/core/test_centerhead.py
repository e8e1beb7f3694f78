"""Decode and circle NMS against plain loops."""

import numpy as np
import pytest

from qat.boxes.centerhead import circle_nms, decode, maps_from_tensors
from qat.boxes.detections import Detections


@pytest.fixture
def head(tiny_config):
    import copy

    head = copy.deepcopy(tiny_config["model"]["heads"]["object"])
    head["test_cfg"]["nms_type"] = "circle"
    head["test_cfg"]["min_radius"] = [-1.0, -1.0, -1.0]  # suppresses nothing
    return head


def random_maps(head, seed=0, nx=16, ny=16):
    rng = np.random.default_rng(seed)
    maps = []
    for task in head["tasks"]:
        widths = {"heatmap": len(task), "reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
        maps.append(
            {name: rng.normal(-1, 1.5, (1, width, nx, ny)).astype(np.float32) for name, width in widths.items()}
        )
    return maps


def test_decode_equals_a_loop_over_cells(head):
    maps = random_maps(head)
    found = decode(maps, head)
    expected, first = [], 0
    for task, names in zip(maps, head["tasks"], strict=True):
        rows = []
        for label in range(len(names)):
            for ix in range(16):
                for iy in range(16):
                    score = 1 / (1 + np.exp(-float(task["heatmap"][0, label, ix, iy])))
                    reg, rot = task["reg"][0, :, ix, iy], task["rot"][0, :, ix, iy]
                    size = np.exp(task["dim"][0, :, ix, iy].astype(float))
                    x, y = (ix + reg[0]) * 1.6 - 12.8, (iy + reg[1]) * 1.6 - 12.8
                    z = task["height"][0, 0, ix, iy]
                    rows.append(
                        (
                            score,
                            [x, y, z - size[2] / 2, *size, np.arctan2(rot[0], rot[1]), *task["vel"][0, :, ix, iy]],
                            label + first,
                        )
                    )
        rows.sort(key=lambda row: -row[0])
        expected += [
            row for row in rows[: head["bbox_coder"]["max_num"]] if row[0] > head["bbox_coder"]["score_threshold"]
        ]
        first += len(names)
    assert len(found) == len(expected)
    assert np.allclose(found.scores, [row[0] for row in expected], atol=1e-5)
    assert found.labels.tolist() == [row[2] for row in expected]
    assert np.allclose(found.boxes, [row[1] for row in expected], rtol=1e-4, atol=1e-4)


def test_a_box_outside_the_limits_is_dropped(head):
    maps = random_maps(head)
    head["bbox_coder"]["post_center_range"] = [0, -100, -100, 100, 100, 100]
    assert (decode(maps, head).boxes[:, 0] >= 0).all()


def test_scores_below_the_threshold_are_dropped(head):
    maps = random_maps(head)
    for task in maps:
        task["heatmap"][:] = -20
    assert len(decode(maps, head)) == 0


def test_circle_nms_compares_squared_distance():
    centres = np.array([[0.0, 0.0], [1.5, 0.0], [5.0, 0.0], [5.0, 1.0]])
    scores = np.array([0.5, 0.9, 0.3, 0.4])
    assert circle_nms(centres, scores, 2.0, 10).tolist() == [1, 0, 3]  # 1.5² is above 2
    assert circle_nms(centres, scores, 2.5, 10).tolist() == [1, 3]
    assert circle_nms(centres, scores, 0.5, 2).tolist() == [1, 0]


def test_one_class_does_not_suppress_another_tasks(head):
    head["test_cfg"]["min_radius"] = [1e6, 1e6, 1e6]
    found = decode(random_maps(head), head)
    assert len(found) == 3  # the best of each task


def test_tensors_are_grouped_by_task():
    tensors = {"heatmap_1": np.ones(1), "reg_0": np.zeros(1), "heatmap_0": np.full(1, 2.0)}
    assert [sorted(task) for task in maps_from_tensors(tensors)] == [["heatmap", "reg"], ["heatmap"]]
    assert len(Detections.empty()) == 0


def test_the_rotated_branch_applies_test_cfgs_own_threshold_and_limits(head):
    maps = random_maps(head)
    head["test_cfg"].update(
        nms_type="rotate", nms_thr=2.0, score_threshold=0.0, post_center_limit_range=[-100] * 3 + [100] * 3
    )
    everything = decode(maps, head)
    head["test_cfg"]["score_threshold"] = 0.9
    assert len(decode(maps, head)) == int((everything.scores >= 0.9).sum()) < len(everything)
    head["test_cfg"].update(score_threshold=0.0, post_center_limit_range=[0, -100, -100, 100, 100, 100])
    assert len(decode(maps, head)) == int((everything.boxes[:, 0] >= 0).sum())
    head["test_cfg"]["nms_type"] = "circle"
    assert len(decode(maps, head)) == len(everything)  # the circle branch has neither


def test_no_threshold_keeps_every_candidate(head):
    head["bbox_coder"]["score_threshold"] = None
    assert len(decode(random_maps(head), head)) == 3 * head["bbox_coder"]["max_num"]
