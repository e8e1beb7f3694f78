import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qat.boxes.centerhead import decode
from qat.core.errors import UserError
from qat.core.geometry import rasterize_depth
from qat.core.preprocess import ResizeCrop, normalize
from qat.engine import CPU_BACKENDS, Options
from qat.export import torch_parts
from qat.families.bevfusion.settings import pipeline_settings
from qat.runtime import Calibration, Pipeline
from tests.messages import refused


@pytest.fixture
def detector(small_config, make_detector):
    return make_detector(small_config)


@pytest.fixture
def folder(tmp_path, exported_fp32):
    return shutil.copytree(exported_fp32, tmp_path / "onnx_fp32")


@pytest.fixture
def sample(small_scene):
    """The scene preprocessed step by step, apart from Pipeline's own code."""
    resize_crop = ResizeCrop((64, 96), 0.5)
    images = [resize_crop.apply(image) for image in small_scene["images"]]
    augment = np.stack([resize_crop.matrix(200, 140)] * 3)
    points = small_scene["points"]
    low, high = np.array([-16.0, -12.0, -5.0]), np.array([16.0, 12.0, 3.0])
    points = points[np.all((points[:, :3] > low) & (points[:, :3] < high), axis=1)]
    lidar2image = small_scene["camera_intrinsics"] @ np.linalg.inv(small_scene["camera2lidar"])
    eye = np.eye(4, dtype=np.float32)
    return SimpleNamespace(
        img=np.stack([normalize(i, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) for i in images]),
        depth=rasterize_depth(points, lidar2image, augment, eye, (64, 96)),
        camera_intrinsics=small_scene["camera_intrinsics"],
        camera2lidar=small_scene["camera2lidar"],
        img_aug_matrix=augment,
        lidar_aug_matrix=eye,
    )


def pytorch_maps(detector, sample):
    """The detector's own forward: its pooling is torch's sparse product."""
    patterns = detector.patterns(
        sample.camera_intrinsics[None],
        sample.camera2lidar[None],
        sample.img_aug_matrix[None],
        sample.lidar_aug_matrix[None],
    )
    with torch.inference_mode():
        maps = detector(torch.from_numpy(sample.img[None]), torch.from_numpy(sample.depth[None]), patterns)
    return [{name: value.numpy() for name, value in task.items()} for task in maps]


@pytest.mark.parametrize("backend", sorted(CPU_BACKENDS))
def test_every_backend_gives_the_maps_and_boxes_of_pytorch(tmp_path, folder, detector, sample, small_config, backend):
    pipeline = Pipeline.load(folder, backend, options=Options(threads=1, cache=tmp_path / "cache"))
    tensors = pipeline.forward(sample)
    maps = pytorch_maps(detector, sample)
    for task, values in enumerate(maps):
        for name, value in values.items():
            # FP32 sums in another order through about 25 layers: see qat/export/verify.py for the 80 dB
            error = tensors[f"{name}_{task}"] - value
            assert 10 * np.log10((value**2).sum() / max((error**2).sum(), 1e-30)) > 80, (name, task)
    expected = decode(maps, small_config["model"]["heads"]["object"])
    found = pipeline.decode(tensors)
    assert len(expected) > 5
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-3, atol=1e-3)


def test_pytorch_parts_in_the_pipeline_equal_the_detectors_own_forward(detector, sample, small_config, small_cameras):
    pipeline = Pipeline(torch_parts(detector), pipeline_settings(small_config))
    tensors = pipeline.forward(sample)
    for task, values in enumerate(pytorch_maps(detector, sample)):
        for name, value in values.items():
            np.testing.assert_allclose(tensors[f"{name}_{task}"], value, rtol=1e-4, atol=1e-4)


def test_images_and_points_give_the_same_boxes_as_the_preprocessed_sample(tmp_path, folder, sample, small_scene):
    pipeline = Pipeline.load(folder, "openvino", options=Options(threads=1, cache=None))
    expected = pipeline.detect_sample(sample)
    calibration = Calibration(small_scene["camera_intrinsics"], small_scene["camera2lidar"])
    found = pipeline(small_scene["images"], small_scene["points"], calibration)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-3, atol=1e-3)
    stages = [
        "preprocess",
        "depth",
        "camera.backbone",
        "pattern",
        "pooling",
        "camera.vtransform",
        "fuser",
        "head.bbox",
        "decode",
    ]
    assert sorted(pipeline.timing_ms) == sorted(stages) and all(t >= 0 for t in pipeline.timing_ms.values())


