"""A report's drawings: HTML bars, which keep their text size on a phone, and inline SVG. Colours are in page.css."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from qat.report.schema import Results
from qat.report.verdict import MAX_LOSS, Row, milliseconds, reference_of, row_name

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 44
_MARKS = {
    "pytorch": "M0-6A6 6 0 1 1 0 6A6 6 0 1 1 0-6Z",
    "openvino": "M-5.5-5.5H5.5V5.5H-5.5Z",
    "onnxruntime": "M0-7L6.5 5H-6.5Z",
    "tensorrt": "M0-7.5L7.5 0L0 7.5L-7.5 0Z",
}
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


def latency_bars(rows: Sequence[Row]) -> str:
    """A bar to each row's median with a whisker to its 99th percentile."""
    longest = max(max(row["latency_ms"]["p99"], row["latency_ms"]["median"]) for row in rows)
    parts = []
    for row in rows:
        median, p99 = row["latency_ms"]["median"], row["latency_ms"]["p99"]
        at, tail = 70 * median / longest, 70 * max(p99 - median, 0) / longest
        parts.append(
            f'<div>{escape(row_name(row, rows))}</div><div class="track {precision_class(row)}">'
            f'<div class="fill" style="width:{at:.2f}%"></div>'
            f'<div class="tail" style="left:{at:.2f}%;width:{tail:.2f}%"></div>'
            f'<div class="value" style="left:{at + tail:.2f}%">{milliseconds(median)}</div></div>'
        )
    return f'<div class="bars">{"".join(parts)}</div>'


def class_bars(reference: Row, candidate: Row, objects: dict[str, int]) -> str:
    """Each class's AP in two rows, as a pair of bars; classes by their AP in the reference."""
    parts = []
    aps = {name: ap or 0.0 for name, ap in reference["per_class_ap"].items()}
    for name in sorted(aps, key=lambda name: (-aps[name], name)):
        pair = (aps[name], candidate["per_class_ap"].get(name) or 0.0)
        bars = "".join(
            f'<div class="track {precision_class(row)}"><div class="fill" style="width:{100 * ap:.2f}%"></div></div>'
            for row, ap in zip((reference, candidate), pair, strict=True)
        )
        count = f" <small>{objects[name]}</small>" if name in objects else ""
        parts.append(
            f'<div>{escape(name.replace("_", " "))}{count}</div><div class="pair">{bars}</div>'
            f'<div class="value">{pair[0]:.3f} <small>→</small> {pair[1]:.3f}</div>'
        )
    return f'<div class="classes">{"".join(parts)}</div>'


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _place_labels(points: Sequence[tuple[float, float]], names: Sequence[str]) -> list[tuple[float, float]]:
    """Where each label begins (left end, baseline) so that labels cover neither each other nor the marks."""
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


def scatter(rows: Sequence[Row]) -> str:
    """mAP over median latency, a mark for each row; the band below FP32 is the loss that a verdict accepts."""
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

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="mAP over latency, one mark for each row">']
    if reference is not None:
        top, bottom = at(0, reference["map"])[1], at(0, max(low, reference["map"] - MAX_LOSS))[1]
        parts.append(
            f'<rect class="band" x="{LEFT}" y="{top:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{bottom - top:.1f}"/>'
        )
    for value in ticks(low, high):
        y = at(0, value)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="axis" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value in ticks(0, right):
        x = at(value, low)[0]
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="axis" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        "median latency of a frame, ms</text>"
        f'<text class="axis" transform="translate(13 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        "mAP</text>"
    )
    points = [at(x, y) for x, y in zip(xs, ys, strict=True)]
    for row, (x, y), (left, base) in zip(
        rows, points, _place_labels(points, [row_name(row, rows) for row in rows]), strict=True
    ):
        name = row_name(row, rows)
        if abs(base - 5 - y) > 22:
            edge = base + 3 if base < y else base - 12
            parts.append(
                f'<path class="leader" d="M{x:.1f} {y:.1f}L{left + _CHARACTER * len(name) / 2:.1f} {edge:.1f}"/>'
            )
        parts.append(
            f'<path class="mark {precision_class(row)}" transform="translate({x:.1f} {y:.1f})" '
            f'd="{_MARKS.get(row["backend"], _MARKS["pytorch"])}"/>'
            f'<text x="{left:.1f}" y="{base:.1f}">{escape(name)}</text>'
        )
    return "".join([*parts, "</svg>"])


def camera_view(frame: Results, camera: Results) -> str:
    """One camera's image with the boxes of truth, reference and candidate drawn over it."""
    width, height = frame["image_size"]
    parts = [
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(camera["name"])}">'
        f'<image href="data:image/jpeg;base64,{camera["jpeg"]}" width="{width:g}" height="{height:g}"/>'
    ]
    for kind in ("truth", "reference", "candidate"):
        for box in frame["boxes"][kind]:
            lines = box["outlines"].get(camera["name"], [])
            if lines:
                path = "".join(f"M{a:g} {b:g}L{c:g} {d:g}" for a, b, c, d in lines)
                parts.append(f'<path class="box {kind}" d="{path}"><title>{_about(box)}</title></path>')
    caption = camera["name"].removeprefix("CAM_").replace("_", " ").lower()
    return f"<figure>{''.join(parts)}</svg><figcaption>{escape(caption)}</figcaption></figure>"


def _about(box: Results) -> str:
    score = box.get("score")
    return escape(box["label"]) + (f" {score:.2f}" if isinstance(score, int | float) else "")


def birds_eye(frame: Results) -> str:
    """The boxes from above: x to the right, y (forward) up, rings every 10 m around the car."""
    reach = frame["range"]
    parts = [
        f'<svg viewBox="{-reach:g} {-reach:g} {2 * reach:g} {2 * reach:g}" role="img" aria-label="bird\'s-eye view">'
    ]
    for radius in range(10, int(reach) + 1, 10):
        parts.append(
            f'<circle r="{radius}" fill="none" class="grid" vector-effect="non-scaling-stroke"/>'
            f'<text class="axis" style="font-size:2.4px" x=".6" y="{-radius + 2.6}">{radius} m</text>'
        )
    parts.append('<path d="M0-2.6L1.1 2H-1.1Z" fill="var(--ink)"><title>the car, facing up</title></path>')
    for kind in ("truth", "reference", "candidate"):
        for box in frame["boxes"][kind]:
            corners = [(x, -y) for x, y in box["corners"]]
            path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in corners) + "Z"
            if kind != "truth" and len(corners) == 4:
                # corners go along the front edge first; a tick shows the heading
                (ax, ay), (bx, by) = corners[0], corners[1]
                cx, cy = (sum(p[0] for p in corners) / 4, sum(p[1] for p in corners) / 4)
                path += f"M{cx:.2f} {cy:.2f}L{(ax + bx) / 2:.2f} {(ay + by) / 2:.2f}"
            parts.append(f'<path class="box {kind}" d="{path}"><title>{_about(box)}</title></path>')
    return "".join([*parts, "</svg>"])
