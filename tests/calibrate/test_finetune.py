"""QAT: losses, gradients through rounding, resuming, several processes, and the checkpoint that comes of it."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qat.calibrate import calibrate, load_ptq, save_ptq
from qat.calibrate import finetune as stage
from qat.calibrate.checkpoint import load_float_reference
from qat.calibrate.finetune import FinetuneOptions, finetune, learning_rate
from qat.cli import main
from qat.core.errors import UserError
from qat.core.tensors import compare_tensors
from qat.data import NuScenesDataset
from qat.data.synth import SynthOptions, generate
from qat.families.bevfusion.augment import AugmentedSet
from qat.families.bevfusion.distill import (
    box_loss,
    distillation_losses,
    heat_loss,
    relative_error,
)
from qat.families.bevfusion.family import BEVFusionFamily
from qat.families.bevfusion.recipe import KEEP_FLOAT
from qat.lean.learn import learn_ranges, refresh_weight_ranges, settle_ranges, trained_parameters
from qat.lean.modes import quantizers
from qat.lean.quantizer import Quantizer, input_quantizer
from qat.manifest import load_manifest
from qat.model.quantized import QuantizedModel
from qat.model.runners import run_frame, torch_feeds, torch_runners
from qat.plan import run as run_plan
from tests.messages import refused

ROOT = Path(__file__).resolve().parents[2]
FEW = FinetuneOptions(steps=4, batch=2, lr=1e-3, warmup=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    options = SynthOptions(scenes=1, seed=5, keyframes=3, width=192, height=128, azimuths=60, sweeps=0, splits={"a": 1})
    return generate(tmp_path_factory.mktemp("finetune") / "set", options, quiet=True)


@pytest.fixture(scope="module")
def ptq(tmp_path_factory, make_tiny_model, tiny_config, data):
    """A PTQ checkpoint; nothing may change it."""
    model = make_tiny_model()
    quantized, _ = calibrate(model, NuScenesDataset(data, "a", tiny_config), "max")
    path = tmp_path_factory.mktemp("finetune") / "ptq.pth"
    save_ptq(path, quantized, model, {"method": "max", "float_checkpoint": {"file": "f.pth", "sha256": "12ab"}})
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """Convolutions on another number of threads round otherwise."""
    with on_one_thread():
        yield


@contextmanager
def on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(ptq, data, out, options=FEW):
    return finetune(ptq, [(data, "a")], out, options, log=lambda _: None)


@pytest.fixture(scope="module")
def trained(ptq, data, tmp_path_factory):
    """A run with the options `FEW`; nothing may change its folder."""
    with on_one_thread():
        return run(ptq, data, tmp_path_factory.mktemp("finetune") / "out")


def outputs(model, data, index=0):
    sample = NuScenesDataset(data, "a", model.config)[index]
    return run_frame(model, sample)


def losses(ptq, model, data):
    with torch.no_grad():
        return distillation_losses(outputs(model, data), outputs(load_float_reference(ptq)[0], data), 1)


def saved(path):
    return torch.load(path, weights_only=True)


def assert_same_weights(one, two):
    one, two = saved(one), saved(two)
    for name in ("weights", "amax", "state_dict"):
        assert one[name].keys() == two[name].keys()
        assert all(torch.equal(one[name][key], two[name][key]) for key in one[name]), name


def test_relative_error_is_the_inverse_of_sqnr():
    rng = np.random.default_rng(0)
    wanted = rng.normal(0, 3, (2, 5, 7)).astype(np.float32)
    found = wanted + rng.normal(0, 0.1, wanted.shape).astype(np.float32)
    errors = relative_error(torch.from_numpy(found), torch.from_numpy(wanted), 2)
    for error, a, b in zip(errors, wanted, found, strict=True):
        assert -10 * math.log10(error) == pytest.approx(compare_tensors(a, b)["sqnr_db"], abs=1e-3)


def test_heat_that_is_missed_and_heat_that_appears_both_cost():
    wanted = torch.full((1, 2, 4, 4), -6.0)
    wanted[0, 0, 1, 1] = 2.0
    assert heat_loss(wanted, wanted).item() == pytest.approx(0, abs=1e-6)
    missed, appeared, far_off = wanted.clone(), wanted.clone(), wanted.clone()
    missed[0, 0, 1, 1] = -6.0
    appeared[0, 1, 3, 3] = 2.0
    far_off[0, 1] = -9.0  # as empty as before
    same = heat_loss(far_off, wanted).item()
    assert heat_loss(missed, wanted).item() > 100 * same
    assert heat_loss(appeared, wanted).item() > 100 * same


def test_the_box_maps_count_where_the_teacher_sees_something():
    heatmap = torch.full((1, 1, 4, 4), -20.0)
    heatmap[0, 0, 2, 1] = 20.0
    wanted = {"heatmap": heatmap, "reg": torch.zeros(1, 2, 4, 4), "vel": torch.zeros(1, 2, 4, 4)}
    found = {name: x.clone() for name, x in wanted.items()}
    found["reg"][0, :, 0, 0] = 5.0
    assert box_loss(found, wanted).item() == pytest.approx(0, abs=1e-6)
    found["reg"][0, 0, 2, 1], found["vel"][0, 1, 2, 1] = 0.3, -1.0
    assert box_loss(found, wanted).item() == pytest.approx(0.3 + 0.2 * 1.0, rel=1e-4)


def test_losses_of_a_batch_are_the_mean_of_its_frames():
    """So that processes which share a batch end with its loss."""
    torch.manual_seed(0)

    def some(frames):
        maps = {"heatmap": torch.randn(frames, 2, 4, 4), "reg": torch.randn(frames, 2, 4, 4)}
        return {
            "camera_depth_weights": torch.rand(frames * 3, 5, 2, 2),
            "camera_feature": torch.randn(frames * 3, 2, 2, 4),
            "middle": torch.randn(frames, 6, 4, 4),
            **{f"{name}_0": value for name, value in maps.items()},
        }

    def frame(o, k):
        return {name: x[3 * k : 3 * k + 3] if name.startswith("camera") else x[k : k + 1] for name, x in o.items()}

    student, teacher = some(2), some(2)
    together = distillation_losses(student, teacher, 2)
    apart = [distillation_losses(frame(student, k), frame(teacher, k), 1) for k in range(2)]
    for name, value in together.items():
        assert torch.isclose(value, (apart[0][name] + apart[1][name]) / 2), name


def test_the_rate_rises_and_falls_as_a_cosine():
    options = FinetuneOptions(steps=100, lr=2.0, warmup=10)
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and np.argmax(rates) == 9
    assert rates[50] == pytest.approx(1.0) and rates[99] < 1e-3 * 2


def test_rounding_passes_gradients_inside_its_range_alone():
    quantizer = input_quantizer()
    quantizer.set_range(torch.tensor(1.0))
    x = torch.tensor([-3.0, -0.5, 0.2, 0.99, 1.5], requires_grad=True)
    quantizer(x).backward(torch.arange(1.0, 6.0))
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]


def test_a_learned_range_has_lsqs_gradient_and_settles_to_a_plain_one():
    torch.manual_seed(0)
    quantizer = input_quantizer()
    quantizer.set_range(torch.tensor(1.5))
    x = torch.randn(400) * 1.2
    learned = quantizer.learn_range()
    found = quantizer(x)
    found.sum().backward()
    scale = 1.5 / 127
    level = x / scale
    inside = (level.round() >= -128) & (level.round() <= 127)
    slope = torch.where(inside, level.round() - level, level.clamp(-128, 127))  # Esser et al., eq. 3
    expected = slope.sum() / math.sqrt(400 * 127) * scale * math.log(2)  # by log2 of the range
    assert learned.grad.item() == pytest.approx(expected.item(), rel=1e-3)
    quantizer.settle_range()
    assert not list(quantizer.parameters()) and quantizer._amax.item() == pytest.approx(1.5)
    assert torch.allclose(quantizer(x), found.detach())


def test_gradients_reach_every_weight(ptq, data):
    """Those of INT8 layers through their rounding, and those of layers that stay float."""
    student, _ = load_ptq(ptq)
    parameters = trained_parameters(student)
    found = distillation_losses(outputs(student, data), outputs(load_float_reference(ptq)[0], data), 1)
    torch.stack(list(found.values())).sum().backward()
    assert len(parameters) == len({id(p) for p in student.parts.parameters()})
    without = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
    assert not without
    assert any("dtransform" in name for name in parameters) and any(
        name.startswith("vtransform.") for name in parameters
    )


def test_the_losses_fall(make_tiny_model, tiny_config, data, tmp_path):
    """With ranges so wide that rounding does harm, as long tails make them; and with the depth map's convolutions in INT8,
    which the tensorrt flavours leave float otherwise."""
    model = make_tiny_model()
    network = QuantizedModel(model, KEEP_FLOAT[:1])
    quantized, _ = calibrate(network, NuScenesDataset(data, "a", tiny_config), "max")
    save_ptq(tmp_path / "int8.pth", quantized, model, {"method": "max"})
    checkpoint = saved(tmp_path / "int8.pth")
    for name, amax in checkpoint["amax"].items():
        if name.startswith("decoder.") and not name.endswith("weight_quantizer"):
            amax *= 8
    coarse = tmp_path / "coarse.pth"
    torch.save(checkpoint, coarse)
    before = losses(coarse, load_ptq(coarse)[0], data)
    result = run(coarse, data, tmp_path / "out", replace(FEW, steps=20, lr=3e-5, augment=False))
    after = losses(coarse, load_ptq(result.checkpoint)[0], data)
    for name in ("bev", "heat", "box"):
        assert after[name] < 0.95 * before[name], name
    assert result.history[-1]["step"] == 20


def test_layers_that_stay_float_train_too(ptq, trained):
    before, after = load_ptq(ptq)[0].weights(), load_ptq(trained.checkpoint)[0].weights()
    for what in ("dtransform", "vtransform.", "depthnet", "heatmap"):
        names = [name for name in before if what in name and name.endswith("weight")]
        assert names and all(not torch.equal(before[name], after[name]) for name in names), what


def test_the_teacher_never_changes(ptq, trained, data, tmp_path):
    """Nor does the float network in the checkpoint, from which a further run takes its teacher."""
    one, two = saved(ptq), saved(trained.checkpoint)
    assert all(torch.equal(one["state_dict"][name], x) for name, x in two["state_dict"].items())
    again = run(trained.checkpoint, data, tmp_path / "again", replace(FEW, steps=1))
    teachers = [
        outputs(load_float_reference(path)[0], data)["middle"] for path in (ptq, trained.checkpoint, again.checkpoint)
    ]
    assert torch.equal(teachers[0], teachers[1]) and torch.equal(teachers[0], teachers[2])
    assert again.recipe["float_checkpoint"] == {"file": "f.pth", "sha256": "12ab"}


def test_a_reload_in_a_new_process_gives_identical_bytes(trained, data, tmp_path):
    path = trained.checkpoint
    model, recipe = load_ptq(path)
    assert saved(path)["schema"] == 3 and recipe["finetune"]["steps"] == 4
    sample = NuScenesDataset(data, "a", model.config)[0]
    inputs = {"img": torch.from_numpy(sample.img), "depth": torch.from_numpy(sample.depth)}
    torch.save(inputs, tmp_path / "inputs.pth")
    with torch.no_grad():
        here = model.parts["camera"](inputs["img"], inputs["depth"])
    script = (
        "import torch; torch.set_num_threads(1); from qat.calibrate import load_ptq; "
        f"m, _ = load_ptq(r'{path}'); x = torch.load(r'{tmp_path / 'inputs.pth'}', weights_only=True); "
        f"torch.save(m.parts['camera'](x['img'], x['depth']).detach(), r'{tmp_path / 'out.pth'}')"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    assert torch.equal(saved(tmp_path / "out.pth"), here)


def test_what_is_saved_is_what_was_trained(ptq, data, tmp_path):
    """The reloaded network and the student in memory compute the same."""
    state = stage._State(ptq, FEW, torch.device("cpu"))
    with torch.no_grad():
        for parameter in state.parameters.values():
            parameter.mul_(1.01)
    state.settle()
    save_ptq(tmp_path / "qat.pth", state.student, load_float_reference(ptq)[1], state.recipe, trained=True)
    with torch.no_grad():
        one, two = outputs(state.student, data), outputs(load_ptq(tmp_path / "qat.pth")[0], data)
    assert torch.equal(one["middle"], two["middle"]) and torch.equal(one["heatmap_0"], two["heatmap_0"])


def test_trained_weights_of_another_network_are_refused(ptq, data, tmp_path):
    path = run(ptq, data, tmp_path / "out", replace(FEW, steps=1)).checkpoint
    checkpoint = saved(path)
    checkpoint["weights"].popitem()
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="weights differ"):
        load_ptq(path)
    torch.save({**checkpoint, "schema": 4}, path)
    with pytest.raises(UserError, match="found schema 4, expected 1 or 2 or 3"):
        load_ptq(path)


def test_weights_ranges_are_those_of_the_trained_weights(ptq, trained):
    model, _ = load_ptq(trained.checkpoint)
    before = load_ptq(ptq)[0].amax()
    count = 0
    for name, amax in model.amax().items():
        if name.endswith("weight_quantizer"):
            layer = model.parts.get_submodule(name.rpartition(".")[0])
            axis = 1 if isinstance(layer, torch.nn.ConvTranspose2d) else 0
            assert torch.equal(amax.flatten(), layer.weight.detach().transpose(0, axis).flatten(1).abs().amax(1)), name
            count += not torch.equal(amax, before[name])
        else:
            assert torch.equal(amax, before[name]), name  # fixed unless they are learned
    assert count > 20


def test_learned_ranges_move_and_are_saved_as_plain_ones(ptq, data, tmp_path):
    result = run(ptq, data, tmp_path / "out", replace(FEW, learn_ranges=True, range_lr=1e-2))
    before, model = load_ptq(ptq)[0], load_ptq(result.checkpoint)[0]
    on = [name for name, q in before.activation_quantizers().items() if not q._disabled]
    off = [name for name, q in before.activation_quantizers().items() if q._disabled]
    moved = [name for name in on if not torch.equal(before.amax()[name], model.amax()[name])]
    assert len(moved) == len(on) and off
    assert all(torch.equal(before.amax()[name], model.amax()[name]) for name in off)
    assert not [name for name in model.state_dict() if name.endswith(Quantizer.LEARNED)]


def test_learning_ranges_changes_next_to_nothing_before_the_first_step(ptq, data):
    """A range and its logarithm's power differ by the last bit, which moves a value to its other step here and there."""
    student, _ = load_ptq(ptq)
    with torch.no_grad():
        plain = outputs(student, data)["middle"]
        assert learn_ranges(student)
        assert relative_error(outputs(student, data)["middle"], plain, 1).item() < 0.01
        settle_ranges(student)
        refresh_weight_ranges(student)
        assert relative_error(outputs(student, data)["middle"], plain, 1).item() < 0.01


