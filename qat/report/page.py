"""results.json → one HTML page that needs nothing else: styles, drawings and images are in it."""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from qat.core.files import write_text
from qat.core.locks import one_writer
from qat.report.charts import birds_eye, camera_view, class_bars, latency_bars, precision_class, scatter
from qat.report.schema import Results, load_results
from qat.report.sensitivity import sensitivity
from qat.report.tables import Cell, change, decibels, facts, in_words, name_cell, optional, plain, table, timed
from qat.report.verdict import (
    MAX_LOSS,
    Row,
    Verdict,
    baseline_of,
    compared_row,
    decide,
    is_simulated,
    milliseconds,
    reference_of,
    row_name,
    signed,
)

# The camera images as a driver sees the world: front row, back row.
_PLACES = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
# Nothing is fetched and no script runs but the page's own, whatever the results hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'"
_TENSORS = {
    "camera_depth_weights": "depth weights",
    "feat_in": "BEV, pooled",
    "feat_out": "BEV, downsampled",
    "middle": "decoder",
}
_TP_NAMES = {
    "trans_err": "mATE, m",
    "scale_err": "mASE",
    "orient_err": "mAOE, rad",
    "vel_err": "mAVE, m/s",
    "attr_err": "mAAE",
}


def _difference(row: Row, base: Row | None, key: str) -> Cell:
    if base is None:
        return "–", 0.0
    interval = row.get("change", {}).get(key)
    bounds = "" if interval is None else f"<br><small>{signed(interval['low'])} … {signed(interval['high'])}</small>"
    return change(row[key] - base[key], bounds)


def _main_table(rows: Sequence[Row], verdict: Verdict) -> str:
    reference = reference_of(rows)
    heads = [
        "Backend and precision", "mAP", "Δ mAP", "NDS", "Δ NDS", "Median", "p99", "Speed-up", "Size", "SQNR",
    ]  # fmt: skip
    body = []
    for row in rows:
        latency = row["latency_ms"]
        base = None if reference is None or row is reference else reference
        cells: list[Cell] = [
            name_cell(row, rows),
            (f"{row['map']:.3f}", row["map"]),
            _difference(row, base, "map"),
            (f"{row['nds']:.3f}", row["nds"]),
            _difference(row, base, "nds"),
            optional(timed(latency["median"], row), milliseconds),
            optional(timed(latency["p99"], row), milliseconds),
            optional(timed(row.get("speedup_vs_fp32"), row), lambda value: f"{value:.2f}×"),
            optional(row.get("size_mb"), lambda value: f"{value:.1f} MB"),
            optional(
                row.get("sqnr_db", {}).get("heads"), lambda value: f"{decibels(value)} dB".replace("exact dB", "exact")
            ),
        ]
        body.append(("ship" if row is verdict.ship else "", cells))
    return table(heads, body)


def _verdict_card(results: Results, verdict: Verdict) -> str:
    rows = results["rows"]
    reference, ship = reference_of(rows), verdict.ship
    tiles = []
    if ship is not None:
        own = baseline_of(ship, rows)
        before = own["latency_ms"]["median"] if own is not None and own is not ship else None
        tiles.append(
            (
                milliseconds(ship["latency_ms"]["median"]),
                f"a frame; FP32 {milliseconds(before)}" if before else "a frame",
            )
        )
        if own is not None and before:
            tiles.append((f"{before / ship['latency_ms']['median']:.2f}×", f"the speed of {row_name(own, rows)}"))
        for name, key in (("mAP", "map"), ("NDS", "nds")):
            change = (
                "" if reference is None or reference is ship else f"; {signed(ship[key] - reference[key])} against FP32"
            )
            tiles.append((f"{ship[key]:.3f}", name + change))
    style = "none" if ship is None else precision_class(ship)
    drawn = "".join(f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in tiles)
    return (
        f'<section class="card verdict {style}"><p class="eyebrow">Which engine to ship</p>'
        f"<h1>{escape(verdict.headline)}</h1>"
        f'<p class="lead">{escape(" ".join(verdict.reasons))}</p>'
        f'<div class="tiles">{drawn}</div></section>'
    )


