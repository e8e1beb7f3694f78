"""T4 data sets: the same frames, boxes and scores as the nuScenes-format data that they were made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lidar import need_mmdet3d

from qat.boxes.conventions import convert
from qat.boxes.detections import Detections
from qat.core.errors import UserError
from qat.data import t4
from qat.data.dataset import open_nuscenes, split_tokens, table_folders, transform
from qat.evaluate import evaluate_detections
from qat.model.opening import open_model, read_config
from qat.model.runners import TorchPart, part_modules
from qat.runtime.pipeline import Pipeline

need_mmdet3d()

ROOT = Path(__file__).resolve().parents[2]
DATA, VERSION = ROOT / "example-data", "v1.0-synth"
MODEL = ROOT / "model" / "lidar-tiny" / "config.py"
# nuScenes' category → how T4 data sets of several years name it
NAMES = {
    "vehicle.car": "car",
    "vehicle.truck": "vehicle.truck",
    "vehicle.construction": "vehicle.construction",
    "vehicle.bus.rigid": "vehicle.bus (bendy & rigid)",
    "vehicle.trailer": "semi_trailer",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "vehicle.bicycle",
    "human.pedestrian.adult": "pedestrian.adult",
    "movable_object.trafficcone": "movable_object.traffic_cone",
    "movable_object.barrier": "movable_object.barrier",
}


def to_t4(out: Path, scenes: int, channel: str = "LIDAR_TOP", width: int = 5) -> list[str]:
    """Scenes of example-data's split "eval" as T4 data sets; returns their ids. channel LIDAR_CONCAT: points in the ego frame."""
    nusc = open_nuscenes(DATA)
    chosen = list(dict.fromkeys(nusc.get("sample", token)["scene_token"] for token in split_tokens(nusc, "eval")))[
        :scenes
    ]
    tables = {name: json.loads((DATA / VERSION / f"{name}.json").read_text()) for name in (*t4.TABLES, "map")}
    for n, scene in enumerate(chosen):
        folder = out / f"set{n}" / "0"
        (folder / "annotation").mkdir(parents=True)
        samples = {r["token"] for r in tables["sample"] if r["scene_token"] == scene}
        data = [dict(r) for r in tables["sample_data"] if r["sample_token"] in samples]
        poses = {r["ego_pose_token"] for r in data}
        sensors = {r["calibrated_sensor_token"] for r in data}
        annotations = [dict(r) for r in tables["sample_annotation"] if r["sample_token"] in samples]
        instances = {r["instance_token"] for r in annotations}
        logs = {r["log_token"] for r in tables["scene"] if r["token"] == scene}
        extra = {"token": "state", "name": "vehicle_state.driving", "description": ""}
        own = {
            "scene": [r for r in tables["scene"] if r["token"] == scene],
            "sample": [r for r in tables["sample"] if r["token"] in samples],
            "sample_data": data,
            "sample_annotation": [
                {**r, "attribute_tokens": ["state", *r["attribute_tokens"], "state"]} for r in annotations
            ],
            "instance": [r for r in tables["instance"] if r["token"] in instances],
            "ego_pose": [r for r in tables["ego_pose"] if r["token"] in poses],
            "calibrated_sensor": [dict(r) for r in tables["calibrated_sensor"] if r["token"] in sensors],
            "log": [r for r in tables["log"] if r["token"] in logs],
            "category": [{**r, "name": NAMES[r["name"]]} for r in tables["category"]],
            "attribute": [*tables["attribute"], extra],
            "sensor": [dict(r) for r in tables["sensor"]],
            "visibility": [{"token": "1", "level": "full", "description": ""}],
            "map": [],
        }
        lidars = {r["token"] for r in own["sensor"] if r["channel"] == "LIDAR_TOP"}
        mounted = {r["token"]: r for r in own["calibrated_sensor"] if r["sensor_token"] in lidars}
        for record in data:
            record["is_valid"] = True
            if record["calibrated_sensor_token"] not in mounted:
                continue
            points = np.fromfile(DATA / record["filename"], np.float32).reshape(-1, 5)
            if channel == "LIDAR_CONCAT":
                move = transform(mounted[record["calibrated_sensor_token"]])
                points[:, :3] = points[:, :3] @ move[:3, :3].T + move[:3, 3]
            points[:, 4] = -1
            name = f"data/{channel}/{Path(record['filename']).name}"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            points[:, :width].tofile(folder / name)
            if width != 5:
                record["info_filename"] = f"{name}.json"
                (folder / f"{name}.json").write_text(json.dumps({"num_pts_feats": width}))
            record["filename"] = name
            if not record["is_key_frame"]:
                record["sample_token"] = ""
        if channel == "LIDAR_CONCAT":
            for record in mounted.values():
                record.update(translation=[0.0, 0.0, 0.0], rotation=[1.0, 0.0, 0.0, 0.0])
            for record in own["sensor"]:
                record["channel"] = channel if record["token"] in lidars else record["channel"]
        for name, rows in own.items():
            (folder / "annotation" / f"{name}.json").write_text(json.dumps(rows))
        (folder / "annotation" / "lidarseg.json").write_text("[]")
    return [f"set{n}" for n in range(len(chosen))]


