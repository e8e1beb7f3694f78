"""Latency of our INT8 beside what users would otherwise run, on this CPU: one run, interleaved, the same threads for all.

example:
  python benchmarks/peers_latency.py --json runs/peers-latency.json          # full-size ResNet-50 camera part, camera-tiny whole
  python benchmarks/peers_latency.py --end-to-end                            # and the full-size detector whole, random weights
  python benchmarks/peers_latency.py --only end-to-end --end-to-end model/camera-tiny/config.yaml

The camera part: ours (flavours openvino and onnxruntime, with the first convolution over the depth map in float as calibrate
leaves it, and with all in INT8; on OpenVINO also with what is left in float in bfloat16) and FP32 beside PyTorch eager and
torch.compile, ONNX Runtime's quantize_static, NNCF's PTQ and ModelOpt's ONNX PTQ. All are made from one float network and one
set of calibration frames. Graphs are built and run by `qat.engine`, peers' too: the backends' settings are the same for all.
Rows "as it comes" are OpenVINO's own defaults, which multiply in bfloat16 where the CPU does. Every row runs in a process of its
own; in each round every row has one turn, in an order that turns, and the first run of a turn is not counted.

End to end, images to boxes: ours in INT8 beside FP32 by `bevqat benchmark`'s own code, with the view transform's convolutions in
float, as calibrate leaves them, and in INT8. A detector with a checkpoint beside its config sees --data's frames, one with random
weights made-up ones.

Goals: our best INT8 is the fastest row, at least 3.5 times as fast as the best FP32 row; end to end our best INT8 is at least 2.5
times as fast as the best FP32 row. Where one is missed, the slowest layers are printed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from command import check_least, one_line_errors
from flavours import OURS, OURS_ALL, PART, Job, load_job, make_graphs
from latency_rows import EngineRow, OpenVinoAsItComes, TorchRow
from rich.table import Table

from qat.benchmark.environment import environment, load_average
from qat.benchmark.run import BenchmarkOptions, benchmark
from qat.benchmark.statistics import summary
from qat.benchmark.table import console
from qat.benchmark.worker import WHOLE, Worker
from qat.core.errors import UserError
from qat.core.files import write_json
from qat.core.rounds import turned
from qat.engine import Options
from qat.export import ExportOptions, export_parts
from qat.families.bevfusion.recipe import KEEP_FLOAT
from qat.manifest import load_manifest

TINY, FULL = Path("model/camera-tiny/config.yaml"), Path("model/resnet50/config.yaml")
PEERS = ("torch", "torch.compile", "onnxruntime", "openvino", "quantize_static", "nncf", "modelopt-onnx")
QUANTIZERS = {"quantize_static": "quantize_static", "nncf": "NNCF PTQ", "modelopt-onnx": "ModelOpt ONNX PTQ"}
BACKENDS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
GOAL_PART, GOAL_WHOLE = 3.5, 2.5
LAYERS = 12  # that are printed where a goal is missed
Say = Callable[[str], None]


@dataclass
class Row:
    """One contender. make: its class and arguments. rounds_ms: milliseconds by round."""

    name: str
    ours: bool
    backend: str
    precision: str
    make: tuple[Any, ...]
    worker: Worker | None = None
    rounds_ms: list[list[float]] = field(default_factory=list)
    warm_up: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Milliseconds."""
        return float(summary(self.rounds_ms)["median"])

    def ask(self, method: str, *values: Any) -> Any:
        """Of the row's process."""
        assert self.worker is not None
        return self.worker.ask(method, *values)


