"""The calibration command: methods by layer, and several processes that end with one process's ranges."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from qat.calibrate import calibrate, load_ptq
from qat.calibrate.inspection import inspect_checkpoint
from qat.calibrate.job import calibrate_checkpoint
from qat.calibrate.options import CalibrateOptions
from qat.cli import main
from qat.core.errors import UserError
from qat.data.synth import SynthOptions, generate
from qat.model.opening import Source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    options = SynthOptions(scenes=1, seed=5, keyframes=3, width=192, height=128, azimuths=60, sweeps=0, splits={"a": 1})
    return generate(tmp_path_factory.mktemp("job") / "set", options, quiet=True)


@pytest.fixture
def files(tmp_path, tiny_config, tiny_model):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config))
    torch.save({"state_dict": tiny_model.state_dict()}, tmp_path / "float.pth")
    return {"config": tmp_path / "config.yaml", "checkpoint": tmp_path / "float.pth"}


def torchrun(files, data, out, *more):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "qat/calibrate.py",
    ]
    command += [
        "--config",
        files["config"],
        "--ckpt",
        files["checkpoint"],
        "--data",
        data,
        "--split",
        "a",
        "--out",
        out,
    ]
    return subprocess.run([*map(str, command), *more], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_two_processes_end_with_the_ranges_of_one(files, data, tmp_path):
    """Three frames: one process has two of them, the other one. torchrun gives each process one thread; convolutions
    on another number of threads round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calibrate_checkpoint(Source(**files), CalibrateOptions(data, "a"), tmp_path / "one.pth")
    finally:
        torch.set_num_threads(threads)
    result = torchrun(files, data, tmp_path / "two.pth")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("two.pth") == 1  # rank 0 alone prints
    one, two = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("one", "two"))
    assert one["recipe"]["frames"] == two["recipe"]["frames"] == 3
    assert one["amax"].keys() == two["amax"].keys()
    assert all(torch.equal(one["amax"][name], two["amax"][name]) for name in one["amax"])
    assert one["recipe"]["int8_share_of_macs"] == two["recipe"]["int8_share_of_macs"]


@pytest.mark.nightly  # 20 CPU seconds: test_distributed.py has a short one
def test_a_process_without_frames_ends_all_with_one_line(files, data, tmp_path):
    result = torchrun(files, data, tmp_path / "two.pth", "--frames", "1")
    assert result.returncode != 0 and not (tmp_path / "two.pth").exists()
    assert result.stderr.count("error: calibration: found no frames, expected at least one for each process") == 1


def test_a_method_by_layer(tiny_model, tiny_frames):
    widest, _ = calibrate(tiny_model, tiny_frames, "max")
    mixed, _ = calibrate(tiny_model, tiny_frames, "percentile", 99.0, by_layer=[("head.*", "max"), ("*", "mse")])
    mse, _ = calibrate(tiny_model, tiny_frames, "mse")
    head = [name for name in mixed.activation_quantizers() if name.startswith("head.")]
    assert head
    for name in mixed.activation_quantizers():
        expected = widest if name in head else mse
        assert torch.equal(mixed.amax()[name], expected.amax()[name]), name


@pytest.mark.parametrize(
    ("pair", "message"),
    [(("nothing.*", "max"), "no quantizer has such a name"), (("*", "best"), "expected a method of")],
)
def test_a_pattern_or_method_that_fits_nothing_is_told(tiny_model, tiny_frames, pair, message):
    with pytest.raises(UserError, match=message):
        calibrate(tiny_model, tiny_frames, by_layer=[pair])


def test_methods_by_layer_are_kept_in_the_recipe(files, data, tmp_path):
    options = CalibrateOptions(data, "a", method="mse", by_layer=[("camera.*", "max")])
    calibrate_checkpoint(Source(**files), options, tmp_path / "m.pth")
    assert load_ptq(tmp_path / "m.pth")[1]["by_layer"] == [["camera.*", "max"]]


def test_auto_is_a_method_for_each_part(files, data, tmp_path):
    """What the user names goes before it."""
    for method in ("auto", "mse", "max"):
        calibrate_checkpoint(Source(**files), CalibrateOptions(data, "a", method=method), tmp_path / f"{method}.pth")
    asked = [("head.quant_x", "mse")]
    calibrate_checkpoint(Source(**files), CalibrateOptions(data, "a", by_layer=asked), tmp_path / "asked.pth")
    auto, mse, widest, named = (
        torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("auto", "mse", "max", "asked")
    )
    assert auto["recipe"]["method"] == "auto" and mse["recipe"]["by_layer"] == []
    for name, amax in auto["amax"].items():
        other = mse if name.startswith(("camera.", "vtransform.")) and "_dtransform_" not in name else widest
        assert torch.equal(amax, other["amax"][name]), name
    assert any(not torch.equal(mse["amax"][name], widest["amax"][name]) for name in mse["amax"] if "decoder." in name)
    assert "head.quant_x" not in named["equalized"]
    assert named["amax"]["head.quant_x"] < widest["amax"]["head.quant_x"]


@pytest.mark.parametrize(("count", "equalized"), [(2, False), (3, True)])
def test_channels_are_not_equalized_on_one_or_two_frames(tiny_model, tiny_frames, count, equalized):
    """What they leave small may be large on the next (case 15)."""
    skew = 2.0 ** -torch.linspace(0, 7, tiny_model.vtransform.C)
    with torch.no_grad():
        last = [m for m in tiny_model.vtransform.downsample.modules() if isinstance(m, torch.nn.BatchNorm2d)][-1]
        last.weight.mul_(skew)
        last.bias.mul_(skew)
    assert bool(calibrate(tiny_model, tiny_frames[:count])[0].equalized) == equalized


def test_layers_kept_float_by_a_pattern_are_listed_with_its_reason_and_stay_so_in_every_flavour(
    files, data, tmp_path, capsys
):
    flags = ["--config", files["config"], "--ckpt", files["checkpoint"], "--data", data, "--split", "a"]
    flags += ["--out", tmp_path / "ptq.pth", "--keep-float", "encoders.camera.neck.*=the neck is small"]
    assert main(["calibrate", *map(str, flags), "--keep-float", "*.layer1.0.conv1"]) == 0
    assert "the neck is small" in capsys.readouterr().out
    found = inspect_checkpoint(tmp_path / "ptq.pth")
    reasons = {f.name: f.reason for f in found.floats if f.rule == "keep_float" and not f.flavours}
    assert reasons.pop("encoders.camera.vtransform.dtransform.0").startswith("its input is raw metres")
    assert reasons.pop("encoders.camera.backbone.layer1.0.conv1") == "requested with keep_float"
    assert reasons and set(reasons.values()) == {"the neck is small"} and all(".neck." in name for name in reasons)
    assert not {layer.path for layer in found.layers} & set(reasons)


def test_a_pattern_that_fits_no_layer_is_one_line(files, data, tmp_path):
    with pytest.raises(UserError, match=r"keep-float nothing\.\*: matches no layer's path"):
        calibrate_checkpoint(
            Source(**files), CalibrateOptions(data, "a", keep_float=["nothing.*"]), tmp_path / "ptq.pth"
        )
    assert not (tmp_path / "ptq.pth").exists()
