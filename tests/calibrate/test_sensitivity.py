"""Each unit alone, against turning quantizers on by hand."""

import json
import shlex

import numpy as np
import pytest
import torch

from qat.calibrate import calibrate, save_ptq
from qat.calibrate.sensitivity import (
    draw_sensitivity,
    histograms,
    load_sensitivity,
    measure,
    measure_sensitivity,
    write_sensitivity,
)
from qat.calibrate.sensitivity.reasons import range_method
from qat.cli import main
from qat.core.errors import UserError
from qat.core.files import sha256
from qat.core.tensors import EQUAL_DB, compare_tensors
from qat.data.synth import SynthOptions, generate
from qat.lean.modes import quantizers
from qat.model.runners import flow_for, run_frame
from qat.model.units import only_on, units


@pytest.fixture
def quantized(tiny_model, tiny_frames):
    return calibrate(tiny_model, tiny_frames, "max")[0]


def head_maps(model, frame):
    with torch.inference_mode():
        tensors = run_frame(model, frame)
    return torch.cat([tensors[name].flatten() for name in flow_for(model).plan.outputs]).numpy()


def test_units_are_all_that_is_on_and_do_not_overlap(quantized):
    on = {name for name, q in quantizers(quantized.parts).items() if not q._disabled}
    listed = [name for unit in units(quantized) for name in unit.quantizers]
    assert len(listed) == len(set(listed)) and set(listed) == on
    layers = [layer for unit in units(quantized) for layer in unit.layers]
    assert len(layers) == len(set(layers)) == sum(name.endswith("weight_quantizer") for name in on)


def test_a_units_damage_is_that_of_its_quantizers_alone(quantized, tiny_model, tiny_frames, tmp_path):
    found = measure_sensitivity(quantized, tiny_frames[:1], tmp_path, "k")
    by_name = {row.name: row for row in found.units}
    expected = head_maps(tiny_model, tiny_frames[0])
    picked = [next(u for u in units(quantized) if u.part == part) for part in ("camera", "decoder", "head")]
    for unit in picked:
        own = quantizers(quantized.parts)
        before = {name: q._disabled for name, q in own.items()}
        for name, quantizer in own.items():
            quantizer._disabled = name not in unit.quantizers
        alone = head_maps(quantized, tiny_frames[0])
        for name, quantizer in own.items():
            quantizer._disabled = before[name]
        plain = compare_tensors(expected, alone)["sqnr_db"]
        assert by_name[unit.name].sqnr_db["heads"] == pytest.approx(plain, abs=0.1), unit.name
    together = compare_tensors(expected, head_maps(quantized, tiny_frames[0]))["sqnr_db"]
    assert found.together.sqnr_db["heads"] == pytest.approx(together, abs=0.05)


def test_noise_at_objects_is_that_of_the_cells_the_float_network_sees_them_in(
    quantized, tiny_model, tiny_frames, tmp_path
):
    found = measure_sensitivity(quantized, tiny_frames[:1], tmp_path, "k")
    frame = tiny_frames[0]
    with torch.inference_mode():
        expected, rounded = (run_frame(model, frame) for model in (tiny_model, quantized))
        names = quantized.plan.outputs
        hot = {n[-1]: expected[n].sigmoid().amax(1) > 0.1 for n in names if n.startswith("heatmap")}
        assert 0 < sum(int(cells.sum()) for cells in hot.values()) < sum(cells.numel() for cells in hot.values())
        values = [
            np.concatenate([maps[n].movedim(1, -1)[hot[n[-1]]].flatten().numpy() for n in names])
            for maps in (expected, rounded)
        ]
    assert found.together.sqnr_db["objects"] == pytest.approx(compare_tensors(*values)["sqnr_db"], abs=0.05)


def test_a_unit_of_the_head_leaves_the_bev_features_alone(quantized, tiny_frames, tmp_path):
    found = measure_sensitivity(quantized, tiny_frames[:1], tmp_path, "k")
    for row in found.units:
        assert (row.sqnr_db["bev"] == EQUAL_DB) == row.name.startswith("head."), row.name
    shares = sum(row.macs_share for row in found.units)
    assert shares == pytest.approx(found.together.macs_share, abs=1e-4) and 0.3 < shares < 1


