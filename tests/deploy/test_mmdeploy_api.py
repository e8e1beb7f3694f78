"""MMDeploy's Python functions: their signatures, what they return, and that it is what the detectors compute."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from lidar import CENTERPOINT, POINTPILLARS, cloud, need_mmdet3d, write_cloud

from qat.core.errors import UserError

need_mmdet3d()

import qat.deploy  # noqa: E402
from qat.deploy import (  # noqa: E402
    build_task_processor,
    create_calib_input_data,
    inference_model,
    torch2onnx,
    visualize_model,
)
from qat.deploy.mmdeploy.api import detections  # noqa: E402
from qat.deploy.mmdeploy.checks import compare_boxes  # noqa: E402
from qat.deploy.mmdeploy.detector import pytorch_detector  # noqa: E402

DEPLOY = Path(__file__).resolve().parents[2] / "configs/mmdet3d/voxel-detection/voxel-detection_onnxruntime_dynamic.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CenterPoint's file and its cloud."""
    folder = tmp_path_factory.mktemp("api")
    file = write_cloud(folder / "cloud.bin", columns=5)
    torch2onnx(str(file), str(folder), "end2end.onnx", str(DEPLOY), str(CENTERPOINT), "random:1", device="cpu")
    return folder


def test_signatures_are_mmdeploys():
    """Its parameters in its order; ours come behind them."""
    own = {
        "inference_model": ["model_cfg", "deploy_cfg", "backend_files", "img", "device"],
        "torch2onnx": ["img", "work_dir", "save_file", "deploy_cfg", "model_cfg", "model_checkpoint", "device"],
        "visualize_model": ["model_cfg", "deploy_cfg", "model", "img", "device", "backend", "output_file", "show_result"],
        "build_task_processor": ["model_cfg", "deploy_cfg", "device"],
        "create_calib_input_data": [
            "calib_file", "deploy_cfg", "model_cfg", "model_checkpoint", "dataset_cfg", "dataset_type", "device",
        ],
    }  # fmt: skip
    assert set(own) == set(qat.deploy.__all__)
    for name, parameters in own.items():
        assert list(inspect.signature(getattr(qat.deploy, name)).parameters)[: len(parameters)] == parameters
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        qat.deploy.nothing  # noqa: B018


def test_inference_model_returns_both_forms(folder):
    points = cloud(columns=4)
    expected = pytorch_detector(CENTERPOINT, "random:1")(points)
    file = folder / "end2end.onnx"
    (sample,) = inference_model(str(CENTERPOINT), str(DEPLOY), [str(file)], str(folder / "cloud.bin"), "cpu")
    found = sample.pred_instances_3d
    assert type(sample).__name__ == "Det3DDataSample" and found.bboxes_3d.tensor.shape == (len(found), 9)
    assert found.labels_3d.dtype == torch.int64 and compare_boxes(detections(sample), expected).same
    ((older,),) = inference_model(str(CENTERPOINT), str(DEPLOY), str(file), points, "cpu", legacy=True)
    assert set(older) == {"boxes_3d", "scores_3d", "labels_3d"}
    assert compare_boxes(detections(older), expected).same


def test_configs_may_be_mmengines_objects(folder):
    from mmengine.config import Config

    deploy_cfg, model_cfg = Config.fromfile(str(DEPLOY)), Config.fromfile(str(CENTERPOINT))
    (sample,) = inference_model(model_cfg, deploy_cfg, [folder / "end2end.onnx"], cloud(columns=4), "cpu")
    assert len(sample.pred_instances_3d) > 0
    with pytest.raises(UserError, match="model_cfg: found a Config without a file"):
        inference_model(Config(dict(model_cfg)), deploy_cfg, [folder / "end2end.onnx"], cloud(columns=4), "cpu")


