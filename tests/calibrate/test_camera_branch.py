"""The camera branch of a camera+lidar model through the calibration stage."""

import json

import pytest
import torch
import yaml

from qat.calibrate import load_ptq
from qat.calibrate.checkpoint import load_float_reference
from qat.calibrate.finetune import FinetuneOptions, finetune
from qat.calibrate.inspection import inspect_checkpoint
from qat.calibrate.job import calibrate_checkpoint, print_summary
from qat.calibrate.options import BudgetOptions, CalibrateOptions
from qat.cli import main
from qat.compare.health import check_detector
from qat.compare.rows import Sources, load_rows
from qat.core.errors import UserError
from qat.core.tensors import compare_tensors
from qat.data.synth import SynthOptions, generate
from qat.engine import Options
from qat.families.bevfusion.config import is_camera_branch, load_config
from qat.families.bevfusion.training.loop import TrainOptions, train
from qat.model.opening import Source
from qat.model.runners import run_frame


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    options = SynthOptions(scenes=1, seed=5, keyframes=2, width=192, height=128, azimuths=60, sweeps=0, splits={"a": 1})
    return generate(tmp_path_factory.mktemp("branch") / "set", options, quiet=True)


@pytest.fixture(scope="module")
def ptq(tmp_path_factory):
    """Where `calibrated` writes its checkpoint."""
    return tmp_path_factory.mktemp("branch") / "ptq.pth"


@pytest.fixture(scope="module")
def calibrated(fusion_files, data, ptq):
    """What nothing may change."""
    return calibrate_checkpoint(Source(**fusion_files, prefix="encoders.camera"), CalibrateOptions(data, "a"), ptq)


def features(model, frame):
    with torch.inference_mode():
        maps = run_frame(model, frame)
    return maps["feat_out"]


def test_the_branch_is_calibrated_and_reloads_bit_identical(calibrated, ptq, tiny_frames, capsys):
    model, recipe = load_ptq(ptq)  # by the file alone: it remembers that it is a branch
    assert is_camera_branch(model.config) and list(model.parts) == ["camera", "vtransform"]
    assert recipe["branch"] == {"prefix": "encoders.camera", "left_out": 6}
    assert recipe["method"] == "auto" and recipe["default_method"] == "mse"
    assert recipe["by_layer"] == [["camera.*_dtransform_*", "max"]]
    assert all(torch.equal(model.amax()[name], amax) for name, amax in calibrated.model.amax().items())
    for frame in tiny_frames:
        assert torch.equal(features(model, frame), features(calibrated.model, frame))
    reference, floats = load_float_reference(ptq)
    expected = features(floats, tiny_frames[0])
    assert compare_tensors(expected.numpy(), features(reference, tiny_frames[0]).numpy())["sqnr_db"] > 80
    assert compare_tensors(expected.numpy(), features(model, tiny_frames[0]).numpy())["sqnr_db"] > 10
    print_summary(calibrated)
    assert "6 tensors of the checkpoint are outside 'encoders.camera'" in " ".join(capsys.readouterr().out.split())


def test_the_branchs_ranges_are_those_of_the_whole_detector(
    calibrated, make_tiny_model, tiny_config, data, tmp_path, fusion_files
):
    """What lies behind the branch has no say in it."""
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(tiny_config))
    torch.save(make_tiny_model().state_dict(), tmp_path / "whole.pth")
    source = Source(tmp_path / "whole.pth", tmp_path / "whole.yaml")
    whole = calibrate_checkpoint(source, CalibrateOptions(data, "a"), tmp_path / "whole_ptq.pth")
    wanted = whole.model.amax()
    assert set(calibrated.model.amax()) == {n for n in wanted if n.startswith(("camera.", "vtransform."))}
    assert all(torch.equal(wanted[name], amax) for name, amax in calibrated.model.amax().items())


def test_a_branch_saved_by_itself_is_taken_with_an_empty_prefix(calibrated, fusion_files, data, tmp_path):
    state = torch.load(fusion_files["checkpoint"], weights_only=True)["state_dict"]
    camera = {n.removeprefix("encoders.camera."): t for n, t in state.items() if n.startswith("encoders.camera.")}
    torch.save(camera, tmp_path / "camera.pth")
    arguments = ["--config", fusion_files["config"], "--ckpt", tmp_path / "camera.pth", "--prefix", ""]
    arguments += ["--data", data, "--split", "a", "--out", tmp_path / "own.pth"]
    assert main(["calibrate", *map(str, arguments)]) == 0
    own = load_ptq(tmp_path / "own.pth")[0]
    assert all(torch.equal(amax, calibrated.model.amax()[name]) for name, amax in own.amax().items())