def _about_table(rows: Sequence[Row], verdict: Verdict) -> str:
    reference = reference_of(rows)
    text = "Every backend and precision over the same keyframes"
    text += f"; differences are against {row_name(reference, rows)}" if reference is not None and len(rows) > 1 else ""
    if any(row.get("change") for row in rows):
        text += ", with their 95 % bounds below"
    return text + ("; the green row is the one to ship." if verdict.ship is not None else ".")


def _how_measured(results: Results) -> str:
    measured, machine, dataset = results.get("measurement", {}), results["machine"], results["dataset"]
    sentences = [
        f"mAP and NDS are what the official nuScenes devkit computes over all {dataset['samples']:g} evaluation "
        "keyframes, the same ones for every row."
    ]
    if measured.get("resamples"):
        sentences.append(
            f"Under each difference stand the bounds between which 95 % of {measured['resamples']} paired resamples of the "
            f"{dataset.get('scenes', '')} scenes lie."
        )
    if "rounds" in measured:
        sentences.append(
            f"Latency is of the whole detector, from preprocessed tensors to boxes, in {measured['rounds']} rounds "
            "that go through all rows in a rotating order, so that a busy or a hot machine slows every row alike; "
            f"in each round a row runs one of {measured.get('frames', '?')} keyframes "
            f"{measured.get('repeats', '?')} times, after one run that does not count."
        )
    if "pattern_rebuild_ms" in measured:
        sentences.append(
            "The pooling pattern of a camera geometry is cached and not in these figures: it takes "
            f"{milliseconds(measured['pattern_rebuild_ms'])} when the geometry changes."
        )
    sentences.append("Speed-up is against FP32 on the same backend; SQNR is of the head's maps against PyTorch FP32.")
    if any(is_simulated(row) for row in results["rows"]):
        sentences.append("PyTorch's INT8 is simulated in float: it shows the accuracy; its time is not an engine's.")
    if machine.get("cpu"):
        sentences.append(f"Machine: {machine['cpu']}, {machine.get('threads', '?')} threads.")
    return " ".join(sentences)


def _classes(results: Results, verdict: Verdict) -> str:
    rows = results["rows"]
    reference, shown = reference_of(rows), compared_row(rows, verdict)
    if reference is None or not reference["per_class_ap"]:
        return ""
    objects = results["dataset"].get("objects") or {}
    heads = ["Backend and precision", *(name.replace("_", " ") for name in reference["per_class_ap"])]
    body = [
        (
            "ship" if row is verdict.ship else "",
            [
                name_cell(row, rows),
                *(optional(row["per_class_ap"].get(name), "{:.3f}".format) for name in reference["per_class_ap"]),
            ],
        )
        for row in rows
    ]
    tables = table(heads, body)
    errors = [key for key in _TP_NAMES if any(row.get("tp_errors", {}).get(key) is not None for row in rows)]
    if errors:
        body = [
            (
                "ship" if row is verdict.ship else "",
                [
                    name_cell(row, rows),
                    *(optional(row.get("tp_errors", {}).get(key), "{:.3f}".format) for key in errors),
                ],
            )
            for row in rows
        ]
        tables += '<p class="note" style="margin:14px 0 8px">True-positive errors, less is better.</p>'
        tables += table(["Backend and precision", *(_TP_NAMES[key] for key in errors)], body)
    bars = "" if shown is None else f'<div class="card">{class_bars(reference, shown, objects)}</div>'
    legend = "" if shown is None else (
        f'<p class="note"><span class="dot {precision_class(reference)}"></span>{escape(row_name(reference, rows))} and '
        f'<span class="dot {precision_class(shown)}"></span>{escape(row_name(shown, rows))}: average precision over the '
        "distances 0.5, 1, 2 and 4 m. The small number is how many objects are annotated.</p>"
    )  # fmt: skip
    return (
        f'<div class="together"><h2>Per class</h2>{legend}{bars}</div>'
        f"<details><summary>Every row's AP and errors</summary>{tables}</details>"
    )


def _stages(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if not is_simulated(row)]
    names: list[str] = list(dict.fromkeys(name for row in rows for name in row.get("stages_ms", {})))
    if not names:
        return ""
    body = [
        ("", [name_cell(row, rows), *(optional(row.get("stages_ms", {}).get(name), milliseconds) for name in names)])
        for row in rows
    ]
    return (
        "<details><summary>Where the time goes: the median of each stage</summary>"
        f"{table(['Backend and precision', *names], body)}</details>"
    )


