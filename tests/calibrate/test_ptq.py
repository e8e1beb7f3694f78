"""Calibration from model and frames to a checkpoint that reloads bit-identically."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch

from qat.calibrate import calibrate, load_ptq, save_ptq
from qat.core.errors import UserError
from qat.core.tensors import compare_tensors
from qat.lean.modes import quantizers, quantizers_off
from qat.model.quantized import QuantizedModel
from qat.model.runners import flow_for, run_frame


def outputs(model, frame):
    with torch.inference_mode():
        tensors = run_frame(model, frame)
    return torch.cat([tensors[name].flatten() for name in flow_for(model).plan.outputs]).numpy()


def test_the_quantized_detector_with_quantizers_off_equals_the_float_one(tiny_model, tiny_frames):
    quantized = QuantizedModel(tiny_model)
    with quantizers_off(quantized):
        assert np.allclose(outputs(quantized, tiny_frames[0]), outputs(tiny_model, tiny_frames[0]), atol=1e-4)


def test_calibrated_outputs_stay_near_float(tiny_model, tiny_frames):
    quantized, report = calibrate(tiny_model, tiny_frames)
    figures = compare_tensors(outputs(tiny_model, tiny_frames[0]), outputs(quantized, tiny_frames[0]))
    # ~6 dB a bit, less what a few tens of layers in a row add up to
    assert figures["sqnr_db"] > 20
    assert report.frames == 3


def test_every_enabled_quantizer_has_a_range(tiny_model, tiny_frames):
    quantized, _ = calibrate(tiny_model, tiny_frames)
    for name, quantizer in quantizers(quantized.parts).items():
        assert quantizer.amax is not None and (quantizer.amax > 0).all(), name


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "entropy"])
def test_max_range_is_never_exceeded_by_another_method(tiny_model, tiny_frames, method):
    widest, _ = calibrate(tiny_model, tiny_frames, "max")
    other, _ = calibrate(tiny_model, tiny_frames, method)
    for name, amax in other.amax().items():
        assert (amax <= widest.amax()[name]).all(), name


def test_the_vtransform_is_calibrated_and_off(tiny_model, tiny_frames):
    quantized, report = calibrate(tiny_model, tiny_frames)
    own = quantizers(quantized.parts["vtransform"])
    assert own and all(quantizer._disabled for quantizer in own.values())
    assert not any(name.startswith("vtransform.") for name in report.int8)


def test_macs_equal_a_count_from_shapes(tiny_model, tiny_frames):
    _, report = calibrate(tiny_model, tiny_frames[:1])
    # 7×7 convolution from 3 to 64 channels on 2 cameras, 64×96 at stride 2
    assert report.macs["camera.encoders.camera.backbone.conv1"] == 2 * 32 * 48 * 64 * 3 * 49
    assert 0 < report.int8_share < 1


def test_a_reload_in_a_new_process_gives_identical_bytes(tiny_model, tiny_frames, tmp_path):
    quantized, _ = calibrate(tiny_model, tiny_frames)
    save_ptq(tmp_path / "ptq.pth", quantized, tiny_model, {"method": "mse"})
    img, depth = torch.from_numpy(tiny_frames[0].img), torch.from_numpy(tiny_frames[0].depth)
    torch.save({"img": img, "depth": depth}, tmp_path / "inputs.pth")
    with torch.inference_mode():
        here = quantized.parts["camera"](img, depth)
    script = (
        "import torch; from qat.calibrate import load_ptq; "
        f"m, _ = load_ptq(r'{tmp_path / 'ptq.pth'}'); x = torch.load(r'{tmp_path / 'inputs.pth'}', weights_only=True); "
        f"torch.save(m.parts['camera'](x['img'], x['depth']).detach(), r'{tmp_path / 'out.pth'}')"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pth", weights_only=True), here)


def test_the_same_frames_give_identical_ranges(tiny_model, tiny_frames):
    first, _ = calibrate(tiny_model, tiny_frames)
    second, _ = calibrate(copy.deepcopy(tiny_model), tiny_frames[::-1])
    for name, amax in first.amax().items():
        assert torch.equal(amax, second.amax()[name]), name


def test_a_float_checkpoint_is_refused_where_ranges_are_needed(tiny_model, tmp_path):
    torch.save({"state_dict": tiny_model.state_dict()}, tmp_path / "float.pth")
    with pytest.raises(UserError, match="without quantizer ranges"):
        load_ptq(tmp_path / "float.pth")


def test_a_checkpoint_whose_ranges_do_not_fit_is_refused(tiny_model, tiny_frames, tmp_path):
    quantized, _ = calibrate(tiny_model, tiny_frames)
    save_ptq(tmp_path / "ptq.pth", quantized, tiny_model, {})
    checkpoint = torch.load(tmp_path / "ptq.pth", weights_only=True)
    checkpoint["amax"].popitem()
    torch.save(checkpoint, tmp_path / "ptq.pth")
    with pytest.raises(UserError, match=r"found no range \(amax\) for 1 of"):
        load_ptq(tmp_path / "ptq.pth")


@pytest.mark.parametrize("spoil", ["nan", "constant"])
def test_a_spoilt_frame_is_named(tiny_model, tiny_frames, spoil):
    frame = copy.deepcopy(tiny_frames[0])
    frame.img[1] = np.nan if spoil == "nan" else 0.5
    with pytest.raises(UserError, match=r"frame0.*drop the frame"):
        calibrate(tiny_model, [frame])


def test_no_frames_is_an_error(tiny_model):
    with pytest.raises(UserError, match="no frames"):
        calibrate(tiny_model, [])


def test_nan_in_an_activation_names_where_it_first_appears(tiny_model, tiny_frames):
    tiny_model.encoders["camera"]["backbone"]["layer2"][0].conv1.weight.data[0] = float("inf")
    with pytest.raises(UserError, match=r"layer2_0.*NaN or infinity"):
        calibrate(tiny_model, tiny_frames)
