"""The calibration command: methods by layer, and several processes that end with one process's ranges."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from qat.calibrate import calibrate, load_ptq
from qat.calibrate.job import calibrate_checkpoint
from qat.core.errors import UserError
from qat.data.synth import SynthOptions, generate

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
        calibrate_checkpoint(**files, data=data, split="a", out=tmp_path / "one.pth")
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
    calibrate_checkpoint(
        **files, data=data, split="a", out=tmp_path / "m.pth", method="mse", by_layer=[("camera.*", "max")]
    )
    assert load_ptq(tmp_path / "m.pth")[1]["by_layer"] == [["camera.*", "max"]]


def test_auto_is_a_method_for_each_part(files, data, tmp_path):
    """What the user names goes before it."""
    for method in ("auto", "mse", "max"):
        calibrate_checkpoint(**files, data=data, split="a", out=tmp_path / f"{method}.pth", method=method)
    asked = [("head.quant_x", "mse")]
    calibrate_checkpoint(**files, data=data, split="a", out=tmp_path / "asked.pth", by_layer=asked)
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
