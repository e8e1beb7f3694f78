"""The controls of test_negative_controls.py on camera-tiny, trained, on its own frames: 20 sites that are drawn, and all of them
nightly."""

from pathlib import Path

import numpy as np
import pytest
from controls import FLAVOURS, int8_parts, undetected
from damage import KINDS, damage

from qat.calibrate import calibrate
from qat.data import NuScenesDataset
from qat.export import ExportOptions, export_parts
from qat.families.bevfusion.config import load_config
from qat.families.bevfusion.state import load_float_model

ROOT = Path(__file__).parents[2]
SITES = 20


@pytest.fixture(scope="module")
def tiny():
    """camera-tiny with ranges of two keyframes, and another keyframe."""
    config = load_config(ROOT / "model/camera-tiny/config.yaml")
    detector = load_float_model(config, ROOT / "model/camera-tiny/camera-tiny.pth")
    frames = NuScenesDataset(ROOT / "example-data", "calib", config, None, 3)
    return calibrate(detector.eval(), [frames[0], frames[1]], "max")[0], frames[2]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name == "onnxruntime" else pytest.mark.nightly) for name in FLAVOURS],
)
def exported(request, tiny, tmp_path_factory):
    detector, frame = tiny
    folder = tmp_path_factory.mktemp("tiny") / request.param
    manifest = export_parts(detector, folder, ExportOptions("int8", flavour=request.param), frames=[frame])
    assert manifest["verification"]["passed"]
    assert (folder / "verification.npz").stat().st_size < 6e6
    return folder


@pytest.mark.parametrize("count", [SITES, pytest.param(None, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_to_camera_tiny_fails(exported, kind, count):
    parts = list(int8_parts(exported))
    every = [(name, site) for name, _, _, sites, _ in parts for site in sites]
    drawn = np.random.default_rng(0).permutation(len(every))[:count]
    chosen = {every[at] for at in drawn}
    found = 0
    for name, part, data, sites, feeds in parts:
        own = [site for site in sites if (name, site) in chosen]
        damaged, done = damage(data, kind, own, {site: sites[site].shape for site in own})
        missed = undetected(data, damaged, done, sites, feeds, part["sites"]["pairs"])
        # Depth bins that are zero nearly everywhere change by less than FP16 tells when two are swapped.
        half = exported.name == "tensorrt-strong"
        assert all(effect <= (sites[site].slack if half else 0) for site, effect in missed.items()), missed
        found += len(done) - len(missed)
    assert found >= 10
