"""A small quantized detector for the tests of this folder."""

import sys
from pathlib import Path

import pytest
import torch

from qat.families.bevfusion.frames import random_frame
from qat.families.bevfusion.settings import pipeline_settings
from qat.lean.modes import quantizers_off
from qat.model.quantized import QuantizedModel
from qat.model.runners import run_frame

sys.path.insert(0, str(Path(__file__).parent))  # damage.py: pytest's importlib mode leaves this folder out


def calibrated(detector, settings):
    """A quantized detector whose ranges are the largest magnitudes on one made-up frame."""
    quantized = QuantizedModel(detector)
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].abs().max().clamp(min=1e-3))
        )
        for name, module in quantized.activation_quantizers().items()
    ]
    frame = random_frame(settings, seed=7)
    with quantizers_off(quantized), torch.inference_mode():
        run_frame(quantized, frame)
    for handle in handles:
        handle.remove()
    for name, module in quantized.activation_quantizers().items():
        module.set_range(seen[name].clone())
    return quantized


@pytest.fixture(scope="session")
def settings(fresh_config, small_cameras):
    return pipeline_settings(fresh_config())


@pytest.fixture(scope="session")
def quantized(fresh_config, settings, make_detector):
    return calibrated(make_detector(fresh_config()), settings)


@pytest.fixture(scope="session")
def calibrate_largest():
    """(float detector, settings) → a quantized one, ranges the largest magnitudes on one made-up frame."""
    return calibrated
