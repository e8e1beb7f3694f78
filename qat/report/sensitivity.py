"""Which units pay for INT8, what stays float, and the activations of the worst: HTML bars and small SVG histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from qat.report.charts import ticks
from qat.report.schema import EXACT_DB, Results
from qat.report.tables import Cell, breakable, decibels, in_words, optional, percent, plain, table
from qat.report.verdict import signed

BARS = 12  # units in the chart; the table below it has more
_WHERE = {
    "bev": "the BEV features",
    "heads": "the head's maps",
    "objects": "the head's maps where objects are",
}
_HEADS = {"bev": "BEV", "heads": "Head", "objects": "At objects"}
# Names of modules around a part, which say nothing beside the part's own.
_AROUND = ("encoders_camera_", "heads_object_")
WIDTH, HEIGHT = 340, 150
LEFT, RIGHT, TOP, BOTTOM = 30, 8, 20, 24


def unit_name(name: str) -> str:
    """ "camera.quant_encoders_camera_backbone_act1" → "camera: backbone_act1"; the part's own input is so called."""
    part, _, tensor = name.partition(".")
    tensor = tensor.removeprefix("quant_")
    for around in (*_AROUND, f"{part}_"):
        tensor = tensor.removeprefix(around)
    if not tensor:
        return name
    return f"{part}: {'input' if tensor == 'x' else tensor}"


def judged_by(section: Results) -> str:
    """The tensor at which the units are judged: the last of those that were compared."""
    return str(list(section["together"]["sqnr_db"])[-1])


def noise(unit: Results, tensor: str) -> float:
    """Noise over signal in power, from the unit's SQNR; 0 for an exact one."""
    value = unit["sqnr_db"].get(tensor, EXACT_DB)
    return 0.0 if value >= EXACT_DB else 10.0 ** (-value / 10)


def _drop(unit: Results) -> str:
    lost = (unit.get("drop") or {}).get("map")
    return "" if lost is None else f' <small class="drop">{signed(-lost, 4)} mAP</small>'


def bars(section: Results) -> str:
    """A bar for each of the worst units to the noise that it makes alone, under that of all together."""
    tensor = judged_by(section)
    count = section.get("units_in_all", len(section["units"]))
    rows = [(f"all {count:g} together", section["together"], "all")]
    rows += [(unit_name(unit["name"]), unit, "int8") for unit in section["units"][:BARS]]
    longest = max(noise(unit, tensor) for _, unit, _ in rows) or 1.0
    parts = []
    for name, unit, style in rows:
        value = decibels(unit["sqnr_db"].get(tensor, EXACT_DB))
        label = f"{value}{'' if value == 'exact' else ' dB'}"
        parts.append(
            f'<div title="{escape(unit["name"])}">{breakable(name)}</div><div class="track {style}">'
            f'<div class="fill" style="width:{100 * noise(unit, tensor) / longest:.2f}%"></div></div>'
            f'<div class="value">{escape(label)}{_drop(unit)}</div><div class="value"><small>{percent(unit["macs_share"])}</small></div>'
        )
    heads = "".join(
        f'<div class="head{" value" if n > 1 else ""}"><small>{text}</small></div>'
        for n, text in enumerate(("unit", "noise", "SQNR", "MACs"))
    )
    parts.insert(0, heads)
    return f'<div class="units">{"".join(parts)}</div>'


def _units_table(section: Results) -> str:
    tensors = list(section["together"]["sqnr_db"])
    drops = list(section.get("reference") or {})
    heads = ["Unit", "Layers", "MACs", *(f"{_HEADS.get(name, name)}, dB" for name in tensors)]
    heads += [f"Δ {'mAP' if name == 'map' else name.upper()}" for name in drops]

    def cells(unit: Results, name: str) -> list[Cell]:
        lost = unit.get("drop") or {}
        return [
            (f'<span title="{escape(", ".join(unit["layers"]))}">{breakable(name)}</span>', name),
            (str(len(unit["layers"])), len(unit["layers"])),
            (percent(unit["macs_share"]), unit["macs_share"]),
            *(optional(unit["sqnr_db"].get(tensor), decibels) for tensor in tensors),
            *(optional(None if lost.get(key) is None else -lost[key], lambda v: signed(v, 4)) for key in drops),
        ]

    body = [("", cells(unit, unit_name(unit["name"]))) for unit in section["units"]]
    return table(heads, [*body, ("", cells(section["together"], "all together"))])


