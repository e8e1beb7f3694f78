"""Content for templates/sensitivity.html: accuracy loss of each unit in INT8, float layers, activations of the worst units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qat.report.charts import ticks
from qat.report.schema import EXACT_DB, Results

BARS = 12  # number of units in the chart; the table below it has more
_WHERE = {
    "bev": "the BEV features",
    "heads": "the head's maps",
    "objects": "the head's maps where objects are",
}
_HEADS = {"bev": "BEV", "heads": "Head", "objects": "At objects"}
# Names of modules around a part, redundant next to the part's name.
_AROUND = ("encoders_camera_", "heads_object_")
WIDTH, HEIGHT = 340, 150
LEFT, RIGHT, TOP, BOTTOM = 30, 8, 20, 24


def unit_name(name: str) -> str:
    """ "camera.quant_encoders_camera_backbone_act1" → "camera: backbone_act1"; the part's input is called "input"."""
    part, _, tensor = name.partition(".")
    tensor = tensor.removeprefix("quant_")
    for around in (*_AROUND, f"{part}_"):
        tensor = tensor.removeprefix(around)
    if not tensor:
        return name
    return f"{part}: {'input' if tensor == 'x' else tensor}"


def judged_by(section: Results) -> str:
    """The tensor by which units are ranked: the last of those that were compared."""
    return str(list(section["together"]["sqnr_db"])[-1])


def noise(unit: Results, tensor: str) -> float:
    """Noise power over signal power, from the unit's SQNR; 0 for an exact one."""
    value = unit["sqnr_db"].get(tensor, EXACT_DB)
    return 0.0 if value >= EXACT_DB else 10.0 ** (-value / 10)


def frames_of(section: Results) -> str:
    """The number of keyframes, and the data, that the units were measured on."""
    dataset = section["dataset"]
    of = " of " + dataset["name"] if dataset.get("name") else ""
    split = f", split {dataset['split']}" if dataset.get("split") else ""
    return f"{section['frames']:g} keyframe{'' if section['frames'] == 1 else 's'}{of}{split}"


def sensitivity(section: Results) -> dict[str, Any]:
    """Content of the sections on the worst units, on float layers and on activations.

    Returns:
        tensor: where units are judged; where: the same in words. count: of all units. bars: name, unit, style, SQNR
        and share of the longest bar. tensors: names and heads. floats: groups, with `shown`, their layers' names within the part.
    """
    tensor, units = judged_by(section), section["units"]
    count = section.get("units_in_all", len(units))
    rows = [(f"all {count:g} together", section["together"], "all")]
    rows += [(unit_name(unit["name"]), unit, "int8") for unit in units[:BARS]]
    longest = max(noise(unit, tensor) for _, unit, _ in rows) or 1.0
    floats = []
    for group in section["floats"]:
        layers = [layer.removeprefix(f"{group['part']}.") for layer in group["layers"]]
        shown = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
        floats.append({**group, "layers": layers, "shown": shown})
    return {
        "tensor": tensor,
        "where": _WHERE.get(tensor, "its last tensor"),
        "count": count,
        "frames": frames_of(section),
        "bars": [
            (name, unit, style, unit["sqnr_db"].get(tensor, EXACT_DB), noise(unit, tensor) / longest)
            for name, unit, style in rows
        ],
        "tensors": {name: _HEADS.get(name, name) for name in section["together"]["sqnr_db"]},
        "drops": {name: "mAP" if name == "map" else name.upper() for name in section.get("reference") or {}},
        "rows": [*((unit_name(unit["name"]), unit) for unit in units), ("all together", section["together"])],
        "share": section["together"]["macs_share"],
        "floats": floats,
        "histograms": [_histogram(own) for own in section["histograms"]],
    }


def _steps(counts: Sequence[float], heights: Sequence[float], at: float, width: float, floor: float) -> str:
    """A filled outline over the bins; an empty bin goes down to the floor."""
    path = [f"M{at:.1f} {floor:.1f}"]
    for n, (count, height) in enumerate(zip(counts, heights, strict=True)):
        top = floor if count == 0 else height
        path.append(f"V{top:.1f}H{at + (n + 1) * width:.1f}")
    return "".join([*path, f"V{floor:.1f}Z"])


def _histogram(own: Results) -> dict[str, Any]:
    """Layout of one unit's histogram: log counts over |x|, and the chosen amax as a line."""
    counts, bin_width, amax = own["counts"], own["bin_width"], own["amax"]
    reach = max(len(counts) * bin_width, amax * 1.02)
    decades = max(1, math.ceil(math.log10(max(max(counts), 2))))
    across, high, floor = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM, HEIGHT - BOTTOM

    def x(value: float) -> float:
        return LEFT + across * value / reach

    def y(count: float) -> float:
        # A count of 1 is drawn a little above the floor, where empty bins are.
        return floor - high * (math.log10(count) + 0.25) / (decades + 0.25) if count > 0 else floor

    levels = []
    for decade in range(0, decades + 1, 2 if decades > 3 else 1):
        power = "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(decade))
        levels.append((y(10.0**decade), "1" if decade == 0 else f"10{power}"))
    return {
        "own": own, "name": unit_name(own["unit"]), "amax": f"{amax:.3g}" if amax < 1000 else f"{amax:,.0f}",
        "line": x(amax), "on_the_right": x(amax) > LEFT + across / 2, "levels": levels,
        "outline": _steps(counts, [y(count) for count in counts], LEFT, across * bin_width / reach, floor),
        "ticks": [(x(value), value) for value in ticks(0, reach, 4) if x(value) < WIDTH - RIGHT - 10],
        "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "floor": floor, "width": WIDTH, "height": HEIGHT,
    }  # fmt: skip


def side_by_side(a: Results, b: Results) -> dict[str, Any]:
    """Two runs' units side by side: SQNR at the tensor by which both are ranked, and float layers in either run.

    Returns:
        comparable: whether both judge at one tensor; with the rest only then. units: name, in A, in B (None where it is not
        among the worst). floats: (part, reason), group in A, group in B.
    """
    tensor = judged_by(a)
    if tensor != judged_by(b):
        return {"comparable": False}
    first, second = ({unit["name"]: unit for unit in section["units"]} for section in (a, b))
    names = list(dict.fromkeys([*first, *second]))
    names.sort(key=lambda name: min(u[name]["sqnr_db"].get(tensor, EXACT_DB) for u in (first, second) if name in u))
    units = [(unit_name(name), first.get(name), second.get(name)) for name in names]
    groups = [{(group["part"], group["reason"]): group for group in section["floats"]} for section in (a, b)]
    reasons = dict.fromkeys([*groups[0], *groups[1]])
    return {
        "comparable": True,
        "tensor": tensor,
        "where": _WHERE.get(tensor, tensor),
        "frames": (frames_of(a), frames_of(b)),
        "units": [*units, ("all together", a["together"], b["together"])],
        "floats": [(reason, *(own.get(reason) for own in groups)) for reason in reasons],
    }
