"""BEV pooling on this CPU: ours beside torch's sparse CSR product, torch's index_add and the naive scatter-add.

example:
  python benchmarks/pooling.py                          # full size: six cameras, 118 bins, 32 × 88 pixels, 80 channels, 360 × 360 cells
  python benchmarks/pooling.py --keyframe DIR           # the geometry of a real keyframe, as `bevqat show` reads it
  python benchmarks/pooling.py --onnx runs/onnx_int8 --config model/camera-tiny/config.yaml    # and its share of a whole detector

The sizes are the config's, the geometry a keyframe's; depth weights are a random softmax, features random normal. In each round
every row runs once, in an order that turns, after a pause in which the threads of the one before go to sleep; medians of
the wall time and of the processor time of all threads are printed (on a machine that others use, the latter says more).
Every row gets its result in new memory, but for "ours, out=", which writes into the caller's.

- ours: `qat.runtime.pool`, grid [C,nx,ny] as the next part takes it.
- torch CSR: the weights gathered by an index that is ready, `torch.sparse_csr_tensor` of them in a pattern that is ready, times
  the features. Its result is [cells,C]: "torch CSR, transposed" copies that to what ours gives.
- torch index_add: weight times feature of 65536 points at once, added to [cells,C].
- naive: the same with `numpy.add.at`, once, in double precision; the others' errors are their distance from it.

Goal: ours / torch CSR at most 0.5, with the same number of threads. A pattern is made for each new camera geometry (on
nuScenes in every sample): its time is apart. Peak memory is what the process grows by in one run, the result with it;
0 where what was freed before is enough.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibration import load_samples
from command import check_least, one_line_errors
from rich.console import Console
from rich.table import Table

from qat.compare.machine import machine_facts
from qat.core.errors import UserError
from qat.core.files import write_json
from qat.core.rounds import no_collection, turned
from qat.core.versions import versions
from qat.data import NuScenesDataset, Sample
from qat.data.frame import load_frame
from qat.engine import Options
from qat.families.bevfusion.config import load_config
from qat.families.bevfusion.pooling.cpu import PatternCache, pool
from qat.families.bevfusion.pooling.geometry import PoolPattern
from qat.runtime import Calibration, Pipeline

GOAL = 0.5
BLOCK = 1 << 16
PAUSE = 0.02  # seconds
OURS, INTO, CSR, CSR_COPY, INDEX_ADD, NAIVE = (
    "ours", "ours, out=", "torch CSR", "torch CSR, transposed", "torch index_add", "naive",
)  # fmt: skip


@dataclass
class Row:
    """One way to pool. run: () → [cells,C] or [C,cells], by `channels_first`. wall, cpu: seconds of each timed run."""

    name: str
    run: Callable[[], Any]
    channels_first: bool
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    error: float = float("nan")
    peak_mb: float | None = None


def matrices(sample: Sample) -> tuple[np.ndarray, ...]:
    """What a pattern is made from."""
    return sample.camera_intrinsics, sample.camera2lidar, sample.img_aug_matrix, sample.lidar_aug_matrix


def read_samples(args: argparse.Namespace, config: dict[str, Any]) -> list[Sample]:
    """Keyframes whose cameras are taken: one real one, or some of a data set.

    Raises:
        UserError: no such data.
    """
    if args.keyframe:
        return [load_frame(args.keyframe, config)]
    return load_samples(config, args)


def naive(pattern: PoolPattern, weights: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The definition, a block of points at once: float64[cells,C]."""
    out = np.zeros((len(pattern.row_ptr) - 1, features.shape[-1]))
    values, pixels = weights.reshape(-1), features.reshape(pattern.pixels, -1)
    for start in range(0, len(pattern.cell), BLOCK):
        part = slice(start, start + BLOCK)
        products = values[pattern.depth[part], None].astype(np.float64) * pixels[pattern.pixel[part]]
        np.add.at(out, pattern.cell[part], products)
    return out


def contenders(pattern: PoolPattern, weights: np.ndarray, features: np.ndarray, threads: int) -> list[Row]:
    """The timed rows."""
    cells, channels = len(pattern.row_ptr) - 1, features.shape[-1]
    row_ptr, pixel = torch.from_numpy(pattern.row_ptr), torch.from_numpy(pattern.pixel)
    cell, depth = torch.from_numpy(pattern.cell), torch.from_numpy(pattern.depth).long()
    values, pixels = torch.from_numpy(weights).reshape(-1), torch.from_numpy(features).reshape(pattern.pixels, channels)

    def csr() -> torch.Tensor:
        with torch.sparse.check_sparse_tensor_invariants(False):
            matrix = torch.sparse_csr_tensor(row_ptr, pixel, values[depth], (cells, pattern.pixels))
        return matrix @ pixels

    def index_add() -> torch.Tensor:
        out = torch.zeros(cells, channels)
        for start in range(0, len(cell), BLOCK):
            part = slice(start, start + BLOCK)
            out.index_add_(0, cell[part], values[depth[part], None] * pixels[pixel[part].long()])
        return out

    given = pool(pattern, weights, features, threads)
    return [
        Row(OURS, lambda: pool(pattern, weights, features, threads), True),
        Row(INTO, lambda: pool(pattern, weights, features, threads, given), True),
        Row(CSR, csr, False),
        Row(CSR_COPY, lambda: csr().t().contiguous(), True),
        Row(INDEX_ADD, index_add, False),
    ]


