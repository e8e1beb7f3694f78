"""`bevqat test`: a config's test set read as mmdet3d reads it, its metrics beside mmdet3d's own, files, speed, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lidar import CENTERPOINT, POINTPILLARS, need_mmdet3d
from mmdet3d_peer import mmdet3ds_kitti_eval, mmdet3ds_kitti_metric, mmdet3ds_nuscenes_metric, their_boxes

from qat.boxes.conventions import convert
from qat.boxes.detections import Detections
from qat.cli import main
from qat.core.errors import UserError
from qat.deploy.mmdeploy.frames import TestFrames
from qat.deploy.mmdeploy.results import read_results, write_results
from qat.deploy.mmdeploy.scoring import scorer_of
from qat.deploy.mmdeploy.testing import model_config
from qat.families.mmdet3d.config import read
from qat.families.mmdet3d.description import read_description
from qat.families.mmdet3d.infos import write_nuscenes_infos
from qat.families.mmdet3d.kitti_form import write_kitti
from qat.families.mmdet3d.metrics.kitti_annos import camera_to_lidar

need_mmdet3d()

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "example-data"
SCENES = {"synth-0007-00004": "scene-0103", "synth-0007-00005": "scene-0916"}  # of eval, and of nuScenes' mini_val
FRAMES = 8
NAMES = ["Pedestrian", "Cyclist", "Car"]
CONFIGS = "configs/mmdet3d/voxel-detection/"
DEPLOY = CONFIGS + "voxel-detection_onnxruntime_dynamic.py"


def tables(root: Path, version: str, names: dict[str, str], splits: dict[str, list[str]] | None) -> Path:
    """example-data with a version's name and scenes' names changed."""
    shutil.copytree(EXAMPLE / "v1.0-synth", root / version)
    for name in ("samples", "maps"):
        (root / name).symlink_to(EXAMPLE / name)
    scenes = json.loads((root / version / "scene.json").read_text())
    for scene in scenes:
        scene["name"] = names.get(scene["name"], scene["name"])
    (root / version / "scene.json").write_text(json.dumps(scenes))
    (root / version / "splits.json").unlink()
    if splits:
        (root / version / "splits.json").write_text(json.dumps(splits))
    return root


@pytest.fixture(scope="module")
def kitti(tmp_path_factory) -> Path:
    """Two scenes in KITTI's form."""
    root = tmp_path_factory.mktemp("kitti")
    source = tables(root / "source", "v1.0-synth", {}, {"val": list(SCENES)})
    write_kitti(source, root / "kitti")
    return root / "kitti"


@pytest.fixture(scope="module")
def nuscenes(tmp_path_factory) -> Path:
    """The same two as nuScenes' v1.0-mini, whose names the devkit knows."""
    root = tables(tmp_path_factory.mktemp("data") / "nuscenes", "v1.0-mini", SCENES, None)
    assert write_nuscenes_infos(root, root, ["mini_val"]) == [root / "nuscenes_infos_mini_val.pkl"]
    (root / "nuscenes_infos_mini_val.pkl").rename(root / "nuscenes_infos_val.pkl")
    return root


def of_kitti(kitti: Path) -> list[str]:
    return ["--cfg-options", f"test_dataloader.dataset.data_root={kitti}/"]


def of_nuscenes(root: Path) -> list[str]:
    data = "test_dataloader.dataset"
    return ["--cfg-options", f"{data}.data_root={root}/", f"{data}.ann_file=nuscenes_infos_val.pkl"]


def infos_of(path: Path) -> dict:
    return pickle.loads(path.read_bytes())


def near(boxes: np.ndarray, labels: np.ndarray, seed: int, classes: int) -> Detections:
    """Detections near most objects, a few of another class, a few of nothing; in mmdet3d's convention."""
    rng = np.random.default_rng(seed)
    kept = rng.random(len(boxes)) < 0.9
    boxes, labels = boxes[kept].astype(np.float32), labels[kept].astype(np.int64)
    boxes = boxes + rng.normal(0, 0.05, boxes.shape).astype(np.float32)
    labels = np.where(rng.random(len(labels)) < 0.05, rng.integers(0, classes, len(labels)), labels)
    false = boxes[:2] + np.float32([6.0, 3.0] + [0.0] * (boxes.shape[1] - 2))
    scores = np.concatenate([rng.uniform(0.3, 1, len(boxes)), rng.uniform(0.1, 0.6, len(false))]).astype(np.float32)
    return Detections(np.concatenate([boxes, false]), scores, np.concatenate([labels, labels[:2]]), "mmdet3d")


