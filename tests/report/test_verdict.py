"""The decision follows the figures."""

from __future__ import annotations

import pytest

from qat.report import compared_row, decide, row_name

SIMULATED = "PyTorch INT8 simulated"


def _rows(results: dict, **changes: dict) -> list[dict]:
    rows = results["rows"]
    for name, values in changes.items():
        backend, precision = name.split("_")
        next(r for r in rows if (r["backend"], r["precision"]) == (backend, precision)).update(values)
    return rows


def _latency(median: float) -> dict:
    return {"latency_ms": {"median": median, "p99": median, "samples": 9}}


def test_the_fastest_row_within_the_loss_is_shipped(results: dict) -> None:
    verdict = decide(results["rows"])
    assert verdict.headline == "Ship OpenVINO INT8"
    assert "Not ONNX Runtime INT8: it is 1.30× as slow as ONNX Runtime FP32." in verdict.reasons
    assert compared_row(results["rows"], verdict) is verdict.ship


def test_a_fast_row_that_loses_too_much_is_not_shipped(results: dict) -> None:
    rows = _rows(results, openvino_int8={"map": 0.517 - 0.03})
    verdict = decide(rows)
    assert verdict.headline == "Ship OpenVINO FP32"
    assert "OpenVINO INT8 loses too much (0.030 of mAP or NDS)." in verdict.reasons


def test_a_loss_of_nds_alone_counts_too(results: dict) -> None:
    assert decide(_rows(results, openvino_int8={"nds": 0.50})).headline == "Ship OpenVINO FP32"


def test_a_gain_within_noise_keeps_fp32(results: dict) -> None:
    verdict = decide(_rows(results, openvino_int8=_latency(69)))
    assert verdict.headline == "Ship OpenVINO FP32"
    assert "Not OpenVINO INT8: it is no faster than OpenVINO FP32." in verdict.reasons


def test_pytorch_is_never_shipped_and_fp32_is_compared_with_the_fastest_engine(results: dict) -> None:
    rows = _rows(results, pytorch_fp32=_latency(1), openvino_int8={"map": 0.1})
    verdict = decide(rows)
    assert verdict.headline == "Ship OpenVINO FP32"
    assert compared_row(rows, verdict) is rows[3]


def test_nothing_is_shipped_when_every_row_loses_too_much(results: dict) -> None:
    low = {"map": 0.4}
    rows = _rows(results, openvino_int8=low, openvino_fp32=low, onnxruntime_int8=low, onnxruntime_fp32=low)
    verdict = decide(rows)
    assert verdict.ship is None
    assert "loses 0.117" in verdict.reasons[0]


def test_a_detector_that_detects_nothing_is_called_so(results: dict) -> None:
    for row in results["rows"]:
        row["map"] = row["nds"] = 0.004
    assert any("cannot be seen" in reason for reason in decide(results["rows"]).reasons)


def test_rows_of_one_backend_and_precision_are_told_apart_by_flavour(results: dict) -> None:
    rows = [*results["rows"], {**results["rows"][5], "flavour": "onnxruntime", **_latency(20)}]
    assert [row_name(row, rows) for row in rows[3:]] == [
        "OpenVINO INT8",
        "ONNX Runtime FP32",
        "ONNX Runtime INT8 (TensorRT flavour)",
        "ONNX Runtime INT8 (own flavour)",
    ]
    verdict = decide(rows)
    assert verdict.headline == "Ship ONNX Runtime INT8 (own flavour)"
    assert verdict.reasons[-2].startswith("Not ONNX Runtime INT8 (TensorRT flavour): it is 1.30× as slow")


def test_what_is_lost_and_what_is_gained_are_told_apart(results: dict) -> None:
    reference = next(r for r in results["rows"] if (r["backend"], r["precision"]) == ("pytorch", "fp32"))
    del results["rows"][3]["change"]  # results without resamples
    rows = _rows(results, openvino_int8={"map": reference["map"] - 0.004, "nds": reference["nds"] + 0.001})
    reasons = " ".join(decide(rows).reasons)
    assert "it costs 0.004 mAP (NDS +0.001)." in reasons
    rows = _rows(results, openvino_int8={"map": reference["map"] - 0.004, "nds": reference["nds"] - 0.002})
    assert "it costs 0.004 mAP and 0.002 NDS." in " ".join(decide(rows).reasons)


def _change(low: float, high: float, nds: tuple[float, float] = (-0.003, 0.002)) -> dict:
    bounds = {"map": (low, high), "nds": nds}
    return {"change": {key: {"low": a, "high": b, "confidence": 0.95} for key, (a, b) in bounds.items()}}