def contenders(job: Job, args: argparse.Namespace, folder: Path, say: Say) -> list[Row]:
    """Makes every graph, and the rows that run them."""
    graphs = make_graphs(job, args, folder, say)
    backends = {name: shown for name, shown in BACKENDS.items() if name in args.backends}
    feeds, threads = job.held_out, args.threads

    def engine(name: str, ours: bool, backend: str, precision: str, graph: str) -> Row:
        return Row(name, ours, backend, precision, (EngineRow, graphs[graph], backend, precision, threads, feeds))

    rows = []
    for backend, shown in backends.items():
        for label in (OURS, OURS_ALL):
            rows.append(engine(f"{label} on {shown}", True, backend, "int8", f"{label} ({backend})"))
        rows.append(engine(f"ours FP32 on {shown}", True, backend, "fp32", "fp32"))
    state = folder / "state.pth"
    torch.save(job.model.state_dict(), state)
    for peer, name in (("torch", "PyTorch eager FP32"), ("torch.compile", "torch.compile FP32 (inductor, freezing)")):
        if peer in args.peers:
            made = (TorchRow, job.config, state, PART, peer == "torch.compile", threads, feeds)
            rows.append(Row(name, False, peer, "fp32", made))
    for backend, shown in backends.items():
        if backend in args.peers:
            rows.append(engine(f"{shown} FP32", False, backend, "fp32", "fp32"))
    for peer, shown in QUANTIZERS.items():
        if peer in graphs:
            for backend in backends:
                if backend == "openvino" or graphs[peer].suffix == ".onnx":
                    rows.append(engine(f"{shown} on {BACKENDS[backend]}", False, backend, "int8", peer))
    if "openvino" in backends and multiplies_bfloat16():
        for label in (OURS, OURS_ALL):
            made = (EngineRow, graphs[f"{label} (openvino)"], "openvino", "int8", threads, feeds, True)
            rows.append(Row(f"{label} on OpenVINO, the rest in bfloat16", True, "openvino", "int8", made))
    if "openvino" in args.peers and "openvino" in backends and multiplies_bfloat16():
        for graph, shown in (("fp32", "OpenVINO"), ("nncf", "NNCF PTQ on OpenVINO")):
            if graph in graphs:
                precision = "bf16" if graph == "fp32" else "int8+bf16"
                made = (OpenVinoAsItComes, graphs[graph], threads, feeds)
                rows.append(Row(f"{shown}, as it comes (bfloat16)", False, "openvino", precision, made))
    return rows


def multiplies_bfloat16() -> bool:
    """Whether OpenVINO would by itself run FP32 graphs in bfloat16 on this CPU."""
    import openvino as ov

    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def measure(rows: Sequence[Row], rounds: int, repeats: int, say: Say) -> tuple[list[Row], dict[str, str]]:
    """Builds and warms up each row, then runs all in turn. Returns those that were measured, and why others were not."""
    running: list[Row] = []
    skipped: dict[str, str] = {}
    for row in rows:
        say(f"build and warm up {row.name}")
        row.worker = Worker(row.name, *row.make)
        try:
            row.worker.described()
            row.warm_up = row.ask("warm_up")
            running.append(row)
        except (UserError, RuntimeError) as error:  # a peer's own trouble must not cost the others' results
            row.worker.close()
            if row.ours:
                raise
            skipped[row.name] = str(error).strip().splitlines()[-1]
            say(f"{row.name}: skipped: {skipped[row.name]}")
    for turn in range(rounds):
        for row in turned(running, turn):
            row.rounds_ms.append(row.ask("turn", turn, repeats))
        say(f"round {turn + 1} of {rounds}")
    for row in running:
        row.finished = row.ask("finish")
    return running, skipped


def result_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """As rows of results.json, fastest first."""
    floats = [row for row in rows if row.precision == "fp32"]
    best = min(row.median for row in floats)
    found = []
    for row in sorted(rows, key=lambda row: row.median):
        own = [other.median for other in floats if other.backend == row.backend]
        found.append(
            {
                "name": row.name,
                "ours": row.ours,
                "backend": row.backend,
                "precision": row.precision,
                "latency_ms": summary(row.rounds_ms),
                "speedup_vs_fp32": min(own) / row.median if own else None,
                "speedup_vs_best_fp32": best / row.median,
                **row.finished,
                "warm_up": row.warm_up,
                "rounds_ms": row.rounds_ms,
            }
        )
    return found