def kitti_found(kitti: Path) -> list[Detections]:
    infos = infos_of(kitti / "kitti_infos_val.pkl")
    categories = {label: name for name, label in infos["metainfo"]["categories"].items()}
    found = []
    for n, record in enumerate(infos["data_list"]):
        own = [one for one in record["instances"] if categories[one["bbox_label"]] in NAMES]
        boxes = np.array([one["bbox_3d"] for one in own], np.float64).reshape(-1, 7)
        boxes = camera_to_lidar(boxes, np.array(record["images"]["CAM2"]["lidar2cam"]))
        labels = np.array([NAMES.index(categories[one["bbox_label"]]) for one in own], np.int64)
        found.append(near(boxes, labels, n, 3))
    return found


def nuscenes_found(root: Path) -> list[Detections]:
    found = []
    for n, record in enumerate(infos_of(root / "nuscenes_infos_val.pkl")["data_list"]):
        boxes = np.array([one["bbox_3d"] + one["velocity"] for one in record["instances"]], np.float64).reshape(-1, 9)
        labels = np.array([one["bbox_label_3d"] for one in record["instances"]], np.int64)
        found.append(near(convert(boxes, "autoware", "mmdet3d"), labels, n, 10))
    return found


def moved(found: list[Detections], by: float) -> list[Detections]:
    shift = np.float32([by, by])
    return [
        Detections(np.concatenate([own.boxes[:, :2] + shift, own.boxes[:, 2:]], 1), own.scores, own.labels, "mmdet3d")
        for own in found
    ]


def swapped(found: list[Detections], classes: int) -> list[Detections]:
    return [Detections(own.boxes, own.scores, (own.labels + 1) % classes, "mmdet3d") for own in found]


def names_of(root: Path, file: str) -> list[str]:
    return [record.get("token", f"{record['sample_idx']:06d}") for record in infos_of(root / file)["data_list"]]


def scored(tmp_path: Path, config: Path, options: list[str], names: list[str], found: list[Detections]) -> dict:
    """The metrics that the command writes, of results in a file."""
    write_results(tmp_path / "found.pkl", names, found)
    flags = ["--model", str(tmp_path / "found.pkl"), "--json-file", str(tmp_path / "metrics.json"), *options]
    assert main(["test", DEPLOY, str(config), *flags]) == 0
    return json.loads((tmp_path / "metrics.json").read_text())


def plain(values: dict) -> dict:
    return {key: None if np.isnan(value) else value for key, value in values.items()}


def test_kitti_ap_is_mmdet3ds_and_falls_with_mistakes(kitti, tmp_path, capsys):
    found, names = kitti_found(kitti), names_of(kitti, "kitti_infos_val.pkl")
    values = scored(tmp_path, POINTPILLARS, of_kitti(kitti), names, found)
    with mmdet3ds_kitti_eval() as theirs, mmdet3ds_kitti_metric(theirs) as metric:
        own = metric(str(kitti / "kitti_infos_val.pkl"))
        own.dataset_meta = {"classes": NAMES}
        expected = own.compute_metrics(
            [{"pred_instances_3d": their_boxes(one), "sample_idx": n} for n, one in enumerate(found)]
        )
    assert list(values) == list(expected) and values == pytest.approx(plain(expected), abs=2e-4, nan_ok=True)
    key = "pred_instances_3d/KITTI/Overall_BEV_AP40_hard"
    assert values[key] > 5
    for worse in (moved(found, 1.5), swapped(found, 3), [Detections.empty()] * FRAMES):
        assert scored(tmp_path, POINTPILLARS, of_kitti(kitti), names, worse)[key] < values[key] / 3
    assert "AP40" in capsys.readouterr().out


