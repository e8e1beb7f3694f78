"""Indoor mAP against mmdet3d's own code and by hand."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
from shapely import affinity
from shapely.geometry import box as rectangle

from qat.core.errors import UserError
from qat.families.mmdet3d.metrics.indoor import Boxes, average_precision, box_overlaps, indoor_eval, truth_boxes

DATA = Path("/work/shared/mmdet3d-data/tests")
CLASSES = ("bed", "table", "sofa", "chair")


@pytest.fixture(scope="module")
def theirs():
    """mmdet3d's indoor_eval.py, whose package wants lyft_dataset_sdk."""
    spec = importlib.util.find_spec("mmdet3d")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("mmdet3d is not installed")
    import qat.lean._torchvision  # noqa: F401
    from qat.families.mmdet3d import ops

    ops.install()
    path = Path(spec.submodule_search_locations[0]) / "evaluation/functional/indoor_eval.py"
    spec = importlib.util.spec_from_file_location("their_indoor_eval", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def their_values(theirs, truth: list[Boxes], found: list[Boxes], classes=CLASSES) -> dict[str, float]:
    import torch
    from mmdet3d.structures import Box3DMode, DepthInstance3DBoxes

    def depth(boxes: np.ndarray) -> DepthInstance3DBoxes:
        width = boxes.shape[1]
        return DepthInstance3DBoxes(torch.from_numpy(boxes), box_dim=width, with_yaw=width == 7)

    truth_annos = [{"gt_bboxes_3d": depth(own.boxes), "gt_labels_3d": own.labels} for own in truth]
    found_annos = [
        {
            "bboxes_3d": depth(own.boxes),
            "labels_3d": torch.from_numpy(own.labels),
            "scores_3d": torch.from_numpy(own.scores),
        }
        for own in found
    ]
    return theirs.indoor_eval(truth_annos, found_annos, [0.25, 0.5], classes, "silent", Box3DMode.DEPTH)


def rooms(seed: int, scenes: int = 8, width: int = 7, classes: int = 4) -> tuple[list[Boxes], list[Boxes]]:
    """Objects, and detections: most near one, some of another class, some of nothing; a scene without objects, one without detections."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for scene in range(scenes):
        count = 0 if scene == 2 else int(rng.integers(3, 10))
        real = rng.uniform([-3, 0, -1, 0.5, 0.5, 0.5, -3], [3, 5, 0, 2, 2, 1.5, 3], (count, 7)).astype(np.float32)[
            :, :width
        ]
        labels = rng.integers(0, classes, count)
        copies = 0 if scene == 3 else 2
        near = np.repeat(real, copies, 0)
        near = near + rng.normal(0, 0.12, near.shape).astype(np.float32)
        wrong = rng.uniform([-3, 0, -1, 0.5, 0.5, 0.5, -3], [3, 5, 0, 2, 2, 1.5, 3], (4 if copies else 0, 7)).astype(
            np.float32
        )
        boxes = np.concatenate([near, wrong[:, :width]])
        said = np.where(
            rng.random(len(boxes)) < 0.85, np.concatenate([np.repeat(labels, copies), wrong[:, 0] > 0]), 1
        ).astype(np.int64)
        truth.append(Boxes(real, labels))
        found.append(Boxes(boxes, said, rng.permutation(len(boxes)).astype(np.float32) / 99 + np.float32(scene / 1e4)))
    return truth, found


@pytest.mark.parametrize("width", [7, 6])
@pytest.mark.parametrize("seed", [1, 2])
def test_values_and_keys_are_mmdet3ds(theirs, seed, width):
    truth, found = rooms(seed, width=width)
    expected = their_values(theirs, truth, found)
    values = indoor_eval(truth, found, CLASSES)
    assert values == pytest.approx(expected, abs=1e-6) and set(values) == set(expected)
    assert 0.1 < values["mAP_0.50"] < values["mAP_0.25"] < 0.95


def test_a_class_that_is_never_found_is_0_and_one_never_annotated_is_nan_as_in_mmdet3d(theirs):
    truth, found = rooms(3)
    silent = [
        Boxes(own.boxes[own.labels != 0], own.labels[own.labels != 0], own.scores[own.labels != 0]) for own in found
    ]
    expected = their_values(theirs, truth, silent)
    values = indoor_eval(truth, silent, CLASSES)
    assert values == pytest.approx(expected, abs=1e-6) and values["bed_AP_0.25"] == values["bed_rec_0.25"] == 0
    never = [Boxes(own.boxes[own.labels != 0], own.labels[own.labels != 0]) for own in truth]
    with np.errstate(invalid="ignore"):
        expected = their_values(theirs, never, found)
    values = indoor_eval(never, found, CLASSES)
    assert values == pytest.approx(expected, abs=1e-6, nan_ok=True) and np.isnan(values["mAP_0.25"])


@pytest.mark.parametrize("name", ["sunrgbd", "scannet"])
def test_annotations_of_mmdet3ds_test_sets_are_read_and_scored_as_by_mmdet3d(theirs, name):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here")
    from mmdet3d.datasets import ScanNetDataset, SUNRGBDDataset

    kind = {"sunrgbd": SUNRGBDDataset, "scannet": ScanNetDataset}[name]
    dataset = kind(data_root=str(DATA / name), ann_file=f"{name}_infos.pkl", pipeline=[], test_mode=True)
    truth = truth_boxes(pickle.loads((DATA / name / f"{name}_infos.pkl").read_bytes()))
    annotated = dataset[0]["eval_ann_info"]
    columns = truth[0].boxes.shape[1]
    assert truth[0].boxes == pytest.approx(annotated["gt_bboxes_3d"].tensor.numpy()[:, :columns], abs=1e-6)
    assert truth[0].labels.tolist() == annotated["gt_labels_3d"].tolist()
    rng = np.random.default_rng(0)
    near = truth[0].boxes + rng.normal(0, 0.08, truth[0].boxes.shape).astype(np.float32)
    found = [Boxes(near, truth[0].labels, rng.random(len(near)).astype(np.float32))]
    classes = dataset.metainfo["classes"]
    values = indoor_eval(truth, found, classes)
    assert values == pytest.approx(their_values(theirs, truth, found, classes), abs=1e-6)
    assert 0 < values["mAP_0.25"] <= 1


def cube(x: float, yaw: float | None = 0.0) -> list[float]:
    return [x, 0.0, 0.0, 1.0, 1.0, 1.0] + ([] if yaw is None else [yaw])


def scene(boxes, labels, scores=None) -> Boxes:
    boxes = np.array(boxes, np.float32).reshape(len(labels), -1 if labels else 7)
    return Boxes(boxes, np.array(labels, np.int64), None if scores is None else np.array(scores, np.float32))


def test_a_cube_moved_by_a_third_is_found_at_a_quarter_but_not_at_a_half():
    values = indoor_eval([scene([cube(0)], [0])], [scene([cube(0.4)], [0], [0.9])], CLASSES)
    # 0.6 of 1.4 is 0.43.
    assert values == {
        "bed_AP_0.25": 1.0, "bed_rec_0.25": 1.0, "mAP_0.25": 1.0, "mAR_0.25": 1.0,
        "bed_AP_0.50": 0.0, "bed_rec_0.50": 0.0, "mAP_0.50": 0.0, "mAR_0.50": 0.0,
    }  # fmt: skip


def test_average_precision_by_hand():
    # Right, wrong, right of three objects: precision 1 up to a recall of 1/3, then 2/3 up to 2/3.
    truth = [scene([cube(0), cube(5), cube(9)], [0, 0, 0])]
    found = [scene([cube(0), cube(20), cube(5)], [0, 0, 0], [0.9, 0.8, 0.7])]
    values = indoor_eval(truth, found, CLASSES)
    assert values["bed_AP_0.25"] == pytest.approx(1 / 3 + 2 / 9) and values["bed_rec_0.25"] == pytest.approx(2 / 3)
    assert average_precision(np.array([1 / 3, 1 / 3, 2 / 3]), np.array([1, 1 / 2, 2 / 3])) == pytest.approx(5 / 9)


def test_the_second_detection_of_an_object_is_wrong():
    truth = [scene([cube(0), cube(5)], [0, 0])]
    twice = [scene([cube(0), cube(0.1), cube(5)], [0, 0, 0], [0.9, 0.8, 0.7])]
    assert indoor_eval(truth, twice, CLASSES)["bed_AP_0.25"] == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)


def test_mis_sorted_scores_swapped_classes_and_a_shift_lower_map():
    truth, found = rooms(4)
    best = [Boxes(own.boxes, own.labels, _quality(real, own)) for real, own in zip(truth, found, strict=True)]
    worst = [Boxes(own.boxes, own.labels, 1 - own.scores) for own in best]
    swapped = [Boxes(own.boxes, (own.labels + 1) % 4, own.scores) for own in best]
    shifted = [Boxes(own.boxes + np.float32([0.3, 0, 0, 0, 0, 0, 0]), own.labels, own.scores) for own in best]
    values = {
        name: indoor_eval(truth, own, CLASSES)
        for name, own in (("best", best), ("worst", worst), ("swapped", swapped), ("shifted", shifted))
    }
    assert values["worst"]["mAP_0.25"] < 0.8 * values["best"]["mAP_0.25"]
    assert values["worst"]["mAR_0.25"] == pytest.approx(values["best"]["mAR_0.25"], abs=0.05)
    assert values["swapped"]["mAP_0.25"] < 0.1 < 0.7 < values["best"]["mAP_0.25"]
    assert values["shifted"]["mAP_0.50"] < values["best"]["mAP_0.50"] - 0.1


def _quality(real: Boxes, own: Boxes) -> np.ndarray:
    scores = np.zeros(len(own.labels))
    for label in np.unique(own.labels):
        mine = own.labels == label
        scores[mine] = box_overlaps(own.boxes[mine], real.boxes[real.labels == label]).max(1, initial=0)
    return scores.astype(np.float32)


def test_overlaps_are_shapelys():
    a, b = (rooms(seed, 1)[0][0].boxes for seed in (5, 6))

    def footprint(box):
        x, y, _, w, h, _, yaw = map(float, box)
        return affinity.rotate(rectangle(x - w / 2, y - h / 2, x + w / 2, y + h / 2), yaw, (x, y), use_radians=True)

    for i, p in enumerate(a):
        for j, q in enumerate(b):
            over = max(0.0, min(p[2] + p[5], q[2] + q[5]) - max(p[2], q[2]))
            common = footprint(p).intersection(footprint(q)).area * over
            whole = p[3:6].prod() + q[3:6].prod() - common
            assert box_overlaps(a, b)[i, j] == pytest.approx(common / whole, abs=1e-6)


@pytest.mark.parametrize(
    ("truth", "found", "says"),
    [
        ([], [], "found 0 scenes of detections for 0"),
        ([scene([cube(0)], [0])], [scene([cube(0)], [0])], "1 boxes, 1 labels, no scores, expected as many"),
        ([scene([cube(0)], [0])], [scene([cube(np.nan)], [0], [1])], "detections of scene 0: found NaN or infinity"),
        (
            [scene([cube(0)], [4])],
            [scene([cube(0)], [0], [1])],
            "ground truth of scene 0: found labels 4 to 4, expected 0 to 3",
        ),
        ([scene([cube(0)[:5]], [0])], [scene([cube(0)], [0], [1])], "found boxes of shape"),
    ],
)
def test_bad_boxes_are_refused_in_one_line(truth, found, says):
    with pytest.raises(UserError, match=says) as caught:
        indoor_eval(truth, found, CLASSES)
    assert "\n" not in str(caught.value)


def test_infos_of_another_form_are_refused():
    with pytest.raises(UserError, match="found no 'data_list'"):
        truth_boxes({"infos": []})
