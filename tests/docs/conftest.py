"""A folder that looks like a checkout and is small: what the documentation's commands run in."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pyquaternion import Quaternion

from qat.data.writer import Box, Calibration, NuScenesWriter

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))  # docs_pages.py: pytest's importlib mode leaves this folder out
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")


@pytest.fixture(scope="session")
def small_network(tiny_config) -> dict:
    """`tiny_config` on timm's test network: what exports in a second."""
    config = copy.deepcopy(tiny_config)
    camera = config["model"]["encoders"]["camera"]
    camera["backbone"] = {"type": "timm", "model_name": "test_resnet", "out_indices": [2, 3]}
    camera["neck"]["in_channels"] = [48, 192]
    head = config["model"]["heads"]["object"]
    head["tasks"] = [config["object_classes"]]  # a third of the head's nodes
    head["test_cfg"].update(nms_type=["rotate"], min_radius=[4.0], nms_scale=[[1.0] * 10])
    return config


def pose(yaw: float, x: float, y: float, z: float) -> np.ndarray:
    matrix = Quaternion(axis=[0, 0, 1], radians=yaw).transformation_matrix
    matrix[:3, 3] = x, y, z
    return matrix


def write_mini(root: Path) -> None:
    """Three keyframes in scenes that v1.0-mini has, so that nuScenes' own split names are known."""
    axes = np.array([[0, 0, 1.0, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    intrinsic = [[80.0, 0, 95.5], [0, 80.0, 60.0], [0, 0, 1]]
    rng = np.random.default_rng(0)
    calibration = {
        name: Calibration(intrinsic, camera2ego=pose(i * np.pi / 3, 1.0, 0.0, 1.5) @ axes)
        for i, name in enumerate(CAMERAS)
    }
    with NuScenesWriter(root, "v1.0-mini", cameras=CAMERAS) as writer:
        for name in ("scene-0061", "scene-0553", "scene-0103"):
            scene = writer.add_scene(name, split="own", calibration=calibration, lidar2ego=pose(-np.pi / 2, 1, 0, 1.8))
            for k in range(2):
                cloud = np.concatenate([rng.uniform(-12, 12, (3000, 2)), rng.uniform(-2, 1, (3000, 1))], 1)
                boxes = [
                    Box("car", (8.0 + k, 2, 1), (4.5, 2, 1.6), 0.1, 1),
                    Box("pedestrian", (5, -4, 1), (1, 1, 1.8), 0),
                ]
                images = {name: rng.integers(0, 256, (128, 192, 3), np.uint8) for name in CAMERAS}
                scene.add_keyframe(1_500_000_000_000_000 + k * 500_000, images, cloud, pose(0, 0, 0, 0), boxes)


def quantized_elsewhere(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of the network as pytorch-quantization would leave it: ranges beside the camera's convolutions."""
    ranges = {}
    for name, tensor in state.items():
        if name.startswith("encoders.camera.") and name.endswith(".weight") and tensor.dim() == 4:
            layer = name.removesuffix(".weight")
            ranges[f"{layer}._input_quantizer._amax"] = torch.tensor(3.0)
            ranges[f"{layer}._weight_quantizer._amax"] = tensor.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-3)
    return {**state, **ranges}


@pytest.fixture(scope="session")
def checkout(tmp_path_factory, small_network, make_detector) -> Path:
    """The folder: model/camera-tiny, benchmarks, examples, and the files that a user has brought along."""
    folder = tmp_path_factory.mktemp("checkout")
    tiny = folder / "model" / "camera-tiny"
    tiny.mkdir(parents=True)
    text = yaml.safe_dump(small_network)
    (tiny / "config.yaml").write_text(text)
    (folder / "configs.yaml").write_text(text)
    state = make_detector(small_network).state_dict()
    torch.save({"state_dict": state}, tiny / "camera-tiny.pth")
    torch.save({"state_dict": state}, folder / "model.pth")
    lidar = {"encoders.lidar.backbone.conv_input.0.weight": torch.zeros(16, 3, 3, 3, 5)}
    torch.save({"state_dict": {**state, **lidar}}, folder / "bevfusion.pth")
    torch.save({"state_dict": quantized_elsewhere(state)}, folder / "bevfusion_ptq.pth")
    for name in ("resnet50", "swint"):  # the full-size networks would take minutes
        (folder / "model" / name).mkdir()
        (folder / "model" / name / "config.yaml").write_text(text)
    for name in ("lidar-tiny", "pointpillars-tiny"):  # which are small
        os.symlink(ROOT / "model" / name, folder / "model" / name)
    for name in ("benchmarks", "configs", "examples", "qat", "tests", "docs", "tools"):
        os.symlink(ROOT / name, folder / name)
    robot = copy.deepcopy(small_network)
    robot["cameras"] = yaml.safe_load((ROOT / "examples/own_data/config.yaml").read_text())["cameras"]
    (folder / "examples").unlink()
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "examples/own_data/config.yaml").write_text(yaml.safe_dump(robot))
    write_mini(folder / "data" / "nuscenes")
    return folder