def part_goals(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The camera part's two."""
    ours = min((row for row in rows if row.ours and row.precision == "int8"), key=lambda row: row.median)
    exact = min((row for row in rows if row.precision == "fp32"), key=lambda row: row.median)
    others = [row for row in rows if not row.ours]
    goals = []
    if others:
        best = min(others, key=lambda row: row.median)
        goals.append(goal(f"{PART}: fastest peer ({best.name}) / ours ({ours.name})", best.median / ours.median, 1.0))
    goals.append(goal(f"{PART}: best FP32 ({exact.name}) / ours ({ours.name})", exact.median / ours.median, GOAL_PART))
    return goals


def goal(what: str, value: float, least: float) -> dict[str, Any]:
    """As it is written and printed."""
    return {"goal": what, "value": round(value, 4), "least": least, "met": value >= least}


def print_rows(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """The table, fastest first."""
    table = Table(title=title)
    headings = (
        "row",
        "ours",
        "median ms",
        "p90",
        "p99",
        "outliers",
        "FP32 / it",
        "best FP32 / it",
        "peak MB",
        "size MB",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:2] else "right", no_wrap=True)
    for row in rows:
        latency, own, peak = row["latency_ms"], row["speedup_vs_fp32"], row["memory_peak_mb"]
        table.add_row(
            row["name"],
            "yes" if row["ours"] else "",
            *(f"{latency[key]:.1f}" for key in ("median", "p90", "p99")),
            str(latency["outliers"]["count"]),
            "" if own is None else f"{own:.2f}×",
            f"{row['speedup_vs_best_fp32']:.2f}×",
            "" if peak is None else f"{peak:.0f}",
            f"{row['size_mb']:.1f}",
        )
    console().print(table)


def print_layers(name: str, layers: Sequence[Mapping[str, Any]]) -> None:
    """The slowest layers of a row that missed its goal."""
    print(f"slowest layers of {name}:")
    for layer in layers:
        print(f"  {layer['ms']:8.3f} ms  {layer['precision']:8}  {layer['type']:20}  {layer['name']}")


def measure_part(args: argparse.Namespace, folder: Path, say: Say) -> dict[str, Any]:
    """The camera part's rows and goals, printed and returned."""
    rows = contenders(load_job(args), args, folder, say)
    try:
        measured, skipped = measure(rows, args.rounds, args.repeats, say)
        found = result_rows(measured)
        print_rows(found, f"{args.config}, {PART}: {args.rounds} interleaved rounds of {args.repeats}")
        goals = part_goals(measured)
        slowest: list[Mapping[str, Any]] = []
        if not all(entry["met"] for entry in goals):
            ours = min((row for row in measured if row.ours and row.precision == "int8"), key=lambda row: row.median)
            slowest = ours.ask("profile", LAYERS)
            print_layers(ours.name, slowest)
    finally:
        for row in rows:
            if row.worker is not None:
                row.worker.close()
    for name, why in skipped.items():
        print(f"skipped: {name}: {why}")
    return {"rows": found, "goals": goals, "skipped": skipped, "slowest_layers": slowest}


def end_to_end(config: Path, args: argparse.Namespace, folder: Path, say: Say) -> dict[str, Any]:
    """One detector from images to boxes: exports it, measures, and returns the results with the goal."""
    name = config.parent.name
    trained = config.with_name(f"{name}.pth")
    ckpt = trained if trained.is_file() else None
    say(f"{name}: calibrate and export, {'random weights' if ckpt is None else ckpt}")
    job = load_job(argparse.Namespace(**{**vars(args), "config": config, "ckpt": ckpt}))
    network = job.quantized(KEEP_FLOAT)
    folders = [folder / "fp32"]
    export_parts(network, folders[0], ExportOptions("fp32"))
    for flavour in args.backends:
        for suffix, parts in (("", ()), ("_vtransform", ("vtransform",))):
            if parts and "camera.vtransform" not in load_manifest(folders[0])["parts"]:
                continue  # a view transform without convolutions behind the pooling
            folders.append(folder / f"int8{suffix}_{flavour}")
            export_parts(network, folders[-1], ExportOptions("int8", flavour=flavour, parts_int8=parts))
    say(f"{name}: measure")
    results = benchmark(
        BenchmarkOptions(
            folders=folders,
            out=folder / "results",
            backends=args.backends,
            data=None if ckpt is None else args.data,
            split="all",
            version=args.version,
            frames=min(args.frames, 4),
            rounds=args.rounds,
            repeats=args.repeats,
            engine=Options(threads=args.threads, cache=None),
        )
    )
    rows = results["rows"]
    for row in rows:
        row["ours"] = True
        row["latency_ms"] = row["sections"][WHOLE]["latency_ms"]
        row["size_mb"] = row["sections"][WHOLE]["size_mb"]
        for key in ("speedup_vs_fp32", "speedup_vs_best_fp32"):
            row[key] = row["sections"][WHOLE][key]
    rows.sort(key=lambda row: row["latency_ms"]["median"])
    print_rows(rows, f"{config}, images to boxes: {args.rounds} interleaved rounds of {args.repeats}")
    best = next(row for row in rows if row["precision"] == "int8")
    exact = next(row for row in rows if row["precision"] == "fp32")
    ratio = exact["latency_ms"]["median"] / best["latency_ms"]["median"]
    reached = goal(f"{name}, images to boxes: best FP32 ({exact['name']}) / {best['name']}", ratio, GOAL_WHOLE)
    slowest: dict[str, Any] = {}
    if not reached["met"]:
        slowest = explain(best, exact, next(f for f in folders if f.name == best["folder"]), args.threads)
    return {"model": name, "rows": rows, "goal": reached, "slowest": slowest}


def explain(best: Mapping[str, Any], exact: Mapping[str, Any], folder: Path, threads: int) -> dict[str, Any]:
    """Prints where the best INT8 row's time goes: its stages beside FP32's, and the slowest layers of each part."""
    print(f"where the time of {best['name']} goes:")
    stages = {}
    for name, section in best["sections"].items():
        ms = section["latency_ms"]["median"]
        before = exact["sections"][name]["latency_ms"]["median"]
        stages[name] = {"ms": ms, "fp32_ms": before}
        print(f"  {ms:8.2f} ms  of FP32's {before:8.2f} ms  {name}")
    layers = {}
    for name, part in load_manifest(folder)["parts"].items():
        worker = Worker(name, EngineRow, folder / part["file"], best["backend"], part["precision"], threads, [])
        try:
            worker.described()
            layers[name] = worker.ask("profile", LAYERS // 2)
        finally:
            worker.close()
        print_layers(name, layers[name])
    return {"stages": stages, "layers": layers}


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status: 0 measured, whether the goals are met or not; 2 bad use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=FULL, metavar="YAML", help=f"whose camera part (default {FULL})")
    parser.add_argument("--ckpt", type=Path, metavar="CKPT", help="its float checkpoint (default: random weights)")
    parser.add_argument("--data", type=Path, default=Path("example-data"), metavar="ROOT", help="nuScenes-format data")
    parser.add_argument("--version", metavar="NAME", help="needed where ROOT holds several, such as v1.0-mini")
    parser.add_argument("--split", default="calib", help="default calib")
    parser.add_argument("--frames", type=int, default=6, metavar="N", help="keyframes, those held out too (default 6)")
    parser.add_argument("--held-out", type=int, default=2, metavar="N", help="of these, to time on (default 2)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="turns of each row (default 15)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="counted runs of a turn (default 1)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default 0: all cores")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS, help="default: all")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS), help="default: both")
    parser.add_argument(
        "--end-to-end",
        nargs="*",
        type=Path,
        default=[TINY],
        metavar="YAML",
        help=f"detectors to run whole (default {TINY}; without a name {FULL} too, with random weights)",
    )
    parser.add_argument("--only", choices=("part", "end-to-end"), help="leave the other out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        check_least(args, rounds=1, repeats=1, held_out=1, threads=0)
        if args.threads:
            torch.set_num_threads(args.threads)
        before = load_average()
        part: dict[str, Any] = {"rows": [], "goals": [], "skipped": {}, "slowest_layers": []}
        wholes = []
        with tempfile.TemporaryDirectory() as folder:
            if args.only != "end-to-end":
                part = measure_part(args, Path(folder) / "part", say)
            if args.only != "part":
                for n, config in enumerate(args.end_to_end or [TINY, FULL]):
                    wholes.append(end_to_end(config, args, Path(folder) / f"whole{n}", say))
        goals = [*part["goals"], *(whole["goal"] for whole in wholes)]
        for entry in goals:
            met = "met" if entry["met"] else "MISSED"
            print(f"{entry['goal']}: {entry['value']:.2f} (goal at least {entry['least']}): {met}")
        facts = environment(args.threads)
        print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
        if args.json:
            result = {
                "schema": 1,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "command": shlex.join(["python", "benchmarks/peers_latency.py", *words]),
                "model": args.config.parent.name,
                "part": PART,
                "machine": facts | {"load": {"before": before, "after": load_average()}},
                "measurement": {
                    "rounds": args.rounds,
                    "repeats": args.repeats,
                    "order": "interleaved, turned by one row",
                },
                **part,
                "goals": goals,
                "end_to_end": wholes,
            }
            write_json(args.json, result)
            print(args.json)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