def test_a_shipped_row_costs_what_its_interval_says(results: dict) -> None:
    reasons = decide(_rows(results, openvino_int8=_change(-0.004, 0.002))).reasons
    assert "Against PyTorch FP32: no difference found, at most 0.004 mAP and 0.003 NDS lost." in reasons
    reasons = decide(_rows(results, openvino_int8=_change(-0.009, -0.002))).reasons
    expected = "a loss of 0.005 mAP [0.002 to 0.009]; no difference found, at most 0.003 NDS lost."
    assert f"Against PyTorch FP32: {expected}" in reasons


def test_equal_rows_have_no_difference_at_the_last_digit_shown(results: dict) -> None:
    change = _change(-0.0002, -0.0001, (0.0, 0.0))
    reasons = decide(_rows(results, openvino_int8=change)).reasons
    assert "Against PyTorch FP32: no difference found, at most 0.001 mAP and 0.001 NDS lost." in reasons


def test_intervals_above_zero_are_a_gain(results: dict) -> None:
    gained = {"map": 0.523, "nds": 0.556, **_change(0.002, 0.011, (0.001, 0.007))}
    reasons = decide(_rows(results, openvino_int8=gained)).reasons
    assert "Against PyTorch FP32: a gain of 0.006 mAP [0.002 to 0.011] and 0.004 NDS [0.001 to 0.007]." in reasons


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "it costs 0.004 mAP and 0.003 NDS; that is within the 0.02 accepted."),
        (
            _change(-0.004, 0.001),
            "no difference found, at most 0.004 mAP and 0.003 NDS lost; that is within the 0.02 accepted.",
        ),
        (
            {"map": 0.505, **_change(-0.018, -0.003, (-0.01, -0.001))},
            "a loss of 0.012 mAP [0.003 to 0.018] and 0.003 NDS [0.001 to 0.010]; that is within the 0.02 accepted.",
        ),
        (
            _change(-0.031, 0.022),
            "no difference found, at most 0.031 mAP and 0.003 NDS lost; these keyframes do not rule out more than the 0.02 "
            "accepted.",
        ),
        (
            {"map": 0.487, **_change(-0.041, -0.021)},
            "a loss of 0.030 mAP [0.021 to 0.041]; no difference found, at most 0.003 NDS lost; it loses too much here (0.030 "
            "of mAP or NDS).",
        ),
        ({"nds": 0.5}, "it costs 0.004 mAP and 0.052 NDS; it loses too much here (0.052 of mAP or NDS)."),
    ],
)
def test_a_simulated_row_is_judged_by_the_same_limit(results: dict, values: dict, words: str) -> None:
    verdict = decide(_rows(results, **{"pytorch_int8-fake": values}))
    assert verdict.headline == "Ship OpenVINO INT8"
    assert verdict.reasons[-1] == f"{SIMULATED}: {words}"


def test_simulated_rows_say_for_which_engines_they_stand(results: dict) -> None:
    rows = results["rows"]
    rows[3]["flavour"], rows[5]["flavour"] = "openvino", "onnxruntime"
    others = ("openvino", "onnxruntime", "tensorrt-strong")
    rows[2:2] = [{**rows[1], "flavour": flavour, **_change(-0.005, 0.001)} for flavour in others]
    rows[1] |= _change(-0.007, 0.001)
    found = "no difference found, at most 0.00{} mAP and 0.003 NDS lost; that is within the 0.02 accepted."
    assert decide(rows).reasons[-3:] == [
        f"{SIMULATED} (TensorRT flavour), for engines that were not measured here: {found.format(7)}",
        f"{SIMULATED} (OpenVINO flavour) and {SIMULATED} (ONNX Runtime flavour): {found.format(5)}",
        f"{SIMULATED} (strongly typed TensorRT flavour), for engines that were not measured here: {found.format(5)}",
    ]


def test_a_simulated_row_is_judged_without_engines_and_never_shipped(results: dict) -> None:
    rows = _rows(results, **{"pytorch_int8-fake": _latency(1)})[:2]
    verdict = decide(rows)
    assert verdict.ship is None and verdict.headline == "Nothing to ship yet"
    assert verdict.reasons[-1].startswith(f"{SIMULATED}, for engines that were not measured here: it costs 0.004 mAP")
    assert compared_row(rows, verdict) is rows[1]


def test_a_simulation_of_a_detector_that_detects_nothing_is_not_judged(results: dict) -> None:
    for row in results["rows"]:
        row["map"] = row["nds"] = 0.004
    assert not any(SIMULATED in reason for reason in decide(results["rows"]).reasons)
