"""`bevqat synth --format kitti`: KITTI's rig, its folder, the same bytes again, and objects where the points are."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qat.cli import main
from qat.data.synth import SynthOptions
from qat.families.mmdet3d.kitti_form import generate_kitti
from qat.families.mmdet3d.metrics.kitti_annos import camera_to_lidar, truth_annos
from qat.families.mmdet3d.ops.points import points_in_boxes

GIVEN = "--format kitti --scenes 2 --keyframes 2 --seed 5 --azimuths 360 --native 414x125 --splits train=1,val=1 --workers 1"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "kitti"
    note = out.with_name("note.json")
    assert main(["synth", "--out", str(out), *GIVEN.split(), "--json", str(note)]) == 0
    assert json.loads(note.read_text()) == {"out": str(out), "scenes": 2, "keyframes": 4}
    return out


def hashes(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def infos_of(root: Path, split: str) -> dict:
    return pickle.loads((root / f"kitti_infos_{split}.pkl").read_bytes())


def test_the_folder_is_kittis_and_nothing_is_left_beside_it(written):
    assert {path.name for path in written.parent.iterdir()} == {"kitti", "note.json"}
    assert (written / "ImageSets/train.txt").read_text().split() == ["000000", "000001"]
    assert (written / "ImageSets/val.txt").read_text().split() == ["000002", "000003"]
    for folder in ("velodyne", "velodyne_reduced", "image_2", "calib", "label_2"):
        assert len(list((written / "training" / folder).iterdir())) == 4
    assert Image.open(written / "training/image_2/000003.png").size == (414, 125)
    assert [record["sample_idx"] for record in infos_of(written, "val")["data_list"]] == [2, 3]


def test_the_rig_is_kittis(written):
    points = np.fromfile(written / "training/velodyne/000000.bin", np.float32).reshape(-1, 4)
    down = np.rad2deg(np.arctan2(points[:, 2], np.linalg.norm(points[:, :2], axis=1)))
    assert down.min() > -25.5 and down.max() < 2.6 and len(np.unique(down.round(1))) > 40
    far = points[np.abs(points[:, 0]) > 8]
    assert abs(np.median(far[far[:, 2] < -1.6][:, 2]) + 1.73) < 0.05  # the ground, below the lidar
    image = infos_of(written, "train")["data_list"][0]["images"]["CAM2"]
    assert np.array(image["cam2img"])[0, 0] * 1242 / 414 == pytest.approx(721.5, rel=0.02)
    assert np.array(image["lidar2cam"])[2, 0] > 0.999  # the camera looks along the lidar's x
    reduced = np.fromfile(written / "training/velodyne_reduced/000000.bin", np.float32).reshape(-1, 4)
    angle = np.rad2deg(np.abs(np.arctan2(reduced[:, 1], reduced[:, 0])))
    assert 35 < angle[reduced[:, 0] > 5].max() < 45  # camera 2 sees 81°


def test_labelled_objects_stand_on_the_ground_and_hold_their_points(written):
    counted = 0
    for split in ("train", "val"):
        infos = infos_of(written, split)
        for record, anno in zip(infos["data_list"], truth_annos(infos), strict=True):
            kept = anno["name"] != "DontCare"
            boxes = np.concatenate([anno["location"], anno["dimensions"], anno["rotation_y"][:, None]], 1)[kept]
            lidar = camera_to_lidar(boxes, np.array(record["images"]["CAM2"]["lidar2cam"]))
            assert np.abs(lidar[:, 2] + 1.73).max() < 0.4  # tilted by 0.3° at most
            points = np.fromfile(
                written / "training/velodyne_reduced" / record["lidar_points"]["lidar_path"], np.float32
            ).reshape(-1, 4)
            lidar[:, 3:6] += 0.1
            inside = points_in_boxes(points, lidar.astype(np.float32)).sum(0)
            given = [found["num_lidar_pts"] for found in record["instances"] if found["bbox_label"] >= 0]
            assert (inside >= given).all()
            counted += sum(given)
    assert counted > 300


def test_the_same_options_write_the_same_bytes_with_any_workers(written, tmp_path):
    options = SynthOptions(2, 5, 2, 414, 125, 360, 0, 95, {"train": 1, "val": 1}, "kitti")
    paths = generate_kitti(tmp_path / "again", options, 2, quiet=True)
    assert [path.name for path in paths] == ["kitti_infos_train.pkl", "kitti_infos_val.pkl"]
    assert hashes(tmp_path / "again") == hashes(written)
    before = (written / "recipe.json").stat().st_mtime_ns
    assert main(["synth", "--out", str(written), *GIVEN.split()]) == 0  # there already
    assert (written / "recipe.json").stat().st_mtime_ns == before


def test_bad_options_are_refused_in_one_line(written, tmp_path, capsys):
    for more, says in (
        (["--out", str(written), "--seed", "6"], "found something there, expected no such folder"),
        (["--out", str(tmp_path / "n"), "--sweeps", "2"], "--sweeps only applies to --format nuscenes"),
        (["--out", str(tmp_path / "n"), "--jpeg-quality", "90"], "--jpeg-quality only applies to --format nuscenes"),
        (["--out", str(tmp_path / "n"), "--native", "wide"], "--native: found 'wide', expected WIDTHxHEIGHT"),
        (["--out", str(tmp_path / "n"), "--azimuths", "0"], "--azimuths: found 0, expected at least 16"),
    ):
        assert main(["synth", *GIVEN.split(), *more]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    assert not (tmp_path / "n").exists()
