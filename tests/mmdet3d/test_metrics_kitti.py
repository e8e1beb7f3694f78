"""KITTI AP against mmdet3d's own code (its compiled loops run as Python, its CUDA intersection by shapely) and by hand."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmdet3d_peer import by_shapely, mmdet3d_file, mmdet3ds_kitti_eval, mmdet3ds_kitti_metric, their_boxes

from qat.boxes.detections import Detections
from qat.core.errors import UserError
from qat.families.mmdet3d.metrics.kitti import (
    CLASSES,
    average_precision,
    bev_overlaps,
    box_overlaps,
    image_overlaps,
    kitti_eval,
)
from qat.families.mmdet3d.metrics.kitti_annos import (
    camera_corners,
    camera_to_lidar,
    detection_anno,
    empty_anno,
    kitti_metric,
    lidar_to_camera,
    project,
    truth_annos,
)

DATA = Path("/work/shared/mmdet3d-data")


@pytest.fixture(scope="module")
def theirs():
    """mmdet3d's kitti_utils/eval.py."""
    with mmdet3ds_kitti_eval() as module:
        yield module


def one(name="Car", bbox=(0, 0, 100, 100), location=(0, 1.5, 20), ry=0.0, dims=(4.0, 1.5, 1.8), **more) -> dict:
    """One object as a row of an anno."""
    row = {"name": name, "truncated": 0.0, "occluded": 0, "alpha": 0.1, "bbox": bbox, "location": location}
    return row | {"dimensions": dims, "rotation_y": ry, "score": 0.9} | more


def anno(*rows: dict) -> dict[str, np.ndarray]:
    return {key: np.array([row[key] for row in rows]) for key in rows[0]} if rows else empty_anno()


