"""Data sets that are missing, half there, damaged, or recorded with something broken."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qat.cli import main
from qat.core.errors import UserError

FRONT, LIDAR = "samples/CAM_FRONT", "samples/LIDAR_TOP"


def _edit(data: Path, table: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes every record of a table; one that `change` gives False for is left out."""
    path = next(data.glob("*/sample.json")).with_name(f"{table}.json")
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([row for row in rows if change(row) is not False]))


def _cameras(data: Path, **values: Any) -> None:
    _edit(data, "calibrated_sensor", lambda row: row.update(values) if row["camera_intrinsic"] else None)


def _each(folder: Path, change: Callable[[Path], Any]) -> None:
    for path in folder.iterdir():
        change(path)


def _table(data: Path, name: str) -> Path:
    return next(data.glob("*/sample.json")).with_name(name)


def _drop_channel(data: Path) -> None:
    _edit(data, "sample_data", lambda row: "CAM_FRONT/" not in row["filename"])


def _points(path: Path, share: float) -> None:
    points = np.fromfile(path, np.float32).reshape(-1, 5)
    points[: int(len(points) * share)] = np.nan
    points.tofile(path)


def _as_npy(path: Path) -> None:
    points = np.fromfile(path, np.float32)
    with path.open("wb") as stream:
        np.save(stream, points)


def _without_ring(path: Path) -> None:
    """As KITTI has points; so many that load_dim 5 divides them."""
    points = np.fromfile(path, np.float32).reshape(-1, 5)[:, :4]
    points[: len(points) // 5 * 5].tofile(path)


def _twice(data: Path) -> None:
    path = _table(data, "sample.json")
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, rows[0]]))