def _share_bar(section: Results) -> str:
    """One bar of all multiply-accumulates: INT8, and what stays float."""
    share = section["together"]["macs_share"]
    return (
        '<div class="share" role="img" aria-label="share of the multiply-accumulates in INT8 and in float">'
        f'<div class="int8" style="width:{100 * share:.2f}%"></div></div>'
        f'<p class="note sharing"><span><span class="dot int8"></span>INT8 {percent(share)} of the multiply-accumulates</span> '
        f'<span><span class="dot fp32"></span>float {percent(1 - share if share < 0.999999 else 0.0)}</span></p>'
    )


def _floats(section: Results) -> str:
    groups = section["floats"]
    if not groups:
        return '<p class="note">Nothing: every layer with weights is INT8.</p>'
    body = []
    for group in groups:
        layers = [layer.removeprefix(f"{group['part']}.") for layer in group["layers"]]
        shown = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
        body.append(
            (
                "",
                [
                    plain(group["part"]),
                    (f'<span title="{escape(", ".join(layers))}">{breakable(shown)}</span>', shown),
                    (percent(group["macs_share"]), group["macs_share"]),
                    plain(group["reason"]),
                ],
            )
        )
    return table(["Part", "Layers", "MACs", "Why"], body, ("Layers", "Why"))


def _frames(section: Results) -> str:
    dataset = section["dataset"]
    of = " of " + dataset["name"] if dataset.get("name") else ""
    split = f", split {dataset['split']}" if dataset.get("split") else ""
    return f"{section['frames']:g} keyframe{'' if section['frames'] == 1 else 's'}{of}{split}"


def sensitivity(section: Results) -> str:
    """The sections of the worst units, of what stays float and of the activations."""
    where = _WHERE.get(judged_by(section), "its last tensor")
    many = section.get("units_in_all", len(section["units"]))
    note = (
        f"Each of the {many:g} quantized units (the input of some layers, with their weights) alone in INT8 and all else in "
        f"float, over {_frames(section)}. A bar is the noise power that this leaves in {where}; SQNR is the same in dB "
        "(less is worse), MACs the share of the multiply-accumulates that the unit moves to INT8. A long bar with a small "
        "share is the first to keep in float."
    )
    more = f"<details><summary>The {len(section['units'])} worst units in figures</summary>{_units_table(section)}</details>"
    kept = f'<div class="together"><h3 class="apart">Kept in float</h3>{_share_bar(section)}{_floats(section)}</div>'
    return (
        f'<div class="together"><h2>Which layers pay for INT8</h2><p class="note">{escape(note)}</p>'
        f'<div class="card">{bars(section)}</div></div>{more}{kept}{_histograms(section)}'
    )


def _histograms(section: Results) -> str:
    if not section["histograms"]:
        return ""
    note = (
        "Magnitudes at the input of the most harmful units, in float, over the same keyframes; counts on a logarithmic scale, "
        "exact zeros left out. The line is the range that calibration chose: 127 steps reach up to it, what lies beyond it "
        "is clipped, and what lies below half a step becomes zero."
    )
    cards = "".join(f'<figure class="card histogram">{_histogram(own)}</figure>' for own in section["histograms"])
    return f'<h2>Activations of the worst units</h2><p class="note">{escape(note)}</p><div class="three">{cards}</div>'


