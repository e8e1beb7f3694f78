"""Content and layout of a report's drawings; templates/drawings.html draws them, page.css colours them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from qat.report.schema import Results
from qat.report.verdict import MAX_LOSS, Row, reference_of, row_name

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 44
_MARKS = {
    "pytorch": "M0-6A6 6 0 1 1 0 6A6 6 0 1 1 0-6Z",
    "openvino": "M-5.5-5.5H5.5V5.5H-5.5Z",
    "onnxruntime": "M0-7L6.5 5H-6.5Z",
    "tensorrt": "M0-7.5L7.5 0L0 7.5L-7.5 0Z",
}
_PLACES = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
_CHARACTER = 8.0  # upper bound on a character's mean width at 13 px


def precision_class(row: Row) -> str:
    """The CSS class that colours a row's marks."""
    return row["precision"] if row["precision"] in ("fp32", "fp16", "int8", "int8-fake") else "int8"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next((factor for factor in (1, 2, 5) if (high - low) / (step * factor) <= count), 10)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def longest(rows: Sequence[Row]) -> float:
    """The longest latency of any row, in ms: the scale of the bars."""
    return max(max(row["latency_ms"]["p99"], row["latency_ms"]["median"]) for row in rows)


def class_pairs(names: Iterable[str], first: Row, second: Row) -> list[tuple[str, float, float]]:
    """Each class's AP in two rows, 0 if a row has none; sorted by the first row's AP."""
    aps = [(name, first["per_class_ap"].get(name) or 0.0, second["per_class_ap"].get(name) or 0.0) for name in names]
    return sorted(aps, key=lambda own: (-own[1], own[0]))


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _place_labels(points: Sequence[tuple[float, float]], names: Sequence[str]) -> list[tuple[float, float]]:
    """The start of each label (left end, baseline), so that labels cover neither each other nor the marks."""
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in points]
    placed = []
    for (x, y), name in zip(points, names, strict=True):
        width = _CHARACTER * len(name)
        spots = [
            (left, y + dy)
            for dy in (5, -14, 24, -30, 40, -46, 56, -62, 72, 88)
            for left in (x + 12, x - 12 - width, x - width / 2)
            if not (abs(dy) < 6 and left == x - width / 2)
        ]

        def cost(spot: tuple[float, float], x: float = x, y: float = y, width: float = width) -> float:
            area = (spot[0], spot[1] - 12, spot[0] + width, spot[1] + 4)
            inside = _overlap(area, (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM))
            outside = width * 16 - inside
            far = abs(spot[1] - 5 - y) + 0.3 * max(spot[0] - x, x - spot[0] - width, 0.0)
            return 100 * sum(_overlap(area, other) for other in taken) + 100 * outside + far

        spot = min(spots, key=cost)
        taken.append((spot[0], spot[1] - 12, spot[0] + width, spot[1] + 4))
        placed.append(spot)
    return placed


def scatter(rows: Sequence[Row]) -> dict[str, Any]:
    """mAP over median latency, a mark for each row; the band below FP32 is the loss that a verdict accepts.

    Returns:
        band: its top and height, or None. up, across: where each tick is, and its value. marks: for each row its style, name,
        shape, place (x, y), the left end and baseline of its label, and where the label's leader ends, or None.
    """
    reference = reference_of(rows)
    xs = [row["latency_ms"]["median"] for row in rows]
    ys = [row["map"] for row in rows]
    right = max(xs) * 1.12
    # Never less than 0.06 high: a difference of 0.001 must not look like a cliff.
    middle, half = (max(ys) + min(ys)) / 2, max((max(ys) - min(ys)) * 0.65, 0.03)
    low = max(0.0, middle - half)
    high = low + 2 * half

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / right
        return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)

    band = None
    if reference is not None:
        top, bottom = at(0, reference["map"])[1], at(0, max(low, reference["map"] - MAX_LOSS))[1]
        band = (top, bottom - top)
    points = [at(x, y) for x, y in zip(xs, ys, strict=True)]
    names = [row_name(row, rows) for row in rows]
    marks = []
    for row, name, (x, y), (left, base) in zip(rows, names, points, _place_labels(points, names), strict=True):
        leader = None
        if abs(base - 5 - y) > 22:
            leader = (left + _CHARACTER * len(name) / 2, base + 3 if base < y else base - 12)
        shape = _MARKS.get(row["backend"], _MARKS["pytorch"])
        marks.append(
            {"row": row, "name": name, "shape": shape, "x": x, "y": y, "left": left, "base": base, "leader": leader}
        )
    return {
        "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM, "width": WIDTH, "height": HEIGHT,
        "band": band, "up": [(at(0, value)[1], value) for value in ticks(low, high)],
        "across": [(at(value, low)[0], value) for value in ticks(0, right)], "marks": marks,
    }  # fmt: skip


def about_box(box: Results) -> str:
    """A box's class, and its score if it has one."""
    score = box.get("score")
    return str(box["label"]) + (f" {score:.2f}" if isinstance(score, int | float) else "")


def footprint(box: Results, heading: bool) -> str:
    """A box from above as an SVG path, y up; `heading` adds a tick from its centre to its front edge."""
    corners = [(x, -y) for x, y in box["corners"]]
    path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in corners) + "Z"
    if heading and len(corners) == 4:
        # corners go along the front edge first
        (ax, ay), (bx, by) = corners[0], corners[1]
        cx, cy = (sum(p[0] for p in corners) / 4, sum(p[1] for p in corners) / 4)
        path += f"M{cx:.2f} {cy:.2f}L{(ax + bx) / 2:.2f} {(ay + by) / 2:.2f}"
    return path


def driver_view(cameras: Sequence[Results]) -> list[Results]:
    """The cameras as a driver sees the world: front row, back row; others behind them, in their order."""
    place = {name: n for n, name in enumerate(_PLACES)}
    return sorted(cameras, key=lambda camera: place.get(camera["name"], len(place)))
