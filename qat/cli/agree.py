"""Run PyTorch and every backend on the same frames and compare each pair: outputs in their own units, then boxes.

Two FP32 rows are judged by their largest difference in any cell, others by the root mean square. Boxes are matched by class and
distance. Exit status 1 when a pair disagrees, 2 when there is nothing to compare.

example:
  bevqat calibrate --out runs/agree/ptq.pth
  bevqat export --ckpt runs/agree/ptq.pth --fp32
  bevqat export --ckpt runs/agree/ptq.pth
  bevqat agree --ptq runs/agree/ptq.pth --onnx runs/agree/onnx_fp32 runs/agree/onnx_int8 --frames 4
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qat.cli.engine_flags import add_backends_flag, add_threads_flag, backends_of
from qat.cli.flags import add_data_flags, add_rows_flags, rows_of
from qat.cli.json_output import add_json_flag, emit_json

if TYPE_CHECKING:
    from qat.compare.agreement import Pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    add_rows_flags(parser)
    add_backends_flag(parser, "openvino,onnxruntime")
    add_data_flags(parser, "eval", "compare")
    add_threads_flag(parser)
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Compares and prints a table for each pair."""
    from qat.cli import FAILED, OK
    from qat.compare.agreement import agree
    from qat.compare.rows import load_rows
    from qat.core.progress import progress_bar
    from qat.engine import Options

    rows, facts = load_rows(rows_of(args), backends_of(args.backends), Options(threads=args.threads))
    frames = facts["family"].dataset(args.data, args.split, facts["config"], args.version, args.frames)
    with progress_bar("agree", len(frames)) as done:
        pairs = agree(rows, frames, done)
    for pair in pairs:
        _print(pair)
    passed = not any(pair.problems for pair in pairs)
    emit_json(args, {"frames": len(frames), "passed": passed, "pairs": [pair.described() for pair in pairs]})
    return OK if passed else FAILED


def _print(pair: Pair) -> None:
    from rich.table import Table

    from qat.core.console import results_console

    table = Table(title=f"{pair.first} and {pair.second}", title_justify="left", box=None)
    for column in ("output", "cells", "unit", "largest", "root mean square", "SQNR", "limit", ""):
        table.add_column(column, justify="left" if column in ("output", "cells", "unit", "") else "right")
    for name, regions in pair.outputs.items():
        for region, figures in regions.items():
            table.add_row(
                name,
                f"{figures.count:,} {region}",
                figures.unit,
                f"{figures.largest:.2g}",
                f"{figures.rms:.2g}",
                f"{figures.sqnr_db:.0f} dB",
                "" if figures.limit is None else f"{figures.limit:.2g}",
                "FAILED" if figures.wrong else "",
            )
    results_console().print(table)
    if pair.boxes is not None:
        found = pair.boxes.described()
        differences = ", ".join(
            f"{name} {found[key]['median']:.2g} (largest {found[key]['max']:.2g})"
            for name, key in (("Δcentre, m", "centre_m"), ("Δyaw, rad", "yaw_rad"), ("Δscore", "score"))
            if found[key] is not None
        )
        print(f"boxes: {found['matched']} matched, {found['missed']} missed, {found['extra']} extra; {differences}")
    for problem in pair.problems:
        print(f"FAILED: {pair.first} and {pair.second}: {problem}")
    if not pair.problems:
        print("they agree")