def _steps(counts: Sequence[float], heights: Sequence[float], at: float, width: float, floor: float) -> str:
    """A filled outline over the bins; an empty bin goes down to the floor."""
    path = [f"M{at:.1f} {floor:.1f}"]
    for n, (count, height) in enumerate(zip(counts, heights, strict=True)):
        top = floor if count == 0 else height
        path.append(f"V{top:.1f}H{at + (n + 1) * width:.1f}")
    return "".join([*path, f"V{floor:.1f}Z"])


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _histogram(own: Results) -> str:
    """One unit's magnitudes, log counts over |x|, with the chosen amax as a line."""
    counts, bin_width, amax = own["counts"], own["bin_width"], own["amax"]
    reach = max(len(counts) * bin_width, amax * 1.02)
    decades = max(1, math.ceil(math.log10(max(max(counts), 2))))
    across, high, floor = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM, HEIGHT - BOTTOM

    def x(value: float) -> float:
        return LEFT + across * value / reach

    def y(count: float) -> float:
        # A count of 1 stands a little above the floor, on which an empty bin lies.
        return floor - high * (math.log10(count) + 0.25) / (decades + 0.25) if count > 0 else floor

    name = unit_name(own["unit"])
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="histogram of {escape(name)}, amax {_figure(amax)}">'
    ]
    for decade in range(0, decades + 1, 2 if decades > 3 else 1):
        level = y(10.0**decade)
        parts.append(f'<path class="grid" d="M{LEFT} {level:.1f}H{WIDTH - RIGHT}"/>')
        power = "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(decade))
        parts.append(
            f'<text class="axis" x="{LEFT - 5}" y="{level + 4:.1f}" text-anchor="end">{"1" if decade == 0 else f"10{power}"}</text>'
        )
    line = x(amax)
    if own["clipped"] > 0:
        parts.append(
            f'<rect class="beyond" x="{line:.1f}" y="{TOP}" width="{WIDTH - RIGHT - line:.1f}" height="{high}"/>'
        )
    heights = [y(count) for count in counts]
    parts.append(f'<path class="area" d="{_steps(counts, heights, LEFT, across * bin_width / reach, floor)}"/>')
    parts.append(f'<path class="base" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>')
    for value in ticks(0, reach, 4):
        parts.append(
            f'<text class="axis" x="{x(value):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{value:g}</text>'
            if x(value) < WIDTH - RIGHT - 10
            else ""
        )
    left = line > LEFT + across / 2
    parts.append(
        f'<path class="amax" d="M{line:.1f} {TOP - 4}V{floor}"/>'
        f'<text class="amax" x="{line + (-6 if left else 6):.1f}" y="{TOP - 6}" text-anchor="{"end" if left else "start"}">'
        f"amax {_figure(amax)}</text></svg>"
    )
    said = [
        f"Range by {own['method']}",
        f"{percent(own['clipped'])} clipped",
        f"{percent(own['to_zero'])} rounded to zero",
    ]
    if own["zeros"]:
        said.append(f"{percent(own['zeros'])} zero anyway")
    about = f"{own['unit']} feeds {', '.join(own['layers']) or 'an addition alone'}"
    return (
        f'<figcaption title="{escape(about)}">{breakable(name)}</figcaption>{"".join(parts)}'
        f'<p class="note">{escape("; ".join(said))}.</p>'
    )


def side_by_side(a: Results, b: Results) -> str:
    """Two runs' units beside each other: SQNR where both judge, and what stays float in either."""
    tensor = judged_by(a)
    if tensor != judged_by(b):
        return '<p class="note">The two were judged at different tensors; they cannot be set side by side.</p>'
    first, second = ({unit["name"]: unit for unit in section["units"]} for section in (a, b))
    names = list(dict.fromkeys([*first, *second]))
    names.sort(key=lambda name: min(u[name]["sqnr_db"].get(tensor, EXACT_DB) for u in (first, second) if name in u))

    def cells(shown: str, before: Results | None, after: Results | None) -> list[Cell]:
        values = [None if unit is None else unit["sqnr_db"].get(tensor) for unit in (before, after)]
        both = None if values[0] is None or values[1] is None else values[1] - values[0]
        return [
            (breakable(shown), shown),
            *(optional(value, decibels) for value in values),
            optional(both, lambda value: signed(value, 1)),
            *(optional(None if u is None else u["macs_share"], percent) for u in (before, after)),
        ]

    body = [("", cells(unit_name(name), first.get(name), second.get(name))) for name in names]
    body.append(("", cells("all together", a["together"], b["together"])))
    units = table(["Unit", "A, dB", "B, dB", "B − A", "MACs, A", "MACs, B"], body)
    note = (
        f"Signal-to-noise ratio at {_WHERE.get(tensor, tensor)} with one unit in INT8, of the worst units of either run (– where "
        f"it is not among the worst). A: {_frames(a)}. B: {_frames(b)}."
    )
    return f'<p class="note">{escape(note)}</p>{units}<h3 class="apart">Kept in float</h3>{_both_floats(a, b)}'


def _both_floats(a: Results, b: Results) -> str:
    groups = [{(group["part"], group["reason"]): group for group in section["floats"]} for section in (a, b)]
    reasons = list(dict.fromkeys([*groups[0], *groups[1]]))
    if not reasons:
        return '<p class="note">Nothing in either run: every layer with weights is INT8.</p>'
    body: list[tuple[str, list[Cell]]] = []
    for reason in reasons:
        found = [own.get(reason) for own in groups]
        shares = [optional(None if group is None else group["macs_share"], percent) for group in found]
        counts = [optional(None if group is None else len(group["layers"]), in_words) for group in found]
        body.append(("", [plain(reason[0]), plain(reason[1]), *shares, *counts]))
    return table(["Part", "Why", "MACs, A", "MACs, B", "Layers, A", "Layers, B"], body, ("Why",))