def test_image_boxes_alone_and_limits(kitti, tmp_path):
    found, names = kitti_found(kitti), names_of(kitti, "kitti_infos_val.pkl")
    both = scored(tmp_path, POINTPILLARS, of_kitti(kitti), names, found)
    alone = scored(tmp_path, POINTPILLARS, [*of_kitti(kitti), "--metrics", "img_bbox"], names, found)
    assert alone == {key: value for key, value in both.items() if "_2D_" in key} and alone
    limits = [*of_kitti(kitti), "--metric-options", "pcd_limit_range=[0,-1,-3,5,1,0]"]
    near_only = scored(tmp_path, POINTPILLARS, limits, names, found)
    assert sum(near_only.values()) < sum(both.values()) / 2


def test_nuscenes_metrics_are_mmdet3ds_and_fall_with_mistakes(nuscenes, tmp_path):
    found, names = nuscenes_found(nuscenes), names_of(nuscenes, "nuscenes_infos_val.pkl")
    values = scored(tmp_path, CENTERPOINT, of_nuscenes(nuscenes), names, found)
    classes = list(read(CENTERPOINT).class_names)
    with mmdet3ds_nuscenes_metric() as metric:
        own = metric(str(nuscenes), str(nuscenes / "nuscenes_infos_val.pkl"))
        own.dataset_meta = {"classes": classes, "version": "v1.0-mini"}
        expected = own.compute_metrics(
            [{"pred_instances_3d": their_boxes(one, 9), "sample_idx": n} for n, one in enumerate(found)]
        )
    assert list(values) == list(expected) and len(values) == 10 * 9 + 7
    assert values == pytest.approx(plain(expected), abs=2e-4, nan_ok=True)
    key = "pred_instances_3d_NuScenes/mAP"
    assert values[key] > 0.2
    for worse in (moved(found, 4.0), swapped(found, 10), [Detections.empty()] * FRAMES):
        assert scored(tmp_path, CENTERPOINT, of_nuscenes(nuscenes), names, worse)[key] < values[key] / 3


def test_points_are_mmdet3ds_sweeps_merged(nuscenes, kitti, monkeypatch):
    """By its own data sets, of shipped configs."""
    import mmdet3d.datasets  # noqa: F401
    from mmdet3d.registry import DATASETS
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet3d")
    for name, root, index in (
        ("centerpoint_pillar02_second_secfpn_head-circlenms_8xb4-cyclic-20e_nus-3d.py", nuscenes, 2),
        ("pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py", kitti, 1),
    ):
        config = read(name)
        config.merge_from_dict({"test_dataloader.dataset.data_root": f"{root}/"})
        theirs = DATASETS.build(config.test_dataloader.dataset)
        frames = TestFrames(config)
        assert len(frames) == len(theirs) == FRAMES and frames.classes == list(theirs.metainfo["classes"])
        expected = theirs[index]["inputs"]["points"].numpy()
        np.testing.assert_array_equal(frames.points(index), expected)
        if root == nuscenes:
            assert len(set(np.round(expected[:, 4], 1))) == 3  # two keyframes before it
        view = frames.view(index)
        assert view is not None and view.image.shape[2] == 3 and view.lidar2img.shape == (4, 4)