def test_a_task_processors_steps(folder, tmp_path):
    processor = build_task_processor(str(CENTERPOINT), str(DEPLOY), "cpu")
    data, inputs = processor.create_input(str(folder / "cloud.bin"))
    assert [value.dtype for value in inputs] == [torch.float32, torch.int32, torch.int32]
    backend = processor.build_backend_model([str(folder / "end2end.onnx")])
    pytorch = processor.build_pytorch_model("random:1")
    (found,), (expected,) = (
        model.test_step(processor.create_input(str(folder / "cloud.bin"))[0]) for model in (backend, pytorch)
    )
    assert compare_boxes(detections(found), detections(expected)).same and len(expected.pred_instances_3d) > 0
    processor.visualize(str(folder / "cloud.bin"), backend, found, tmp_path / "boxes.png")
    assert (tmp_path / "boxes.png").read_bytes()[:4] == b"\x89PNG"
    assert processor.get_model_name() == "centerpoint" and set(data) == {"inputs", "data_samples"}
    with pytest.raises(UserError, match="input_shape: found"):
        processor.create_input(str(folder / "cloud.bin"), (1, 2))


def test_visualize_model_draws_backends_and_checkpoints(folder, tmp_path):
    clouds = [str(folder / "cloud.bin"), cloud(1, columns=4)]
    visualize_model(
        str(CENTERPOINT), str(DEPLOY), [folder / "end2end.onnx"], clouds, "cpu", output_file=tmp_path / "a.png"
    )
    visualize_model(str(CENTERPOINT), str(DEPLOY), "random:1", clouds[0], "cpu", output_file=tmp_path / "b.png")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a.png", "a_1.png", "b.png"]
    with pytest.raises(UserError, match="backend: found 'openvino', expected 'onnxruntime'"):
        visualize_model(str(CENTERPOINT), str(DEPLOY), "random", clouds[0], "cpu", "openvino", tmp_path / "c.png")
    with pytest.raises(UserError, match="output_file: found None"):
        visualize_model(str(CENTERPOINT), str(DEPLOY), "random", clouds[0], "cpu")


def test_a_file_of_another_model_is_one_line(folder):
    with pytest.raises(UserError, match=r"end2end.onnx: input voxels: found|cls_score0: found"):
        inference_model(str(POINTPILLARS), str(DEPLOY), [folder / "end2end.onnx"], cloud(columns=4), "cpu")
    with pytest.raises(UserError, match=r"expected one \.onnx for onnxruntime"):
        inference_model(str(CENTERPOINT), str(DEPLOY), ["end2end.engine"], cloud(columns=4), "cpu")
    with pytest.raises(UserError, match="found no such file, expected what bevqat deploy wrote"):
        inference_model(str(CENTERPOINT), str(DEPLOY), ["missing.onnx"], cloud(columns=4), "cpu")


def test_calibration_inputs(tmp_path):
    """Of the frames that a config's val set has, in its own pipeline."""
    import pickle

    config = tmp_path / "config.py"
    config.write_text(
        POINTPILLARS.read_text().replace("data/kitti/", f"{tmp_path}/") + "\nval_dataloader = test_dataloader\n"
    )
    folder = tmp_path / "training" / "velodyne_reduced"
    folder.mkdir(parents=True)
    records = []
    for n in range(3):
        write_cloud(folder / f"{n:06d}.bin", seed=n)
        records.append({"sample_idx": n, "lidar_points": {"lidar_path": f"{n:06d}.bin", "num_pts_feats": 4}})
    infos = {"metainfo": {"categories": {"Pedestrian": 0, "Cyclist": 1, "Car": 2}}, "data_list": records}
    (tmp_path / "kitti_infos_val.pkl").write_bytes(pickle.dumps(infos))
    create_calib_input_data(tmp_path / "calib.npz", str(DEPLOY), str(config))
    with np.load(tmp_path / "calib.npz") as arrays:
        assert len(arrays.files) == 9 and arrays["voxels/2"].shape[1:] == (8, 4)
        assert (arrays["num_points/0"] > 0).all() and arrays["coors/1"].dtype == np.int32
    with pytest.raises(UserError, match=r"found the ending '.h5', expected .npz"):
        create_calib_input_data(tmp_path / "calib.h5", str(DEPLOY), str(config))
    with pytest.raises(UserError, match=r"a\.pth: found no such file"):
        create_calib_input_data(tmp_path / "calib.npz", str(DEPLOY), str(config), "a.pth")
