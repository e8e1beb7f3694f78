"""Info files of generated data: read by mmdet3d's own data sets, beside its own converters and our own reading."""

from __future__ import annotations

import importlib.util
import pickle
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from qat.boxes.conventions import convert
from qat.boxes.detections import Detections
from qat.core.errors import UserError
from qat.core.preprocess import ResizeCrop
from qat.data.dataset import NuScenesDataset
from qat.data.reading import Pipeline, Reading
from qat.families.mmdet3d.infos import CLASSES, nuscenes_info, open_nuscenes, write_nuscenes_infos
from qat.families.mmdet3d.kitti_form import CATEGORIES, NAMES, difficulty, write_kitti
from qat.families.mmdet3d.metrics.kitti_annos import kitti_metric, truth_annos

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "example-data"
SCENE = 4  # keyframes of the first scene, which the comparisons take


@pytest.fixture(scope="module")
def mmdet3d():
    """mmdet3d's folder, its data sets ready to be built."""
    spec = importlib.util.find_spec("mmdet3d")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("mmdet3d is not installed")
    import qat.lean._torchvision  # noqa: F401
    from qat.families.mmdet3d import ops

    ops.install()
    import mmdet3d.datasets  # noqa: F401
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet3d")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    """example-data with one split of its first calib scene."""
    root = tmp_path_factory.mktemp("data") / "scene"
    shutil.copytree(EXAMPLE / "v1.0-synth", root / "v1.0-synth")
    for name in ("samples", "maps"):
        (root / name).symlink_to(EXAMPLE / name)
    (root / "v1.0-synth" / "splits.json").write_text('{"one": ["synth-0007-00000"]}')
    return root


@pytest.fixture(scope="module")
def infos(scene, tmp_path_factory) -> Path:
    (path,) = write_nuscenes_infos(scene, tmp_path_factory.mktemp("infos"))
    assert path.name == "nuscenes_infos_one.pkl"
    return path


@pytest.fixture(scope="module")
def kitti(scene, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("kitti") / "kitti"
    assert write_kitti(scene, out) == [out / "kitti_infos_one.pkl"]
    return out


@pytest.fixture(scope="module")
def own(scene) -> NuScenesDataset:
    """Our own reading, without sweeps."""
    cameras = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
    return NuScenesDataset(
        scene, "one", Reading(Pipeline(ResizeCrop((64, 96), 0.25), [0] * 3, [1] * 3), list(CLASSES), cameras)
    )


def nuscenes_pipeline(*more: dict) -> list[dict]:
    load = {"type": "LoadPointsFromFile", "coord_type": "LIDAR", "load_dim": 5, "use_dim": 5}
    annotate = {"type": "LoadAnnotations3D", "with_bbox_3d": True, "with_label_3d": True}
    pack = {"type": "Pack3DDetInputs", "keys": ["points", "gt_bboxes_3d", "gt_labels_3d"]}
    return [load, *more, annotate, pack]


PREFIX = {"pts": "samples/LIDAR_TOP", "sweeps": "sweeps/LIDAR_TOP"}


def test_mmdet3ds_nuscenes_data_set_reads_our_points_and_boxes(mmdet3d, scene, infos, own):
    from mmdet3d.datasets import NuScenesDataset as Theirs

    dataset = Theirs(
        str(scene), str(infos), data_prefix=dict(PREFIX), pipeline=nuscenes_pipeline(), filter_empty_gt=False
    )
    assert len(dataset) == len(own) == SCENE and dataset.metainfo["classes"] == CLASSES
    for index in range(SCENE):
        frame, expected = dataset[index], own.read(own.tokens[index])
        points = frame["inputs"]["points"].numpy()
        assert points[:, :4].tobytes() == expected.points[:, :4].tobytes()
        truth = frame["data_samples"].gt_instances_3d
        with_points = expected.gt_points > 0
        boxes = convert(expected.gt_boxes, "bevfusion", "mmdet3d")[with_points]
        found = truth.bboxes_3d.tensor.numpy()
        turn = (found[:, 6] - boxes[:, 6] + np.pi) % (2 * np.pi) - np.pi
        assert np.delete(found, 6, 1) == pytest.approx(np.delete(boxes, 6, 1), abs=1e-4) and turn == pytest.approx(
            0, abs=1e-5
        )
        assert truth.labels_3d.tolist() == expected.gt_labels[with_points].tolist()
        assert len(boxes) > 5


def test_mmdet3d_reads_sweeps_and_pictures(mmdet3d, scene, infos, own):
    from mmdet3d.datasets import NuScenesDataset as Theirs

    sweeps = {"type": "LoadPointsFromMultiSweeps", "sweeps_num": 10, "use_dim": [0, 1, 2, 3, 4], "test_mode": True}
    pictures = {"type": "LoadMultiViewImageFromFiles", "to_float32": True, "num_views": 6, "color_type": "color"}
    pipeline = nuscenes_pipeline(sweeps)[:2] + [pictures]
    cameras = {name: f"samples/{name}" for name in own.cameras}
    dataset = Theirs(
        str(scene), str(infos), data_prefix=PREFIX | cameras, pipeline=pipeline, test_mode=True,
        modality={"use_lidar": True, "use_camera": True},
    )  # fmt: skip
    frame = dataset[2]
    points = frame["points"].tensor.numpy()
    assert sorted(set(np.round(points[:, 4], 2).tolist())) == [0.0, 0.5, 1.0]  # two keyframes before it
    assert len(frame["img"]) == 6 and frame["img"][0].shape == (225, 400, 3)
    expected = own.read(own.tokens[2])
    for name, matrix in zip(expected.cameras, expected.lidar2image, strict=True):
        i = list(frame["images"]).index(name)
        assert np.asarray(frame["lidar2cam"][i]) == pytest.approx(
            np.linalg.inv(expected.camera2lidar[expected.cameras.index(name)]), abs=1e-4
        )
        seen = np.eye(4)
        seen[:3, :3] = np.asarray(frame["cam2img"][i])[:3, :3]
        assert seen @ np.asarray(frame["lidar2cam"][i]) == pytest.approx(matrix, abs=1e-2)


def test_infos_are_those_of_mmdet3ds_own_converter(mmdet3d, scene, infos, monkeypatch):
    """Its two steps: infos of version 1 from the tables, then of version 2, with its own opening of the data set replaced by ours."""
    nusc = open_nuscenes(scene)
    converter = theirs(mmdet3d, "nuscenes_converter")
    scenes = [record["token"] for record in nusc.scene if record["name"] == "synth-0007-00000"]
    nusc.sample = [record for record in nusc.sample if record["scene_token"] in scenes]
    first, _ = converter._fill_trainval_infos(nusc, scenes, [], max_sweeps=10)
    update = theirs(mmdet3d, "update_infos_to_v2")
    monkeypatch.setattr(update, "NuScenes", lambda **_: nusc)
    folder = infos.parent / "theirs"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "infos.pkl").write_bytes(pickle.dumps({"infos": first, "metadata": {"version": "v1.0-synth"}}))
    update.update_nuscenes_infos(str(folder / "in" / "infos.pkl"), str(folder))
    expected = pickle.loads((folder / "infos.pkl").read_bytes())
    ours = pickle.loads(infos.read_bytes())
    assert ours["metainfo"] == expected["metainfo"] and len(ours["data_list"]) == SCENE
    for mine, other in zip(ours["data_list"], expected["data_list"], strict=True):
        seen, others = mine.pop("cam_instances"), other.pop("cam_instances")
        for sweep, theirs_ in zip(mine.get("lidar_sweeps", []), other.get("lidar_sweeps", []), strict=True):
            name = theirs_["lidar_points"]["lidar_path"]
            assert name.endswith(sweep["lidar_points"]["lidar_path"])
            sweep["lidar_points"]["lidar_path"] = name
        same(mine, other, "info")
        compared = 0
        for name, found in seen.items():
            for box in found:
                near = [o for o in others[name] if np.allclose(o["bbox_3d"][:3], box["bbox_3d"][:3], atol=1e-3)]
                assert len(near) == 1
                left, top, right, bottom = box["bbox"]
                # mmdet3d takes pictures for 1600×900, and of a box that reaches behind a camera only the corners ahead of it.
                if box["depth"] > 10 and left > 0 and top > 0 and right < 400 and bottom < 225:
                    same(box, near[0], name, 2e-3)
                    compared += 1
        assert compared > 10


def same(mine, other, where: str, tolerance: float = 1e-4) -> None:
    """Equal keys and values, down to the numbers. (None and NaN: of what mmdet3d does not know.)"""
    if isinstance(other, dict):
        other = {key: value for key, value in other.items() if value is not None}
        assert set(mine) == set(other), where
        for key, value in other.items():
            same(mine[key], value, f"{where}.{key}", tolerance)
    elif isinstance(other, (list, tuple, np.ndarray)):
        assert len(mine) == len(other), where
        if where.endswith("bbox_3d"):
            turn = (mine[6] - other[6] + np.pi) % (2 * np.pi) - np.pi
            assert abs(turn) < tolerance and mine[:6] == pytest.approx(list(other[:6]), abs=tolerance), where
            return
        for i, value in enumerate(other):
            same(mine[i], value, f"{where}[{i}]" if isinstance(value, dict) else where, tolerance)
    elif isinstance(other, float):
        assert mine == pytest.approx(0.0 if np.isnan(other) else other, abs=tolerance, rel=1e-6), where
    else:
        assert mine == other, where


def theirs(mmdet3d: Path, name: str) -> ModuleType:
    """A converter that mmdet3d's wheel ships, and that is no module of a package. scikit-image's reader is Pillow's."""
    pictures = ModuleType("skimage")
    pictures.io = ModuleType("skimage.io")
    from PIL import Image

    pictures.io.imread = lambda path: np.asarray(Image.open(path))
    spec = importlib.util.spec_from_file_location(
        f"their_{name}", mmdet3d / ".mim/tools/dataset_converters" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "skimage", pictures)
        patch.setitem(sys.modules, "skimage.io", pictures.io)
        spec.loader.exec_module(module)
    return module


