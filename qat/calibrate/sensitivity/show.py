"""Prints a sensitivity as a table, and draws it."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from qat.calibrate.sensitivity.result import OBJECTS, Sensitivity
from qat.core.console import results_console
from qat.core.files import write_figure

HEADINGS = {"bev": "SQNR BEV", "heads": "SQNR heads", OBJECTS: "at objects"}


def print_sensitivity(found: Sensitivity, most: int = 30) -> None:
    """Prints the worst units, and all of them together."""
    table = Table(title=f"loss of each quantized unit, one at a time, over {found.frames} frames", title_justify="left")
    names = list(found.reference or {})
    tensors = list(found.together.sqnr_db)
    for heading in (
        "unit",
        "layers",
        "MACs",
        *(HEADINGS.get(tensor, f"SQNR {tensor}") for tensor in tensors),
        *(f"Δ {name}" for name in names),
    ):
        table.add_column(heading, justify="left" if heading == "unit" else "right", overflow="fold")
    for row in [*found.units[:most], found.together]:
        drops = [f"{-row.drop[name]:+.4f}" for name in names] if row.drop else []
        sqnr = [f"{row.sqnr_db[t]:.1f} dB" for t in tensors]
        table.add_row(row.name, str(len(row.layers)), f"{row.macs_share:.1%}", *sqnr, *drops)
    results_console(140).print(table)
    if len(found.units) > most:
        print(f"and {len(found.units) - most} more with smaller losses")


def draw_sensitivity(found: Sensitivity, path: Path, most: int = 40) -> None:
    """Writes a PNG: noise at the head maps where objects are, in dB below the signal, of the worst units; of a
    camera branch, noise at the BEV features."""
    from matplotlib.figure import Figure

    judged = list(found.together.sqnr_db)[-1]
    where = {"bev": "the BEV features", OBJECTS: "the head maps where objects are"}.get(judged, judged)
    rows = sorted(found.units, key=lambda row: row.sqnr_db[judged])[:most][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh([row.name for row in rows], [row.sqnr_db[judged] for row in rows], color="#4477aa")
    axes.axvline(found.together.sqnr_db[judged], color="#cc3311", label="all units on")
    axes.set(xlabel=f"SQNR at {where}, dB (lower is worse)")
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    axes.legend(loc="lower right")
    write_figure(path, figure)
