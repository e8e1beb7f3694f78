"""Fixtures that several folders share."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from qat.families.bevfusion.config import load_config
from qat.families.bevfusion.detector import build_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # for what several folders import (lidar.py)


@pytest.fixture(autouse=True)
def torch_threads():
    """A test that sets torch's threads, as --threads does, leaves them as they were: other numbers round otherwise."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_config():
    """camera-tiny's config, made small: 64×96 images, 12.8 m of BEV, few channels; three tasks where it has one."""
    config = copy.deepcopy(load_config(ROOT / "model" / "camera-tiny" / "config.yaml"))
    config["image_size"] = [64, 96]
    del config["native_size"]
    camera = config["model"]["encoders"]["camera"]
    camera["backbone"] = {"type": "ResNet", "depth": 18, "out_indices": [1, 2]}
    camera["neck"]["out_channels"] = 16
    camera["vtransform"].update(
        in_channels=16,
        out_channels=10,
        image_size=[64, 96],
        feature_size=[8, 12],
        xbound=[-12.8, 12.8, 0.8],
        ybound=[-12.8, 12.8, 0.8],
        dbound=[1.0, 13.0, 1.0],
    )
    config["model"]["decoder"]["backbone"].update(in_channels=10, blocks=[[1, 8, 1], [1, 12, 2]])
    config["model"]["decoder"]["neck"].update(in_channels=[12, 8], out_channels=12)
    head = config["model"]["heads"]["object"]
    names = config["object_classes"]
    head.update(in_channels=12, share_conv_channel=8, tasks=[names[:5], names[5:8], names[8:]])
    head["test_cfg"].update(
        nms_type=["rotate", "rotate", "circle"],
        min_radius=[4.0, 1.0, 0.175],
        nms_scale=[[1.0] * 5, [1.0] * 3, [1.0] * 2],
    )
    head["separate_head"]["head_conv"] = 8
    low_high = [-12.8, -12.8, -5.0, 12.8, 12.8, 3.0]
    head["bbox_coder"].update(pc_range=low_high, max_num=20, out_size_factor=16)
    head["train_cfg"].update(point_cloud_range=low_high, grid_size=[256, 256, 1], out_size_factor=16)
    for step in config["data"]["test"]["pipeline"]:
        if step["type"] == "ImageAug3D":
            step.update(final_dim=[64, 96], resize_lim=[0.5, 0.5])
    return config


@pytest.fixture(scope="session")
def tiny_frames():
    """Three frames of two cameras, smooth random images and sparse depth."""
    rng = np.random.default_rng(0)
    frames = []
    for k in range(3):
        coarse = torch.from_numpy(rng.normal(0, 1, (2, 3, 8, 12)).astype(np.float32))
        img = torch.nn.functional.interpolate(coarse, size=(64, 96), mode="bilinear").numpy()
        depth = (rng.uniform(1, 13, (2, 1, 64, 96)) * (rng.random((2, 1, 64, 96)) < 0.03)).astype(np.float32)
        intrinsics = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
        intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = 80.0
        intrinsics[:, 0, 2], intrinsics[:, 1, 2] = 48.0, 32.0
        camera2lidar = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
        camera2lidar[0, :3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]  # looking along the lidar's y
        camera2lidar[1, :3, :3] = [[-1, 0, 0], [0, 0, -1], [0, -1, 0]]  # and backwards
        eye = np.eye(4, dtype=np.float32)
        frames.append(
            SimpleNamespace(
                token=f"frame{k}",
                img=img,
                depth=depth,
                camera_intrinsics=intrinsics,
                camera2lidar=camera2lidar,
                img_aug_matrix=np.tile(eye, (2, 1, 1)),
                lidar_aug_matrix=eye,
            )
        )
    return frames


@pytest.fixture
def tiny_model(make_tiny_model):
    """`make_tiny_model`'s, the test's own."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def make_tiny_model(tiny_config):
    """() → a seeded random detector whose batch norms are not the identity and whose head maps depend on the images (with
    PyTorch's own initialisation they would not: it shrinks a signal at every layer)."""

    def make():
        torch.manual_seed(0)
        model = build_model(tiny_config).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.7, 1.4)
                torch.nn.init.uniform_(module.weight, 0.7, 1.3)  # timm zeroes that of a block's last one
        return model

    return make


