"""The comparison's pieces: interleaving, agreement of boxes, drawn outlines, the cache."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nuscenes.utils.geometry_utils import view_points

from qat.boxes.detections import Detections
from qat.boxes.geometry import box_corners
from qat.compare.accuracy import RowAccuracy, _Cache, run_accuracy
from qat.compare.frames import disagreement, drawn_from, outlines
from qat.compare.latency import measure
from qat.compare.rows import _simulations
from qat.families import flow_of
from qat.families.bevfusion.frames import random_frame
from qat.families.bevfusion.settings import pipeline_settings
from qat.runtime import Pipeline
from tests.messages import refused


class _Recorder:
    """A pipeline that writes down who ran on what."""

    def __init__(self, name: str, log: list) -> None:
        self.name, self.log, self.timing_ms = name, log, {}

    def detect_sample(self, sample: str) -> None:
        self.log.append((self.name, sample))
        self.timing_ms = {"camera.backbone": 2.0, "pattern": 0.0}


def _rows(log: list, names: str, simulated: str = "") -> list:
    return [SimpleNamespace(pipeline=_Recorder(name, log), simulated=name in simulated) for name in names]


def test_every_round_runs_every_row_in_an_order_turned_by_one() -> None:
    log: list = []
    timings = measure(_rows(log, "abc"), ["s", "t"], rounds=3, repeats=1)
    visits = [(name, sample) for n, (name, sample) in enumerate(log) if n % 2]
    assert "".join(name for name, _ in visits) == "abcbcacab"
    assert [sample for _, sample in visits] == ["s"] * 3 + ["t"] * 3 + ["s"] * 3
    assert [len(timing.total) for timing in timings] == [3, 3, 3]


def test_one_run_before_the_counted_ones_and_a_simulated_row_runs_once_in_all() -> None:
    log: list = []
    timings = measure(_rows(log, "ab", simulated="b"), ["s"], rounds=2, repeats=3)
    assert "".join(name for name, _ in log) == "aaaabaaaa"
    assert timings[0].summary()["samples"] == 6
    assert timings[1].summary()["samples"] == 1
    assert timings[0].stage_medians() == {"camera.backbone": 2.0}


def _found(*boxes: tuple[float, float, float, int]) -> Detections:
    array = np.zeros((len(boxes), 9), np.float32)
    for row, (x, y, _, _) in zip(array, boxes, strict=True):
        row[:6] = x, y, 0, 2, 4, 1.5
    scores = np.array([box[2] for box in boxes], np.float32)
    return Detections(array, scores, np.array([box[3] for box in boxes], np.int64))


def test_disagreement_counts_what_has_no_partner_of_its_class_within_two_metres() -> None:
    reference = _found((0, 0, 0.9, 0), (10, 0, 0.8, 0), (20, 0, 0.7, 1), (30, 0, 0.2, 0))
    candidate = _found((1.9, 0, 0.6, 0), (12.1, 0, 0.5, 0), (20, 0, 0.7, 2))
    found = disagreement(reference, candidate, 0.3)
    assert (found.only_reference, found.only_candidate) == (2, 2)
    assert found.total == pytest.approx((0.9 - 0.6) + 0.8 + 0.7 + 0.5 + 0.7)


def test_a_box_has_one_partner_and_the_better_score_chooses_first() -> None:
    found = disagreement(_found((0, 0, 0.5, 0), (1, 0, 0.9, 0)), _found((0.6, 0, 0.9, 0)), 0.3)
    assert (found.only_reference, found.only_candidate) == (1, 0)
    assert found.total == pytest.approx(0.5)


def test_disagreement_with_nothing() -> None:
    assert disagreement(Detections.empty(), Detections.empty(), 0.3).total == 0
    assert disagreement(_found((0, 0, 0.5, 0)), Detections.empty(), 0.3).only_reference == 1


def test_as_many_boxes_are_drawn_as_objects_are_annotated() -> None:
    frames = [_found((0, 0, 0.35, 0), (5, 0, 0.2, 0)), _found((0, 0, 0.3, 0), (5, 0, 0.05, 0))]
    assert drawn_from(frames, 2) == 0.3
    assert drawn_from(frames, 1) == 0.35
    assert drawn_from(frames, 4) == 0.1
    assert drawn_from(frames, 9) == 0.1
    assert drawn_from([_found((0, 0, 0.9, 0))], 1) == 0.4


FORWARD = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], np.float32)  # looks along y
INTRINSICS = np.array([[80, 0, 60, 0], [0, 80, 30, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)


def test_outlines_of_a_box_in_view_are_the_devkits_projection_of_its_edges() -> None:
    box = np.array([[0.5, 12, -1, 1.8, 4.2, 1.5, 0.3, 0, 0]], np.float32)
    shrink = np.diag([0.5, 0.5, 1, 1]).astype(np.float32)
    shrink[:2, 3] = 3, -2
    (lines,) = outlines(box, INTRINSICS @ FORWARD, shrink, (60, 30))
    seen = FORWARD[:3, :3] @ box_corners(box)[0].T
    expected = view_points(seen, INTRINSICS[:3, :3], normalize=True)[:2].T * 0.5 + [3, -2]
    ends = np.array(lines).reshape(-1, 2)
    assert len(lines) == 12
    nearest = np.linalg.norm(ends[:, None] - expected, axis=-1)
    assert (nearest.min(1) < 0.1).all()
    assert (nearest.min(0) < 0.1).all()


@pytest.mark.parametrize("y", [-12.0, 0.0, 2.0])
def test_outlines_stay_in_the_picture_behind_and_around_the_camera(y: float) -> None:
    box = np.array([[0.5, y, -1, 1.8, 4.2, 1.5, 0.3, 0, 0]], np.float32)
    (lines,) = outlines(box, INTRINSICS @ FORWARD, np.eye(4, dtype=np.float32), (120, 60))
    ends = np.array(lines).reshape(-1, 2)
    assert (len(ends) == 0) == (y == -12)
    assert ((ends >= 0) & (ends <= [120, 60])).all()


def test_sqnr_is_of_summed_energies() -> None:
    accuracy = RowAccuracy(("camera_feature", "middle", "heads"))
    accuracy.energies[0] = 1000, 1
    accuracy.energies[-1] = 50, 0
    assert accuracy.sqnr_db() == {"camera_feature": pytest.approx(30), "heads": 200}


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut off", b"not an archive"])
def test_a_damaged_cache_file_counts_as_none(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(damage)
    cache = _Cache(tmp_path)
    assert cache.read("x") == {}
    cache.write("x", {"a": np.arange(3)})
    assert cache.read("x")["a"].tolist() == [0, 1, 2]


def test_a_row_that_gives_nan_is_named(tmp_path: Path, small_config: dict) -> None:
    settings = pipeline_settings(small_config)

    def row(name: str, value: float):
        pipeline = Pipeline(dict.fromkeys(flow_of(settings).plan.parts, SimpleNamespace(run=None)), settings)
        tensors = {n: np.zeros(3, np.float32) for n in pipeline.flow.plan.tensors}
        tensors["camera_feature"] = np.full(3, value, np.float32)
        pipeline.forward, pipeline.decode = lambda sample: tensors, lambda found: Detections.empty()
        return SimpleNamespace(name=name, key=name, pipeline=pipeline)

    sample = random_frame(settings, 1)
    sample.token = "s1"
    rows = [row("pytorch fp32", 1.0), row("openvino int8", np.nan)]
    with refused("openvino int8: sample s1: camera_feature has values that are not finite"):
        run_accuracy(rows, [sample], tmp_path, lambda index, kept: None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_an_unknown_flavour_is_named() -> None:
    with refused("onnx_int8: flavour", "found 'odd'", "expected one of tensorrt,", "export again"):
        _simulations(None, [(Path("onnx_int8"), "int8", {"flavour": "odd", "parts": {}})])