def street(seed: int, frames: int = 20, shift: float = 0.3) -> tuple[list[dict], list[dict]]:
    """Objects of every kind and difficulty, and detections: most near an object, some of a wrong class, some of nothing, some tiny."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    kinds = {
        "Car": (3.9, 1.5, 1.6),
        "Van": (5.0, 2.1, 1.9),
        "Pedestrian": (0.8, 1.7, 0.6),
        "Person_sitting": (0.8, 1.2, 0.6),
    }
    kinds |= {"Cyclist": (1.8, 1.7, 0.6)}
    for _ in range(frames):
        objects, boxes = [], []
        for _ in range(int(rng.integers(3, 9))):
            name = str(rng.choice(list(kinds)))
            location = np.array([rng.uniform(-15, 15), 1.6, rng.uniform(8, 60)])
            dims = np.array(kinds[name]) * rng.uniform(0.9, 1.1, 3)
            left, top = 600 + 700 * location[0] / location[2], 170 + 700 * (1.6 - dims[1]) / location[2]
            bbox = np.array([left, top, left + 700 * dims[0] / location[2], 170 + 700 * 1.6 / location[2]])
            ry = float(rng.uniform(-np.pi, np.pi))
            rest = {
                "truncated": float(rng.choice([0, 0.2, 0.6], p=[0.8, 0.1, 0.1])),
                "occluded": int(rng.choice(4, p=[0.6, 0.2, 0.1, 0.1])),
            }
            alpha = ry - np.arctan2(location[0], location[2])
            objects.append(one(name, bbox, location, ry, dims, alpha=alpha, score=0.0, **rest))
            for _ in range(int(rng.choice([0, 1, 2], p=[0.15, 0.65, 0.2]))):
                said = name if rng.random() < 0.85 else str(rng.choice(CLASSES))
                turned = ry + rng.normal(0, 0.15) + (np.pi if rng.random() < 0.1 else 0)
                moved = location + rng.normal(0, shift, 3) * [1, 0.2, 1]
                near = bbox + rng.normal(0, 2, 4)
                score = float(np.float32(rng.random()))
                boxes.append(
                    one(
                        said,
                        near,
                        moved,
                        turned,
                        dims * rng.uniform(0.95, 1.05, 3),
                        alpha=alpha + rng.normal(0, 0.2),
                        score=score,
                    )
                )
        for _ in range(2):
            left, top = rng.uniform(0, 900), rng.uniform(100, 200)
            region = np.array([left, top, left + 120, top + 70])
            objects.append(
                one("DontCare", region, (-1000,) * 3, -10.0, (-1.0,) * 3, alpha=-10.0, truncated=-1.0, occluded=-1)
            )
            boxes.append(
                one(
                    "Car",
                    region + rng.uniform(0, 8, 4),
                    (rng.uniform(-9, 9), 1.6, 30),
                    0.3,
                    score=float(np.float32(rng.random())),
                )
            )
        truth.append(anno(*objects))
        found.append(anno(*boxes))
    found[1] = empty_anno()
    for own in found:
        for key in ("bbox", "location", "dimensions", "rotation_y", "alpha", "score"):
            own[key] = own[key].astype(np.float32)  # as a detector gives them
    return truth, found


@pytest.mark.parametrize(("seed", "shift"), [(1, 0.08), (2, 0.3)])
def test_values_keys_and_text_are_mmdet3ds(theirs, seed, shift):
    truth, found = street(seed, shift=shift)
    expected_text, expected = theirs.kitti_eval(truth, found, list(CLASSES), ["bbox", "bev", "3d"])
    text, values = kitti_eval(truth, found, CLASSES)
    assert list(values) == list(expected)
    assert values == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert text == expected_text
    spread = {round(value, 3) for value in values.values()}
    assert len(spread) > 40 and 0 < values["KITTI/Car_3D_AP40_moderate_loose"] < 100  # the comparison is of something
    assert "aos  AP11" in text


def test_one_class_and_one_type_are_mmdet3ds(theirs):
    truth, found = street(3, frames=6)
    for own in found:
        own["alpha"] = np.full(len(own["alpha"]), -10.0)  # no orientation
    expected_text, expected = theirs.kitti_eval(truth, found, "Pedestrian", ["bbox"])
    text, values = kitti_eval(truth, found, "Pedestrian", ["bbox"])
    assert values == pytest.approx(expected, abs=1e-9) and text == expected_text and "aos" not in text


def test_curves_are_mmdet3ds(theirs):
    truth, found = street(4, frames=6)
    least = np.array([[[0.7], [0.7], [0.7]], [[0.7], [0.5], [0.5]]])
    ap = average_precision(truth, found, ["Car"])
    ours = ap["aos"].ap40[0]
    expected = theirs.eval_class(truth, found, [0], [0, 1, 2], 0, least, compute_aos=True)["orientation"]
    assert ours == pytest.approx(theirs.get_mAP40(expected)[0], abs=1e-9) and ours.any()


def test_kitti_demo_and_test_annotations_are_scored_as_by_mmdet3d(theirs):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here")
    infos = pickle.loads((DATA / "tests/kitti/kitti_infos_train.pkl").read_bytes())
    demo = pickle.loads((DATA / "kitti/000008.pkl").read_bytes())  # without categories
    infos["data_list"] += demo["data_list"]
    truth = truth_annos(infos)
    found = [{**own, "score": np.linspace(0.9, 0.3, len(own["name"]))} for own in truth]
    found[1] = {**found[1], "location": found[1]["location"] + [0.0, 0.0, 0.2]}
    expected_text, expected = theirs.kitti_eval(truth, found, list(CLASSES), ["bbox", "bev", "3d"])
    text, values = kitti_eval(truth, found, CLASSES)
    assert values == pytest.approx(expected, abs=1e-9) and text == expected_text
    assert values["KITTI/Car_2D_AP40_hard_strict"] > 0 and values["KITTI/Pedestrian_3D_AP11_easy_strict"] > 0


def cars(count: int) -> list[dict]:
    """Frames of one easy car each."""
    return [anno(one(location=(i, 1.5, 20 + i), bbox=(10 * i, 0, 10 * i + 100, 100))) for i in range(count)]


def test_all_found_is_100_and_none_found_is_0():
    truth = cars(50)
    _, values = kitti_eval(truth, truth, ["Car"])
    # 50 objects reach the 41 recalls; AP11 counts 11 of them.
    assert set(values.values()) == {100.0}
    _, values = kitti_eval(truth, [empty_anno()] * 50, ["Car"])
    assert set(values.values()) == {0.0}


def test_half_of_the_objects_found_is_half_of_the_recalls():
    truth = cars(40)
    found = [own if i < 20 else empty_anno() for i, own in enumerate(truth)]
    ap = average_precision(truth, found, ["Car"])["3d"]
    # Thresholds at recalls 1/40 … 20/40 stand at places 0 … 19 of 41, so AP40 (places 1 to 40) has 19, AP11 (0, 4, 8, …) has 5.
    assert ap.ap40[0, 0, 0] == pytest.approx(100 * 19 / 40)
    assert ap.ap11[0, 0, 0] == pytest.approx(100 * 5 / 11)


def test_a_shifted_box_lowers_ap():
    truth = cars(40)

    def moved(by):
        return [{**own, "location": own["location"] + [by, 0, 0]} for own in truth]

    # Cars 4 m long, their length along x: moved by s, (4 − s) / (4 + s) is left.
    assert 3.4 / 4.6 > 0.7 > 2.6 / 5.4 and 2.6 / 5.4 < 0.5 < 3.2 / 4.8
    _, near = kitti_eval(truth, moved(0.6), ["Car"])
    _, middle = kitti_eval(truth, moved(0.8), ["Car"])
    _, far = kitti_eval(truth, moved(1.4), ["Car"])
    assert near["KITTI/Car_BEV_AP40_easy_strict"] == near["KITTI/Car_3D_AP40_easy_strict"] > 95
    assert middle["KITTI/Car_3D_AP40_easy_strict"] == 0 and middle["KITTI/Car_3D_AP40_easy_loose"] > 95
    assert far["KITTI/Car_3D_AP40_easy_loose"] == 0 and far["KITTI/Car_2D_AP40_easy_strict"] > 95


def test_swapped_classes_find_nothing():
    truth = cars(40)
    swapped = [{**own, "name": np.array(["Cyclist"])} for own in truth]
    _, values = kitti_eval(truth, swapped, CLASSES)
    assert set(values.values()) == {0.0}


def test_a_false_positive_costs_more_the_higher_its_score():
    truth = cars(40)

    def with_false(score):
        extra = one(location=(40, 1.5, 90), bbox=(900, 0, 990, 90), score=score)
        return [anno(one(location=(i, 1.5, 20 + i), bbox=(10 * i, 0, 10 * i + 100, 100)), extra) for i in range(40)]

    sure = average_precision(truth, with_false(0.95), ["Car"])["3d"].ap40[0, 0, 0]
    unsure = average_precision(truth, with_false(0.1), ["Car"])["3d"].ap40[0, 0, 0]
    assert sure == pytest.approx(50, abs=2) and unsure > 95


def test_difficulties_ignore_what_is_harder():
    hard = [anno(one(), one(location=(8, 1.5, 40), bbox=(300, 0, 340, 30), occluded=1, alpha=0.0)) for _ in range(40)]
    found = [anno(one()) for _ in range(40)]  # the near one alone
    ap = average_precision(hard, found, ["Car"])["bbox"].ap40[0, :, 0]
    assert ap[0] > 95 and ap[1] == ap[2] == pytest.approx(100 * 39 / 80, abs=2)


def test_vans_and_dont_care_regions_are_no_false_positives():
    region = one(
        "DontCare", (500, 0, 600, 100), (-1000,) * 3, -10.0, (-1.0,) * 3, alpha=-10.0, truncated=-1.0, occluded=-1
    )
    van = one("Van", (700, 0, 800, 100), (12, 1.5, 30))
    truth = [anno(one(), van, region) for _ in range(40)]
    both = [
        anno(
            one(score=0.5),
            one(bbox=(505, 0, 600, 95), location=(-20, 1.5, 50)),
            one(bbox=(700, 0, 800, 100), location=(12, 1.5, 30)),
        )
        for _ in range(40)
    ]
    ap = average_precision(truth, both, ["Car"])
    assert ap["bbox"].ap40[0, 0, 0] > 95
    # Regions are of the image: from above, the box inside one is false, so precision is a half.
    assert ap["3d"].ap40[0, 0, 0] == pytest.approx(50, abs=2)


def test_orientation_counts_in_aos_alone():
    truth = cars(40)
    turned = [{**own, "alpha": own["alpha"] + np.pi} for own in truth]
    ap = average_precision(truth, turned, ["Car"])
    assert ap["bbox"].ap40[0, 0, 0] > 95 and ap["aos"].ap40[0, 0, 0] == pytest.approx(0)


def test_mis_sorted_scores_lower_ap():
    truth, found = street(5, frames=40)

    def scored_by(quality) -> float:
        ranked = []
        for real, own in zip(truth, found, strict=True):
            overlaps = image_overlaps(own["bbox"], real["bbox"][real["name"] == "Car"])
            ranked.append({**own, "score": quality(overlaps.max(1, initial=0))})
        return average_precision(truth, ranked, ["Car"])["bbox"].ap40[0, 2, 0]

    best, worst = scored_by(lambda overlap: overlap), scored_by(lambda overlap: 1 - overlap)
    assert best > worst + 5 > 5


def test_overlaps_are_shapelys():
    truth, found = street(6, frames=2)
    real = {key: value[truth[0]["name"] != "DontCare"] for key, value in truth[0].items()}
    a, b = (
        np.concatenate([own["location"][:, [0, 2]], own["dimensions"][:, [0, 2]], own["rotation_y"][:, None]], 1)
        for own in (found[0], real)
    )
    common = by_shapely(a, b, 2)
    heights = [(own["location"][:, 1], own["location"][:, 1] - own["dimensions"][:, 1]) for own in (found[0], real)]
    over = np.minimum(heights[0][0][:, None], heights[1][0]) - np.maximum(heights[0][1][:, None], heights[1][1])
    volume = found[0]["dimensions"].prod(-1)[:, None] + real["dimensions"].prod(-1)
    inside = common * over.clip(0)
    assert box_overlaps(found[0], real) == pytest.approx(inside / (volume - inside), abs=1e-5)


IN_THE_SIMULATOR = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("rotate_iou", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
boxes = np.load(sys.argv[2])
np.save(sys.argv[3], [module.rotate_iou_gpu_eval(boxes["a"], boxes["b"], criterion) for criterion in (-1, 2)])
"""


