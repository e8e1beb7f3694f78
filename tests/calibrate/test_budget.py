"""Mixed precision under a budget: what stays float, what it gains, and what is kept for the next run."""

import json

import numpy as np
import pytest
import torch
import yaml

from qat.calibrate import budget as module
from qat.calibrate import calibrate, load_ptq
from qat.calibrate.budget import keep_within_budget
from qat.calibrate.inspection import inspect_checkpoint
from qat.calibrate.ptq import int8_layers
from qat.calibrate.sensitivity import measure_sensitivity
from qat.cli import main
from qat.core.errors import UserError
from qat.data.synth import SynthOptions, generate
from qat.lean.modes import quantizers
from qat.model.units import only_on, units


@pytest.fixture
def quantized(tiny_model, tiny_frames):
    return calibrate(tiny_model, tiny_frames, "max")[0]


@pytest.fixture
def broken(quantized):
    """Three units whose ranges saturate nearly everything, so that each of them pays."""
    chosen = [units(quantized)[n] for n in (2, 5, -2)]
    for unit in chosen:
        quantizers(quantized.parts)[unit.name].set_range(torch.tensor(1e-3))
    return {unit.name for unit in chosen}


class Counted:
    """A metric that a unit's being on lowers by its price, and that says what was tried. It reads the detector's state
    through the scores: `run` is replaced by what is on."""

    def __init__(self, monkeypatch, model, prices):
        self.runs = 0

        def run(*_):
            self.runs += 1
            own = quantizers(model.parts)
            lost = sum(price for name, price in prices.items() if not own[name]._disabled)
            channels = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
            classes = [len(task) for task in model.config["model"]["heads"]["object"]["tasks"]]
            maps = {}
            for name in model.plan.outputs:
                kind, _, task = name.rpartition("_")
                maps[name] = torch.zeros(1, channels.get(kind, classes[int(task)]), 4, 4)
                if kind == "heatmap":
                    maps[name] -= 9.0
            maps["heatmap_0"][0, 0, 1, 1] = torch.logit(torch.tensor(0.9 - lost))
            return maps

        monkeypatch.setattr(module, "run", run)

    def __call__(self, boxes):
        return {"map": float(np.mean([max(found.scores) for found in boxes.values()])), "nds": 0.5}


def search(model, frames, budget, metric, tmp_path):
    ranking = measure_sensitivity(model, frames[:1], tmp_path / "ranking", "k")
    return keep_within_budget(model, frames, budget, metric, ranking, tmp_path / "cache", "k")


def test_only_the_units_that_pay_stay_float(quantized, broken, tiny_frames, tmp_path, monkeypatch):
    metric = Counted(monkeypatch, quantized, dict.fromkeys(broken, 0.1))
    found = search(quantized, tiny_frames, 0.05, metric, tmp_path)
    assert set(found.chosen.floats) == broken
    assert found.chosen.drop == pytest.approx(0, abs=1e-6)
    own = quantizers(quantized.parts)
    listed = {unit.name for unit in units(quantized)}
    assert not listed & broken and all(own[name]._disabled for name in broken)
    assert len(int8_layers(quantized)) < sum(name.endswith("weight_quantizer") for name in own)


def test_a_budget_for_one_leaves_the_others_int8(quantized, broken, tiny_frames, tmp_path, monkeypatch):
    metric = Counted(monkeypatch, quantized, dict.fromkeys(broken, 0.1))
    found = search(quantized, tiny_frames, 0.25, metric, tmp_path)
    assert len(found.chosen.floats) == 1 and set(found.chosen.floats) < broken
    assert found.chosen.drop == pytest.approx(0.2, abs=1e-6)
    assert max(point.drop for point in found.points) == pytest.approx(0.3, abs=1e-6)
    shares = [point.int8_share for point in found.points]
    assert shares == sorted(shares, reverse=True) and shares[-1] > 0


def test_nothing_stays_float_where_nothing_is_lost(quantized, tiny_frames, tmp_path, monkeypatch):
    metric = Counted(monkeypatch, quantized, {})
    found = search(quantized, tiny_frames, 0.0, metric, tmp_path)
    assert found.chosen.floats == [] and len(found.points) == 1
    assert all(not quantizers(quantized.parts)[name]._disabled for unit in units(quantized) for name in unit.quantizers)


def test_an_interrupted_search_runs_no_frame_twice(quantized, broken, tiny_frames, tmp_path, monkeypatch):
    metric = Counted(monkeypatch, quantized, dict.fromkeys(broken, 0.1))
    ranking = measure_sensitivity(quantized, tiny_frames[:1], tmp_path / "ranking", "k")

    def stop(boxes, limit=3):
        metric.calls = getattr(metric, "calls", 0) + 1
        if metric.calls == limit:
            raise KeyboardInterrupt
        return metric(boxes)

    with pytest.raises(KeyboardInterrupt):
        keep_within_budget(quantized, tiny_frames, 0.05, stop, ranking, tmp_path / "cache", "k")
    done = metric.runs
    found = keep_within_budget(quantized, tiny_frames, 0.05, metric, ranking, tmp_path / "cache", "k")
    assert set(found.chosen.floats) == broken
    sets = len(found.points) + 1  # and the float network
    assert done == 3 * len(tiny_frames) and metric.runs == sets * len(tiny_frames)


