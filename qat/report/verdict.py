"""Decides which row to ship, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

MAX_LOSS = 0.02  # of mAP, and of NDS
MIN_MAP = 0.05  # below it FP32 detects too little for a meaningful comparison
MIN_GAIN = 1.05  # a smaller speed-up is within the noise of the machine's load

NAMES = {
    "pytorch": "PyTorch",
    "openvino": "OpenVINO",
    "openvino-gpu": "OpenVINO GPU",
    "openvino-npu": "OpenVINO NPU",
    "onnxruntime": "ONNX Runtime",
    "onnxruntime-cuda": "ONNX Runtime CUDA",
    "onnxruntime-tensorrt": "ONNX Runtime TensorRT",
    "tensorrt": "TensorRT",
    "tensorrt-strong": "strongly typed TensorRT",
    "fp32": "FP32",
    "fp16": "FP16",
    "int8": "INT8",
    "int8-fake": "INT8 simulated",
}

Row = dict[str, Any]
METRICS = (("mAP", "map"), ("NDS", "nds"))


def is_simulated(row: Row) -> bool:
    """Whether the row simulates an integer engine in float: its accuracy is the flavour's, its time is meaningless."""
    return bool(row["precision"] == "int8-fake")


def row_name(row: Row, rows: Sequence[Row]) -> str:
    """A row's name for people, such as "OpenVINO INT8"; with its flavour if other `rows` differ only in it."""
    name = f"{NAMES.get(row['backend'], row['backend'])} {NAMES.get(row['precision'], row['precision'])}"
    twins = [other for other in rows if (other["backend"], other["precision"]) == (row["backend"], row["precision"])]
    flavour = row.get("flavour")
    if len(twins) < 2 or not flavour:
        return name
    return f"{name} ({'own' if flavour == row['backend'] else NAMES.get(flavour, flavour)} flavour)"


def reference_of(rows: Sequence[Row]) -> Row | None:
    """The row that accuracy is measured against: PyTorch FP32, else the first FP32 row."""
    floats = [row for row in rows if row["precision"] == "fp32"]
    return next((row for row in floats if row["backend"] == "pytorch"), floats[0] if floats else None)


def baseline_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The FP32 row of the same backend, the reference of a speed-up."""
    return next((other for other in rows if other["precision"] == "fp32" and other["backend"] == row["backend"]), None)


def milliseconds(value: float) -> str:
    """Three significant digits at most."""
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


def signed(value: float, digits: int = 3) -> str:
    """+0.001, −0.001 or ±0.000, with a true minus."""
    text = f"{abs(value):.{digits}f}"
    return f"±{text}" if float(text) == 0 else f"{'−' if value < 0 else '+'}{text}"


@dataclass(frozen=True)
class Verdict:
    """ship: the row to ship, None if no row can be shipped. reasons: sentences."""

    ship: Row | None
    headline: str
    reasons: list[str] = field(default_factory=list)


def _loss(row: Row, reference: Row | None) -> float:
    return 0.0 if reference is None else max(reference[key] - row[key] for _, key in METRICS)


def _lost(row: Row, reference: Row) -> str:
    changes = [(name, reference[key] - row[key]) for name, key in METRICS]
    if all(abs(change) < 0.0005 for _, change in changes):
        return "no mAP or NDS"
    if all(change <= 0 for _, change in changes):
        return "no accuracy: " + " and ".join(f"{name} {signed(-change)}" for name, change in changes)
    lost = " and ".join(f"{change:.3f} {name}" for name, change in changes if change > 0)
    gained = "".join(f" ({name} {signed(-change)})" for name, change in changes if change <= 0)
    return lost + gained


def _has_intervals(row: Row) -> bool:
    return all(key in row.get("change", {}) for _, key in METRICS)


def _by_intervals(row: Row, reference: Row) -> str:
    """The difference to the reference, in words: significant losses, and otherwise the largest loss within the intervals."""
    losses, gains, unsure = [], [], []
    for name, key in METRICS:
        low, high = (row["change"][key][end] for end in ("low", "high"))
        change = row[key] - reference[key]
        if low <= 0 <= high or max(-low, high) < 0.0005:
            unsure.append(f"{max(-low, 0.001):.3f} {name}")
        elif high < 0:
            losses.append(f"{-change:.3f} {name} [{-high:.3f} to {-low:.3f}]")
        else:
            gains.append(f"{change:.3f} {name} [{low:.3f} to {high:.3f}]")
    said = [f"a {what} of {' and '.join(found)}" for what, found in (("loss", losses), ("gain", gains)) if found]
    return "; ".join(said + ([f"no difference found, at most {' and '.join(unsure)} lost"] if unsure else []))


def _against(row: Row, reference: Row, rows: Sequence[Row]) -> str:
    """A sentence on a row's loss."""
    name = row_name(reference, rows)
    if _has_intervals(row):
        return f"Against {name}: {_by_intervals(row, reference)}."
    return f"Against {name} it costs {_lost(row, reference)}."


