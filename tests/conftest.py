"""A detector small enough to export and run in a second, shared by the stages' tests."""

from __future__ import annotations

import copy

import numpy as np
import pytest

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


@pytest.fixture
def small_config() -> dict:
    """A config of three cameras, 64×96 pixels and a 32×24 BEV grid."""
    return _config()


@pytest.fixture
def small_cameras() -> tuple[str, ...]:
    """Names of the small detector's cameras."""
    return CAMERAS


@pytest.fixture(scope="session")
def make_detector():
    """config → a float detector with seeded weights and batch norms that have seen something, in eval mode."""
    import torch

    from qat.models import build_model

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
    from qat.export import export_parts

    folder = tmp_path_factory.mktemp("exported") / "onnx_fp32"
    export_parts(make_detector(_config()), folder, "fp32", cameras=CAMERAS)
    return folder
