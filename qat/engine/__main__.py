"""The GPU lab: builds exported parts with TensorRT, times them and compares their outputs, in one script.

    python -m qat.engine onnx_fp32 onnx_int8 --json lab.json
    python -m qat.engine onnx_fp32 --write-reference reference.npz     # on a machine with ONNX Runtime, without a GPU
    python -m qat.engine onnx_fp32 onnx_int8 --reference reference.npz

An FP32 folder gives the rows FP32 (TF32 off), FP32 (TF32 on) and FP16; an INT8 folder INT8+FP16; a folder of the
tensorrt-strong flavour its own precision. Latency is between CUDA events around the enqueue, after warm-up, on seeded random
inputs; the rows of a part run in interleaved rounds. Needs numpy, tensorrt and cuda-bindings alone.
"""

from __future__ import annotations

import argparse
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qat.core.errors import UserError
from qat.core.files import write_arrays, write_json
from qat.core.onnx_file import read_outline
from qat.core.plain_output import allow_any_text
from qat.core.tensors import compare_tensors
from qat.engine import cuda
from qat.engine.base import Options, TensorSpec
from qat.engine.inspector import Findings, table
from qat.engine.tensorrt_builder import one_line
from qat.engine.tensorrt_options import TACTIC_SOURCES, Profile, TensorRtOptions
from qat.manifest import PARTS, load_manifest

OK, BAD_USE, INTERRUPTED = 0, 2, 130
# What ends one row and not the lab: bad use, and what CUDA and TensorRT's bindings raise.
FAILURES = (UserError, RuntimeError)
MIB = 2**20


@dataclass
class Job:
    """One row: a part of a folder, at one precision.

    name: of the precision for people. folder, file: the graph. reference: the FP32 graph to compare with, None without one.
    """

    part: str
    name: str
    precision: str
    folder: Path
    file: Path
    tf32: bool
    reference: Path | None = None
    row: dict[str, Any] = field(default_factory=dict)


def plan_jobs(folders: Sequence[Path], parts: Sequence[str] | None, rows: Sequence[str] | None) -> list[Job]:
    """What is to be built, part by part.

    Raises:
        UserError: a folder without a manifest, a part that no folder has, or nothing left to build.
    """
    manifests = {folder: load_manifest(folder) for folder in folders}
    for part in parts or ():
        if not any(part in manifest["parts"] for manifest in manifests.values()):
            known = sorted({name for manifest in manifests.values() for name in manifest["parts"]})
            raise UserError(f"part: found {part!r}, expected of {', '.join(known)}")
    jobs = []
    names = {name for manifest in manifests.values() for name in manifest["parts"]}
    for part in [*(name for name in PARTS if name in names), *sorted(names - set(PARTS))]:
        if parts and part not in parts:
            continue
        found: list[Job] = []
        reference = None
        for folder, manifest in manifests.items():
            if part not in manifest["parts"]:
                continue
            file = folder / manifest["parts"][part]["file"]
            strong = " strong" if manifest.get("flavour") == "tensorrt-strong" else ""
            precision = manifest["parts"][part].get("precision", manifest["precision"])  # a part may stay float
            if precision == "int8":
                found.append(Job(part, f"INT8+FP16{strong}", "int8", folder, file, tf32=False))
            elif strong:
                found.append(Job(part, f"{precision.upper()}{strong}", precision, folder, file, tf32=False))
            else:  # FP16 of the tensorrt flavour is the same graph: its precision is the builder's flag
                reference = reference or file
                found += [
                    Job(part, "FP32", "fp32", folder, file, tf32=False),
                    Job(part, "FP32 TF32", "fp32", folder, file, tf32=True),
                    Job(part, "FP16", "fp16", folder, file, tf32=False),
                ]
        unique = list({(job.name, job.file.resolve() if "INT8" in job.name else ""): job for job in found}.values())
        jobs += [replace(job, reference=reference) for job in unique if not rows or job.name in rows]
    if not jobs:
        raise UserError("nothing to build: no part of these folders has a row of those asked for")
    return jobs