def test_mmdet3ds_kitti_data_set_reads_our_points_and_boxes(mmdet3d, kitti, own):
    from mmdet3d.datasets import KittiDataset

    load = {"type": "LoadPointsFromFile", "coord_type": "LIDAR", "load_dim": 4, "use_dim": 4}
    pipeline = [load, *nuscenes_pipeline()[1:]]
    dataset = KittiDataset(
        str(kitti),
        "kitti_infos_one.pkl",
        data_prefix={"pts": "training/velodyne"},
        pipeline=pipeline,
        filter_empty_gt=False,
    )
    records = pickle.loads((kitti / "kitti_infos_one.pkl").read_bytes())["data_list"]
    assert len(dataset) == SCENE and dataset.metainfo["classes"] == CATEGORIES
    for index in range(SCENE):
        frame, expected = dataset[index], own.read(own.tokens[index])
        forward = expected.camera2lidar[0, :3, 2]  # of CAM_FRONT
        turn = -np.arctan2(forward[1], forward[0])
        cos, sin = np.cos(turn), np.sin(turn)
        rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        points = frame["inputs"]["points"].numpy()
        assert points[:, :3] == pytest.approx(expected.points[:, :3] @ rotation.T, abs=1e-4)
        assert points[:, 3] == pytest.approx(expected.points[:, 3] / 255) and points[:, 3].max() <= 1
        truth = frame["data_samples"].gt_instances_3d
        found = truth.bboxes_3d.tensor.numpy()
        boxes = convert(expected.gt_boxes, "bevfusion", "mmdet3d")
        centres = boxes[:, :3] @ rotation.T
        assert len(found) == sum(record["bbox_label"] >= 0 for record in records[index]["instances"]) > 0
        for box, label in zip(found, truth.labels_3d.tolist(), strict=True):
            (i,) = np.flatnonzero(np.abs(centres - box[:3]).max(1) < 0.01)
            assert box[3:6] == pytest.approx(boxes[i, 3:6], abs=1e-3)
            assert abs((box[6] - boxes[i, 6] - turn + np.pi) % (2 * np.pi) - np.pi) < 1e-3
            assert CATEGORIES[label] == NAMES[CLASSES[expected.gt_labels[i]]]
        reduced = np.fromfile(kitti / "training/velodyne_reduced" / f"{index:06d}.bin", np.float32).reshape(-1, 4)
        assert 50 < len(reduced) < len(points) / 3 and (reduced[:, 0] > 0).all()