def test_a_moved_camera_rebuilds_the_pattern_and_a_still_one_does_not(folder, sample):
    pipeline = Pipeline.load(folder, "openvino", options=Options(threads=1, cache=None))
    pipeline.forward(sample)
    pipeline.forward(sample)
    assert pipeline.flow.rebuilds == 1
    sample.camera2lidar = sample.camera2lidar.copy()
    sample.camera2lidar[0, 0, 3] += 0.5
    pipeline.forward(sample)
    assert pipeline.flow.rebuilds == 2


def test_a_detector_without_depth_and_downsampling_runs(tmp_path, sample, small_config, small_cameras, make_detector):
    small_config["model"]["encoders"]["camera"]["vtransform"] |= {"type": "LSSTransform", "downsample": 1}
    small_config["model"]["heads"]["object"]["bbox_coder"]["out_size_factor"] = 4
    detector = make_detector(small_config)
    pipeline = Pipeline(torch_parts(detector), pipeline_settings(small_config))
    maps = pytorch_maps(detector, sample)
    np.testing.assert_allclose(pipeline.forward(sample)["heatmap_0"], maps[0]["heatmap"], rtol=1e-4, atol=1e-4)


def test_a_changed_file_is_refused(folder):
    file = folder / "fuser.onnx"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"fuser\.onnx: found sha256 .* export again"):
        Pipeline.load(folder, "openvino")


def test_a_missing_file_and_a_missing_manifest_are_refused(folder):
    (folder / "fuser.onnx").unlink()
    with pytest.raises(UserError, match=r"fuser\.onnx: no such file, expected part fuser"):
        Pipeline.load(folder, "openvino")
    with refused("manifest.json: no such file", "expected a folder written by export-camera"):
        Pipeline.load(folder.parent, "openvino")


def test_another_schema_or_precision_is_refused(folder):
    with pytest.raises(UserError, match="found fp32 parts, expected int8"):
        Pipeline.load(folder, "openvino", "int8")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema": 9}))
    with pytest.raises(UserError, match="found schema 9, expected 1"):
        Pipeline.load(folder, "openvino")


def test_wrong_images_are_named(folder, small_scene):
    pipeline = Pipeline.load(folder, "openvino", options=Options(threads=1, cache=None))
    calibration = Calibration(small_scene["camera_intrinsics"], small_scene["camera2lidar"])
    with pytest.raises(UserError, match="images: found 2, expected 3: FRONT, LEFT, RIGHT"):
        pipeline(small_scene["images"][:2], small_scene["points"], calibration)
    images = [*small_scene["images"][:2], small_scene["images"][2].astype(np.float32)]
    with pytest.raises(UserError, match=r"RIGHT: found float32\[140,200,3\], expected uint8"):
        pipeline(images, small_scene["points"], calibration)


def test_runs_in_a_process_that_cannot_import_torch(tmp_path, folder, small_scene):
    np.savez(tmp_path / "scene.npz", **{**small_scene, "images": np.stack(small_scene["images"])})
    code = f"""
import sys
for name in ("torch", "torchvision", "timm", "onnx", "yaml", "nuscenes", "pytorch_quantization"):
    sys.modules[name] = None
import numpy as np
from qat.engine import Options
from qat.runtime import Calibration, Pipeline
scene = np.load({str(tmp_path / "scene.npz")!r})
for backend in {sorted(CPU_BACKENDS)!r}:
    pipeline = Pipeline.load({str(folder)!r}, backend, options=Options(threads=1, cache=None))
    calibration = Calibration(scene["camera_intrinsics"], scene["camera2lidar"])
    print(len(pipeline(list(scene["images"]), scene["points"], calibration)))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = [int(line) for line in done.stdout.split()]
    assert counts[0] > 5 and counts[0] == counts[1]