def _sqnr(results: Results) -> str:
    rows = results["rows"]
    names: list[str] = list(dict.fromkeys(name for row in rows for name in row.get("sqnr_db", {})))
    if not names:
        return ""
    body = [
        ("", [name_cell(row, rows), *(optional(row["sqnr_db"].get(name), decibels) for name in names)])
        for row in rows
        if row.get("sqnr_db")
    ]
    return (
        "<h2>Distance from FP32 along the network</h2>"
        '<p class="note">Signal-to-quantization-noise ratio in dB against PyTorch FP32, over all keyframes, at the '
        "tensors between the parts in their order. More is better; 6 dB are one bit. The first low column tells "
        "where a row loses its accuracy; float rounding alone stays above 80.</p>"
        + table(["Backend and precision", *(_TENSORS.get(name, name.replace("_", " ")) for name in names)], body)
    )


def _frame(results: Results, frame: Results, number: int) -> str:
    rows = results["rows"]
    reference, candidate = (rows[int(frame[key])] for key in ("reference", "candidate"))
    names = [camera["name"] for camera in frame["cameras"]]
    place = {name: n for n, name in enumerate(_PLACES)}
    cameras = sorted(
        frame["cameras"], key=lambda camera: (place.get(camera["name"], len(place)), names.index(camera["name"]))
    )
    views = "".join(camera_view(frame, camera) for camera in cameras)
    toggles = "".join(
        f'<label><input type="checkbox" class="show-{kind}" checked> <span class="swatch {kind}"></span>'
        f"{escape(text)}</label>"
        for kind, text in (
            ("reference", row_name(reference, rows)),
            ("candidate", row_name(candidate, rows)),
            ("truth", "annotated"),
        )
    )
    counts = [(frame.get(f"only_{key}"), row) for key, row in (("reference", reference), ("candidate", candidate))]
    facts = [
        f"{count} {'box' if count == 1 else 'boxes'} only in {row_name(row, rows)}"
        for count, row in counts
        if isinstance(count, int) and count > 0
    ] or ["the same boxes in both"]
    least = frame.get("min_score")
    shown = f" Boxes with a score of {least:g} or more." if isinstance(least, int | float) else ""
    return (
        f'<div class="card frame"><h3>Keyframe {number}: {escape(", ".join(facts))}</h3>'
        f'<p class="note"><code>{escape(str(frame.get("token", "")))}</code>{escape(shown)}</p>'
        f'<div class="toggles">{toggles}</div><div class="cameras">{views}</div>'
        f'<div class="bev">{birds_eye(frame)}</div></div>'
    )


def _frames(results: Results) -> str:
    if not results.get("frames"):
        return ""
    many = len(results["frames"]) > 1
    drawn = "".join(_frame(results, frame, n + 1) for n, frame in enumerate(results["frames"]))
    return (
        f"<h2>Where the boxes differ most</h2>"
        f'<p class="note">Of all keyframes, {"these are those" if many else "this is the one"} in which the two rows '
        "agree least. A box of both is blue with an orange core. A switch below hides a layer; hover over a box for "
        "its class and score.</p>"
        f"{drawn}"
    )


def _commands(provenance: Results) -> str:
    """The commands that made the files and these results, each once, with what it made."""
    listed = provenance.get("commands") or []
    if not listed and provenance.get("command"):  # written before every file told its own
        listed = [{"what": "these results", "command": str(provenance["command"])}]
    made: dict[tuple[str, str], list[str]] = {}
    for entry in listed:
        made.setdefault((entry["command"], in_words(entry.get("versions", {}))), []).append(entry["what"])
    parts = []
    for (command, others), whats in made.items():
        small = f" <small>with {escape(others)}</small>" if others else ""
        parts.append(
            f"<dt>{escape(', '.join(dict.fromkeys(whats)))}{small}</dt><dd><code>{escape(command)}</code></dd>"
        )
    return f'<dl class="commands">{"".join(parts)}</dl>' if parts else ""