# What a camera+lidar model holds besides its camera branch, as BEVFusion names it.
LIDAR_TENSORS = {
    "encoders.lidar.backbone.conv_input.0.weight": (16, 3, 3, 3, 5),
    "encoders.lidar.backbone.conv_out.1.bias": (128,),
    "fuser.0.weight": (256, 266, 3, 3),
    "decoder.backbone.blocks.0.0.weight": (128, 256, 3, 3),
    "decoder.neck.deblocks.0.0.weight": (256, 128, 1, 1),
    "heads.object.decoder.0.self_attn.in_proj_weight": (384, 128),
}


@pytest.fixture(scope="session")
def fusion_config(tiny_config):
    """A camera+lidar model's config around `tiny_config`'s camera branch: what surrounds that is known to no code here."""
    config = copy.deepcopy(tiny_config)
    config["model"] |= {
        "fuser": {"type": "ConvFuser", "in_channels": [10, 256], "out_channels": 256},
        "decoder": {"backbone": {"type": "SECOND", "in_channels": 256}, "neck": None},
        "heads": {"map": {"type": "BEVSegmentationHead"}, "object": {"type": "TransFusionHead", "num_proposals": 200}},
    }
    config["model"]["encoders"]["lidar"] = {
        "voxelize": {"max_num_points": 10, "voxel_size": [0.075, 0.075, 0.2]},
        "backbone": {"type": "SparseEncoder", "in_channels": 5, "sparse_shape": [1440, 1440, 41]},
    }
    del config["object_classes"]
    return config


@pytest.fixture(scope="session")
def make_fusion_state(make_tiny_model):
    """() → a state dict of such a model, whose camera branch has `make_tiny_model`'s weights."""

    def make():
        own = make_tiny_model().state_dict()
        camera = {name: tensor for name, tensor in own.items() if name.startswith("encoders.camera.")}
        rng = torch.Generator().manual_seed(1)
        return camera | {name: torch.randn(shape, generator=rng) for name, shape in LIDAR_TENSORS.items()}

    return make


@pytest.fixture(scope="session")
def fusion_files(tmp_path_factory, fusion_config, make_fusion_state):
    """{"config": configs.yaml, "checkpoint": bevfusion.pth} of a camera+lidar model; nothing may change them."""
    folder = tmp_path_factory.mktemp("fusion")
    files = {"config": folder / "configs.yaml", "checkpoint": folder / "bevfusion.pth"}
    files["config"].write_text(yaml.safe_dump(fusion_config))
    torch.save({"state_dict": make_fusion_state(), "meta": {"epoch": 6}}, files["checkpoint"])
    return files


CAMERAS = ("FRONT", "LEFT", "RIGHT")


