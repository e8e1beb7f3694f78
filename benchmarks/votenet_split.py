"""Latency on this CPU of VoteNet's split form beside the whole graph of `bevqat export-mmdet3d`.

example:
  python benchmarks/votenet_split.py votenet_8xb16_sunrgbd-3d.py --data FILE.bin

"whole" is model.onnx: the network with its sampling and neighbours inside. "split" is the two parts `backbone` and `head` of
`bevqat export`, which are given the indices: FP32, INT8 in the backend's own flavour, and plain QDQ (the `tensorrt` flavour's graphs).
Their host steps (sampling, indices, decoding) are printed apart. Random weights; without --data a made-up room. Rows run once a round in
an order that turns; medians and ratios are printed.

Goals (issue 17): the FP32 parts at least 4 times as fast as the whole graph on ONNX Runtime; INT8 never slower than FP32. Exit status
1 where one is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from command import check_least, one_line_errors
from rich.console import Console
from rich.table import Table

from qat.core.rounds import turned
from qat.engine import Options as EngineOptions
from qat.engine import build
from qat.export.checkpoint import export_checkpoint
from qat.export.options import ExportOptions
from qat.families.mmdet3d import config as configs
from qat.families.mmdet3d.exporter import Export, Options
from qat.families.mmdet3d.inputs import Reader, read_points
from qat.families.mmdet3d.int8 import write_int8
from qat.families.mmdet3d.model import build as build_model
from qat.families.mmdet3d.model import draw
from qat.model.opening import Source
from qat.runtime import Pipeline

BACKENDS = ("onnxruntime", "openvino")
GOAL = 4.0
PARTS = ("backbone", "head")


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--data", type=Path, help="points (.bin); default a made-up room")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    check_least(args, rounds=1, threads=1)
    say = Console(stderr=True).print
    path = configs.find(args.config)
    config = configs.read(path)
    model = build_model(config)
    draw(model, 0)
    reader = Reader(config, model)
    settings = EngineOptions(threads=args.threads, cache=None)
    rows: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        sample = reader.read(args.data) if args.data else reader.random()
        export = Export(model, args.config, None, [sample], Options(("onnx",)), say)
        metadata = export.run(out / "whole", lambda place: write_int8(path, model, None, place / "int8", 0, say))
        if not metadata["export_success"]["onnx"]:
            say(f"model.onnx: {metadata['failures']}")
        tensors = export.inputs.tensors(sample)
        feeds = {entry.name: value.numpy() for entry, value in zip(export.inputs.used, tensors, strict=True)}
        int8 = out / "whole" / "int8"
        export_checkpoint(Source(int8 / "ptq.pth"), ExportOptions("fp32"), out / "fp32")
        pipelines: dict[str, Pipeline] = {}
        for backend in BACKENDS:
            engine = build(out / "whole" / "model.onnx", backend, "fp32", settings)
            rows[f"whole, FP32, {backend}"] = lambda engine=engine: engine.run(feeds)
            folders = {"FP32": out / "fp32", "INT8": int8 / backend, "plain QDQ": int8 / "tensorrt"}
            for name, place in folders.items():
                pipelines[f"split, {name}, {backend}"] = Pipeline.load(place, backend, options=settings)
        flow = next(iter(pipelines.values())).flow
        if args.data:
            points = np.ascontiguousarray(
                read_points(args.data, flow.settings["load_dim"])[:, : flow.settings["columns"]]
            )
        else:
            points = flow.made_frame(0).points
        rows |= {name: lambda one=one: one(points) for name, one in pipelines.items()}
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        host: dict[str, list[float]] = {}
        for run in rows.values():
            run()
        for turn in range(args.rounds):
            for name in turned(list(rows), turn):
                begin = time.perf_counter()
                rows[name]()
                took = time.perf_counter() - begin
                if name in pipelines:
                    timing = pipelines[name].timing_ms
                    took = sum(timing[part] for part in PARTS) / 1e3
                    for step, value in timing.items():
                        if step not in PARTS:
                            host.setdefault(step, []).append(value)
                seconds[name].append(took)
            say(f"round {turn + 1} of {args.rounds}")
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    table = Table(title=f"{path.stem}: medians of {args.rounds} interleaved rounds, {args.threads} thread(s)")
    for column in ("row", "ms here", "whole / it", "split FP32 / it"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for name, value in medians.items():
        backend = name.rpartition(" ")[2]
        whole, split = (medians[f"{kind}, FP32, {backend}"] for kind in ("whole", "split"))
        table.add_row(name, f"{value * 1e3:.0f}", f"{whole / value:.2f}", f"{split / value:.2f}")
    steps = ", ".join(f"{step} {float(np.median(values)):.1f}" for step, values in host.items())
    console = Console(width=120)
    console.print(table)
    console.print(f"host steps of the split form, ms: {steps}")
    ratio = medians["whole, FP32, onnxruntime"] / medians["split, FP32, onnxruntime"]
    slower = [b for b in BACKENDS if medians[f"split, INT8, {b}"] > medians[f"split, FP32, {b}"]]
    console.print(
        f"whole / split on ONNX Runtime: {ratio:.2f}, goal {GOAL}; INT8 slower than FP32 on: {', '.join(slower) or 'none'}"
    )
    return int(ratio < GOAL or bool(slower))


if __name__ == "__main__":
    sys.exit(main())