def frames_of(root, split="all", frames=None):
    family, config = read_config(MODEL)
    return family.dataset(root, split, config, None, frames)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("t4")
    to_t4(root, 2)
    return root


def made_boxes(frame):
    """The annotated boxes as detections, some moved, with scores."""
    rng = np.random.default_rng(len(frame.gt_boxes))
    boxes = frame.gt_boxes.copy()
    boxes[:, :2] += rng.normal(scale=0.4, size=(len(boxes), 2))
    return Detections(boxes, rng.uniform(0.1, 1, len(boxes)).astype(np.float32), frame.gt_labels)


def test_frames_and_boxes_are_those_of_nuscenes(sets):
    mine, plain = frames_of(sets), frames_of(DATA, "eval")
    assert len(mine) == 2 * len([t for t in plain.tokens if plain.scene_of(t) == plain.scene_of(plain.tokens[0])])
    for n in range(0, len(mine), 5):
        a, b = mine[n], plain[n]
        np.testing.assert_array_equal(a.points[:, :4], b.points[:, :4])
        np.testing.assert_allclose(a.gt_boxes, b.gt_boxes, atol=1e-5)
        np.testing.assert_array_equal(a.gt_labels, b.gt_labels)
        assert a.token.endswith(b.token) and len(b.gt_boxes) > 3
    assert len({mine.scene_of(token) for token in mine.tokens}) == 2
    assert len(table_folders(mine.nusc)) == 2


def test_equal_boxes_have_equal_scores(sets):
    """The round trip: the same detections on both forms, scored."""
    mine = frames_of(sets)
    plain = frames_of(DATA, "eval")
    plain.tokens = plain.tokens[: len(mine)]
    figures = []
    for dataset in (mine, plain):
        figures.append(evaluate_detections(dataset, {frame.token: made_boxes(frame) for frame in dataset}))
    assert figures[0]["map"] == pytest.approx(figures[1]["map"]) and figures[0]["map"] > 0.3
    assert figures[0]["nds"] == pytest.approx(figures[1]["nds"])
    assert figures[0]["tp_errors"] == pytest.approx(figures[1]["tp_errors"])


def test_a_detector_finds_the_same_in_both(sets):
    """Points, through the network, to boxes and scores."""
    opened = open_model(MODEL.with_name(f"{MODEL.parent.name}.pth"), MODEL)
    parts = {name: TorchPart(wrapper) for name, wrapper in part_modules(opened.network).items()}
    pipeline = Pipeline(parts, opened.family.settings(opened.network.config))
    mine, plain = frames_of(sets), frames_of(DATA, "eval", None)
    found = {frame.token: pipeline.detect_sample(frame) for frame in mine}
    for frame in plain:
        for token, boxes in found.items():
            if token.endswith(frame.token):
                expected = pipeline.detect_sample(frame)
                np.testing.assert_array_equal(boxes.boxes, expected.boxes)
                np.testing.assert_array_equal(boxes.scores, expected.scores)
                np.testing.assert_array_equal(boxes.labels, expected.labels)
    assert sum(len(boxes.boxes) for boxes in found.values()) > 5 * len(found)


def test_concatenated_lidars_are_in_the_ego_frame(tmp_path):
    to_t4(tmp_path, 1, "LIDAR_CONCAT", width=4)
    mine, plain = frames_of(tmp_path), frames_of(DATA, "eval")
    frame, other = mine[0], plain[0]
    nusc = plain.nusc
    record = nusc.get("sample_data", nusc.get("sample", other.token)["data"]["LIDAR_TOP"])
    move = transform(nusc.get("calibrated_sensor", record["calibrated_sensor_token"]))
    moved = convert(other.gt_boxes, "bevfusion", "nuscenes")
    ours = convert(frame.gt_boxes, "bevfusion", "nuscenes")
    np.testing.assert_allclose(ours[:, :3], moved[:, :3] @ move[:3, :3].T + move[:3, 3], atol=1e-3)
    # The points of a box's inside stay there.
    assert frame.points.shape[1] == 5 and np.isfinite(frame.points).all()
    figures = evaluate_detections(
        mine, {f.token: Detections(f.gt_boxes, np.ones(len(f.gt_boxes), np.float32), f.gt_labels) for f in mine}
    )
    present = {name for f in mine for name in np.array(mine.classes)[f.gt_labels]}
    assert all(figures["per_class_ap"][name] > 0.99 for name in present & {"car", "pedestrian"})