def test_overlaps_are_those_of_mmdet3ds_cuda_kernel(tmp_path):
    """The kernel itself, in numba's simulator of CUDA."""
    kernel = mmdet3d_file("evaluation/functional/kitti_utils/rotate_iou.py")
    rng = np.random.default_rng(0)
    a, b = rng.uniform([-4, -4, 0.5, 0.5, -4], [4, 4, 4, 4, 4], (2, 12, 5)).astype(np.float32)
    np.savez(tmp_path / "boxes.npz", a=a, b=b)
    arguments = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        IN_THE_SIMULATOR,
        str(kernel),
        str(tmp_path / "boxes.npz"),
        str(tmp_path / "iou.npy"),
    ]
    done = subprocess.run(
        arguments, env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    iou, common = np.load(tmp_path / "iou.npy")
    zeros = np.zeros(12)

    def boxes(rows):  # in the camera's frame, 2 m high
        return {
            "name": np.full(12, "Car"),
            "location": np.stack([rows[:, 0], zeros, rows[:, 1]], 1),
            "dimensions": np.stack([rows[:, 2], zeros + 2, rows[:, 3]], 1),
            "rotation_y": rows[:, 4],
        }

    assert bev_overlaps(boxes(a), boxes(b)) == pytest.approx(iou, abs=1e-5) and (iou > 0.05).sum() > 20
    areas = a[:, None, 2:4].prod(-1) + b[None, :, 2:4].prod(-1)
    assert box_overlaps(boxes(a), boxes(b)) == pytest.approx(common / (areas - common), abs=1e-5)
    assert by_shapely(a, b) == pytest.approx(iou, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, f: (t, f[:1], ["Car"]), "found 1 frames of detections for 2 of ground truth"),
        (lambda t, f: (t, f, ["Truck"]), "classes: found Truck, expected some of Car, Pedestrian, Cyclist"),
        (
            lambda t, f: (t, [f[0], {**f[1], "score": np.array([np.nan])}], ["Car"]),
            "detections of frame 1: score: found NaN",
        ),
        (
            lambda t, f: (t, [f[0], {**f[1], "bbox": np.zeros((1, 3))}], ["Car"]),
            "bbox: found shape [1, 3], expected [1, 4]",
        ),
        (lambda t, f: ([t[0], {"name": t[1]["name"]}], f, ["Car"]), "ground truth of frame 1: found no truncated"),
    ],
)
def test_bad_annos_are_refused_in_one_line(change, says):
    truth, found, classes = change(cars(2), cars(2))
    with pytest.raises(UserError, match=says.replace("[", r"\[").replace("]", r"\]")) as caught:
        kitti_eval(truth, found, classes)
    assert "\n" not in str(caught.value)


