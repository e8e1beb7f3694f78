"""`bevqat inspect` against the network itself."""

import json

import pytest
import torch

from qat.calibrate import calibrate, save_ptq
from qat.calibrate.inspection import inspect_checkpoint
from qat.cli import main
from qat.lean.modes import quantizers


@pytest.fixture
def checkpoint(tmp_path, tiny_model, tiny_frames):
    quantized, report = calibrate(tiny_model, tiny_frames, "max")
    path = tmp_path / "ptq.pth"
    save_ptq(path, quantized, tiny_model, {"method": "max", "frames": report.frames})
    return path, quantized


def test_every_quantizer_and_layer_is_listed_with_its_scale(checkpoint):
    path, quantized = checkpoint
    found = inspect_checkpoint(path)
    own = quantizers(quantized.parts)
    listed = {f"{g.part}.{g.quantizer}": g for g in found.groups}
    assert set(listed) == {name for name, quantizer in own.items() if not quantizer.weights}
    for name, group in listed.items():
        assert group.amax == float(own[name].range) and group.scale == pytest.approx(group.amax / 127)
        assert (group.state == "on") == (not own[name]._disabled)
    for layer in found.layers:
        scales = own[f"{layer.part}.{layer.path}.weight_quantizer"]._amax.flatten() / 127
        assert layer.scales == pytest.approx((float(scales.min()), float(scales.max())))
        assert layer.channels == len(scales)
    assert len(found.layers) == sum(name.endswith("weight_quantizer") for name in own)


def test_a_group_names_its_tensors_and_what_they_feed(checkpoint):
    found = inspect_checkpoint(checkpoint[0])
    groups = {(g.part, t): g for g in found.groups for t in g.tensors}
    head = next(g for g in found.groups if g.part == "head" and len(g.feeds) > 5)
    assert {name.rpartition(".")[2] for name in head.feeds} <= {"conv", "0"}  # one tensor for every map of every task
    identity = [g for (part, _), g in groups.items() if part == "camera" and any("add" in f for f in g.feeds)]
    assert identity and all(any("conv" in f for f in g.feeds) for g in identity if len(g.feeds) > 1)


def test_what_stays_float_names_its_rule(checkpoint):
    found = inspect_checkpoint(checkpoint[0])
    rules = {(f.part, f.rule) for f in found.floats}
    assert ("camera", "keep_float") in rules and ("vtransform", "parts_off") in rules
    # The first convolution over the depth map is float in every flavour, those behind it where a GPU computes them.
    depth = {f.name.rpartition(".")[2]: (f.reason, f.flavours) for f in found.floats if "dtransform" in f.name}
    assert list(depth) == ["0", "3", "6"] and "raw metres" in depth["0"][0] and depth["0"][1] == ()
    assert depth["3"][1] == depth["6"][1] == ("tensorrt", "tensorrt-strong")
    states = {layer.path.rpartition(".")[2]: layer.state for layer in found.layers if "dtransform" in layer.path}
    assert states == {"3": "watched", "6": "watched"}


def test_the_command_prints_and_writes_json(checkpoint, tmp_path, capsys):
    assert main(["inspect", str(checkpoint[0]), "--json", str(tmp_path / "i.json")]) == 0
    text = capsys.readouterr().out
    assert "layers with INT8 weights" in text and "raw metres" in text and "shared by several tensors" in text
    written = json.loads((tmp_path / "i.json").read_text())
    assert len(written["layers"]) == len(inspect_checkpoint(checkpoint[0]).layers)


def test_a_float_checkpoint_is_refused(tiny_model, tmp_path, capsys):
    torch.save({"state_dict": tiny_model.state_dict()}, tmp_path / "float.pth")
    assert main(["inspect", str(tmp_path / "float.pth")]) == 2
    assert "run calibrate on it first" in capsys.readouterr().err
