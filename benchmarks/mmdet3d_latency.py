"""Latency on this CPU of mmdet3d's detectors: PyTorch, the exported graph, and the dense part in INT8 beside its peers.

example:
  python benchmarks/mmdet3d_latency.py pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py

Rows run once a round in an order that turns; medians and ratios are printed. "whole" is the graph of mode="tensor" on made-up points,
beside mmdet3d's own forward in PyTorch. "dense" is the part `pts_backbone_neck_head` alone: FP32, our INT8 flavour, the same network as
plain QDQ (the `tensorrt` flavour's graph), and ONNX Runtime's quantize_static of the FP32 graph.

Goals (issue 17): the FP32 graph no slower than PyTorch; INT8 at least 2.6 (PointPillars) and 3 (CenterPoint) times as fast as the
best FP32 row; never slower than plain QDQ or quantize_static.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import check_least, one_line_errors
from peers_accuracy import Setting, make_part
from rich.console import Console
from rich.table import Table

from qat.core.files import read_json
from qat.core.rounds import turned
from qat.engine import Options as EngineOptions
from qat.engine import build
from qat.export.checkpoint import export_checkpoint
from qat.export.options import ExportOptions
from qat.families import flow_of
from qat.families.mmdet3d import config as configs
from qat.families.mmdet3d.exporter import Export, Options
from qat.families.mmdet3d.inputs import Reader
from qat.families.mmdet3d.int8 import write_int8
from qat.families.mmdet3d.model import build as build_model
from qat.families.mmdet3d.model import draw
from qat.families.mmdet3d.tracing import runnable
from qat.families.mmdet3d.tree import cloned
from qat.model.opening import Source

PART = "pts_backbone_neck_head"
BACKENDS = ("onnxruntime", "openvino")
STATIC = Setting("quantize_static", "minmax", "onnxruntime", options={"method": "MinMax"})


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    check_least(args, rounds=1, threads=1)
    torch.set_num_threads(args.threads)
    say = Console(stderr=True).print
    path = configs.find(args.config)
    config = configs.read(path)
    model = build_model(config)
    draw(model, 0)
    reader = Reader(config, model)
    rows: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        sample = reader.random()
        export = Export(model, args.config, None, [sample, reader.random(0.5)], Options(("onnx",)), say)
        metadata = export.run(out / "whole", lambda place: write_int8(path, model, None, place / "int8", 0, say))
        if not metadata["export_success"]["onnx"]:
            say(f"model.onnx: {metadata['failures']}")

        def whole() -> object:
            with torch.inference_mode(), runnable(model):
                return model(cloned(sample.inputs), sample.samples, mode="tensor")

        rows["whole, PyTorch"] = whole
        tensors = export.inputs.tensors(sample)
        feeds = {entry.name: value.numpy() for entry, value in zip(export.inputs.used, tensors, strict=True)}
        settings = EngineOptions(threads=args.threads, cache=None)
        for backend in BACKENDS:
            engine = build(out / "whole" / "model.onnx", backend, "fp32", settings)
            rows[f"whole, FP32, {backend}"] = lambda engine=engine: engine.run(feeds)
        ptq = out / "whole" / "int8" / "ptq.pth"
        export_checkpoint(Source(ptq), ExportOptions("fp32"), out / "fp32")
        flow: Any = flow_of(read_json(out / "fp32" / "manifest.json")["pipeline"])
        dense = []
        encoder = build(out / "fp32" / "pts_voxel_encoder.onnx", "onnxruntime", "fp32", settings)
        for n in range(3):
            found = flow.voxelize(flow.feeds([flow.made_frame(n)]))
            pillars = encoder.run({"input_features": found["input_features"]})["pillar_features"]
            dense.append(
                {"spatial_features": flow.ops()["scatter"]({"pillar_features": pillars, **found})["spatial_features"]}
            )
        say("quantize_static")
        make_part(out / "fp32" / f"{PART}.onnx", dense, out / "static.onnx", STATIC, [])
        graphs = {
            "FP32": (out / "fp32" / f"{PART}.onnx", BACKENDS, "fp32"),
            "plain QDQ": (out / "whole" / "int8" / "tensorrt" / f"{PART}.onnx", BACKENDS, "int8"),
            "quantize_static": (out / "static.onnx", BACKENDS, "int8"),
        }
        for backend in BACKENDS:
            graphs[f"ours ({backend})"] = (out / "whole" / "int8" / backend / f"{PART}.onnx", (backend,), "int8")
        for name, (file, backends, precision) in graphs.items():
            for backend in backends:
                engine = build(file, backend, precision, settings)
                rows[f"dense, {name.split(' (')[0]}, {backend}"] = lambda engine=engine: engine.run(dense[0])
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for run in rows.values():
            run()
        for turn in range(args.rounds):
            for name in turned(list(rows), turn):
                begin = time.perf_counter()
                rows[name]()
                seconds[name].append(time.perf_counter() - begin)
            say(f"round {turn + 1} of {args.rounds}")
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    best = min(value for name, value in medians.items() if name.startswith("dense, FP32"))
    table = Table(title=f"{path.stem}: medians of {args.rounds} interleaved rounds, {args.threads} thread(s)")
    for column in ("row", "ms here", "PyTorch / it", "best FP32 / it"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for name, value in medians.items():
        whole_row = name.startswith("whole")
        table.add_row(
            name,
            f"{value * 1e3:.0f}",
            f"{medians['whole, PyTorch'] / value:.2f}" if whole_row else "",
            "" if whole_row else f"{best / value:.2f}",
        )
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
