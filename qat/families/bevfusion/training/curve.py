"""Draws the training curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qat.core.files import write_figure


def draw_curve(history: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Writes a PNG of each loss over the optimiser steps, on a logarithmic axis. history: recorded by `train`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    steps = [entry["step"] for entry in history]
    for name in [name for name in history[0] if name not in ("step", "lr")]:
        axes.plot(steps, [entry[name] for entry in history], label=name)
    axes.set(xlabel="optimiser step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(path, figure)