def _bomb(path: Path) -> None:
    """A picture of a few bytes that says that it has 60,000×60,000 pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 100)))
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


PICTURE, TABLES = f"data/{FRONT}/", "v1.0-synth"
BROKEN = {
    "missing": (shutil.rmtree, "data: no such folder; expected the folder of a nuScenes-format data set"),
    "a file": (lambda data: (shutil.rmtree(data), data.write_text("")), "data: found a file; expected the folder"),
    "no tables": (lambda data: shutil.rmtree(data / TABLES), "found no version folder with tables"),
    "a table missing": (
        lambda data: (_table(data, "ego_pose.json").unlink(), _table(data, "log.json").unlink()),
        f"data/{TABLES}: found no ego_pose.json, log.json, expected nuScenes' 13 tables; fetch",
    ),
    "a table cut": (
        lambda data: _table(data, "ego_pose.json").write_text('[{"token": '),
        f"data/{TABLES}/ego_pose.json: not valid JSON",
    ),
    "a table of something else": (
        lambda data: _table(data, "calibrated_sensor.json").write_text("[1, 2]"),
        "calibrated_sensor.json: found something other than records with tokens",
    ),
    "a table empty": (lambda data: _table(data, "ego_pose.json").write_text("[]"), "ego_pose.json: found no record"),
    "pictures missing": (lambda data: shutil.rmtree(data / "samples"), "no such file; the data set is incomplete"),
    "a camera's folder missing": (lambda data: shutil.rmtree(data / FRONT), f"{PICTURE}", ),
    "a channel absent": (_drop_channel, "has no CAM_FRONT"),
    "a picture cut": (
        lambda data: _each(data / FRONT, lambda path: path.write_bytes(path.read_bytes()[:600])),
        "not a readable picture (",
    ),
    "a picture empty": (
        lambda data: _each(data / FRONT, lambda path: path.write_bytes(b"")),
        "not a readable picture (an empty file); fetch it again",
    ),
    "a picture of text": (
        lambda data: _each(data / FRONT, lambda path: path.write_text("not found")),
        "not a readable picture (a text file); fetch it again",
    ),
    "a picture of floats": (
        lambda data: _each(data / FRONT, lambda path: Image.fromarray(np.ones((64, 96), np.float32)).save(path, "TIFF")),
        "found mode F, whose values have no stated range, expected a picture of 8 or 16 bits a channel",
    ),
    "a picture bomb": (lambda data: _each(data / FRONT, _bomb), "not a readable picture ("),
    "a picture of another size": (
        lambda data: _each(data / FRONT, lambda path: Image.new("RGB", (50, 30)).save(path)),
        "found 50×30 pixels, expected 96×64 as sample_data.json says; fetch the picture again",
    ),
    "a picture of one colour": (
        lambda data: _each(data / FRONT, lambda path: Image.new("RGB", (96, 64)).save(path)),
        "camera 0 is one colour; drop the frame",
    ),
    "intrinsics nan": (
        lambda data: _cameras(data, camera_intrinsic=[[float("nan"), 0, 48], [0, 80, 32], [0, 0, 1]]),
        "camera_intrinsic: found [[nan, 0, 48], [0, 80, 32], [0, 0, 1]], which is not finite; fix the table",
    ),
    "intrinsics cut": (
        lambda data: _cameras(data, camera_intrinsic=[[80, 0, 48], [0, 80, 32]]),
        "camera_intrinsic: found [[80, 0, 48], [0, 80, 32]], expected numbers [3,3]",
    ),
    "intrinsics zero": (
        lambda data: _cameras(data, camera_intrinsic=[[0, 0, 48], [0, 0, 32], [0, 0, 1]]),
        "with focal lengths above 0; fix the table",
    ),
    "intrinsics of another size": (
        lambda data: _cameras(data, camera_intrinsic=[[1266, 0, 816], [0, 1266, 491], [0, 0, 1]]),
        "found the optical axis at (816, 491), expected it near a picture of 96×64 pixels",
    ),
    "rotation nan": (lambda data: _cameras(data, rotation=[float("nan")] * 4), "rotation: found [nan, nan, nan, nan]"),
    "no rotation": (lambda data: _cameras(data, rotation=[0, 0, 0, 0]), "expected a quaternion w, x, y, z of length 1"),
    "three angles": (lambda data: _cameras(data, rotation=[0, 0, 1.6]), "rotation: found [0, 0, 1.6], expected numbers [4]"),
    "translation infinite": (
        lambda data: _cameras(data, translation=[float("inf"), 0, 0]),
        "calibrated_sensor.json: ",
    ),
    "a pose nan": (
        lambda data: _edit(data, "ego_pose", lambda row: row.update(translation=[float("nan")] * 3)),
        "ego_pose.json: ",
    ),
    "lidar cut": (
        lambda data: _each(data / LIDAR, lambda path: path.write_bytes(path.read_bytes()[:-7])),
        "bytes, expected points of load_dim 5 float32 values each; fetch it again",
    ),
    "lidar empty": (lambda data: _each(data / LIDAR, lambda path: path.write_bytes(b"")), "found 0 bytes, expected points"),
    "lidar nan": (
        lambda data: _each(data / LIDAR, lambda path: _points(path, 0.9)),
        "found NaN or infinity in",
    ),
    "lidar an array of NumPy's": (
        lambda data: _each(data / LIDAR, lambda path: _as_npy(path)),
        "found a NumPy array, expected points of load_dim 5 float32 values each, as raw bytes",
    ),
    "lidar float64": (
        lambda data: _each(data / LIDAR, lambda path: np.fromfile(path, np.float32).astype(np.float64).tofile(path)),
        "of x, y, z beyond 2,000 m or next to nothing",
    ),
    "lidar of four values": (
        lambda data: _each(data / LIDAR, _without_ring),
        "found points of 4 values each, as its columns say, expected points of load_dim 5",
    ),
    "a box nan": (
        lambda data: _edit(data, "sample_annotation", lambda row: row.update(size=[1.0, float("nan"), 1.0])),
        "sample_annotation.json: ",
    ),
    "tokens twice": (_twice, "twice, expected it once"),
    "a circle in time": (
        lambda data: _edit(data, "sample", lambda row: row.update(next=row["token"])),
        "sample.json: found ",
    ),
    "a dangling token": (
        lambda data: _edit(data, "sample_data", lambda row: row.update(ego_pose_token="gone")),
        "ego_pose.json: found no record 'gone'",
    ),
    "splits a list": (
        lambda data: _table(data, "splits.json").write_text('["calib"]'),
        "splits.json: found something else, expected lists of scenes by split",
    ),
    "splits empty": (
        lambda data: _table(data, "splits.json").write_text('{"calib": []}'),
        "split 'calib' has no keyframes in version v1.0-synth, expected scenes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_data_that_cannot_be_used(kind, work, own, refused):
    change, words = BROKEN[kind]
    change(own("data"))
    common = ["--config", "config.yaml", "--data", "data", "--split", "calib"]
    line = refused(["calibrate", *common, "--ckpt", "float.pth", "--out", "ptq.pth"], words)
    assert "data" in line or "frame" in line


@pytest.mark.parametrize("kind", ["a channel absent", "a picture cut", "intrinsics nan", "a table missing"])
def test_every_verb_that_reads_data_says_so(kind, work, own, verbs, refused):
    change, words = BROKEN[kind]
    change(own("data"))
    for verb in ("sensitivity", "health", "finetune"):
        arguments = verbs.quantized("ptq.pth")[verb]
        refused([*arguments, "--no-augment"] if verb == "finetune" else arguments, words)
    train = ["train", "--config", "config.yaml", "--data", "data:calib", "--steps", "1", "--out", "trained"]
    show = ["show", "--config", "config.yaml", "--data", "data", "--out", "sheet.png"]
    export = verbs.floats("float.pth")["export-camera"]
    for arguments in (show, export, verbs.floats("float.pth")["compare"]):
        refused([*arguments, "--split", "calib"], words)
    if kind != "a picture cut":
        refused(train, words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--split", "nothing"], "split 'nothing' not found; there is calib, eval, all"),
        (["--version", "v9"], "version 'v9' not found; there is v1.0-synth"),
        (["--frames", "0"], "--frames: found 0, split 'calib' of data has 1 keyframes, expected 1 to 1"),
        (["--frames", "9"], "--frames: found 9"),
    ],
    ids=["split", "version", "no frames", "too many frames"],
)
def test_a_split_a_version_or_frames_that_are_not_there(flags, words, refused):
    refused(["calibrate", "--config", "config.yaml", "--ckpt", "float.pth", "--data", "data", *flags], words)


def _calibrated(work: Path) -> int:
    arguments = ["calibrate", "--config", "config.yaml", "--ckpt", "float.pth", "--data", "data", "--out", "own.pth"]
    return main(arguments)


def test_pictures_of_another_native_size_are_fine_where_tables_and_intrinsics_fit(work, own):
    """A rig may have cameras of several sizes: each is resized by the config's factor and cropped."""
    data = own("data")
    noise = np.random.default_rng(0).integers(0, 255, (128, 192, 3), np.uint8)
    _each(data / FRONT, lambda path: Image.fromarray(noise).save(path))
    _edit(
        data,
        "sample_data",
        lambda row: row.update(width=192, height=128) if "CAM_FRONT/" in row["filename"] else None,
    )
    assert _calibrated(work) == 0