def _provenance(results: Results) -> str:
    provenance = dict(results.get("provenance", {}))
    files = [file for file in provenance.pop("files", []) if isinstance(file, Mapping)]
    commands = _commands(provenance)
    rest = {key: value for key, value in provenance.items() if key not in ("command", "commands")}
    parts = ["<h2>Provenance</h2>"]
    if commands:
        parts.append(
            '<p class="note">The commands that made the files and these results, in their order.</p>'
            f'<div class="card">{commands}</div>'
        )
    parts.append(f'<div class="two apart"><div class="card"><h3>Data</h3>{facts(results["dataset"])}</div>')
    parts.append(f'<div class="card"><h3>Machine</h3>{facts(results["machine"])}</div></div>')
    parts.append(f'<div class="card apart"><h3>Run</h3>{facts(rest)}</div>')
    if files:
        body = [
            (
                "",
                [
                    plain(file.get("what", "")),
                    (f"<code>{escape(str(file.get('file', '')))}</code>", str(file.get("file", ""))),
                    (
                        f'<code title="{escape(str(file.get("sha256", "")))}">{escape(str(file.get("sha256", ""))[:16])}</code>',
                        str(file.get("sha256", "")),
                    ),
                ],
            )
            for file in files
        ]
        parts.append(
            "<details open><summary>Files and the first 16 digits of their SHA-256</summary>"
            f"{table(['What', 'File', 'SHA-256'], body, ('File', 'SHA-256'))}</details>"
        )
    return "".join(parts)


def _spread(rows: Sequence[Row]) -> str:
    samples = sorted({int(row["latency_ms"]["samples"]) for row in rows})
    count = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    noise = statistics.median(row["latency_ms"]["p99"] / row["latency_ms"]["median"] for row in rows)
    return f"Bar: median of {count} runs; whisker: 99th percentile, {noise:.2f}× the median for the middle row."


def document(title: str, content: str) -> str:
    """A whole page around `content` (HTML): styles, the sorting of tables, and a policy that lets nothing be fetched."""
    files = resources.files("qat.report")
    style, script = files.joinpath("page.css").read_text("utf-8"), files.joinpath("page.js").read_text("utf-8")
    policy = _POLICY.format(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{content}</main><script>{script}</script></body></html>\n"
    )


def render(results: Results) -> str:
    """The page of checked results, as text."""
    rows, dataset = results["rows"], results["dataset"]
    verdict = decide(rows)
    # A simulation's time says nothing about the engine that it simulates.
    engines = [row for row in rows if not is_simulated(row)] or rows
    created = str(results.get("provenance", {}).get("created", ""))[:10]
    keyframes = f"{dataset['samples']:g} keyframes" + (f" of {dataset['name']}" if dataset.get("name") else "")
    about = [text for text in ("bevqat", results["model"], keyframes, created) if text]
    section = results.get("sensitivity")
    return document(
        f"{results['model']}: {verdict.headline}",
        f'<p class="eyebrow">{escape(" · ".join(about))}</p>'
        f"{_verdict_card(results, verdict)}"
        f'<h2>Accuracy and latency</h2><p class="note">{escape(_about_table(rows, verdict))}</p>{_main_table(rows, verdict)}'
        "<details><summary>How this was measured</summary>"
        f'<p class="note">{escape(_how_measured(results))}</p></details>'
        f'<div class="two apart"><div class="card"><h3>Latency of a frame</h3>{latency_bars(engines)}'
        f'<p class="note" style="margin:14px 0 0">{escape(_spread(engines))}</p></div>'
        f'<div class="card"><h3>Accuracy over latency</h3>{scatter(engines)}'
        f'<p class="note" style="margin:10px 0 0">Up and to the left is better. Green band: at most {MAX_LOSS:g} mAP '
        "below FP32.</p>"
        f"</div></div>{_stages(rows)}"
        f"{_classes(results, verdict)}{_sqnr(results)}{sensitivity(section) if section else ''}{_frames(results)}"
        f"{_provenance(results)}",
    )


@one_writer("out")
def write_report(results: Mapping[str, Any] | str | Path, out: str | Path) -> Verdict:
    """Writes the page of `results` (a results.json or its content) to `out`, whole or not at all.

    Returns:
        the verdict that the page opens with.

    Raises:
        UserError: the results fail `qat.report.schema.check_results`, or `out` cannot be written.
    """
    checked = load_results(results)
    text = render(checked)
    write_text(out, text)
    return decide(checked["rows"])