def test_the_average_of_weights_is_what_is_saved(ptq, data, tmp_path, monkeypatch):
    steps = []
    update = stage._State.update_ema

    def noting(state, decay):
        update(state, decay)
        steps.append({name: p.detach().clone() for name, p in state.parameters.items()})

    monkeypatch.setattr(stage._State, "update_ema", noting)
    result = run(ptq, data, tmp_path / "out", replace(FEW, ema=0.25))
    start = load_ptq(ptq)[0]
    start.absorb_background()  # what is corrected is trained on from there
    expected = dict(start.parts.named_parameters())
    found = load_ptq(result.checkpoint)[0].weights()
    for name, first in expected.items():
        average = first.detach()
        for count, parameters in enumerate(steps, 1):
            decay = min(0.25, count / (count + 10))
            average = decay * average + (1 - decay) * parameters[name]
        assert torch.allclose(found[name], average, atol=1e-6), name
    assert any(not torch.allclose(found[name], steps[-1][name], atol=1e-6) for name in expected)


@pytest.mark.parametrize("options", [FEW, replace(FEW, ema=0.9, learn_ranges=True)])
def test_a_killed_run_resumes_to_the_same_bytes(ptq, trained, data, tmp_path, monkeypatch, options):
    whole = trained if options == FEW else run(ptq, data, tmp_path / "whole", options)
    options = replace(options, save_seconds=0)
    step, done = stage._step, []

    def killed(*args):
        if len(done) == 2:
            raise RuntimeError("killed")
        done.append(1)
        return step(*args)

    monkeypatch.setattr(stage, "_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(ptq, data, tmp_path / "killed", options)
    assert saved(tmp_path / "killed" / "resume.pth")["step"] == 2
    monkeypatch.setattr(stage, "_step", step)
    again = run(ptq, data, tmp_path / "killed", options)
    assert_same_weights(whole.checkpoint, again.checkpoint)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_the_step_that_it_fell_into(ptq, trained, data, tmp_path, monkeypatch, number):
    step, done = stage._step, []

    def interrupted(*args):
        done.append(1)
        if len(done) == 2:
            os.kill(os.getpid(), number)
        return step(*args)

    monkeypatch.setattr(stage, "_step", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run(ptq, data, tmp_path / "stopped")
    assert signal.getsignal(number) is before
    assert saved(tmp_path / "stopped" / "resume.pth")["step"] in (2, 3)
    assert_same_weights(trained.checkpoint, run(ptq, data, tmp_path / "stopped").checkpoint)


def test_a_finished_run_does_nothing_more(ptq, trained, data, tmp_path, monkeypatch):
    out = shutil.copytree(trained.checkpoint.parent, tmp_path / "out")
    before = (out / "qat.pth").stat().st_mtime_ns
    monkeypatch.setattr(stage, "_train", None)
    monkeypatch.setattr(stage, "save_ptq", None)
    assert run(ptq, data, out).checkpoint.stat().st_mtime_ns == before


def test_a_checkpoint_of_an_earlier_run_is_not_taken_for_this_ones(ptq, data, tmp_path, monkeypatch):
    """Killed between its last step and its checkpoint, in a folder where an earlier run had left one."""
    earlier = run(ptq, data, tmp_path / "out", replace(FEW, steps=1))
    (tmp_path / "out" / "resume.pth").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(stage, "save_ptq", None)
        with pytest.raises(TypeError):
            run(ptq, data, tmp_path / "out")
    assert load_ptq(earlier.checkpoint)[1]["finetune"]["steps"] == 1
    assert load_ptq(run(ptq, data, tmp_path / "out").checkpoint)[1]["finetune"]["steps"] == 4


def test_what_another_run_left_is_refused(ptq, data, tmp_path, capsys):
    run(ptq, data, tmp_path / "out", replace(FEW, steps=1))
    with refused("another lr", "found 0.001", "expected 0.002", "remove it or choose another --out"):
        run(ptq, data, tmp_path / "out", replace(FEW, steps=1, lr=2e-3))
    (tmp_path / "out" / "resume.pth").write_bytes(b"half a file")
    with pytest.raises(UserError, match="damaged, or of another version"):
        run(ptq, data, tmp_path / "out", replace(FEW, steps=1))


def torchrun(ptq, data, out, *more):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "qat/finetune.py",
    ]
    command += ["--ckpt", ptq, "--data", f"{data}:a", "--out", out, "--lr", "1e-3", "--warmup", "1", *more]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_two_processes_have_the_gradient_of_one(ptq, data, tmp_path):
    """A batch of two frames, one for each process: their gradients are averaged. (A convolution of one frame rounds
    other than of two, which moves a value to its other step here and there; hence not to the last bit.)"""

    def gradient(out):
        state = saved(out / "resume.pth")["optimizer"]["state"]  # AdamW's first average after one step: a tenth of it
        return torch.cat([state[key]["exp_avg"].flatten() for key in sorted(state)])

    run(ptq, data, tmp_path / "one", replace(FEW, steps=1))
    run(ptq, data, tmp_path / "half", replace(FEW, steps=1, batch=1))
    result = torchrun(ptq, data, tmp_path / "two", "--steps", "1", "--batch", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("qat.pth") == 1 and result.stdout.count("step 1/1") == 1  # rank 0 alone prints
    one, two, half = (gradient(tmp_path / name) for name in ("one", "two", "half"))
    assert (two - one).norm() < 0.02 * one.norm() < (half - one).norm()
    history = [json.loads((tmp_path / name / "history.json").read_text())["history"][0] for name in ("one", "two")]
    assert history[0] == pytest.approx(history[1], rel=0.02)


@pytest.mark.nightly  # 10 to 20 CPU seconds: test_distributed.py has a short one
def test_a_batch_that_the_processes_cannot_share_is_told_once(ptq, data, tmp_path):
    result = torchrun(ptq, data, tmp_path / "two", "--batch", "3")
    assert result.returncode != 0 and not (tmp_path / "two").exists()
    assert result.stderr.count("error: --batch: found 3 frames for 2 processes, expected a multiple of 2") == 1


@pytest.mark.nightly  # 10 to 20 CPU seconds: test_distributed.py has a short one
def test_a_frame_that_one_process_cannot_read_ends_all_with_one_line(ptq, data, tmp_path):
    broken = shutil.copytree(data, tmp_path / "set")
    dataset = NuScenesDataset(broken, "a", load_ptq(ptq)[0].config)
    image = dataset.nusc.get("sample", dataset.tokens[1])["data"]["CAM_FRONT"]
    (broken / dataset.nusc.get("sample_data", image)["filename"]).write_bytes(b"no picture")
    result = torchrun(ptq, broken, tmp_path / "out", "--no-augment", "--steps", "3")
    assert result.returncode != 0 and not (tmp_path / "out" / "qat.pth").exists()
    assert result.stderr.count("error: ") == 1 and "CAM_FRONT" in result.stderr


def test_bfloat16_layers_train_float32_weights(ptq, data):
    """What autocast does on a GPU, on the CPU: rounding and pooling stay float32."""
    student, _ = load_ptq(ptq)
    parameters = trained_parameters(student)
    teacher, _ = load_float_reference(ptq)
    sample = NuScenesDataset(data, "a", student.config)[0]
    runners = torch_runners(student, lambda: torch.autocast("cpu", torch.bfloat16))
    found = run_plan(student.plan, runners, torch_feeds(student, student.flow.feeds([sample])))
    assert found["middle"].dtype == found["camera_feature"].dtype == torch.float32
    torch.stack(list(distillation_losses(found, outputs(teacher, data), 1).values())).sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in parameters.values())
    assert relative_error(found["middle"], outputs(student, data)["middle"], 1).item() < 0.05


def test_a_trained_checkpoint_exports_and_agrees_with_its_simulation(trained, tmp_path):
    path = shutil.copy(trained.checkpoint, tmp_path)
    assert main(["export-camera", "--ckpt", str(path)]) == 0
    manifest = load_manifest(tmp_path / "onnx_int8")
    assert manifest["verification"]["passed"] and manifest["calibration"]["finetune"]["steps"] == 4
    assert manifest["parts"]["fuser"]["operators"]["QuantizeLinear"] > 0
    assert main(["export-camera", "--ckpt", str(path), "--fp16"]) == 0


def test_fp32_parts_of_a_trained_checkpoint_are_the_float_networks(ptq, trained, tmp_path):
    """Weights that were trained for rounding, and scales that serve it, have no place in them."""
    for checkpoint, out in ((ptq, "before"), (trained.checkpoint, "after")):
        assert main(["export-camera", "--ckpt", str(checkpoint), "--fp32", "--out", str(tmp_path / out)]) == 0
    for part in load_manifest(tmp_path / "before")["parts"].values():
        assert (tmp_path / "before" / part["file"]).read_bytes() == (tmp_path / "after" / part["file"]).read_bytes()
        assert "Mul" not in part["operators"]


def test_other_verbs_take_a_trained_checkpoint(trained, data, tmp_path, capsys):
    path = str(trained.checkpoint)
    assert main(["inspect", path]) == 0
    frames = ["--data", str(data), "--split", "a", "--frames", "1"]
    assert main(["health", path, *frames, "--saturation", "0.9"]) == 0
    assert main(["sensitivity", path, *frames, "--out", str(tmp_path / "s")]) == 0


def test_the_command_trains_and_measures(ptq, data, tmp_path, capsys):
    arguments = ["finetune", "--ckpt", str(ptq), "--data", f"{data}:a", "--data", f"{data}:a", "--no-augment"]
    arguments += ["--steps", "1", "--held-out", f"{data}:a", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "step 1/1 image" in text and "float mAP" in text and "qat   mAP" in text
    assert (tmp_path / "out" / "metrics.json").is_file() and (tmp_path / "out" / "history.json").is_file()
    assert load_ptq(tmp_path / "out" / "qat.pth")[1]["finetune"]["keyframes"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "--data: found 'nowhere', expected ROOT:SPLIT"),
        (["--data", "DATA:b"], "split 'b' not found"),
        (["--data", "DATA:a", "--batch", "4"], "--batch: found 4, --data has 3 keyframes"),
        (["--data", "DATA:a", "--lr", "0"], "--lr: found 0.0, expected above 0 and at most 1"),
        (["--data", "DATA:a", "--ema", "1"], "--ema: found 1.0, expected at least 0 and at most 0.99999"),
        (["--data", "DATA:a", "--clip", "inf"], "--clip: found inf, expected above 0"),
        (["--data", "DATA:a", "--seed", "-1"], "--seed: found -1, expected at least 0"),
        (["--data", "DATA:a", "--heat-weight", "nan"], "--heat-weight: found nan, expected at least 0"),
        (["--data", "DATA:a", "--steps", "1", "--held-out", "DATA:b"], "split 'b' not found"),
    ],
)
def test_bad_input_is_one_line(ptq, data, tmp_path, capsys, arguments, message):
    arguments = [text.replace("DATA", str(data)) for text in arguments]
    assert main(["finetune", "--ckpt", str(ptq), *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "qat.pth").exists()


def test_a_float_checkpoint_is_refused(tiny_model, data, tmp_path, capsys):
    torch.save({"state_dict": tiny_model.state_dict()}, tmp_path / "float.pth")
    assert main(["finetune", "--ckpt", str(tmp_path / "float.pth"), "--data", f"{data}:a"]) == 2
    assert "run calibrate on it first" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_says_what_to_do(ptq, data, tmp_path, monkeypatch):
    real = BEVFusionFamily.losses
    monkeypatch.setattr(BEVFusionFamily, "losses", lambda *given: {k: v / 0 for k, v in real(*given).items()})
    with pytest.raises(UserError, match=r"not finite; run again with a lower --lr"):
        run(ptq, data, tmp_path / "out")


def test_a_frame_that_the_float_network_cannot_take_is_named(ptq, data, tmp_path, monkeypatch):
    draw = AugmentedSet.draw

    def spoilt(self, index, rng):
        sample = draw(self, index, rng)
        sample.img[0] = np.nan
        return sample

    monkeypatch.setattr(AugmentedSet, "draw", spoilt)
    with pytest.raises(UserError, match=r"frame \w+: the float network's values are not finite"):
        run(ptq, data, tmp_path / "out")


def test_a_config_without_augmentation_is_told_of_the_flag(ptq, data, tmp_path):
    checkpoint = saved(ptq)
    del checkpoint["config"]["augment2d"]
    plain = tmp_path / "plain.pth"
    torch.save(checkpoint, plain)
    with pytest.raises(UserError, match=r"found no augment2d.*--no-augment"):
        run(plain, data, tmp_path / "out")
    assert run(plain, data, tmp_path / "out", replace(FEW, steps=1, augment=False)).checkpoint.is_file()


def test_quantizers_are_as_before(ptq, data, tmp_path):
    """Which are on, and where they are, is the PTQ checkpoint's."""
    before, after = load_ptq(ptq)[0], load_ptq(run(ptq, data, tmp_path / "out", replace(FEW, steps=1)).checkpoint)[0]
    one, two = quantizers(before.parts), quantizers(after.parts)
    assert {name: q._disabled for name, q in one.items()} == {name: q._disabled for name, q in two.items()}