P2 = [
    [721.5377, 0.0, 609.5593, 44.85728],
    [0.0, 721.5377, 172.854, 0.2163791],
    [0.0, 0.0, 1.0, 0.002745884],
    [0.0, 0.0, 0.0, 1.0],
]
LIDAR2CAM = [
    [0.00023477, -0.99994415, -0.01056348, -0.00279682],
    [0.01044941, 0.01056535, -0.99988961, -0.07510879],
    [0.99994540, 0.00012437, 0.01045130, -0.27213280],
    [0.0, 0.0, 0.0, 1.0],
]


def kitti_info(index: int = 0) -> dict:
    camera = {"lidar2cam": LIDAR2CAM, "cam2img": P2, "height": 375, "width": 1242}
    return {"sample_idx": index, "images": {"CAM2": camera}, "instances": []}


def lidar_detections(seed: int, count: int = 60) -> Detections:
    """Some in front of the camera, some behind, some beyond KITTI's range. In mmdet3d's convention."""
    rng = np.random.default_rng(seed)
    low, high = [-20, -50, -3.5, 0.4, 0.4, 1, -7], [80, 50, 0.5, 5, 2, 2, 7]
    boxes = rng.uniform(low, high, (count, 7)).astype(np.float32)
    return Detections(boxes, rng.random(count).astype(np.float32), rng.integers(0, 3, count), "mmdet3d")


