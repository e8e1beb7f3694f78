"""`bevqat agree`: pairs that agree pass, and every mistake of a two-part CenterPoint deployment fails (negative controls)."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lidar import need_mmdet3d

from qat.boxes.detections import Detections
from qat.calibrate.job import calibrate_checkpoint
from qat.calibrate.options import CalibrateOptions
from qat.cli import main
from qat.compare.agreement import agree, matched
from qat.compare.rows import Row
from qat.core.errors import NotFiniteError, UserError
from qat.families.centerpoint.autoware import older
from qat.families.flow import InUnit
from qat.model.opening import Source, open_model
from qat.model.runners import torch_parts
from qat.runtime import Pipeline

need_mmdet3d()

ROOT = Path(__file__).resolve().parents[2]
MODEL, CAMERA = ROOT / "model" / "lidar-tiny", ROOT / "model" / "camera-tiny" / "camera-tiny.pth"
ENCODER, DENSE = "pts_voxel_encoder", "pts_backbone_neck_head"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """lidar-tiny in PyTorch, FP32 and INT8 (simulated), and two keyframes of example-data."""
    ptq = tmp_path_factory.mktemp("agree") / "ptq.pth"
    source = Source(MODEL / "lidar-tiny.pth", MODEL / "config.py")
    calibrate_checkpoint(source, CalibrateOptions(data=ROOT / "example-data", split="calib", frames=2), ptq)
    opened = open_model(ptq)
    opened.quantized.use("openvino")
    found = {}
    for name, network in (("fp32", opened.network), ("int8-fake", opened.quantized)):
        pipeline = Pipeline(torch_parts(network), opened.family.settings(opened.config))
        found[name] = Row("pytorch", name, "openvino", pipeline, 0.0, name, name != "fp32")
    frames = opened.family.dataset(ROOT / "example-data", "eval", opened.config, None, 2)
    return found, [frames[n] for n in range(2)]


class Damaged:
    """A part whose inputs and outputs are changed."""

    def __init__(self, part, before=dict, after=dict):
        self.part, self.before, self.after = part, before, after

    def run(self, feeds):
        return {n: np.ascontiguousarray(v) for n, v in self.after(self.part.run(self.before(feeds))).items()}


def with_part(row, name, key, **changes):
    pipeline = copy.copy(row.pipeline)
    pipeline.parts = {**pipeline.parts, name: Damaged(pipeline.parts[name], **changes)}
    return replace(row, backend="other", key=key, pipeline=pipeline)


def swapped(a, b):
    return lambda maps: {**maps, a: maps[b], b: maps[a]}


def turned(name):
    return lambda maps: {**maps, name: older(maps)[name]}


def flat(maps):
    return {n: v.swapaxes(2, 3).reshape(v.shape) for n, v in maps.items()}


def sigmoid(maps):
    return {**maps, "heatmap": 1 / (1 + np.exp(-maps["heatmap"]))}


def first_columns(feeds):
    """The raw columns of the points stand where their offsets belong (`pillar_features` fed, and not the decorated points)."""
    features = feeds["input_features"].copy()
    features[..., 4:] = features[..., : features.shape[-1] - 4]
    return {"input_features": features}


DAMAGE = {
    "outputs swapped": (DENSE, {"after": swapped("reg", "vel")}),
    "rot not turned": (DENSE, {"after": turned("rot")}),
    "dim in another order": (DENSE, {"after": turned("dim")}),
    "x and y transposed": (DENSE, {"after": flat}),
    "sigmoid applied twice": (DENSE, {"after": sigmoid}),
    "other features": (ENCODER, {"before": first_columns}),
    "heat lost": (DENSE, {"after": lambda maps: {**maps, "heatmap": maps["heatmap"] - 3}}),
}


def test_one_network_agrees_with_itself_in_another_place(rows):
    found, frames = rows
    (pair,) = agree([found["fp32"], with_part(found["fp32"], DENSE, "same")], frames)
    assert not pair.problems and pair.boxes.matched > 20 and pair.boxes.missed == pair.boxes.extra == 0
    assert set(pair.outputs) == {"heatmap", "reg", "height", "dim", "rot", "vel"}
    for name, regions in pair.outputs.items():
        assert set(regions) == {"occupied", "empty"}
        assert name == "rot" or sum(f.count for f in regions.values()) % (208 * 104) == 0
    assert pair.outputs["height"]["occupied"].unit == "m" and pair.outputs["rot"]["empty"].unit == "rad"


def test_int8_agrees_with_fp32(rows):
    found, frames = rows
    (pair,) = agree([found["fp32"], found["int8-fake"]], frames)
    assert pair.problems == []
    assert 0 < pair.outputs["dim"]["occupied"].rms < pair.outputs["dim"]["occupied"].largest


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("precision", ["fp32", "int8-fake"])
def test_a_mistake_is_found(rows, damage, precision):
    found, frames = rows
    part, changes = DAMAGE[damage]
    (pair,) = agree([found["fp32"], with_part(found[precision], part, damage, **changes)], frames[:1])
    assert pair.problems, damage
    assert not pair.described()["passed"]


def test_small_differences_of_two_fp32_rows_are_found(rows):
    """Two millimetres in one cell."""
    found, frames = rows

    def nudged(maps):
        height = maps["height"].copy()
        height[0, 0, 5, 7] += 0.002
        return {**maps, "height": height}

    (pair,) = agree([found["fp32"], with_part(found["fp32"], DENSE, "nudged", after=nudged)], frames[:1])
    assert (
        len(pair.problems) == 1 and pair.problems[0].startswith("height in") and "0.002 m (largest)" in pair.problems[0]
    )


def test_an_engine_beside_itself_and_no_frames_are_refused(rows):
    found, frames = rows
    with pytest.raises(UserError, match="pytorch fp32 twice"):
        agree([found["fp32"], replace(found["fp32"])], frames)
    with pytest.raises(UserError, match="found 1 row"):
        agree([found["fp32"]], frames)
    with pytest.raises(UserError, match="no frames"):
        agree(list(found.values()), [])


def test_nothing_compared_is_no_agreement(rows):
    """No boxes anywhere, or maps of zeros, do not pass."""
    found, frames = rows
    cold = {"after": lambda maps: {**maps, "heatmap": maps["heatmap"] * 0 - 20}}
    pair = agree([with_part(found["fp32"], DENSE, name, **cold) for name in ("a", "b")], frames[:1])[0]
    assert any("no boxes" in problem for problem in pair.problems)
    zeros = {"after": lambda maps: {**maps, "vel": maps["vel"] * 0}}
    pair = agree([with_part(found["fp32"], DENSE, name, **zeros) for name in ("a", "b")], frames[:1])[0]
    assert pair.problems == [
        f"vel in {r} cells: nothing to compare: no values, or zeros alone" for r in ("occupied", "empty")
    ]


def test_values_that_are_not_finite_are_an_error(rows):
    found, frames = rows
    broken = {"after": lambda maps: {**maps, "rot": maps["rot"] / 0}}
    with np.errstate(all="ignore"), pytest.raises(NotFiniteError, match="rot: found NaN or infinity"):
        agree([found["fp32"], with_part(found["fp32"], DENSE, "nan", **broken)], frames)


def test_outputs_without_a_unit_are_judged_by_sqnr():
    from qat.compare.agreement import Figures

    a = np.random.default_rng(0).normal(size=(2, 50))
    for noise, exact, passes in ((1e-4, True, True), (1e-2, True, False), (1e-1, False, True), (1.0, False, False)):
        figures = Figures("", None, exact)
        figures.add(
            InUnit(a), InUnit(a + noise * np.random.default_rng(1).normal(size=a.shape)), np.ones(a.shape, bool)
        )
        assert bool(figures.wrong) != passes, (noise, exact)


def test_an_angle_wraps():
    from qat.compare.agreement import Figures

    figures = Figures("rad", 0.1, True)
    a, b = (InUnit(np.array([value]), "rad", 0.1, 0.1, 2 * np.pi) for value in (3.13, -3.14))
    figures.add(a, b, np.ones(1, bool))
    assert figures.largest == pytest.approx(2 * np.pi - 6.27)


def test_boxes_match_by_class_and_distance():
    def boxes(*centres):
        return np.array([[x, y, 0, 1, 1, 1, 0, 0, 0] for x, y in centres], np.float32)

    a = Detections(boxes((0, 0), (5, 0), (20, 0)), np.ones(3, np.float32), np.array([0, 0, 1]))
    b = Detections(boxes((5.3, 0), (0.2, 0), (20, 0), (4.9, 0)), np.ones(4, np.float32), np.array([0, 0, 0, 0]))
    assert matched(a, b) == [(1, 3), (0, 1)]  # the nearest first; another class is no match


def test_the_command(tmp_path, capsys):
    """On the family of cameras too, whose maps have no units: exported parts on two backends, and their JSON."""
    assert main(["export", "--ckpt", str(CAMERA), "--out", str(tmp_path / "fp32"), "--frames", "0"]) == 0
    flags = ["--ckpt", str(CAMERA), "--data", str(ROOT / "example-data"), "--frames", "1"]
    folder = str(tmp_path / "fp32")
    assert main(["agree", *flags, "--onnx", folder, "--json", str(tmp_path / "agree.json")]) == 0
    assert "pytorch fp32 and openvino fp32" in capsys.readouterr().out
    result = json.loads((tmp_path / "agree.json").read_text())
    assert len(result["pairs"]) == 3 and result["frames"] == 1 and all(pair["passed"] for pair in result["pairs"])
    assert main(["agree", *flags, "--onnx", folder, folder]) == 2
    assert "openvino fp32 twice" in capsys.readouterr().err