def test_sensitivity_inspect_and_health_know_the_branch_by_its_checkpoint(calibrated, ptq, data, tmp_path, capsys):
    path, flags = str(ptq), ["--data", str(data), "--split", "a", "--frames", "1"]
    assert main(["sensitivity", path, *flags, "--out", str(tmp_path / "s")]) == 0
    found = json.loads((tmp_path / "s" / "sensitivity.json").read_text())
    assert found["together"]["sqnr_db"].keys() == {"bev"} and found["units"]
    figures = [unit["sqnr_db"]["bev"] for unit in found["units"]]
    assert figures == sorted(figures) and found["together"]["sqnr_db"]["bev"] <= figures[0] + 1
    assert sum(unit["macs_share"] for unit in found["units"]) == pytest.approx(found["together"]["macs_share"], 1e-4)
    assert main(["health", path, *flags]) == 0
    assert "every layer is finite on 1 frames" in capsys.readouterr().out
    assert main(["inspect", path]) == 0
    assert {group.part for group in inspect_checkpoint(path).groups} == {"camera", "vtransform"}


def test_health_checks_the_branch_of_a_float_checkpoint(fusion_files, data, capsys):
    command = ["health", str(fusion_files["checkpoint"]), "--config", str(fusion_files["config"]), "--data", str(data)]
    assert main([*command, "--split", "a", "--prefix", "encoders.camera"]) == 0
    assert "every layer is finite on 2 frames" in capsys.readouterr().out
    assert main([*command, "--split", "a"]) == 2
    assert "--prefix encoders.camera" in capsys.readouterr().err


def test_a_spoilt_branch_is_named_by_health(calibrated, ptq, tiny_frames):
    assert check_detector(calibrated.model, tiny_frames).first is None
    spoilt, _ = load_ptq(ptq)
    with torch.no_grad():
        layer = spoilt.parts["vtransform"].get_submodule("encoders.camera.vtransform.downsample.6")
        layer.bias[0] = float("nan")
    where = check_detector(spoilt, tiny_frames).first.where
    assert where == "parts.vtransform.encoders.camera.vtransform.downsample.6"


def test_finetune_trains_the_branch_on_its_features(calibrated, ptq, data, tmp_path, tiny_frames):
    """Augmented frames: there are no object_classes, and the boxes that are moved with a frame are none."""
    options = FinetuneOptions(steps=2, batch=2, lr=1e-3, warmup=1)
    result = finetune(ptq, [(data, "a")], tmp_path / "qat", options, log=lambda _: None)
    assert {"image", "bev"} <= result.history[-1].keys() and not {"heat", "box"} & result.history[-1].keys()
    trained = load_ptq(result.checkpoint)[0]
    assert is_camera_branch(trained.config)
    assert not torch.equal(features(trained, tiny_frames[0]), features(calibrated.model, tiny_frames[0]))


def test_what_needs_boxes_is_refused_in_one_line(calibrated, ptq, fusion_files, data, tmp_path, capsys):
    path = ptq
    flags = ["--data", str(data), "--split", "a"]
    assert main(["sensitivity", str(path), *flags, "--metric", "map", "--out", str(tmp_path / "s")]) == 2
    train_on, held_out = ["--data", f"{data}:a"], ["--held-out", f"{data}:a"]
    assert main(["finetune", "--ckpt", str(path), *train_on, *held_out, "--out", str(tmp_path / "f")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: --") and "no boxes" in line for line in lines)
    with pytest.raises(UserError, match="--budget: found a camera branch"):
        budget = BudgetOptions(0.001, data, "a", lambda _: pytest.fail("the metric was asked for"))
        options = CalibrateOptions(data, "a", budget=budget)
        calibrate_checkpoint(Source(**fusion_files, prefix="encoders.camera"), options, tmp_path / "b.pth")
    assert not (tmp_path / "b.pth").exists()
    with pytest.raises(UserError, match=r"ptq\.pth: found a camera branch"):
        load_rows(Sources(fusion_files["checkpoint"], path, [], []), ["onnxruntime"], Options())
    with pytest.raises(UserError, match="train: found a camera branch"):
        train(load_config(fusion_files["config"], "camera"), [], tmp_path / "t", TrainOptions())


@pytest.mark.parametrize(("prefix", "message"), [("encoders.cam", "expected 'encoders.camera'"), (None, "--prefix")])
def test_a_prefix_that_is_wrong_or_forgotten_is_told(fusion_files, data, tmp_path, prefix, message):
    with pytest.raises(UserError, match=message):
        calibrate_checkpoint(Source(**fusion_files, prefix=prefix), CalibrateOptions(data, "a"), tmp_path / "p.pth")
    assert not (tmp_path / "p.pth").exists()