def test_kitti_infos_are_those_of_mmdet3ds_own_converter_on_the_written_folder(mmdet3d, kitti, tmp_path, monkeypatch):
    read = theirs(mmdet3d, "kitti_data_utils")
    ids = [int(line) for line in (kitti / "ImageSets/one.txt").read_text().split()]
    first = read.get_kitti_image_info(kitti, training=True, velodyne=True, calib=True, image_ids=ids, num_worker=1)
    ours = pickle.loads((kitti / "kitti_infos_one.pkl").read_bytes())
    for info, record in zip(first, ours["data_list"], strict=True):  # counted in compiled code there
        info["annos"]["num_points_in_gt"] = np.array([found["num_lidar_pts"] for found in record["instances"]])
    update = theirs(mmdet3d, "update_infos_to_v2")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "infos.pkl").write_bytes(pickle.dumps(first))
    monkeypatch.setattr(update.time, "sleep", lambda _: None)
    update.update_kitti_infos(str(tmp_path / "in" / "infos.pkl"), str(tmp_path))
    expected = pickle.loads((tmp_path / "infos.pkl").read_bytes())
    assert {**expected["metainfo"]["categories"], "DontCare": -1} == ours["metainfo"]["categories"]
    for mine, other in zip(ours["data_list"], expected["data_list"], strict=True):
        (seen,), (others,) = mine.pop("cam_instances").values(), other.pop("cam_instances").values()
        for instance in [*mine["instances"], *other["instances"]]:
            if instance["bbox_label"] < 0:  # DontCare has no place
                instance["center_2d"] = instance["depth"] = 0.0
        same(mine, other, "info", 1e-3)
        assert [box["bbox_label"] for box in seen] == [box["bbox_label"] for box in others]
        for a, b in zip(seen, others, strict=True):
            assert set(a) == set(b) and a["bbox_3d"] == pytest.approx(b["bbox_3d"], abs=1e-3)
            assert (
                a["bbox"] == pytest.approx(b["bbox"], abs=1.0) or a["depth"] < 15
            )  # near boxes have corners behind the camera