def test_single_points_that_are_nan_are_left_out(work, own):
    """Lidars give them where nothing came back."""
    data = own("data")
    plain = _calibrated(work), (work / "own.pth").stat().st_size
    _each(data / LIDAR, lambda path: _points(path, 0.01))
    assert plain[0] == 0 and _calibrated(work) == 0


@pytest.mark.parametrize("what", ["none", "unknown"])
def test_frames_without_boxes_calibrate_and_are_not_scored(what, work, own, refused, verbs):
    """None at all, or of classes that nobody knows: nuScenes' own evaluation leaves those out."""
    data = own("data")
    words = "no annotated objects in 1 keyframes"
    if what == "none":
        _edit(data, "sample_annotation", lambda row: False)
        _edit(data, "instance", lambda row: False)
    else:
        _edit(data, "category", lambda row: row.update(name="vehicle.spaceship"))
        words = "objects of vehicle.spaceship alone in 1 keyframes, expected some of car, truck, pedestrian"
    assert _calibrated(work) == 0
    refused(verbs.floats("float.pth")["compare"], "data: split 'eval' has ", words, "choose an annotated split")
    budget = [*verbs.floats("float.pth")["calibrate"], "--budget", "0.1"]
    refused(budget, f"data: split 'calib' has {words}", "choose an annotated split")


def _without_maps(data: Path) -> None:
    shutil.rmtree(data / "maps")


def _backslashes(data: Path) -> None:
    for table in ("sample_data", "map"):
        _edit(data, table, lambda row: row.update(filename=row["filename"].replace("/", "\\")))