def test_splits_versions_and_settings_of_a_yaml(sets, tmp_path, capsys):
    root = tmp_path / "sets"
    shutil.copytree(sets, root)
    shutil.copytree(root / "set0" / "0", root / "set0" / "11")
    file = root / "splits.yaml"
    file.write_text("train: [set1]\nval: [set0/0]\nclass_ranges: {car: 10.0}\nversion: 1\n")
    assert [path.name for path in t4.find(root)] == ["11", "0"]  # the newest
    assert [path.parent.name for path in t4.find(file)] == ["set1", "set0"]
    train, val = frames_of(file, "train"), frames_of(file, "val")
    assert {t.split("-")[0] for t in train.tokens} == {"0"} and {t.split("-")[0] for t in val.tokens} == {"1"}
    assert len(frames_of(file)) == len(train) + len(val)
    near = evaluate_detections(val, {frame.token: made_boxes(frame) for frame in val})
    far = evaluate_detections(
        frames_of(root / "set0" / "0"), {f.token: made_boxes(f) for f in frames_of(root / "set0" / "0")}
    )
    assert near["per_class_ap"]["car"] != far["per_class_ap"]["car"]
    with pytest.raises(UserError, match="split 'test' not found; there is train, val, all"):
        frames_of(file, "test")


def test_the_score_is_of_the_models_classes(sets):
    dataset = frames_of(sets / "set0" / "0")
    dataset.classes = ["car", "pedestrian"]
    found = {}
    for frame in dataset:
        found[frame.token] = Detections(frame.gt_boxes, np.ones(len(frame.gt_boxes), np.float32), frame.gt_labels)
    figures = evaluate_detections(dataset, found)
    assert set(figures["per_class_ap"]) == {"car", "pedestrian"} and figures["map"] > 0.9


def test_what_is_not_valid_or_not_known_is_said(tmp_path, capsys):
    to_t4(tmp_path, 1)
    folder = tmp_path / "set0" / "0" / "annotation"
    data = json.loads((folder / "sample_data.json").read_text())
    lidar = next(r for r in data if r["is_key_frame"] and "LIDAR" in r["filename"])
    lidar["is_valid"] = False
    (folder / "sample_data.json").write_text(json.dumps(data))
    categories = json.loads((folder / "category.json").read_text())
    for record in categories:
        if record["name"] == "car":
            record["name"] = "animal"
    (folder / "category.json").write_text(json.dumps(categories))
    whole = len(frames_of(DATA, "eval")) // 4
    dataset = frames_of(tmp_path)
    said = capsys.readouterr().err
    assert "left out 1 keyframes whose lidar is not valid" in said and "animal (" in said
    assert lidar["sample_token"] not in dataset.tokens and len(dataset) < whole + 10
    cars = dataset.classes.index("car")
    assert not any((frame.gt_labels == cars).any() for frame in dataset)
    (tmp_path / "all.yaml").write_text("val: [set0]\nname_mapping: {animal: car}\n")
    assert any((frame.gt_labels == cars).any() for frame in frames_of(tmp_path / "all.yaml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("val: [nowhere]", "val: found nowhere, expected a T4 data set"),
        ("version: 1", "found no splits"),
        ("val: [set0]\nname_mapping: {animal: cow}", "name_mapping: found 'cow'"),
        ("val: [set0]\nclass_ranges: {car: -1}", "class_ranges: found car: -1"),
        ("val: [set0]\nlidar: LIDAR_LEFT", "sensor.json: found"),
        ("[1, 2", "expected YAML with splits"),
        ("- a", "found list, expected splits"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(sets, tmp_path, text, words):
    shutil.copytree(sets / "set0", tmp_path / "set0")
    file = tmp_path / "all.yaml"
    file.write_text(text + "\n")
    with pytest.raises(UserError) as error:
        frames_of(file, "val")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_distorted_cameras_and_other_lidar_files_are_refused(sets, tmp_path):
    shutil.copytree(sets / "set0", tmp_path / "set0")
    folder = tmp_path / "set0" / "0" / "annotation"
    data = json.loads((folder / "sample_data.json").read_text())
    lidar = next(r for r in data if "LIDAR" in r["filename"])
    lidar["filename"] = lidar["filename"].replace(".bin", "")
    (folder / "sample_data.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"expected \.pcd\.bin"):
        frames_of(tmp_path)
    with pytest.raises(UserError, match="--version: found 'v1' with T4 data"):
        open_nuscenes(tmp_path, "v1")
    mounted = json.loads((sets / "set1" / "0" / "annotation" / "calibrated_sensor.json").read_text())
    for record in mounted:
        record["camera_distortion"] = [0.1, 0, 0, 0, 0]
    shutil.copytree(sets / "set1", tmp_path / "other" / "set1")
    (tmp_path / "other" / "set1" / "0" / "annotation" / "calibrated_sensor.json").write_text(json.dumps(mounted))
    nusc = open_nuscenes(tmp_path / "other")
    from qat.data.dataset import sensor_of

    sample = nusc.sample[0]
    with pytest.raises(UserError, match="found camera_distortion"):
        sensor_of(nusc, sample, next(name for name in sample["data"] if name.startswith("CAM")))


@pytest.mark.parametrize(
    ("category", "name"),
    [
        ("vehicle.emergency (ambulance & police)", "car"),
        ("static_object.bicycle rack", None),
        ("vehicle.bus (bendy & rigid)", "bus"),
        ("police_car", "car"),
        ("construction_worker", "pedestrian"),
        ("movable_object.debris", None),
        ("Vehicle.Truck", "truck"),
    ],
)  # fmt: skip
def test_categories_of_several_years(category, name):
    assert t4.class_of(category, t4.NAMES) == name