def test_points_in_labelled_boxes_are_counted_in_the_image(kitti):
    record = pickle.loads((kitti / "kitti_infos_one.pkl").read_bytes())["data_list"][0]
    points = np.fromfile(kitti / "training/velodyne_reduced/000000.bin", np.float32).reshape(-1, 4)
    matrix = np.array(record["images"]["CAM2"]["lidar2cam"])
    local = points[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]
    pixels = local @ np.array(record["images"]["CAM2"]["cam2img"])[:3, :3].T
    pixels = pixels[:, :2] / pixels[:, 2:]
    counted = 0
    for found in record["instances"]:
        if found["bbox_label"] >= 0:
            x, y, z, length, height, width, turn = found["bbox_3d"]
            cos, sin = np.cos(turn), np.sin(turn)
            own = (local - [x, y - height / 2, z]) @ np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
            inside, surely = (
                (np.abs(own) <= np.array([length, height, width]) / 2 + by).all(1) for by in (0.01, -0.01)
            )
            assert surely.sum() <= found["num_lidar_pts"] <= inside.sum()  # points lie on the faces
            left, top, right, bottom = found["bbox"]
            of_box = pixels[inside]
            assert ((of_box >= [left - 0.5, top - 0.5]) & (of_box <= [right + 0.5, bottom + 0.5])).all()
            counted += int(inside.sum())
    assert counted > 20


def test_true_boxes_in_the_lidars_frame_score_100(kitti):
    """Detector's boxes, as KittiDataset hands out the labels, through the metric: every object of a difficulty is found."""
    from qat.families.mmdet3d.metrics.kitti_annos import camera_to_lidar

    infos = pickle.loads((kitti / "kitti_infos_one.pkl").read_bytes())
    names = ("Pedestrian", "Cyclist", "Car")
    found, found_moved = [], []
    for record, anno in zip(infos["data_list"], truth_annos(infos), strict=True):
        kept = np.isin(anno["name"], names)
        boxes = np.concatenate([anno["location"], anno["dimensions"], anno["rotation_y"][:, None]], 1)[kept]
        lidar = camera_to_lidar(boxes.astype(np.float32), np.array(record["images"]["CAM2"]["lidar2cam"]))
        labels = np.array([names.index(name) for name in anno["name"][kept]], np.int64)
        scores = np.linspace(0.9, 0.5, len(labels), dtype=np.float32)
        found.append(Detections(lidar, scores, labels, "mmdet3d"))
        found_moved.append(Detections(lidar + np.float32([0, 0.5, 0, 0, 0, 0, 0]), scores, labels, "mmdet3d"))
    _, values = kitti_metric(infos, found, names)
    _, moved = kitti_metric(infos, found_moved, names)
    key = "pred_instances_3d/KITTI/Car_3D_AP11_hard_strict"
    assert values[key] > 0 and moved[key] < values[key]
    assert values[key] == values["pred_instances_3d/KITTI/Car_BEV_AP11_hard_strict"]


