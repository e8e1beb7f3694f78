"""Latency on this CPU of mmdet3d's detectors: PyTorch, the exported graph, and points to boxes by precision beside the peers.

example:
  python benchmarks/mmdet3d_latency.py pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py
  python benchmarks/mmdet3d_latency.py centerpoint_pillar02_second_secfpn_8xb4-cyclic-20e_nus-3d.py --points LIDAR_TOP.bin

Rows run once a round in an order that turns; medians and ratios are printed. "whole" is the graph of mode="tensor", beside mmdet3d's own
forward in PyTorch. The other rows are a `Pipeline`, from points to boxes, of which the part `pts_backbone_neck_head` is told apart: its
FP32 graph, our INT8 flavour, the same network as plain QDQ (the `tensorrt` flavour's graph), and the FP32 graph as ONNX Runtime's
quantize_static and NNCF's PTQ quantize it. Points are made up, or --points, a .bin file in the config's columns.

Goals: the FP32 graph no slower than PyTorch; the part in INT8 at least 2.6 (PointPillars) and 3.2 (CenterPoint) times as fast as the best
FP32 row, points to boxes 2.5 times; never slower than plain QDQ or a peer; voxelization and scatter under a tenth of FP32's time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from qat.families.mmdet3d.frames import PointFiles
from qat.families.mmdet3d.inputs import Reader
from qat.families.mmdet3d.int8 import write_int8
from qat.families.mmdet3d.model import build as build_model
from qat.families.mmdet3d.model import draw
from qat.families.mmdet3d.tracing import runnable
from qat.families.mmdet3d.tree import cloned
from qat.model.opening import Source, open_model
from qat.model.runners import TorchPart, part_modules
from qat.runtime.pipeline import Pipeline

PART = "pts_backbone_neck_head"
BACKENDS = ("onnxruntime", "openvino")
HOST = ("voxelize", "scatter")
PEERS = {
    "quantize_static": Setting("quantize_static", "minmax", "onnxruntime", options={"method": "MinMax"}),
    "nncf": Setting("nncf", "performance", "openvino", options={"preset": "PERFORMANCE"}),
}


@dataclass
class Row:
    """run: once. stages: milliseconds of the latest run's, of a pipeline. seconds, part, host: by round."""

    run: Callable[[], object]
    stages: Callable[[], Mapping[str, float]] | None = None
    seconds: list[float] = field(default_factory=list)
    part: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """One run, counted."""
        begin = time.perf_counter()
        self.run()
        self.seconds.append(time.perf_counter() - begin)
        if self.stages:
            found = self.stages()
            self.part.append(found[PART] / 1e3)
            self.host.append(sum(found[name] for name in HOST) / 1e3)


def whole_rows(export: Export, file: Path, sample: Any, settings: EngineOptions) -> dict[str, Row]:
    """mmdet3d's own forward, and the graph of it on each backend."""

    def forward() -> object:
        with torch.inference_mode(), runnable(export.model):
            return export.model(cloned(sample.inputs), sample.samples, mode="tensor")

    rows = {"whole, PyTorch": Row(forward)}
    tensors = export.inputs.tensors(sample)
    feeds = {entry.name: value.numpy() for entry, value in zip(export.inputs.used, tensors, strict=True)}
    for backend in BACKENDS:
        engine = build(file, backend, "fp32", settings)
        rows[f"whole, FP32, {backend}"] = Row(lambda engine=engine: engine.run(feeds))
    return rows