def _marked(data: Path) -> None:
    """UTF-8 with a byte order mark, as Windows' editors and PowerShell write it."""
    for path in data.glob("*/*.json"):
        path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")


@pytest.mark.parametrize("change", [_without_maps, _backslashes, _marked], ids=["no maps", "backslashes", "BOM"])
def test_data_sets_that_are_whole_all_the_same(change, work, own):
    """No picture of a map is read here. The result is the same, bit for bit."""
    data = own("data")
    change(data)
    assert _calibrated(work) == 0
    found, plain = (torch.load(work / name, weights_only=True) for name in ("own.pth", "ptq.pth"))
    assert all(torch.equal(found["amax"][name], plain["amax"][name]) for name in plain["amax"])
    assert main(["show", "--config", "config.yaml", "--data", "data", "--split", "eval", "--out", "sheet.png"]) == 0


def test_a_scene_is_evaluated_without_maps(work, own, verbs):
    _without_maps(own("data"))
    assert main(verbs.floats("float.pth")["compare"]) == 0


def _four_times_as_large(data: Path) -> None:
    """Pictures, table and intrinsics, as another rig's would be."""
    for folder in (data / "samples").glob("CAM_*"):
        for path in folder.iterdir():
            with Image.open(path) as picture:
                larger = picture.resize((384, 256))
            larger.save(path)
    _edit(data, "sample_data", lambda row: row.update(width=384, height=256) if row["width"] else None)
    _edit(
        data,
        "calibrated_sensor",
        lambda row: (
            row.update(camera_intrinsic=(np.diag([4, 4, 1]) @ row["camera_intrinsic"]).tolist())
            if row["camera_intrinsic"]
            else None
        ),
    )


def test_pictures_of_a_size_that_the_model_was_not_made_for(work, own, verbs, refused):
    """A float config says what they are resized by, and no more."""
    _four_times_as_large(own("data"))
    words = ("CAM_FRONT: found a picture of 384×256 pixels", "96×64", "expected about 96×64", "resize_lim")
    show = ["show", "--config", "config.yaml", "--data", "data", "--split", "calib", "--out", "sheet.png"]
    for arguments in (show, *(verbs.floats("float.pth")[verb] for verb in ("calibrate", "export-camera", "health"))):
        refused(arguments, *words)


def test_a_quantized_checkpoint_and_its_exports_know_the_native_size_and_resize_others_to_it(work, own):
    """calibrate has seen the pictures. Larger ones of the same shape then give the same boxes, as far as resampling is the same."""
    from qat.data import NuScenesDataset
    from qat.manifest import load_manifest
    from qat.runtime import Calibration, Pipeline

    assert torch.load("ptq.pth", weights_only=True)["config"]["native_size"] == [64, 96]
    assert (
        main(["export-camera", "--ckpt", "ptq.pth", "--fp32", "--data", "data", "--split", "calib", "--out", "known"])
        == 0
    )
    assert load_manifest("known")["pipeline"]["image"]["native"] == [64, 96]
    assert "native" not in load_manifest("fp32")["pipeline"]["image"]
    config = torch.load("ptq.pth", weights_only=True)["config"]
    before = NuScenesDataset("data", "calib", config)
    frame, small = before.read(before.tokens[0]), before[0]
    _four_times_as_large(own("data"))
    after = NuScenesDataset("data", "calib", config)
    large = after.read(after.tokens[0])
    pipeline = Pipeline.load("known", "onnxruntime")

    def run(frame):
        return pipeline(frame.images, frame.points, Calibration(frame.camera_intrinsics, frame.camera2lidar))

    small_boxes, large_boxes = run(frame), run(large)
    assert len(small_boxes.scores) and abs(len(small_boxes.scores) - len(large_boxes.scores)) <= 2
    assert np.allclose(after[0].depth, small.depth, atol=1e-3)
    assert np.abs(after[0].images.astype(int) - small.images).mean() < 6
    with pytest.raises(UserError, match=r"pipeline: CAM_FRONT: found a picture of 400×100 pixels"):
        pipeline([np.zeros((100, 400, 3), np.uint8)] * len(frame.images), frame.points,
                 Calibration(frame.camera_intrinsics, frame.camera2lidar))  # fmt: skip