NAMES = ("Pedestrian", "Cyclist", "Car")  # in the order of mmdet3d's models


@pytest.fixture(scope="module")
def their_metric(theirs):
    """mmdet3d's KittiMetric."""
    with mmdet3ds_kitti_metric(theirs) as metric:
        yield metric


def test_detections_become_mmdet3ds_annos(their_metric):
    found, info = lidar_detections(1), kitti_info()
    metric = their_metric("unused.pkl")
    metric.data_infos = [info]
    (expected,) = metric.bbox2result_kitti([their_boxes(found)], [0], list(NAMES))
    ours = detection_anno(found, info, NAMES)
    assert 8 < len(ours["name"]) < 40
    for key, value in ours.items():
        if key == "name":
            assert value.tolist() == expected[key].tolist()
        else:
            assert value.astype(np.float64) == pytest.approx(expected[key].astype(np.float64), rel=1e-4, abs=2e-3), key
            assert value.dtype == expected[key].dtype, key


def test_no_detection_in_the_image_is_an_empty_anno(their_metric):
    behind = Detections(np.float32([[-20, 0, -1, 4, 2, 1.5, 0]]), np.float32([0.9]), np.array([2]), "mmdet3d")
    metric = their_metric("unused.pkl")
    metric.data_infos = [kitti_info()]
    (expected,) = metric.bbox2result_kitti([their_boxes(behind)], [0], list(NAMES))
    ours = detection_anno(behind, kitti_info(), NAMES)
    assert {key: value.shape for key, value in ours.items()} == {key: expected[key].shape for key in ours}