def dense_graphs(folder: Path, peers: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """name → (the part's file, backends, precision). folder: with fp32/ and int8/; peers' graphs are written there."""
    graphs: dict[str, Any] = {
        "FP32": (folder / "fp32" / f"{PART}.onnx", BACKENDS, "fp32"),
        "INT8, plain QDQ": (folder / "int8" / "tensorrt" / f"{PART}.onnx", BACKENDS, "int8"),
    }
    pipeline = Pipeline.load(folder / "fp32", "onnxruntime", "fp32", EngineOptions(cache=None))
    grids = [pipeline.forward(pipeline.flow.made_frame(n))["spatial_features"] for n in range(3)]
    for peer in peers:
        say(peer)
        made = folder / ("static.onnx" if peer == "quantize_static" else "nncf.xml")
        make_part(graphs["FP32"][0], [{"spatial_features": grid} for grid in grids], made, PEERS[peer], [])
        graphs[f"INT8, {peer}"] = (made, BACKENDS if made.suffix == ".onnx" else ("openvino",), "int8")
    for backend in BACKENDS:
        graphs[f"INT8, ours ({backend})"] = (folder / "int8" / backend / f"{PART}.onnx", (backend,), "int8")
    return graphs


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--points", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    args = parser.parse_args()
    check_least(args, rounds=1, threads=1)
    torch.set_num_threads(args.threads)
    say = Console(stderr=True).print
    path = configs.find(args.config)
    config = configs.read(path)
    model = build_model(config)
    draw(model, 0)
    reader = Reader(config, model)
    settings = EngineOptions(threads=args.threads, cache=None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calib = None if args.points is None else [args.points]
        sample = reader.random() if args.points is None else reader.read(args.points)
        fewer = reader.random(0.5) if args.points is None else reader.read(args.points, 0.5)
        export = Export(model, args.config, None, [sample, fewer], Options(("onnx",)), say)
        metadata = export.run(folder / "whole", lambda _: write_int8(path, model, calib, folder / "int8", 0, say))
        if not metadata["export_success"]["onnx"]:
            say(f"model.onnx: {metadata['failures']}")
        rows = whole_rows(export, folder / "whole" / "model.onnx", sample, settings)
        export_checkpoint(Source(folder / "int8" / "ptq.pth"), ExportOptions("fp32"), folder / "fp32")
        flow: Any = flow_of(read_json(folder / "fp32" / "manifest.json")["pipeline"])
        frame = flow.made_frame(0)
        if args.points is not None:
            frame = PointFiles(args.points, flow.settings["columns"], flow.settings["load_dim"], None, True)[0]
        encoder = folder / "fp32" / "pts_voxel_encoder.onnx"
        pipelines = {}
        quantized = open_model(folder / "int8" / "ptq.pth", as_float=True).network.to(memory_format=torch.channels_last)
        parts: dict[str, Any] = {part: TorchPart(module) for part, module in part_modules(quantized).items()}
        pipelines["FP32, PyTorch"] = Pipeline(parts, flow.settings, args.threads)
        for label, (file, backends, precision) in dense_graphs(folder, args.peers, say).items():
            for backend in backends:
                parts = {
                    "pts_voxel_encoder": build(encoder, backend, "fp32", settings),
                    PART: build(file, backend, precision, settings),
                }
                pipelines[f"{label.split(' (')[0]}, {backend}"] = Pipeline(parts, flow.settings, args.threads)
        for label, pipeline in pipelines.items():
            rows[label] = Row(
                lambda pipeline=pipeline: pipeline.detect_sample(frame), lambda pipeline=pipeline: pipeline.timing_ms
            )
        for row in rows.values():
            row.run()
        for turn in range(args.rounds):
            for label in turned(list(rows), turn):
                rows[label].run()
                rows[label].measure()
            say(f"round {turn + 1} of {args.rounds}")
    Console(width=120).print(table(rows, f"{path.stem}: medians of {args.rounds} rounds, {args.threads} thread(s)"))
    return 0


def table(rows: Mapping[str, Row], title: str) -> Table:
    """Milliseconds here, and the ratios."""
    found = Table(title=title)
    found.add_column("row", no_wrap=True)
    for column in ("ms here", "PyTorch / it", "best FP32 / it", f"{PART}, ms", "best FP32 / it", " + ".join(HOST)):
        found.add_column(column, justify="right")
    whole = float(np.median(rows["whole, PyTorch"].seconds))
    floats = [row for name, row in rows.items() if name.startswith("FP32")]
    best = min(float(np.median(row.seconds)) for row in floats)
    best_part = min(float(np.median(row.part)) for row in floats)
    torch_boxes = float(np.median(rows["FP32, PyTorch"].seconds))
    for name, row in rows.items():
        took = float(np.median(row.seconds))
        cells = [name, f"{took * 1e3:.0f}", f"{(torch_boxes if row.stages else whole) / took:.2f}", "", "", "", ""]
        if row.stages:
            part, host = float(np.median(row.part)), float(np.median(row.host))
            cells[3:] = [f"{best / took:.2f}", f"{part * 1e3:.0f}", f"{best_part / part:.2f}", f"{host / took:.1%}"]
        found.add_row(*cells)
    return found


if __name__ == "__main__":
    sys.exit(main())