def _config() -> dict:
    vtransform = {
        "type": "DepthLSSTransform",
        "in_channels": 16,
        "out_channels": 10,
        "image_size": [64, 96],
        "feature_size": [8, 12],
        "xbound": [-16.0, 16.0, 1.0],
        "ybound": [-12.0, 12.0, 1.0],
        "zbound": [-10.0, 10.0, 20.0],
        "dbound": [1.0, 13.0, 1.0],
        "downsample": 2,
    }
    head = {
        "type": "CenterHead",
        "in_channels": 24,
        "tasks": [["car", "truck"], ["pedestrian"]],
        "common_heads": {"reg": [2, 2], "height": [1, 2], "dim": [3, 2], "rot": [2, 2], "vel": [2, 2]},
        "share_conv_channel": 16,
        "separate_head": {"type": "SeparateHead", "init_bias": -2.19, "final_kernel": 3, "head_conv": 16},
        "norm_bbox": True,
        "bbox_coder": {
            "pc_range": [-16.0, -12.0, -5.0, 16.0, 12.0, 3.0],
            "post_center_range": [-20.0, -20.0, -10.0, 20.0, 20.0, 10.0],
            "max_num": 40,
            "score_threshold": 0.05,
            "out_size_factor": 8,
            "voxel_size": [0.25, 0.25],
        },
        "test_cfg": {
            "min_radius": [1.0, 0.2],
            "nms_type": ["rotate", "circle"],
            "pre_max_size": 40,
            "post_max_size": 20,
            "nms_thr": 0.2,
        },
    }
    camera = {
        "backbone": {"type": "timm", "model_name": "test_resnet", "out_indices": [2, 3]},
        "neck": {"type": "GeneralizedLSSFPN", "in_channels": [48, 192], "out_channels": 16, "num_outs": 1},
        "vtransform": vtransform,
    }
    decoder = {
        "backbone": {"type": "GeneralizedResNet", "in_channels": 10, "blocks": [[1, 12, 1], [1, 24, 2]]},
        "neck": {"type": "LSSFPN", "in_indices": [-1, 0], "in_channels": [24, 12], "out_channels": 24},
    }
    steps = [
        {"type": "ImageAug3D", "final_dim": [64, 96], "resize_lim": [0.5, 0.5], "bot_pct_lim": [0.0, 0.0]},
        {"type": "PointsRangeFilter", "point_cloud_range": [-16.0, -12.0, -5.0, 16.0, 12.0, 3.0]},
        {"type": "ImageNormalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    ]
    return {
        "image_size": [64, 96],
        "point_cloud_range": [-16.0, -12.0, -5.0, 16.0, 12.0, 3.0],
        "voxel_size": [0.25, 0.25, 8.0],
        "object_classes": ["car", "truck", "pedestrian"],
        "model": {
            "encoders": {"camera": camera, "lidar": None},
            "fuser": None,
            "decoder": decoder,
            "heads": {"object": head, "map": None},
        },
        "data": {"test": {"pipeline": steps}},
    }


def _small() -> dict:
    return {**_config(), "cameras": list(CAMERAS)}


@pytest.fixture(scope="session")
def make_config():
    """→ a fresh config such as `small_config`, of nuScenes' cameras."""
    return _config


@pytest.fixture
def small_config() -> dict:
    """A config of three cameras, 64×96 pixels and a 32×24 BEV grid; the test's own, to change at will."""
    return _small()


@pytest.fixture(scope="session")
def fresh_config():
    """() → another `small_config`, for fixtures that several tests share."""
    return _small


@pytest.fixture(scope="session")
def small_cameras() -> tuple[str, ...]:
    """Names of the small detector's cameras."""
    return CAMERAS


@pytest.fixture(scope="session")
def make_detector():
    """config → a float detector with seeded weights and batch norms that have seen something, in eval mode."""

    def make(config: dict, seed: int = 0):
        torch.manual_seed(seed)
        detector = build_model(copy.deepcopy(config))
        for module in detector.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                torch.nn.init.uniform_(module.running_mean, -0.3, 0.3)
                torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.uniform_(module.bias, -0.3, 0.3)
        # A random head's heatmap is flat; spread it so that decoding has peaks above its threshold to find.
        for head in detector.heads["object"].task_heads:
            torch.nn.init.normal_(head.heatmap[-1].weight, std=0.3)
        return detector.eval()

    return make


@pytest.fixture
def small_scene() -> dict:
    """What a robot would have: uint8 images of three cameras in a ring, lidar points, calibration matrices."""
    random = np.random.default_rng(5)
    intrinsics = np.tile(np.eye(4, dtype=np.float32), (3, 1, 1))
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = 150
    intrinsics[:, :2, 2] = 100, 70
    camera2lidar = np.tile(np.eye(4, dtype=np.float32), (3, 1, 1))
    for n, angle in enumerate(np.arange(3) * 2 * np.pi / 3):
        c, s = np.cos(angle), np.sin(angle)
        camera2lidar[n, :3, :3] = [[s, 0, c], [-c, 0, s], [0, -1, 0]]
        camera2lidar[n, :3, 3] = 0.2 * c, 0.2 * s, -0.3
    return {
        "images": list(random.integers(0, 256, (3, 140, 200, 3), dtype=np.uint8)),
        "points": random.uniform(-15, 15, (4000, 5)).astype(np.float32) * [1, 1, 0.15, 1, 1],
        "camera_intrinsics": intrinsics,
        "camera2lidar": camera2lidar,
    }


@pytest.fixture(scope="session")
def exported_fp32(tmp_path_factory, make_detector):
    """Folder of the small detector's FP32 parts; copy it before changing anything in it."""
    from qat.export import ExportOptions, export_parts

    folder = tmp_path_factory.mktemp("exported") / "onnx_fp32"
    export_parts(make_detector(_small()), folder, ExportOptions("fp32"))
    return folder