def test_a_detector_is_run_timed_written_and_drawn(kitti, tmp_path, capsys):
    """PyTorch's, with random weights; then its results are scored again, with the same metrics."""
    flags = [*of_kitti(kitti), "test_dataloader.dataset.indices=4"]
    work = tmp_path / "work"
    more = ["--out", str(tmp_path / "out.pkl"), "--work-dir", str(work), "--speed-test", "--warmup", "1"]
    more += ["--log-interval", "2", "--log2file", str(tmp_path / "log.txt"), "--batch-size", "2"]
    more += ["--show", "--show-dir", str(tmp_path / "pictures"), "--show-score-thr", "0.1", "--interval", "2"]
    more += ["--json", str(tmp_path / "result.json"), "--device", "cpu"]
    assert main(["test", DEPLOY, str(POINTPILLARS), "--model", "random:3", *flags, *more]) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["frames"] == 4 and result["boxes"] > 4
    assert set(result["speed_ms"]) == {"voxelize", "network", "post", "total"} and min(result["speed_ms"].values()) > 0
    assert "2 of 4 frames: voxelize" in shown and "medians of 4 frames after 1 to warm up, batch size 2" in shown
    assert all(line in shown for line in (tmp_path / "log.txt").read_text().splitlines())
    assert result["metrics"] == json.loads((work / "metrics.json").read_text()) and len(result["metrics"]) > 100
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["000000.png", "000002.png"]
    again = ["--model", str(tmp_path / "out.pkl"), "--json-file", str(tmp_path / "again.json")]
    assert main(["test", DEPLOY, str(POINTPILLARS), *again, *flags]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == result["metrics"]


def test_a_config_changed_by_options_changes_the_detector(kitti, tmp_path):
    def boxes(*options: str) -> int:
        flags = ["--model", "random", "--format-only", "--work-dir", str(tmp_path), "--json", str(tmp_path / "r.json")]
        data = [*of_kitti(kitti), "test_dataloader.dataset.indices=1", *options]
        assert main(["test", DEPLOY, str(POINTPILLARS), *flags, *data]) == 0
        return json.loads((tmp_path / "r.json").read_text())["boxes"]

    assert boxes("model.test_cfg.max_num=7") == 7 < boxes()


def test_options_change_nothing_else():
    """Nor the order of maps, and with it random weights."""
    with model_config(str(CENTERPOINT), {"test_dataloader.dataset.indices": 4}) as (config, path):
        assert config.test_dataloader.dataset.indices == 4
        assert read_description(path, "centerpoint") == read_description(CENTERPOINT, "centerpoint")
        before, after = (read(own).model.to_dict() for own in (CENTERPOINT, path))
        assert repr(before) == repr(after)


def test_forms_of_the_data_sets(kitti, nuscenes, tmp_path):
    """Written and not scored; what the peers' own readers make of them."""
    found, names = kitti_found(kitti), names_of(kitti, "kitti_infos_val.pkl")
    write_results(tmp_path / "k.pkl", names, found)
    prefixes = ["--metric-options", f"pklfile_prefix={tmp_path}/annos", f"submission_prefix={tmp_path}/labels"]
    flags = ["--model", str(tmp_path / "k.pkl"), *of_kitti(kitti)]
    assert main(["test", DEPLOY, str(POINTPILLARS), *flags, "--format-only", *prefixes]) == 0
    annos = pickle.loads((tmp_path / "annos" / "pred_instances_3d.pkl").read_bytes())
    label = (tmp_path / "labels" / "pred_instances_3d" / f"{names[0]}.txt").read_text().splitlines()
    assert len(label) == len(annos[0]["name"]) > 0 and all(len(line.split()) == 16 for line in label)
    with mmdet3ds_kitti_eval() as theirs, mmdet3ds_kitti_metric(theirs) as metric:
        own = metric(str(kitti / "kitti_infos_val.pkl"))
        own.data_infos = infos_of(kitti / "kitti_infos_val.pkl")["data_list"]
        own.bbox2result_kitti([their_boxes(one) for one in found], range(FRAMES), NAMES, None, str(tmp_path / "theirs"))
    expected = (tmp_path / "theirs" / f"{names[0]}.txt").read_text().splitlines()
    for ours, line in zip(label, expected, strict=True):
        assert ours.split()[0] == line.split()[0]
        assert list(map(float, ours.split()[1:])) == pytest.approx(list(map(float, line.split()[1:])), abs=0.02)
    found, names = nuscenes_found(nuscenes), names_of(nuscenes, "nuscenes_infos_val.pkl")
    write_results(tmp_path / "n.pkl", names, found)
    flags = ["--model", str(tmp_path / "n.pkl"), "--work-dir", str(tmp_path / "w"), *of_nuscenes(nuscenes)]
    assert main(["test", DEPLOY, str(CENTERPOINT), *flags, "--format-only"]) == 0
    from nuscenes.eval.common.loaders import load_prediction
    from nuscenes.eval.detection.data_classes import DetectionBox

    path = tmp_path / "w" / "results" / "pred_instances_3d" / "results_nusc.json"
    boxes, meta = load_prediction(str(path), 500, DetectionBox)
    assert boxes.sample_tokens == names and meta["use_lidar"] and not meta["use_camera"]
    assert not (tmp_path / "w" / "metrics.json").exists()


def metrics_of(path: Path, words: list[str]) -> dict:
    assert main(["test", *words, "--json-file", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("deploy", "file"),
    [
        ("voxel-detection_onnxruntime_dynamic.py", "end2end.onnx"),
        ("voxel-detection_openvino_dynamic-kitti-32x4.py", "end2end.xml"),
    ],
)
def test_a_deployed_file_scores_as_pytorch(kitti, tmp_path, deploy, file):
    cloud = str(kitti / "training" / "velodyne_reduced" / "000000.bin")
    config, work = [CONFIGS + deploy, str(POINTPILLARS)], tmp_path / "work"
    assert main(["deploy", *config, "random:5", cloud, "--work-dir", str(work)]) == 0
    data = [*of_kitti(kitti), "--metrics", "bbox", "--out", str(tmp_path / "out.pkl")]
    built = metrics_of(tmp_path / "built.json", [*config, "--model", str(work / file), *data])
    found = pickle.loads((tmp_path / "out.pkl").read_bytes())
    torch = metrics_of(tmp_path / "torch.json", [*config, "--model", "random:5", *data])
    assert built == pytest.approx(torch, abs=1e-3)
    for ours, own in zip(found, pickle.loads((tmp_path / "out.pkl").read_bytes()), strict=True):
        ours, own = ours["pred_instances_3d"], own["pred_instances_3d"]
        assert len(own["scores_3d"]) > 5
        np.testing.assert_allclose(ours["scores_3d"], own["scores_3d"], atol=1e-4)
        np.testing.assert_allclose(ours["bboxes_3d"], own["bboxes_3d"], atol=1e-3, rtol=1e-3)


def test_a_deploy_config_that_is_none_is_refused(kitti, capsys):
    """Also with a checkpoint, which needs none of it."""
    for config, words in (
        ("nowhere.py", "nowhere.py: found no such file"),
        (str(POINTPILLARS), "codebase_config: type"),
    ):
        assert main(["test", config, str(POINTPILLARS), "--model", "random", *of_kitti(kitti)]) == 2
        assert words in capsys.readouterr().err


def test_files_of_another_backend_are_refused(kitti, tmp_path, capsys):
    (tmp_path / "end2end.onnx").write_bytes(b"no graph")
    model = ["--model", str(tmp_path / "end2end.onnx"), *of_kitti(kitti)]
    assert main(["test", CONFIGS + "voxel-detection_openvino_dynamic-kitti-32x4.py", str(POINTPILLARS), *model]) == 2
    assert "expected one .xml for openvino" in capsys.readouterr().err
    assert main(["test", DEPLOY, str(POINTPILLARS), *model]) == 2
    error = capsys.readouterr().err
    assert "end2end.onnx" in error and error.count("\n") == 1


@pytest.mark.nightly
def test_the_tutorials_line(nuscenes, tmp_path, monkeypatch):
    """mmdet3d's deployment tutorial: CenterPoint at its full size on ONNX Runtime, the names of configs as there."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "nuscenes").symlink_to(nuscenes)
    monkeypatch.chdir(tmp_path)
    model = "configs/centerpoint/centerpoint_02pillar_second_secfpn_circlenms_4x8_cyclic_20e_nus.py"
    config = [DEPLOY, model]
    cloud = str(next((nuscenes / "samples" / "LIDAR_TOP").iterdir()))
    assert main(["deploy", *config, "random", cloud, "--work-dir", "work-dir"]) == 0
    words = [*config, "--model", "work-dir/end2end.onnx", "--metrics", "bbox", "--device", "cpu"]
    built = metrics_of(tmp_path / "built.json", words)
    torch = metrics_of(tmp_path / "torch.json", [*config, "--model", "random", "--metrics", "bbox"])
    key = "pred_instances_3d_NuScenes/NDS"
    assert built[key] == pytest.approx(torch[key], abs=1e-3) and len(built) == 97


def damaged(entries: list[dict], field: str, value: object) -> list[dict]:
    entries[1]["pred_instances_3d"][field] = value
    return entries


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e[:-1], "found results of 1 frames, expected 2"),
        (lambda e: e[::-1], "frame a: found 'b', expected this frame"),
        (lambda e: {"results": e}, "found a dict, expected a list"),
        (lambda e: damaged(e, "bboxes_3d", np.zeros((2, 6))), "found shapes [2, 6], [1], [1]"),
        (lambda e: damaged(e, "bboxes_3d", np.full((1, 7), np.nan)), "frame b: found NaN or infinity"),
        (lambda e: damaged(e, "labels_3d", np.array([3])), "labels_3d: found int64 up to 3, expected integers below 3"),
        (lambda e: damaged(e, "labels_3d", np.array([-1])), "expected integers below 3"),
        (lambda e: damaged(e, "scores_3d", ["0.5"]), "scores_3d: found list, expected an array of numbers"),
        (lambda e: damaged(e, "scores_3d", None), "scores_3d: found NoneType"),
    ],
)
def test_damaged_results_are_refused(tmp_path, change, words):
    one = Detections(np.zeros((1, 7), np.float32), np.float32([0.5]), np.array([0]), "mmdet3d")
    write_results(tmp_path / "r.pkl", ["a", "b"], [one, one])
    assert [len(own) for own in read_results(tmp_path / "r.pkl", ["a", "b"], NAMES)] == [1, 1]
    entries = pickle.loads((tmp_path / "r.pkl").read_bytes())
    (tmp_path / "r.pkl").write_bytes(pickle.dumps(change(entries)))
    with pytest.raises(UserError) as caught:
        read_results(tmp_path / "r.pkl", ["a", "b"], NAMES)
    assert words in str(caught.value)


def test_results_that_would_run_something_do_not(tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harmed",))

    (tmp_path / "r.pkl").write_bytes(pickle.dumps([Harm()]))
    with pytest.raises(UserError, match="expected a list of results"):
        read_results(tmp_path / "r.pkl", ["a"], NAMES)
    for content in (b"", b"no pickle", pickle.dumps([1, 2])[:-3]):
        (tmp_path / "r.pkl").write_bytes(content)
        with pytest.raises(UserError, match=r"r\.pkl: found no readable pickle"):
            read_results(tmp_path / "r.pkl", ["a"], NAMES)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--show-score-thr", "0.2"], "--show-score-thr only applies with --show or --show-dir"),
        (["--interval", "2"], "--interval only applies with --show or --show-dir"),
        (["--warmup", "2"], "--warmup only applies with --speed-test"),
        (["--speed-test", "--warmup", "-1"], "--warmup: found -1, expected 0 or more"),
        (["--log-interval", "2"], "--log-interval only applies with --speed-test"),
        (["--out", "found.json"], "--out: found found.json, expected a file that ends in .pkl"),
        (["--format-only", "--metrics", "bbox"], "--metrics: found with --format-only"),
        (["--metrics", "segm"], "--metrics: found segm, expected some of bbox, img_bbox, mAP of KittiMetric"),
        (["--metric-options", "jsonfile_prefix=x"], "--metric-options: found jsonfile_prefix, expected some of pcd_limit_range"),
        (["--metric-options", "x"], "--metric-options: found 'x', expected key=value"),
        (["--metric-options", "pcd_limit_range=[1,2]"], "pcd_limit_range: found [1, 2], expected six numbers"),
        (["--model", "a.pkl", "--speed-test"], "a.pkl: found results with a flag of a detector"),
        (["--model", "random:x"], "CKPT: found 'random:x'"),
    ],
)  # fmt: skip
def test_contradictions_are_one_line(kitti, capsys, flags, words):
    start = ["test", DEPLOY, str(POINTPILLARS), "--model", "random", *of_kitti(kitti)]
    assert main([*start, *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize("flag", [["--uri", "10.1.1.1:60000"], ["--wait-time", "2"]])
def test_flags_without_a_meaning_are_refused_by_name(capsys, flag):
    assert main(["test", DEPLOY, str(POINTPILLARS), "--model", "random", *flag]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flag[0]} ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["test_dataloader.dataset.data_root=nowhere/"], "ann_file: found nowhere/kitti_infos_val.pkl, which is not on this disk"),
        (["test_dataloader.dataset.indices=99"], "indices: found 99, expected numbers of its 8 frames"),
        (["test_evaluator.type=WaymoMetric"], "test_evaluator: found WaymoMetric, expected KittiMetric or NuScenesMetric"),
        (["test_dataloader.dataset.data_prefix.pts=training/velodyne_other"], "velodyne_other/000000.bin: No such file"),
        (["test_dataloader.dataset.metainfo.classes=[Pedestrian,Cyclist,Bus]"], "metainfo.classes: found Bus"),
        (["test_dataloader.dataset.metainfo.classes=[Car,Cyclist]"], "metainfo.classes: found Car, Cyclist, expected the model's 3"),
    ],
)  # fmt: skip
def test_data_sets_that_do_not_fit_are_one_line(kitti, capsys, options, words):
    assert main(["test", DEPLOY, str(POINTPILLARS), "--model", "random", *of_kitti(kitti), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_an_evaluator_of_another_file_is_said(kitti, capsys):
    config = read(POINTPILLARS)
    config.merge_from_dict({"test_dataloader.dataset.data_root": f"{kitti}/"})
    frames = TestFrames(config)
    evaluator = {"type": "KittiMetric", "ann_file": "elsewhere.pkl", "metric": ["img_bbox"], "format_only": True}
    scorer, format_only = scorer_of(frames, evaluator, None, {})
    assert scorer.metrics == ["img_bbox"] and format_only
    assert "test_evaluator: ann_file: elsewhere.pkl is not read" in capsys.readouterr().err
    scorer_of(frames, {**evaluator, "ann_file": str(kitti / "kitti_infos_val.pkl")}, None, {})
    assert capsys.readouterr().err == ""


def test_infos_of_other_tables_are_refused(nuscenes, tmp_path, capsys):
    other = tables(tmp_path / "other", "v1.0-mini", {}, None)
    infos = infos_of(nuscenes / "nuscenes_infos_val.pkl")
    infos["data_list"][1]["token"] = "f" * 32
    (other / "nuscenes_infos_val.pkl").write_bytes(pickle.dumps(infos))
    assert main(["test", DEPLOY, str(CENTERPOINT), "--model", "random", *of_nuscenes(other)]) == 2
    assert f"found the token '{'f' * 32}', expected one of" in capsys.readouterr().err


def test_large_infos_are_read_and_bombs_are_not(tmp_path, monkeypatch):
    """nuScenes' own have more numbers than a checkpoint may; copies of one list beyond the file's length stay refused."""
    import qat.checkpoints.unpickle as unpickle
    from qat.families.mmdet3d.inputs import read_infos

    monkeypatch.setattr(unpickle, "MAX_OPCODES", 1000)
    path = tmp_path / "infos.pkl"
    path.write_bytes(pickle.dumps({"data_list": [{"values": [float(n) for n in range(5000)]}]}))
    assert read_infos(path)[0]["values"][-1] == 4999
    # Each tuple of the list again is a copy that no byte stands for.
    bomb = b"]" + b"q\x00" + b"(" + b"K\x01" * 900 + b"e" + b"0" + b"h\x00cbuiltins\ntuple\nq\x01"
    calls = b"".join(b"h\x01h\x00\x85R0" for _ in range(200))
    path.write_bytes(b"\x80\x02" + bomb + calls + b".")
    with pytest.raises(UserError, match="no readable pickle"):
        read_infos(path)


def test_the_launcher_is_the_verb():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "test.py"), "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0 and "bevqat test" in done.stdout and "--speed-test" in done.stdout