def as_grid(row: Row, result: Any, pattern: PoolPattern) -> np.ndarray:
    """float[cells,C] whatever the row gives."""
    array = np.asarray(result)
    nz, nx, ny = pattern.shape
    if not row.channels_first:
        return array
    if row.name in (OURS, INTO):
        return array.reshape(nz, -1, nx * ny).transpose(0, 2, 1).reshape(nz * nx * ny, -1)
    return array.T


def return_large_blocks() -> None:
    """Makes glibc give freed blocks of 32 MB back to the system, so that every row's grid is in new memory.

    By itself it keeps up to 64 MB for the next block of that size, and the row that gets it is spared the page faults.
    """
    largest, m_trim_threshold, m_mmap_threshold = 1 << 25, -1, -3
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_trim_threshold, largest)
        mallopt(m_mmap_threshold, largest)


def peak_mb(run: Callable[[], Any]) -> float | None:
    """MB by which the process is larger at its largest during a run; None where the system does not tell."""

    def status(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1])

    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        before = status("VmRSS")
        result = run()
        grown = status("VmHWM") - before
    except (OSError, StopIteration):
        return None
    del result
    return max(grown, 0) * 1024 / 1e6


def measure(rows: Sequence[Row], rounds: int) -> None:
    """Times the rows in turn."""
    with no_collection():
        for turn in range(rounds):
            for row in turned(rows, turn):
                time.sleep(PAUSE)
                cpu, wall = time.process_time(), time.perf_counter()
                result = row.run()
                row.wall.append(time.perf_counter() - wall)
                row.cpu.append(time.process_time() - cpu)
                del result  # giving the memory back is not timed, for none


def pattern_rebuild(
    config: dict[str, Any], samples: Sequence[Sample], rounds: int
) -> tuple[PoolPattern, dict[str, float]]:
    """A pattern, and the median milliseconds that making it takes: wall and processor time."""
    transform = config["model"]["encoders"]["camera"]["vtransform"]
    names = ("image_size", "feature_size", "xbound", "ybound", "zbound", "dbound")
    wall, cpu = [], []
    for turn in range(rounds + 1):
        cache = PatternCache(*(transform[name] for name in names))
        time.sleep(PAUSE)
        cpu_begin, begin = time.process_time(), time.perf_counter()
        pattern = cache.get(*matrices(samples[turn % len(samples)]))
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - cpu_begin)
    # The first one compiles.
    return pattern, {"wall_ms": float(np.median(wall[1:])) * 1e3, "cpu_ms": float(np.median(cpu[1:])) * 1e3}


def share(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, float]:
    """Median milliseconds of each stage of the detector in --onnx, images to boxes, a new geometry in every frame.

    Raises:
        UserError: no such folder, backend or data.
    """
    pipeline = Pipeline.load(args.onnx, args.backend, options=Options(threads=args.threads))
    dataset = NuScenesDataset(args.data, args.split, config, args.version, 6)  # more than patterns are kept
    frames = [dataset.read(token) for token in dataset.tokens]
    stages: dict[str, list[float]] = {}
    for turn in range(args.rounds + 1):
        frame = frames[turn % len(frames)]
        # Its own poses may be those of the frame before: moved by less than a millimetre, they are another geometry.
        moved = frame.camera2lidar.copy()
        moved[:, :3, 3] += np.float32(1e-4 * (turn + 1))
        begin = time.perf_counter()
        pipeline(frame.images, frame.points, Calibration(frame.camera_intrinsics, moved))
        total = (time.perf_counter() - begin) * 1e3
        if turn:  # the first one compiles
            for name, value in (pipeline.timing_ms | {"all": total}).items():
                stages.setdefault(name, []).append(value)
    return {name: float(np.median(values)) for name, values in stages.items()}