def _judgement(row: Row, reference: Row, max_loss: float) -> str:
    """Text on the loss of a simulated row, and whether it is accepted."""
    intervals = _has_intervals(row)
    words = _by_intervals(row, reference) if intervals else f"it costs {_lost(row, reference)}"
    if (loss := _loss(row, reference)) > max_loss:
        return f"{words}; it loses too much here ({loss:.3f} of mAP or NDS)"
    if intervals and max(-row["change"][key]["low"] for _, key in METRICS) > max_loss:
        return f"{words}; these keyframes do not rule out more than the {max_loss:g} accepted"
    return f"{words}; that is within the {max_loss:g} accepted"


def _simulations(rows: Sequence[Row], reference: Row | None, max_loss: float) -> list[str]:
    """Sentences on the simulated rows; rows with the same result share one."""
    if reference is None or reference["map"] < MIN_MAP:  # the result would be meaningless
        return []
    measured = {row.get("flavour") for row in rows if row["precision"] == "int8"}
    said: dict[str, list[str]] = {}
    for row in filter(is_simulated, rows):
        note = "" if row.get("flavour") in measured else ", for engines that were not measured here"
        said.setdefault(f"{note}: {_judgement(row, reference, max_loss)}.", []).append(row_name(row, rows))
    return [" and ".join(names) + words for words, names in said.items()]


def decide(rows: Sequence[Row], max_loss: float = MAX_LOSS) -> Verdict:
    """The fastest row outside PyTorch that loses at most `max_loss` of mAP and of NDS.

    Between rows of one backend a gain in speed under 5 % does not pay for lower precision, and FP32 is kept. Simulated rows
    are judged by their accuracy, and never shipped.
    """
    reference = reference_of(rows)
    found = _decide_engines(rows, reference, max_loss)
    return replace(found, reasons=[*found.reasons, *_simulations(rows, reference, max_loss)])


def _decide_engines(rows: Sequence[Row], reference: Row | None, max_loss: float) -> Verdict:
    deployable = [row for row in rows if row["backend"] != "pytorch"]
    if not deployable:
        return Verdict(None, "Nothing to ship yet", ["Only PyTorch was measured; name a backend with --backends."])
    accurate = [row for row in deployable if _loss(row, reference) <= max_loss]
    if not accurate:
        least = min(deployable, key=lambda row: _loss(row, reference))
        return Verdict(
            None,
            "Ship nothing here yet",
            [
                f"Every row loses more than {max_loss:g} mAP or NDS against {row_name(reference or least, rows)}; the least, "
                f"{row_name(least, rows)}, loses {_loss(least, reference):.3f}. Calibrate on more frames or keep the worst "
                "layers in float."
            ],
        )
    ship = min(accurate, key=lambda row: row["latency_ms"]["median"])
    baseline = baseline_of(ship, rows)
    slowest = MIN_GAIN * ship["latency_ms"]["median"]
    if baseline is not None and baseline in accurate and baseline["latency_ms"]["median"] < slowest:
        ship = baseline
    reasons = [_speed(ship, baseline, rows)]
    if reference is not None and ship is not reference:
        reasons.append(_against(ship, reference, rows))
    if reference is not None and reference["map"] < MIN_MAP:
        reasons.append(
            f"But {row_name(reference, rows)} itself reaches no more than {reference['map']:.3f} mAP: on such a detector the "
            "cost of quantization cannot be seen."
        )
    for row in deployable:
        if row is not ship and row["precision"] != "fp32":
            reasons += _why_not(row, row in accurate, reference, rows)
    return Verdict(ship, f"Ship {row_name(ship, rows)}", reasons)


def _speed(ship: Row, baseline: Row | None, rows: Sequence[Row]) -> str:
    median = ship["latency_ms"]["median"]
    if baseline is None or ship is baseline:
        return f"It is the fastest here, at {milliseconds(median)} for a frame."
    before = baseline["latency_ms"]["median"]
    return (
        f"It is {before / median:.2f}× as fast as {row_name(baseline, rows)} here: {milliseconds(median)} "
        f"instead of {milliseconds(before)} for a frame."
    )


def _why_not(row: Row, accurate: bool, reference: Row | None, rows: Sequence[Row]) -> list[str]:
    """Why a row of low precision is not shipped, unless only because another is faster."""
    name, own = row_name(row, rows), baseline_of(row, rows)
    if not accurate:
        return [f"{name} loses too much ({_loss(row, reference):.3f} of mAP or NDS)."]
    if own is None or row["latency_ms"]["median"] * MIN_GAIN <= own["latency_ms"]["median"]:
        return []
    ratio = row["latency_ms"]["median"] / own["latency_ms"]["median"]
    if ratio > MIN_GAIN:
        return [f"Not {name}: it is {ratio:.2f}× as slow as {row_name(own, rows)}."]
    return [f"Not {name}: it is no faster than {row_name(own, rows)}."]


def compared_row(rows: Sequence[Row], verdict: Verdict) -> Row | None:
    """The low-precision row to compare with FP32: the shipped one, else the fastest engine's, else the first."""
    low = [row for row in rows if row["precision"] != "fp32"]
    if any(row is verdict.ship for row in low):
        return verdict.ship
    engines = [row for row in low if row["backend"] != "pytorch"]
    return min(engines, key=lambda row: row["latency_ms"]["median"], default=low[0] if low else None)
