"""Swin inside a whole detector: traced, calibrated, exported and verified, as mmdet's and as timm's."""

import numpy as np
import pytest
import torch

from qat.calibrate import load_ptq
from qat.calibrate.checkpoint import save_ptq
from qat.calibrate.ptq import calibrate
from qat.export import ExportOptions, export_parts
from qat.families.bevfusion.detector import build_model
from qat.families.bevfusion.frames import random_frame
from qat.families.bevfusion.random_init import random_model
from qat.families.bevfusion.settings import pipeline_settings
from qat.families.bevfusion.state import load_state
from qat.model.runners import run_frame

SWIN = {
    "type": "SwinTransformer",
    "embed_dims": 8,
    "depths": [1, 1, 2],
    "num_heads": [1, 2, 2],
    "out_indices": [1, 2],
    "drop_path_rate": 0.2,
}
TIMM = {"type": "timm", "model_name": "swin_tiny_patch4_window7_224", "out_indices": [0, 1]}
# backbone; the neck's channels; layers with INT8 weights in the backbone, of which each block has four
CASES = {
    "mmdet": (SWIN, [16, 32], 1 + 4 * 4 + 2),
    "timm": (TIMM, [96, 192], 1 + 4 * 4 + 1),
}


class Case:
    """A random detector with such a backbone, and calibrated on two made-up frames."""

    def __init__(self, name, config, cameras):
        backbone, channels, self.layers = CASES[name]
        camera = config["model"]["encoders"]["camera"]
        camera["backbone"] = backbone
        camera["neck"].update(in_channels=channels, num_outs=len(channels) - 1)
        if name == "timm":  # its first map has stride 4, and LSSTransform takes any
            camera["vtransform"].update(type="LSSTransform", feature_size=[16, 24])
        self.settings = pipeline_settings(config)
        self.frames = [random_frame(self.settings, seed) for seed in (1, 2)]
        for frame in self.frames:
            frame.token = "made up"
        self.detector = random_model(config)
        self.quantized, self.report = calibrate(self.detector, self.frames)


@pytest.fixture(scope="module", params=list(CASES))
def case(request, fresh_config, small_cameras):
    return Case(request.param, fresh_config(), small_cameras)


def test_every_weighted_layer_of_the_backbone_is_int8(case):
    ours = [name for name in case.report.int8 if name.startswith("camera.encoders.camera.backbone.")]
    assert len(ours) == case.layers
    assert not case.report.unexcited


@pytest.mark.parametrize(
    ("case", "precision", "flavour"),
    [
        ("mmdet", "fp32", "tensorrt"),
        ("mmdet", "int8", "tensorrt"),
        ("mmdet", "int8", "onnxruntime"),
        ("timm", "int8", "tensorrt"),
    ],
    indirect=["case"],
)
def test_its_parts_are_exported_and_verified(case, precision, flavour, tmp_path, small_cameras, capfd):
    detector = case.detector if precision == "fp32" else case.quantized
    manifest = export_parts(detector, tmp_path / "out", ExportOptions(precision, flavour=flavour))
    assert manifest["verification"]["passed"]
    assert list(manifest["parts"]) == ["camera.backbone", "camera.vtransform", "fuser", "head.bbox"]
    camera = manifest["parts"]["camera.backbone"]
    assert ("QuantizeLinear" in camera["operators"]) == (precision == "int8")
    assert "Loop" not in camera["operators"] and "If" not in camera["operators"]
    assert camera["inputs"]["img"]["shape"] == [1, 3, 3, 64, 96]
    assert capfd.readouterr().err == ""


def test_int8_stays_near_the_float_network(case):
    with torch.inference_mode():
        exact, rounded = run_frame(case.detector, case.frames[0]), run_frame(case.quantized, case.frames[0])
    for name in case.quantized.plan.outputs:
        noise = float((rounded[name] - exact[name]).square().mean() / exact[name].var())
        assert 10 * np.log10(noise) < -10, name


def test_a_checkpoint_brings_the_same_network_back(case, tmp_path):
    save_ptq(tmp_path / "int8.pth", case.quantized, case.detector, {"method": "mse"})
    again, _ = load_ptq(tmp_path / "int8.pth")
    plain = build_model(case.detector.config)
    load_state(plain, case.detector.state_dict(), "x.pth")
    with torch.inference_mode():
        for model, copied in ((case.quantized, again), (case.detector, plain.eval())):
            a, b = run_frame(model, case.frames[1]), run_frame(copied, case.frames[1])
            assert all(torch.equal(a[name], b[name]) for name in case.quantized.plan.outputs)