def test_the_most_harmful_unit_comes_first(quantized, tiny_frames, tmp_path):
    broken = units(quantized)[3]
    quantizers(quantized.parts)[broken.name].set_range(torch.tensor(1e-3))  # saturates nearly everything
    found = measure_sensitivity(quantized, tiny_frames[:1], tmp_path, "k")
    assert found.units[0].name == broken.name
    levels = [row.sqnr_db["objects"] for row in found.units]
    assert levels[0] < 200
    assert levels == sorted(levels)
    draw_sensitivity(found, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"


def test_the_block_restores_what_was_on(quantized):
    before = {name: q._disabled for name, q in quantizers(quantized.parts).items()}
    with pytest.raises(RuntimeError), only_on(quantized, []):
        assert all(q._disabled for q in quantizers(quantized.parts).values())
        raise RuntimeError
    assert before == {name: q._disabled for name, q in quantizers(quantized.parts).items()}


def test_an_interrupted_run_goes_on_with_the_next_frame(quantized, tiny_frames, tmp_path, monkeypatch):
    whole = measure_sensitivity(quantized, tiny_frames, tmp_path / "whole", "k")
    real, seen = measure._one_frame, []

    def cut(model, frame, *rest):
        seen.append(frame.token)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(model, frame, *rest)

    monkeypatch.setattr(measure, "_one_frame", cut)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(quantized, tiny_frames, tmp_path / "cut", "k")
    again = measure_sensitivity(quantized, tiny_frames, tmp_path / "cut", "k")
    assert seen == ["frame0", "frame1", "frame1", "frame2"]
    assert again.to_json() == whole.to_json()
    measure_sensitivity(quantized, tiny_frames[:1], tmp_path / "cut", "another checkpoint")
    assert seen[-1] == "frame0"  # another's results are not taken


def test_other_settings_or_pictures_are_not_taken_from_an_earlier_run(quantized, tiny_frames, tmp_path):
    def files():
        measure_sensitivity(quantized, tiny_frames[:1], tmp_path, "k")
        return len(list(tmp_path.glob("*.npz")))

    assert files() == files() == 1
    tiny_frames[0].img = tiny_frames[0].img * 0.5  # the same token
    assert files() == 2
    quantized.config = {**quantized.config, "changed": True}
    assert files() == 3


def test_a_damaged_file_of_an_earlier_run_is_made_anew(quantized, tiny_frames, tmp_path):
    whole = measure_sensitivity(quantized, tiny_frames[:1], tmp_path, "k")
    (path,) = tmp_path.glob("*.npz")
    for damage in (path.read_bytes()[:200], b"", b"PK\x03\x04 not a zip"):
        path.write_bytes(damage)
        assert measure_sensitivity(quantized, tiny_frames[:1], tmp_path, "k").to_json() == whole.to_json()


def test_a_metric_sees_every_units_boxes(quantized, tiny_frames, tmp_path):
    calls = []

    def metric(boxes):
        calls.append({token: len(found) for token, found in boxes.items()})
        return {"boxes": float(sum(calls[-1].values()))}

    found = measure_sensitivity(quantized, tiny_frames[:2], tmp_path, "k", metric)
    assert len(calls) == len(units(quantized)) + 2 and all(set(c) == {"frame0", "frame1"} for c in calls)
    for row in found.units:
        assert row.drop["boxes"] == found.reference["boxes"] - row.metric["boxes"]


def inputs_of(model, tiny_model, frame, name):
    """What a quantizer is given while the others are off, float64[n]."""
    seen = []
    handle = quantizers(model.parts)[name].register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with only_on(model, []):
        head_maps(model, frame)
    handle.remove()
    return np.concatenate([tensor.flatten().numpy() for tensor in seen])


def test_a_histogram_is_that_of_the_float_activations_at_the_quantizer(quantized, tiny_model, tiny_frames, tmp_path):
    clipped = units(quantized)[1]
    quantizers(quantized.parts)[clipped.name].set_range(torch.tensor(0.5))
    found = measure_sensitivity(quantized, tiny_frames, tmp_path, "k", worst=3)
    assert [own.unit for own in found.histograms] == [row.name for row in found.units[:3]]
    own = next(own for own in found.histograms if own.unit == clipped.name)
    values = np.concatenate([inputs_of(quantized, tiny_model, frame, clipped.name) for frame in tiny_frames])
    step = np.float32(0.5) / 127
    assert (own.amax, own.values, own.layers) == (0.5, len(values), list(clipped.layers))
    assert own.largest == np.abs(values).max()
    assert own.zeros == pytest.approx((values == 0).mean(), abs=1e-9)
    rounded = np.rint(values / step)
    assert own.clipped == pytest.approx(((rounded > 127) | (rounded < -128)).mean(), abs=2e-5) and own.clipped > 0.1
    assert own.to_zero == pytest.approx(((rounded == 0) & (values != 0)).mean(), abs=2e-5) and own.to_zero > 0
    edges = np.arange(len(own.counts) + 1) * own.bin_width
    magnitudes = np.abs(values[values != 0])
    assert own.counts == np.histogram(magnitudes, edges)[0].tolist()
    assert sum(own.counts) == len(magnitudes) and own.counts[-1] > 0 and 40 < len(own.counts) <= 80


def test_histograms_go_on_after_an_interruption_and_do_not_depend_on_the_order(
    quantized, tiny_frames, tmp_path, monkeypatch
):
    chosen = units(quantized)[:2]
    whole = histograms.measure_histograms(quantized, tiny_frames, tmp_path / "whole", "k", chosen, {})
    real, seen = histograms._see_inputs, []

    def cut(model, feeds, tallies):
        seen.append(next(frame.token for frame in tiny_frames if np.array_equal(frame.img, feeds["img"][0])))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(model, feeds, tallies)

    monkeypatch.setattr(histograms, "_see_inputs", cut)
    with pytest.raises(KeyboardInterrupt):
        histograms.measure_histograms(quantized, tiny_frames, tmp_path / "cut", "k", chosen, {})
    again = histograms.measure_histograms(quantized, tiny_frames[::-1], tmp_path / "cut", "k", chosen, {})
    assert seen == ["frame0", "frame1", "frame2", "frame1"]
    assert again == whole


def test_int8_and_what_stays_float_are_all_of_the_network(quantized, tiny_frames, tmp_path):
    off = units(quantized)[2]
    for name in off.quantizers:
        quantizers(quantized.parts)[name].off = True
    quantized.use(quantized.flavour)
    recipe = {"budget": {"drop": 0.001, "of": "map"}}
    found = measure_sensitivity(quantized, tiny_frames[:1], tmp_path, "k", recipe=recipe)
    assert sum(group.macs_share for group in found.floats) + found.together.macs_share == pytest.approx(1, abs=1e-5)
    layers = [layer for group in found.floats for layer in group.layers]
    assert len(layers) == len(set(layers)) and not set(layers) & set(found.together.layers)
    reasons = {group.rule: group for group in found.floats}
    assert reasons["budget"].layers == list(off.layers)
    assert reasons["budget"].reason == "INT8 costs more map than the budget of 0.001 allows"
    assert all(layer.startswith("vtransform.") for layer in reasons["parts_off"].layers)
    assert "raw metres" in reasons["keep_float"].reason


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ({"default_method": "mse", "by_layer": [["head.*", "max"]]}, "mse"),
        ({"default_method": "mse", "by_layer": [["camera.*", "entropy"], ["*", "max"]]}, "entropy"),
        ({"method": "percentile", "percentile": 99.9}, "percentile 99.9"),
        ({"default_method": "mse", "equalized": ["camera.quant_a"]}, "max, channels equalized"),
        ({"default_method": "mse", "finetune": {"learn_ranges": True}}, "learned"),
        ({"method": "imported"}, "imported"),
        ({}, "unknown"),
    ],
)
def test_the_method_of_a_range_is_told_by_the_recipe(recipe, method):
    assert range_method("camera.quant_a", recipe) == method