def annotated(frames: int = 4) -> tuple[dict, list[Detections]]:
    """Infos whose objects are detections of another seed, and detections near most of them."""
    categories = {name: i for i, name in enumerate(NAMES)} | {"DontCare": -1}
    infos = {"metainfo": {"categories": categories}, "data_list": []}
    found = []
    for index in range(frames):
        info, real = kitti_info(index), lidar_detections(100 + index)
        seen = detection_anno(real, info, NAMES)
        for i in range(len(seen["name"])):
            box = [*seen["location"][i], *seen["dimensions"][i], seen["rotation_y"][i]]
            label = categories[seen["name"][i]]
            row = {
                "bbox": seen["bbox"][i].tolist(),
                "bbox_label": label,
                "bbox_label_3d": label,
                "alpha": float(seen["alpha"][i]),
            }
            info["instances"].append(
                row | {"bbox_3d": [float(v) for v in box], "truncated": 0.0, "occluded": 0, "score": 0.0}
            )
        infos["data_list"].append(info)
        near = real.boxes + np.random.default_rng(index).normal(0, 0.04, real.boxes.shape).astype(np.float32)
        found.append(Detections(near, real.scores, real.labels, "mmdet3d"))
    return infos, found


def test_the_whole_metric_is_mmdet3ds(their_metric, tmp_path):
    infos, found = annotated()
    (tmp_path / "infos.pkl").write_bytes(pickle.dumps(infos))
    metric = their_metric(str(tmp_path / "infos.pkl"))
    metric.dataset_meta = {"classes": NAMES}
    samples = [{"pred_instances_3d": their_boxes(own), "sample_idx": i} for i, own in enumerate(found)]
    expected = metric.compute_metrics(samples)
    text, values = kitti_metric(infos, found, NAMES)
    assert values == pytest.approx(expected, abs=1e-4) and list(values) == list(expected)
    assert max(values.values()) > 20 and "aos" in text


def test_any_convention_of_boxes_is_taken():
    infos, found = annotated(2)
    _, values = kitti_metric(infos, found, NAMES)
    _, others = kitti_metric(infos, [own.converted("bevfusion") for own in found], NAMES)
    assert others == pytest.approx(values, abs=1e-3)


def test_camera_boxes_go_back_to_the_lidar():
    found = lidar_detections(3)
    matrix = np.float32(LIDAR2CAM)
    boxes = lidar_to_camera(found.boxes, matrix)
    back = camera_to_lidar(boxes, matrix)
    turn = (back[:, 6] - found.boxes[:, 6] + np.pi) % (2 * np.pi) - np.pi
    assert back[:, :6] == pytest.approx(found.boxes[:, :6], abs=1e-4) and turn == pytest.approx(0, abs=1e-5)
    ahead = Detections(np.float32([[20, 0, -1.6, 4, 2, 1.5, 0]]), np.float32([1]), np.array([2]), "mmdet3d")
    corners = camera_corners(lidar_to_camera(ahead.boxes, matrix))
    # 4 m long and facing away: 18 to 22 m in front of the lidar, 0.27 m more of the camera.
    assert corners[..., 2].min() == pytest.approx(17.7, abs=0.1) and corners[..., 2].max() == pytest.approx(
        21.75, abs=0.1
    )
    pixels = project(corners, np.array(P2))
    assert pixels[..., 0].mean() == pytest.approx(610, abs=5) and (pixels[..., 1] > 150).all()


def test_infos_without_calibration_or_categories_are_refused_in_one_line():
    infos, found = annotated(1)
    del infos["data_list"][0]["images"]["CAM2"]["lidar2cam"]
    with pytest.raises(UserError, match="infos: sample 0: found no 'lidar2cam' of CAM2"):
        kitti_metric(infos, found, NAMES)
    with pytest.raises(UserError, match="found detections of 2 frames, the infos have 1"):
        kitti_metric(infos, found * 2, NAMES)
    with pytest.raises(UserError, match="expected metainfo"):
        kitti_metric({"metainfo": {}, "data_list": []}, [], NAMES)
