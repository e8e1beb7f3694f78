"""benchmark.svg: a bar for each row, made of its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from qat.benchmark.worker import REBUILD, WHOLE
from qat.report.charts import ticks

WIDTH, LEFT, RIGHT, TOP, BAR, GAP = 960, 236, 168, 56, 26, 14
INK, SOFT, GRID = "#16202c", "#586575", "#e3e8ed"
# Blue for stages in engines, orange and grey for other stages; neighbours differ in lightness too.
ENGINES = ("#2f6690", "#7fb2d9", "#4b8bbe", "#a9cfe8")
HOST = ("#b8bec6", "#8a94a0", "#6b3f12", "#e07b16", "#f2b877", "#c9a06b")
_FONT = "font-family=\"system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif\""
_LEGEND = 150  # px to an entry


def _milliseconds(value: float) -> str:
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


def _colours(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, str]:
    """A colour for each stage; those with an engine's size run in engines."""
    engines = [n for n in names if any("size_mb" in row["sections"].get(n, {}) for row in rows)]
    others = [n for n in names if n not in engines]
    pairs = [(engines, ENGINES), (others, HOST)]
    return {name: palette[n % len(palette)] for group, palette in pairs for n, name in enumerate(group)}


def draw(results: Mapping[str, Any]) -> str:
    """The picture: medians of the stages one after the other, the whole's median as a number, its 99th percentile as a
    whisker. If the stages add up to less than the whole's median, the rest is time between them."""
    rows = results["rows"]
    wholes = [row["sections"][WHOLE]["latency_ms"] for row in rows]
    longest = max(whole["median"] for whole in wholes)
    # A stage too short to see, such as the look-up of a known pattern, gets no entry in the legend.
    names = dict.fromkeys(name for row in rows for name in row["sections"] if name not in (WHOLE, REBUILD))
    stages = [name for name in names if any(_median(row, name) > 1e-3 * longest for row in rows)]
    colours = _colours(rows, list(names))
    columns = max((WIDTH - 40) // _LEGEND, 1)
    top = TOP + 22 * -(-len(stages) // columns)
    bottom = top + len(rows) * (BAR + GAP)
    sums = [sum(_median(row, name) for name in stages) for row in rows]
    right = max(max(w["p99"] for w in wholes), *sums) * 1.02
    scale = (WIDTH - LEFT - RIGHT) / right
    machine = results["machine"]
    about = f"{machine['cpu']}, threads: {machine['threads']}, medians of {wholes[0]['samples']} runs"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 48}" width="{WIDTH}" '
        f'height="{bottom + 48}" role="img" aria-label="latency by row and stage" {_FONT} font-size="13" fill="{INK}">'
        f'<rect width="{WIDTH}" height="{bottom + 48}" fill="#fff"/>'
        f'<text x="20" y="28" font-size="16" font-weight="600">Latency of a frame, by stage</text>'
        f'<text x="{WIDTH - 20}" y="28" text-anchor="end" fill="{SOFT}" font-size="12">{escape(about)}</text>'
    ]
    for n, name in enumerate(stages):
        x, y = 20 + n % columns * _LEGEND, TOP + n // columns * 22
        out.append(
            f'<rect x="{x}" y="{y - 11}" width="12" height="12" rx="2" fill="{colours[name]}"/>'
            f'<text x="{x + 18}" y="{y}" font-size="12">{escape(name)}</text>'
        )
    for value in ticks(0, right):
        x = LEFT + value * scale
        out.append(
            f'<path d="M{x:.1f} {top - 4}V{bottom}" stroke="{GRID}"/>'
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" font-size="12" fill="{SOFT}">{value:g}</text>'
        )
    out.append(
        f'<text x="{LEFT}" y="{bottom + 38}" font-size="12" fill="{SOFT}">median milliseconds; whisker: 99th '
        "percentile; ×: best FP32 row over this one</text>"
    )
    for n, (row, whole) in enumerate(zip(rows, wholes, strict=True)):
        y, at = top + n * (BAR + GAP), float(LEFT)
        out.append(f'<text x="{LEFT - 12}" y="{y + 18}" text-anchor="end">{escape(row["name"])}</text>')
        for name in stages:
            width = _median(row, name) * scale
            if width > 0:
                out.append(
                    f'<rect x="{at:.2f}" y="{y}" width="{width:.2f}" height="{BAR}" fill="{colours[name]}">'
                    f"<title>{escape(name)}: {_milliseconds(_median(row, name))}</title></rect>"
                )
            at += width
        end, tail = max(LEFT + whole["median"] * scale, at), LEFT + whole["p99"] * scale
        if tail > end:
            out.append(
                f'<path d="M{end:.1f} {y + BAR / 2}H{tail:.1f}M{tail:.1f} {y + 6}V{y + BAR - 6}" stroke="{SOFT}" '
                f'stroke-width="2" fill="none"><title>99th percentile: {_milliseconds(whole["p99"])}</title></path>'
            )
        speed = row["sections"][WHOLE]["speedup_vs_best_fp32"]
        text = _milliseconds(whole["median"]) + ("" if speed is None else f", {speed:.2f}×")
        out.append(f'<text x="{max(end, tail) + 8:.1f}" y="{y + 18}">{text}</text>')
    return "".join([*out, "</svg>\n"])


def _median(row: Mapping[str, Any], name: str) -> float:
    return float(row["sections"][name]["latency_ms"]["median"]) if name in row["sections"] and name != REBUILD else 0.0
