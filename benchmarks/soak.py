"""A robot's day in short: thousands of frames through `Pipeline` in one process, whose memory, threads and files must not grow
and whose results must not drift.

example:
  python benchmarks/soak.py --onnx runs/onnx_fp32 --backend openvino onnxruntime
  python benchmarks/soak.py --onnx runs/onnx_int8_openvino --backend openvino --frames 20000 --json soak.json

Each folder runs on each backend in a process of its own. Frames are made up: --scenes sets of pictures, points and
camera geometries, shown again and again in turn, more of them than the pipeline remembers patterns for, so that patterns are
made anew all the time. The boxes of a scene, their scores and labels must be those of its first time, bit for bit.

Printed for each: the resident memory after --warm-up frames, how far it rose above that at any later frame, and what else a
process can leak. Exit status 1 where it rose by more than --limit-mb, where there are more threads or open files at the end
than after the warm-up, or where a result differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from command import check_least, one_line_errors

from qat.core.errors import UserError
from qat.core.files import write_json
from qat.core.geometry import camera_ring
from qat.engine import CPU_BACKENDS, Options
from qat.runtime import Calibration, Pipeline

EVERY = 20  # frames between two looks at the memory


@dataclass
class Soak:
    """What a run of one folder on one backend came to. Memory in MB (10⁶ bytes). differing: frames whose result is not that of
    the scene's first time. boxes: of one round of the scenes. patterns: how often one was made."""

    folder: str
    backend: str
    precision: str
    frames: int
    rss_mb: float
    growth_mb: float
    threads: tuple[int, int]
    files: tuple[int, int]
    differing: int
    boxes: int
    patterns: int
    seconds: float

    def problems(self, limit_mb: float) -> list[str]:
        """What must not be; empty where all is well."""
        found = []
        if self.growth_mb > limit_mb:
            found.append(f"memory rose by {self.growth_mb:.1f} MB, expected at most {limit_mb:g}")
        if self.threads[1] > self.threads[0]:
            found.append(f"threads rose from {self.threads[0]} to {self.threads[1]}")
        if self.files[1] > self.files[0]:
            found.append(f"open files rose from {self.files[0]} to {self.files[1]}")
        if self.differing:
            found.append(f"{self.differing} results differ from those of the first time")
        return found


def resident_mb() -> float:
    """This process's resident memory, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _counts() -> tuple[int, int]:
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def scenes(pipeline: Pipeline, count: int) -> list[tuple[list[np.ndarray], np.ndarray, Calibration]]:
    """Noise for pictures, a cloud of points, and cameras in a ring that lies otherwise in each scene."""
    made = []
    height, width = pipeline.settings["image"]["size"]
    scale = pipeline.settings["image"]["resize"]
    native = (round(height / scale), round(width / scale))
    for seed in range(count):
        random = np.random.default_rng(seed)
        images = list(random.integers(0, 256, (len(pipeline.cameras), *native, 3), dtype=np.uint8))
        points = (random.standard_normal((5_000, 5)) * [12, 12, 1, 1, 0]).astype(np.float32)
        intrinsics, camera2lidar = camera_ring(len(pipeline.cameras), native)
        camera2lidar = camera2lidar.astype(np.float32)
        camera2lidar[:, :3, 3] += random.uniform(-0.5, 0.5, 3)
        made.append((images, points, Calibration(intrinsics.astype(np.float32), camera2lidar)))
    return made


def soak(folder: str, backend: str, frames: int, warm_up: int, variety: int, threads: int) -> Soak:
    """Runs one folder on one backend in this process."""
    pipeline = Pipeline.load(folder, backend, options=Options(threads=threads, cache=None))
    shown = scenes(pipeline, variety)
    first: list[bytes] = []
    differing = boxes = 0
    base, highest, began = 0.0, 0.0, time.perf_counter()
    counts = (0, 0)
    for frame in range(frames):
        found = pipeline(*shown[frame % variety])
        digest = hashlib.sha256()
        for array in (found.boxes, found.scores, found.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        if frame < variety:
            first.append(digest.digest())
            boxes += len(found)
        elif digest.digest() != first[frame % variety]:
            differing += 1
        if frame + 1 == warm_up:
            base, counts = resident_mb(), _counts()
        elif frame >= warm_up and (frame % EVERY == 0 or frame + 1 == frames):
            highest = max(highest, resident_mb())
    after = _counts()
    return Soak(
        folder=str(folder),
        backend=backend,
        precision=pipeline.parts["camera.backbone"].precision,  # type: ignore[attr-defined]
        frames=frames,
        rss_mb=round(base, 1),
        growth_mb=round(highest - base, 2),
        threads=(counts[0], after[0]),
        files=(counts[1], after[1]),
        differing=differing,
        boxes=boxes,
        patterns=pipeline.flow.rebuilds,
        seconds=round(time.perf_counter() - began, 1),
    )


def _apart(arguments: argparse.Namespace, folder: str, backend: str) -> Soak:
    """`soak` in a process of its own: what an earlier backend left would be part of the memory."""
    command = [sys.executable, __file__, "--onnx", folder, "--backend", backend, "--one"]
    for name in ("frames", "warm_up", "scenes", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: ") if done.stderr else "soak failed")
    values = json.loads(done.stdout.splitlines()[-1])
    return Soak(**{**values, "threads": tuple(values["threads"]), "files": tuple(values["files"])})


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", nargs="+", required=True, metavar="DIR", help="folders written by export-camera")
    parser.add_argument("--backend", nargs="+", choices=CPU_BACKENDS, default=list(CPU_BACKENDS))
    parser.add_argument("--frames", type=int, default=2000, help="of each (default 2000)")
    parser.add_argument("--warm-up", type=int, default=200, help="frames before memory is looked at (default 200)")
    parser.add_argument("--scenes", type=int, default=6, help="different frames (default 6; patterns of 4 are kept)")
    parser.add_argument("--threads", type=int, default=0, help="0 for one on each core (default)")
    parser.add_argument("--limit-mb", type=float, default=20.0, help="by how much memory may rise (default 20)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    check_least(args, frames=2, warm_up=1, scenes=1, threads=0)
    if args.frames <= args.warm_up or args.warm_up < args.scenes:
        raise UserError(
            f"--frames {args.frames} --warm-up {args.warm_up} --scenes {args.scenes}: expected more frames than warm-up, "
            "and a warm-up that shows each scene"
        )
    if args.one:
        run = soak(args.onnx[0], args.backend[0], args.frames, args.warm_up, args.scenes, args.threads)
        print(json.dumps(asdict(run)))
        return 0
    runs = []
    failed = False
    for folder in args.onnx:
        for backend in args.backend:
            run = _apart(args, folder, backend)
            runs.append(run)
            print(
                f"{run.folder} on {run.backend} ({run.precision}): {run.frames:,} frames in {run.seconds:.0f} s, "
                f"{run.rss_mb:.0f} MB + {run.growth_mb:.1f} MB, {run.threads[1]} threads, {run.files[1]} files, "
                f"{run.patterns:,} patterns, {run.boxes} boxes a round, {run.differing} differing",
                flush=True,
            )
            for problem in run.problems(args.limit_mb):
                failed = True
                print(f"  {problem}", flush=True)
    if args.json:
        write_json(args.json, [asdict(run) for run in runs])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