def report(rows: Sequence[Row], pattern: PoolPattern, result: dict[str, Any]) -> None:
    """Prints the tables and the goal."""
    console = Console()
    console = console if console.is_terminal else Console(width=110)
    table = Table(title=f"{result['sizes']}: medians of {len(rows[0].wall)} interleaved rounds")
    for name in ("", "wall ms", "cpu ms", "wall / torch CSR", "cpu / torch CSR", "largest error", "peak MB"):
        table.add_column(name, justify="right" if name else "left")
    for entry in result["rows"]:
        table.add_row(
            entry["name"],
            f"{entry['wall_ms']:.1f}",
            f"{entry['cpu_ms']:.1f}",
            f"{entry['wall_ratio']:.2f}",
            f"{entry['cpu_ratio']:.2f}",
            f"{entry['max_abs_error']:.1e}",
            "" if entry["peak_mb"] is None else f"{entry['peak_mb']:.0f}",
        )
    table.add_row(NAIVE, f"{result['naive_ms']:.0f}", "", "", "", "", "")
    console.print(table)
    rebuild, megabytes = result["pattern"], result["pattern"]["mb"]
    print(f"pattern of a new geometry: {rebuild['wall_ms']:.1f} ms ({rebuild['cpu_ms']:.1f} cpu), {megabytes:.1f} MB")
    if stages := result.get("stages_ms"):
        whole = stages["all"]
        print(
            f"share of {result['onnx']} on {result['backend']}, images to boxes, {whole:.1f} ms, a new geometry each:"
        )
        for name, value in stages.items():
            if name != "all":
                print(f"  {name:18s} {value:8.2f} ms {value / whole:6.1%}")
    print(f"ours / torch CSR (goal at most {GOAL}): {result['ratio']:.2f} wall, {result['cpu_ratio']:.2f} cpu")
    facts = result["machine"]
    print(f"{facts['cpu']}, {facts['cores']} cores, {result['threads']} threads each")
    print(", ".join(f"{name} {version}" for name, version in result["versions"].items()))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures everything and prints it.

    Raises:
        UserError: bad config, data or folder of parts.
    """
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    return_large_blocks()
    config = load_config(args.config)
    transform = config["model"]["encoders"]["camera"]["vtransform"]
    facts = machine_facts(args.threads)
    threads = facts["threads"]
    pattern, rebuild = pattern_rebuild(config, read_samples(args, config), args.rounds)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fh, fw = transform["feature_size"]
        cameras, channels = pattern.pixels // (fh * fw), transform["out_channels"]
        bins = int(np.ceil((transform["dbound"][1] - transform["dbound"][0]) / transform["dbound"][2]))
        random = np.random.default_rng(0)
        weights = np.exp(2 * random.standard_normal((cameras, bins, fh, fw), np.float32))
        weights /= weights.sum(1, keepdims=True)
        features = random.standard_normal((cameras, fh, fw, channels), np.float32)
        begin = time.perf_counter()
        exact = naive(pattern, weights, features)
        naive_ms = (time.perf_counter() - begin) * 1e3
        rows = contenders(pattern, weights, features, threads)
        for row in rows:
            row.error = float(np.abs(as_grid(row, row.run(), pattern) - exact).max(initial=0))
        del exact
        for row in rows:
            row.peak_mb = peak_mb(row.run)
        measure(rows, args.rounds)
    finally:
        torch.set_num_threads(before)
    base = next(row for row in rows if row.name == CSR)
    entries = [
        {
            "name": row.name,
            "ours": row.name in (OURS, INTO),
            "wall_ms": float(np.median(row.wall)) * 1e3,
            "cpu_ms": float(np.median(row.cpu)) * 1e3,
            "wall_ratio": float(np.median(row.wall) / np.median(base.wall)),
            "cpu_ratio": float(np.median(row.cpu) / np.median(base.cpu)),
            "max_abs_error": row.error,
            "peak_mb": row.peak_mb,
            "seconds": row.wall,
        }
        for row in rows
    ]
    nz, nx, ny = pattern.shape
    megabytes = sum(a.nbytes for a in (pattern.cell, pattern.pixel, pattern.depth, pattern.row_ptr)) / 1e6
    result: dict[str, Any] = {
        "sizes": f"{cameras}×{bins}×{fh}×{fw} points, {len(pattern.cell)} in the grid, {channels} channels, {nz}×{nx}×{ny} cells",
        "rows": entries,
        "naive_ms": naive_ms,
        "ratio": entries[0]["wall_ratio"],
        "cpu_ratio": entries[0]["cpu_ratio"],
        "goal": GOAL,
        "pattern": {**rebuild, "mb": megabytes},
        "threads": threads,
        "machine": facts,
        "versions": versions(),
    }
    if args.onnx:
        result |= {"onnx": str(args.onnx), "backend": args.backend, "stages_ms": share(args, config)}
    report(rows, pattern, result)
    return result


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status: 0 measured, 2 bad use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("model/resnet50/config.yaml"), metavar="YAML")
    parser.add_argument("--data", type=Path, default=Path("example-data"), metavar="ROOT", help="its cameras are taken")
    parser.add_argument("--version", metavar="NAME", help="needed where ROOT holds several, such as v1.0-mini")
    parser.add_argument("--split", default="calib", help="default calib")
    parser.add_argument("--frames", type=int, default=4, metavar="N", help="keyframes, in turn (default 4)")
    parser.add_argument("--keyframe", type=Path, metavar="DIR", help="one keyframe with info.json, in --data's place")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="times that each row runs (default 15)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default 0: all cores")
    parser.add_argument(
        "--onnx", type=Path, metavar="DIR", help="parts of --config's detector, to measure the share in"
    )
    parser.add_argument("--backend", default="openvino", help="for --onnx (default openvino)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    args = parser.parse_args(argv)
    check_least(args, rounds=1, frames=1)
    if args.threads < 0:
        raise UserError(f"--threads: found {args.threads}, expected 0 (all cores) or more")
    result = run(args)
    if args.json:
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