def random_feeds(
    inputs: Mapping[str, TensorSpec], seed: int, opt: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Standard normal inputs, never zeros: kernels and clocks differ on them. The same on every machine."""
    return {
        name: np.random.default_rng([seed, index])
        .standard_normal(opt.get(name, tuple(n or 1 for n in spec.shape)))
        .astype(np.float32)
        for index, (name, spec) in enumerate(inputs.items())
    }


def reference_outputs(
    job: Job, saved: Mapping[str, np.ndarray], feeds: Mapping[str, np.ndarray], seed: int
) -> tuple[str, dict[str, np.ndarray]]:
    """(what it is from, FP32 outputs) for the part's inputs: saved ones, else ONNX Runtime's, else none."""
    prefix = f"{job.part}/{seed}/"
    outputs = {name.removeprefix(prefix): array for name, array in saved.items() if name.startswith(prefix)}
    if outputs:
        return "saved", outputs
    if job.reference is None:
        return "", {}
    try:
        from qat.engine.onnxruntime_backend import PlainGraph
    except ImportError:
        return "", {}
    graph = PlainGraph(job.reference)
    return "ONNX Runtime", graph.run(feeds)


def write_reference(jobs: Sequence[Job], path: Path, seed: int) -> None:
    """Runs each FP32 part with ONNX Runtime on the lab's inputs and writes the outputs.

    Raises:
        UserError: no FP32 folder among those given, or no ONNX Runtime.
    """
    try:
        from qat.engine.onnxruntime_backend import PlainGraph
    except ImportError:
        raise UserError(
            "write-reference: the package onnxruntime is not installed; mend by: pip install onnxruntime"
        ) from None
    arrays: dict[str, np.ndarray] = {}
    for job in {job.part: job for job in jobs if job.reference is not None}.values():
        assert job.reference is not None
        graph = PlainGraph(job.reference)
        outputs = graph.run(random_feeds(graph.inputs, seed, {}))
        arrays |= {f"{job.part}/{seed}/{name}": array for name, array in outputs.items()}
    if not arrays:
        raise UserError("write-reference: found no FP32 folder, expected one; write it with export-camera --fp32")
    write_arrays(path, arrays)


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, p90 and p99 in milliseconds, and how many."""
    median, p90, p99 = (float(value) for value in np.percentile(times, (50, 90, 99)))
    return {"median_ms": round(median, 4), "p90_ms": round(p90, 4), "p99_ms": round(p99, 4), "runs": len(times)}


@dataclass(frozen=True)
class Lab:
    """How to measure. seed: of the inputs. warmup: seconds. saved: reference outputs by "part/seed/output"."""

    device: str
    options: Options
    seed: int
    rounds: int
    repeats: int
    warmup: float
    slowest: int
    saved: Mapping[str, np.ndarray]

    def run(self, jobs: Sequence[Job], say: Callable[[str], None]) -> None:
        """Fills the jobs' rows, part by part. A row that cannot be built or run says why in its "error"; the others go on."""
        for part in dict.fromkeys(job.part for job in jobs):
            engines = []
            for job in (job for job in jobs if job.part == part):
                say(f"{part} {job.name}")
                job.row |= {"part": part, "row": job.name, "folder": str(job.folder), "precision": job.precision}
                try:
                    engines.append((job, self.build(job)))
                except FAILURES as error:
                    _fail(job, error, say)
            self.time(engines, say)

    def build(self, job: Job) -> Any:
        """Builds a row's engine, compares its outputs, measures copies and layers."""
        from qat.engine.tensorrt_backend import build

        inputs = read_outline(job.file).inputs
        profiles = tuple(profile for profile in self.options.tensorrt.profiles if profile.input in inputs)
        asked = replace(self.options.tensorrt, tf32=job.tf32, profiles=profiles)
        started = time.monotonic()
        engine = build(job.file, job.precision, replace(self.options, tensorrt=asked), self.device)
        ready = time.monotonic() - started
        feeds32 = random_feeds(engine.inputs, self.seed, {profile.input: profile.opt for profile in profiles})
        feeds = {name: array.astype(engine.inputs[name].dtype) for name, array in feeds32.items()}
        outputs = engine.run(feeds)
        transfers = []
        for _ in range(self.repeats):
            engine.run(feeds)
            transfers.append(engine.transfer_ms)
        layers = engine.layers(feeds, runs=10)
        source, reference = reference_outputs(job, self.saved, feeds32, self.seed)
        job.row |= {
            "strongly_typed": bool(engine.facts and engine.facts.strongly_typed),
            "tf32": job.tf32,
            "build_s": engine.facts.build_seconds if engine.facts else None,
            "ready_s": round(ready, 2),
            "engine_bytes": engine.size_bytes,
            "transfer": summary(transfers),
            "reference": source,
            "difference": {name: _difference(reference[name], outputs[name]) for name in outputs if name in reference},
            "findings": asdict(engine.findings()),
            "layers": [asdict(layer) for layer in layers],
            "slowest": table(layers, self.slowest),
        }
        engine.run(feeds)  # the buffers hold these inputs again, at these shapes
        return engine

    def time(self, engines: Sequence[tuple[Job, Any]], say: Callable[[str], None]) -> None:
        """Times every row of one part, round by round: what drifts, drifts for all. One that fails is left out from there on."""
        times: dict[tuple[int, str], list[float]] = {}
        for turn in range(-1, self.rounds):
            for index, (job, engine) in enumerate(engines):
                if "error" in job.row:
                    continue
                try:
                    if turn < 0:
                        self._warm_up(job, engine)
                        continue
                    for mode, ms in self._round(engine):
                        times.setdefault((index, mode), []).append(ms)
                except FAILURES as error:
                    _fail(job, error, say)
        for (index, mode), spent in times.items():
            if "error" not in engines[index][0].row:
                engines[index][0].row[mode] = summary(spent)

    def _warm_up(self, job: Job, engine: Any) -> None:
        until = time.monotonic() + self.warmup
        while time.monotonic() < until:  # clocks come up, kernels that load late are loaded
            engine.enqueue()
            engine.stream.synchronize()
        if engine.graph_refused:
            job.row["cuda_graph_refused"] = engine.graph_refused

    def _round(self, engine: Any) -> list[tuple[str, float]]:
        """One row's turn: mode and milliseconds of each run."""
        found = []
        for mode in ("eager",) if engine.graph_refused else ("eager", "graph"):
            for _ in range(self.repeats):
                with cuda.timed(engine.stream.handle) as spent:
                    engine.enqueue(mode == "graph")
                found.append((mode, spent[0]))
        return found


def _fail(job: Job, error: Exception, say: Callable[[str], None]) -> None:
    job.row["error"] = one_line(str(error))
    say(f"  {job.row['error']}")


def _difference(reference: np.ndarray, output: np.ndarray) -> dict[str, Any]:
    try:
        return dict(compare_tensors(reference, output))
    except UserError as error:  # NaN or infinity: a finding of the lab, not its end
        return {"error": str(error)}


def result_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The short table at the end: a line a row."""
    head = (
        "part",
        "row",
        "build s",
        "MiB",
        "median ms",
        "p99 ms",
        "graph ms",
        "graph p99",
        "copies ms",
        "INT8",
        "reformats",
        "SQNR dB",
    )
    cells = [head]
    for row in rows:
        if "error" in row:
            cells.append((row["part"], row["row"], row["error"].rsplit(": ", 1)[-1][:60], *[""] * (len(head) - 3)))
            continue
        found = row["findings"]
        total = len(found["int8"]) + len(found["fallbacks"]) + len(found["hidden"])
        worst = [value.get("sqnr_db") for value in row["difference"].values()]
        sqnr = "" if not worst else "NaN" if None in worst else f"{min(worst):.1f}"
        graph = row.get("graph")
        cells.append(
            (
                row["part"],
                row["row"],
                "" if row["build_s"] is None else f"{row['build_s']:.1f}",
                f"{row['engine_bytes'] / 2**20:.1f}",
                f"{row['eager']['median_ms']:.3f}",
                f"{row['eager']['p99_ms']:.3f}",
                f"{graph['median_ms']:.3f}" if graph else "refused",
                f"{graph['p99_ms']:.3f}" if graph else "",
                f"{row['transfer']['median_ms']:.3f}",
                f"{len(found['int8'])}/{total}" if total else "",
                str(len(found["reformats"])),
                sqnr,
            )
        )
    widths = [max(len(row[i]) for row in cells if i != 2 or len(row[i]) < 20) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """INT8 against FP32 (TF32 off) and FP16 of each part, by the faster of eager and graph."""

    def best(row: Mapping[str, Any]) -> float:
        return min(row[mode]["median_ms"] for mode in ("eager", "graph") if mode in row)

    lines = []
    done = [row for row in rows if "eager" in row]
    for row in done:
        if row["precision"] != "int8":
            continue
        others = {other["row"]: best(other) for other in done if other["part"] == row["part"]}
        against = [
            f"{name} / it {others[name] / best(row):.2f}" for name in ("FP32", "FP32 TF32", "FP16") if name in others
        ]
        if against:
            lines.append(f"{row['part']} {row['row']}: {', '.join(against)}")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qat.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="written by export-camera")
    parser.add_argument("--part", nargs="+", metavar="PART", help="these alone, such as camera.backbone")
    parser.add_argument("--row", nargs="+", metavar="ROW", help='these alone, such as FP32 "FP32 TF32" FP16 INT8+FP16')
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument("--device", default="cuda:0", metavar="cuda:N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the inputs")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="interleaved rounds (default 20)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="runs of a row in a round (default 20)")
    parser.add_argument("--warmup", type=float, default=1.0, metavar="S", help="seconds a row (default 1)")
    parser.add_argument("--slowest", type=int, default=10, metavar="N", help="layers to show (default 10)")
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument("--reference", type=Path, metavar="NPZ", help="FP32 outputs written by --write-reference")
    reference.add_argument(
        "--write-reference", type=Path, metavar="NPZ", help="run FP32 with ONNX Runtime, write, stop"
    )
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--cache", type=Path, metavar="DIR", help="of built plans")
    cache.add_argument("--no-cache", action="store_true", help="build every plan afresh")
    build = parser.add_argument_group("build")
    build.add_argument("--timing-cache", type=Path, metavar="FILE")
    build.add_argument("--workspace", type=int, metavar="MIB", help="a layer's scratch memory at most")
    build.add_argument("--tactic-sources", nargs="+", metavar="NAME", help=f"of {', '.join(TACTIC_SOURCES)}")
    build.add_argument("--profile", nargs="+", default=[], metavar="NAME=MIN:OPT:MAX", help="shapes of dynamic inputs")
    build.add_argument("--optimization-level", type=int, metavar="N", help="0 to 5 (8.6 and later)")
    build.add_argument("--plugin", nargs="+", type=Path, default=[], metavar="LIB")
    build.add_argument("--no-cuda-graph", action="store_true", help="do not capture CUDA graphs")
    return parser


def _options(args: argparse.Namespace) -> Options:
    built = TensorRtOptions(
        workspace=None if args.workspace is None else args.workspace * MIB,
        timing_cache=args.timing_cache,
        tactic_sources=None if args.tactic_sources is None else tuple(args.tactic_sources),
        profiles=tuple(Profile.parse(text) for text in args.profile),
        plugins=tuple(args.plugin),
        cuda_graph=not args.no_cuda_graph,
        optimization_level=args.optimization_level,
    )
    options = Options(tensorrt=built)
    return replace(options, cache=None if args.no_cache else args.cache or options.cache)


def run(args: argparse.Namespace) -> int:
    """See the module's docstring."""
    for name in ("rounds", "repeats", "slowest"):
        if getattr(args, name) < 1:
            raise UserError(f"{name}: found {getattr(args, name)}, expected 1 or more")
    jobs = plan_jobs(args.folders, args.part, args.row)
    if args.write_reference:
        write_reference(jobs, args.write_reference, args.seed)
        print(args.write_reference)
        return OK
    options = _options(args)
    from qat.engine.tensorrt_backend import describe_device

    machine = describe_device(args.device)
    print(machine)
    saved = _saved(args.reference, jobs, args.seed) if args.reference else {}
    lab = Lab(args.device, options, args.seed, args.rounds, args.repeats, args.warmup, args.slowest, saved)
    try:
        lab.run(jobs, lambda line: print(line, file=sys.stderr, flush=True))
    finally:  # what was measured before Ctrl-C, or before what nobody expected, is kept
        rows = [job.row for job in jobs if job.row]
        if args.json:
            write_json(
                args.json, {"format": "bevqat-lab", "schema": 1, "machine": machine, "seed": args.seed, "rows": rows}
            )
    for row in rows:
        if "slowest" in row:
            print(f"\n{row['part']} {row['row']}: the slowest layers")
            print("\n".join(row["slowest"]))
            found = row["findings"]
            print("\n".join(Findings(**{name: _tuples(value) for name, value in found.items()}).lines()))
    print()
    print("\n".join([*result_table(rows), *ratios(rows)]))
    return OK if any("error" not in row for row in rows) else BAD_USE


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _saved(path: Path, jobs: Sequence[Job], seed: int) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; write it with --write-reference on a machine with ONNX Runtime")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            saved = dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a file of reference outputs ({error}); write it with --write-reference") from None
    for part in {job.part for job in jobs}:
        if not any(name.startswith(f"{part}/{seed}/") for name in saved):
            raise UserError(f"{path}: found nothing for {part} with seed {seed}; write it with --write-reference")
    return saved


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 fine, 2 bad use or nothing could be built (no GPU, no TensorRT), 130 interrupted."""
    allow_any_text()
    args = _parser().parse_args(argv)
    try:
        return run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_USE
    except KeyboardInterrupt:
        print("interrupted; plans that were finished are kept in the cache", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