@pytest.mark.parametrize(
    ("height", "occluded", "truncated", "expected"),
    [
        (41, 0, 0.15, 0),
        (40, 0, 0.0, 1),
        (41, 1, 0.3, 1),
        (26, 2, 0.5, 2),
        (25, 0, 0.0, -1),
        (99, 3, 0.0, -1),
        (99, 0, 0.51, -1),
    ],
)
def test_difficulty_is_kittis(height, occluded, truncated, expected):
    assert difficulty(height, occluded, truncated) == expected


def test_infos_say_nothing_but_plain_values(infos, kitti):
    import pickletools

    for path in (infos, kitti / "kitti_infos_one.pkl"):
        names = {code.name for code, _, _ in pickletools.genops(path.read_bytes())}
        assert not names & {"GLOBAL", "STACK_GLOBAL", "REDUCE", "INST", "OBJ", "NEWOBJ"}


def test_bad_input_is_refused_in_one_line(scene, kitti, tmp_path):
    for call, says in (
        (lambda: write_nuscenes_infos(tmp_path / "none", tmp_path), "no such folder"),
        (lambda: write_nuscenes_infos(scene, tmp_path, ["train2"]), "split 'train2' not found"),
        (lambda: write_kitti(scene, kitti), "found something there, expected no such folder"),
        (lambda: write_kitti(scene, tmp_path / "k", camera="CAM_TOP"), "has no CAM_TOP"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "k").exists()


def test_a_table_without_a_pictures_size_is_refused_in_one_line(scene, own):
    nusc = open_nuscenes(scene)
    record = nusc.get("sample_data", nusc.get("sample", own.tokens[0])["data"]["CAM_BACK"])
    record["width"] = None
    with pytest.raises(UserError, match=r"sample_data.json: \w+: found width and height \(None, 225\), expected"):
        nuscenes_info(nusc, own.tokens[0], 0)


def test_a_box_that_nobody_turned_the_right_way_is_seen(scene, own):
    """Control: lengths and widths exchanged, or a yaw of another convention, differ from what is written."""
    record = nuscenes_info(open_nuscenes(scene), own.tokens[0], 0)
    boxes = np.array([instance["bbox_3d"] for instance in record["instances"]])
    wrong = own.read(own.tokens[0]).gt_boxes
    assert np.abs(boxes[:, 3:5] - wrong[:, 3:5]).max() > 1 and np.abs(boxes[:, 6] - wrong[:, 6]).max() > 1


def test_the_verb_writes_both_forms_and_says_where(scene, infos, tmp_path, capsys):
    import json

    from qat.cli import main

    given = ["infos", "--data", str(scene), "--out"]
    assert (
        main([*given, str(tmp_path / "n"), "--form", "nuscenes", "--split", "one", "--json", str(tmp_path / "n.json")])
        == 0
    )
    written = tmp_path / "n" / "nuscenes_infos_one.pkl"
    assert written.read_bytes() == infos.read_bytes()
    assert capsys.readouterr().out.splitlines()[0] == str(written)
    assert json.loads((tmp_path / "n.json").read_text()) == {
        "out": str(tmp_path / "n"),
        "form": "nuscenes",
        "infos": [str(written)],
    }
    assert main([*given, str(tmp_path / "k"), "--form", "kitti", "--camera", "CAM_BACK"]) == 0
    assert len(list((tmp_path / "k/training/label_2").glob("*.txt"))) == SCENE
    capsys.readouterr()
    assert main([*given, str(tmp_path / "m"), "--form", "nuscenes", "--camera", "CAM_BACK"]) == 2
    assert capsys.readouterr().err.startswith("error: --camera only applies to --form kitti")
    assert main([*given, str(tmp_path / "k"), "--form", "kitti"]) == 2
    assert "found something there" in capsys.readouterr().err