def test_a_convolution_left_float_is_not_rounded_by_the_other_flavour_either(quantized):
    """The onnxruntime flavour rounds outputs of convolutions before adds; the budget has not measured that."""
    own = quantizers(quantized.parts)
    outputs = {name for name, quantizer in own.items() if quantizer.role == "output"}
    outputs = {name for name in outputs if name.partition(".")[0] not in quantized.parts_off}
    with quantized.in_flavour("onnxruntime"):
        assert all(not own[name]._disabled for name in outputs)
    before = next(u for u in units(quantized) if any("conv2" in layer or "layers.1" in layer for layer in u.layers))
    for name in before.quantizers:
        own[name].off = True
    with quantized.in_flavour("onnxruntime"):
        off = {name for name in outputs if own[name]._disabled}
    assert 0 < len(off) < len(outputs)


def test_what_is_chosen_is_what_the_real_detector_gives(quantized, broken, tiny_frames, tmp_path):
    """Without any stand-in: sums of scores for a metric, the drop of the chosen set measured again by hand."""

    def metric(boxes):
        return {"score": float(sum(found.scores.sum() for found in boxes.values()))}

    found = search(quantized, tiny_frames, 1e9, metric, tmp_path)
    assert found.of == "score" and found.chosen.floats == []
    with only_on(quantized, units(quantized)):
        trial = module._Trials(
            quantized, tiny_frames, metric, dict.fromkeys([u.name for u in units(quantized)], 0.0), tmp_path / "x", "k"
        )
        assert trial.point([]).metric == found.chosen.metric
    assert trial.reference == found.reference


@pytest.mark.parametrize("budget", [-0.1, float("nan")])
def test_a_budget_below_zero_is_refused(quantized, tiny_frames, tmp_path, budget):
    with pytest.raises(UserError, match="expected 0 or more"):
        search(quantized, tiny_frames, budget, lambda boxes: {"map": 0.0}, tmp_path)


def test_the_command_leaves_a_checkpoint_a_curve_and_an_inventory(
    tmp_path, tiny_config, tiny_model, capsys, monkeypatch
):
    """A negative budget is told; with 0, whatever lowers mAP stays float, and a reload has it so."""
    options = SynthOptions(scenes=1, seed=5, keyframes=2, width=192, height=128, azimuths=60, sweeps=0, splits={"a": 1})
    data = generate(tmp_path / "set", options, quiet=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config))
    torch.save({"state_dict": tiny_model.state_dict()}, tmp_path / "float.pth")
    base = ["calibrate", "--config", tmp_path / "config.yaml", "--ckpt", tmp_path / "float.pth", "--data", data]
    base += ["--split", "a", "--budget-split", "a", "--out", tmp_path / "ptq.pth", "--budget"]
    monkeypatch.setattr("qat.calibrate.job.calibrate", None)  # what is wrong is told before the work begins
    assert main([*map(str, base), "0.1", "--budget-split", "none"]) == 2
    assert "error: " in (said := capsys.readouterr().err) and "split 'none' not found" in said
    assert main([*map(str, base), "inf"]) == 2 and "found inf" in capsys.readouterr().err
    assert main([*map(str, base[:-1])]) == 2
    assert "--budget-split: only applies with --budget" in capsys.readouterr().err
    assert main([*map(str, base), "-1"]) == 2
    assert "error: --budget: found -1.0" in capsys.readouterr().err and not (tmp_path / "ptq.pth").exists()
    monkeypatch.undo()
    assert main([*map(str, base), "0"]) == 0
    curve = json.loads((tmp_path / "ptq.budget.json").read_text())
    model, recipe = load_ptq(tmp_path / "ptq.pth")
    assert recipe["budget"] == {"drop": 0.0, "of": "map", "float_units": curve["chosen"]["floats"]}
    assert curve["chosen"]["drop"] <= 0 and (tmp_path / "ptq.budget.png").read_bytes()[:4] == b"\x89PNG"
    assert "MACs in INT8" in capsys.readouterr().out
    assert not {unit.name for unit in units(model)} & set(curve["chosen"]["floats"])
    groups = inspect_checkpoint(tmp_path / "ptq.pth").groups
    off = {f"{g.part}.{g.quantizer}" for g in groups if g.state == "off" and g.part not in model.parts_off}
    assert off == set(curve["chosen"]["floats"])