def test_a_sensitivity_of_another_checkpoint_is_refused(quantized, tiny_frames, tmp_path):
    checkpoint, file = tmp_path / "ptq.pth", tmp_path / "sensitivity.json"
    checkpoint.write_bytes(b"one")
    found = measure_sensitivity(quantized, tiny_frames[:1], tmp_path, "k")
    write_sensitivity(file, found, checkpoint, {"name": "set", "version": "v", "split": "calib"})
    read = load_sensitivity(file, checkpoint)
    assert read["units"] == found.to_json()["units"] and read["versions"]["torch"] == torch.__version__
    checkpoint.write_bytes(b"two")
    with pytest.raises(UserError, match=r"sensitivity\.json: measured on a checkpoint with sha256 .* again$"):
        load_sensitivity(file, checkpoint)
    for change, message in (({"format": "other"}, "not a sensitivity"), ({"schema": 2}, "found schema 2, expected 1")):
        file.write_text(json.dumps({**read, **change}))
        with pytest.raises(UserError, match=message):
            load_sensitivity(file, checkpoint)


def test_no_frames_is_an_error(quantized, tmp_path):
    with pytest.raises(UserError, match="no frames"):
        measure_sensitivity(quantized, [], tmp_path, "k")
    with pytest.raises(UserError, match="--histograms: found -1, expected 0 or more"):
        measure_sensitivity(quantized, [], tmp_path, "k", worst=-1)


def test_the_command_with_map(quantized, tiny_model, tmp_path, capsys):
    options = SynthOptions(scenes=1, seed=5, keyframes=2, width=192, height=128, azimuths=60, sweeps=0, splits={"a": 1})
    data = generate(tmp_path / "set", options, quiet=True)
    save_ptq(tmp_path / "ptq.pth", quantized, tiny_model, {"method": "max"})
    out = tmp_path / "out"
    arguments = ["sensitivity", tmp_path / "ptq.pth", "--data", data, "--split", "a", "--metric", "map", "--out", out]
    assert main(list(map(str, arguments))) == 0
    text = capsys.readouterr().out
    assert "Δ map" in text and "SQNR heads" in text
    written = json.loads((out / "sensitivity.json").read_text())
    assert (written["format"], written["schema"]) == ("bevqat-sensitivity", 1)
    assert written["checkpoint"]["sha256"] == sha256(tmp_path / "ptq.pth")
    assert written["command"] == shlex.join(["bevqat", *map(str, arguments)])
    assert written["dataset"]["split"] == "a" and len(written["histograms"]) == 8
    assert written["frames"] == 2 and set(written["reference"]) == {"map", "nds"}
    assert np.isfinite([row["sqnr_db"]["heads"] for row in written["units"]]).all()
