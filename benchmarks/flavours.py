"""Latency of one part's INT8 graphs on this CPU: our flavours beside ONNX Runtime's quantize_static and NNCF's PTQ.

example:
  python benchmarks/flavours.py                         # the full-size ResNet-50 camera part, random weights
  python benchmarks/flavours.py --config model/camera-tiny/config.yaml --ckpt model/camera-tiny/camera-tiny.pth

Every graph is made from the same float network and the same calibration frames. In each round every engine runs once, in an
order that turns; medians and their ratios are printed, with the SQNR of the outputs against the FP32 graph's on
frames that no calibration saw, and how many convolutions and matrix products the backend runs in INT8 (from its own
profile). "ours" keeps the first convolution over the depth map in float, as calibrate does; "ours, all INT8" quantizes it too,
as the peers do by themselves.

Goals (ratios of medians): ours on ONNX Runtime at most 1.0 of quantize_static there; ours on OpenVINO at most 1.0 of the better of
NNCF and quantize_static's graph there; INT8 at least 3.5 times as fast as FP32 on each; SQNR no lower than
quantize_static's.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from calibration import add_source_flags, camera_inputs, load_samples
from command import check_least, one_line_errors
from peers_accuracy import Setting, installed, make_part
from rich.console import Console
from rich.table import Table

from qat.calibrate.ptq import calibrate
from qat.core.errors import UserError
from qat.core.files import write_json
from qat.core.rounds import turned
from qat.core.tensors import compare_tensors
from qat.core.versions import versions
from qat.data import Sample
from qat.engine import Engine, Options, build
from qat.export import ExportOptions, export_parts
from qat.families.bevfusion.config import load_config
from qat.families.bevfusion.detector import CameraBEVDetector
from qat.families.bevfusion.random_init import random_model
from qat.families.bevfusion.recipe import KEEP_FLOAT, recipe_of
from qat.families.bevfusion.state import load_float_model
from qat.model.quantized import QuantizedModel

PART = "camera.backbone"
Feeds = dict[str, np.ndarray]
STATIC = Setting("quantize_static", "minmax", "onnxruntime", options={"method": "MinMax"})
NNCF = Setting("nncf", "performance", "openvino", options={"preset": "PERFORMANCE"})
MODELOPT = Setting("modelopt-onnx", "max", "onnxruntime", options={"method": "max"})
GOAL_SPEED = 3.5
LAYER = re.compile("Conv(?!ert)|Gemm|MatMul|FullyConnected")
OURS, OURS_ALL = "ours", "ours, all INT8"


@dataclass
class Contender:
    """One graph on one backend. label: its row. file: the graph. seconds: of each timed run. sqnr: of the worst output, dB."""

    label: str
    backend: str
    file: Path
    precision: str
    engine: Engine | None = None
    seconds: list[float] = field(default_factory=list)
    sqnr: float = float("nan")
    layers: tuple[int, int] = (0, 0)  # with weights: INT8, all

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))


@dataclass
class Job:
    """What every graph is made from. samples: that calibrate; seen: what the part is fed of them; held_out: of the others."""

    config: dict[str, Any]
    model: CameraBEVDetector
    samples: list[Sample]
    seen: list[Feeds]
    held_out: list[Feeds]
    networks: dict[Any, QuantizedModel] = field(default_factory=dict)

    def quantized(self, keep: Any) -> QuantizedModel:
        """The calibrated network with `keep` in float."""
        if keep not in self.networks:
            usual = recipe_of(self.config)
            method, by_layer = usual.method, usual.by_layer
            quantized = QuantizedModel(self.model, keep)
            self.networks[keep], _ = calibrate(quantized, self.samples, method, by_layer=by_layer)
        return self.networks[keep]


def load_job(args: argparse.Namespace) -> Job:
    """Reads --config, --ckpt, --data, --version, --split, --frames and --held-out.

    Raises:
        UserError: bad config, checkpoint or data, or no frames left to calibrate on.
    """
    config = load_config(args.config)
    samples = load_samples(config, args)
    if len(samples) <= args.held_out:
        raise UserError(f"--frames: found {len(samples)}, expected more than the {args.held_out} that are held out")
    model = load_float_model(config, args.ckpt) if args.ckpt else random_model(config, seed=0, frames=samples[:2])
    feeds = [
        {"img": img[None].numpy()} | ({} if depth is None else {"depth": depth[None].numpy()})
        for img, depth in camera_inputs(config, samples)
    ]
    kept = len(samples) - args.held_out
    return Job(config, model, samples[:kept], feeds[:kept], feeds[kept:])


def make_graphs(job: Job, args: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """Writes every graph of --backends and --peers; returns them by name."""
    graphs: dict[str, Path] = {}
    say(f"calibrate on {len(job.seen)} frames")
    exports = [("fp32", KEEP_FLOAT, "fp32", "tensorrt"), ("tensorrt", KEEP_FLOAT, "int8", "tensorrt")]
    for name, keep in ((OURS, KEEP_FLOAT), (OURS_ALL, ())):
        exports += [(f"{name} ({backend})", keep, "int8", backend) for backend in args.backends]
    for name, keep, precision, flavour in exports:
        say(f"export {name}")
        out = folder / str(len(graphs))
        manifest = export_parts(job.quantized(keep), out, ExportOptions(precision, flavour=flavour, parts=[PART]))
        for output, figures in manifest["parts"][PART]["verification"].items():
            if not figures["passed"]:
                say(f"{name}: {output} is out of tolerance: {figures['sqnr_db']:.1f} dB against PyTorch")
        graphs[name] = out / f"{PART}.onnx"
    for setting in (STATIC, NNCF, MODELOPT):
        if setting.peer in args.peers and installed(setting.peer, say):
            say(f"quantize with {setting.peer}")
            graphs[setting.peer] = folder / f"{setting.peer}{'.xml' if setting is NNCF else '.onnx'}"
            # In a process of its own: ModelOpt replaces functions of onnxruntime.quantization, which then fails without it.
            with get_context("spawn").Pool(1) as pool:
                pool.apply(make_part, (graphs["fp32"], job.seen, graphs[setting.peer], setting, []))
    return graphs


def contenders(graphs: dict[str, Path], args: argparse.Namespace, say: Callable[[str], None]) -> list[Contender]:
    """Builds every graph on every backend that takes it."""
    rows = []
    for backend in args.backends:
        for name, file in graphs.items():
            if backend == "onnxruntime" and (file.suffix != ".onnx" or name == "tensorrt"):
                continue  # a TensorRT-style graph is slower than FP32 there: not a contender
            label, _, own = name.partition(" (")
            if own and own != f"{backend})":
                continue
            say(f"build {label} on {backend}")
            row = Contender(label, backend, file, "fp32" if name == "fp32" else "int8")
            row.engine = build(file, backend, row.precision, Options(threads=args.threads, cache=None))
            rows.append(row)
    return rows


def measure(rows: Sequence[Contender], feeds: Sequence[Feeds], rounds: int, say: Callable[[str], None]) -> None:
    """Times the rows in turn; then SQNR against FP32 on the first backend, and layers."""
    for row in rows:
        assert row.engine is not None
        row.engine.run(feeds[0])
    for turn in range(rounds):
        for row in turned(rows, turn):
            assert row.engine is not None
            begin = time.perf_counter()
            row.engine.run(feeds[turn % len(feeds)])
            row.seconds.append(time.perf_counter() - begin)
        say(f"round {turn + 1} of {rounds}")
    exact = next(row for row in rows if row.label == "fp32")
    for row in rows:
        assert row.engine is not None and exact.engine is not None
        worst = []
        for feed in feeds:
            expected, found = exact.engine.run(feed), row.engine.run(feed)
            worst.append(min(compare_tensors(expected[name], found[name])["sqnr_db"] for name in expected))
        row.sqnr = float(np.mean(worst))
        layers = [layer for layer in row.engine.profile(feeds[0], runs=1) if LAYER.search(layer["type"])]
        row.layers = (sum(layer["precision"] in ("int8", "i8", "u8") for layer in layers), len(layers))


def report(rows: Sequence[Contender], args: argparse.Namespace) -> dict[str, Any]:
    """Prints the table and the goals, and returns both."""
    table = Table(title=f"{args.config}, {PART}: medians of {args.rounds} interleaved rounds")
    for name in ("backend", "graph", "FP32 / it", "ms", "SQNR dB", "INT8 layers", "MB"):
        table.add_column(name, justify="left" if name in ("backend", "graph") else "right")
    by = {(row.backend, row.label): row for row in rows}
    for row in rows:
        size = sum(f.stat().st_size for f in row.file.parent.glob(f"{row.file.stem}.*")) / 1e6
        table.add_row(
            row.backend,
            row.label,
            f"{by[row.backend, 'fp32'].median / row.median:.2f}",
            f"{row.median * 1e3:.0f}",
            f"{row.sqnr:.1f}",
            "/".join(map(str, row.layers)),
            f"{size:.1f}",
        )
    Console(width=120).print(table)
    goals = {}
    for backend in args.backends:
        peers = [by[backend, name] for name in ("quantize_static", "nncf") if (backend, name) in by]
        for label in (OURS, OURS_ALL):
            ours = by[backend, label]
            goals[f"{backend}: FP32 / {label} (goal at least {GOAL_SPEED})"] = by[backend, "fp32"].median / ours.median
            if peers:
                best = min(peers, key=lambda row: row.median)
                goals[f"{backend}: {label} / {best.label} (goal at most 1.0)"] = ours.median / best.median
            if (backend, "quantize_static") in by:
                difference = ours.sqnr - by[backend, "quantize_static"].sqnr
                goals[f"{backend}: SQNR, {label} minus quantize_static, dB (goal at least 0)"] = difference
    for name, value in goals.items():
        print(f"{name}: {value:.2f}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    return {
        "rows": [
            {
                "backend": row.backend,
                "graph": row.label,
                "seconds": row.seconds,
                "median": row.median,
                "sqnr_db": row.sqnr,
                "int8_layers": row.layers,
            }
            for row in rows
        ],
        "goals": goals,
        "versions": versions(),
    }


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status: 0 measured, 2 bad use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_flags(parser)
    parser.add_argument("--frames", type=int, default=6, metavar="N", help="keyframes, those held out too (default 6)")
    parser.add_argument(
        "--held-out", type=int, default=2, metavar="N", help="of these, to time and compare (default 2)"
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="times that each engine runs (default 15)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default 0: all cores")
    parser.add_argument(
        "--backends", nargs="+", default=["onnxruntime", "openvino"], choices=["onnxruntime", "openvino"]
    )
    parser.add_argument("--peers", nargs="*", default=["quantize_static", "nncf"], choices=["quantize_static", "nncf"])
    parser.add_argument("--out", type=Path, metavar="JSON", help="also write the figures to a file")
    args = parser.parse_args(argv)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    check_least(args, rounds=1, held_out=1)
    with tempfile.TemporaryDirectory() as folder:
        job = load_job(args)
        rows = contenders(make_graphs(job, args, Path(folder), say), args, say)
        measure(rows, job.held_out, args.rounds, say)
        result = report(rows, args)
    if args.out:
        write_json(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
