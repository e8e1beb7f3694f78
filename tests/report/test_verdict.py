"""The decision follows the figures."""

from __future__ import annotations

from qat.report import compared_row, decide, row_name


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
    assert verdict.reasons[-1].startswith("Not ONNX Runtime INT8 (TensorRT flavour): it is 1.30× as slow")


def test_what_is_lost_and_what_is_gained_are_told_apart(results: dict) -> None:
    reference = next(r for r in results["rows"] if (r["backend"], r["precision"]) == ("pytorch", "fp32"))
    rows = _rows(results, openvino_int8={"map": reference["map"] - 0.004, "nds": reference["nds"] + 0.001})
    reasons = " ".join(decide(rows).reasons)
    assert "it costs 0.004 mAP (NDS +0.001)." in reasons
    rows = _rows(results, openvino_int8={"map": reference["map"] - 0.004, "nds": reference["nds"] - 0.002})
    assert "it costs 0.004 mAP and 0.002 NDS." in " ".join(decide(rows).reasons)
