"""A small quantized detector for the tests of this folder."""

import sys
from pathlib import Path

import pytest
import torch

from qat.export import pipeline_settings
from qat.export.verify import random_frame
from qat.lean import quantize_detector
from qat.lean.modes import quantizers_off

sys.path.insert(0, str(Path(__file__).parent))  # damage.py: pytest's importlib mode leaves this folder out


def calibrated(detector, settings):
    """A quantized detector whose ranges are the largest magnitudes on one made-up frame."""
    quantized = quantize_detector(detector)
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].abs().max().clamp(min=1e-3))
        )
        for name, module in quantized.activation_quantizers().items()
    ]
    frame = random_frame(settings, seed=7)
    matrices = (frame.camera_intrinsics, frame.camera2lidar, frame.img_aug_matrix, frame.lidar_aug_matrix)
    with quantizers_off(quantized), torch.inference_mode():
        patterns = quantized.patterns(*(matrix[None] for matrix in matrices))
        quantized(torch.from_numpy(frame.img[None]), torch.from_numpy(frame.depth[None]), patterns)
    for handle in handles:
        handle.remove()
    for name, module in quantized.activation_quantizers().items():
        module.set_range(seen[name].clone())
    return quantized


@pytest.fixture(scope="session")
def settings(fresh_config, small_cameras):
    return pipeline_settings(fresh_config(), small_cameras)


@pytest.fixture(scope="session")
def quantized(fresh_config, settings, make_detector):
    return calibrated(make_detector(fresh_config()), settings)


@pytest.fixture(scope="session")
def calibrate_largest():
    """(float detector, settings) → a quantized one, ranges the largest magnitudes on one made-up frame."""
    return calibrated
