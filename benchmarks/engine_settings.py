"""What the backends' CPU settings do to latency, memory and processor time: one changed at a time, beside what we run with.

example:
  python benchmarks/engine_settings.py                                          # camera-tiny's camera.backbone, FP32
  python benchmarks/engine_settings.py --onnx runs/full/onnx_int8_openvino/camera.backbone.onnx --backend openvino

Every setting has a process of its own, which loads the built engine and then waits. In each round every process, in an order
that turns, runs once uncounted and --repeats times counted, with a pause before each run as a robot's camera makes it
(--pause). The ratio is the median over the rounds of (this setting's median / the default's in the same round), with the
quartiles: where they enclose 1 the run does not tell. Peak RSS is the whole process's, Python and its packages with it. CPU is
processor time from one run's beginning to the next one's, pause included: threads that spin use it too.

docs/engines.md says what was chosen by it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from qat.core.errors import UserError
from qat.core.files import write_json
from qat.core.machine import cores, threads_of
from qat.core.versions import versions
from qat.engine import CPU_BACKENDS, Options, build, ending

PART = "camera.backbone"
DEFAULT = "default"


@dataclass(frozen=True)
class Setting:
    """One row. options: fields of `qat.engine.Options`. raw: the backend's own settings, over what we tell it: OpenVINO's
    properties, or ONNX Runtime's session entries, attributes of SessionOptions ("options.NAME") and run entries
    ("run.NAME"). built: whether it loads the built engine or builds it from the graph."""

    name: str
    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)
    built: bool = True


def settings(backend: str) -> list[Setting]:
    """The default and what is tried beside it."""
    ours = Options()
    common = [
        Setting(DEFAULT, backend),
        Setting("not pinned" if ours.pinning else "pinned", backend, {"pinning": not ours.pinning}),
        Setting("no model cache", backend, built=False),
    ]
    if len(cores()) > 1:
        common.append(Setting("1 thread", backend, {"threads": 1}))
    if backend == "openvino":
        return common + [
            Setting("hint THROUGHPUT", backend, raw={"PERFORMANCE_HINT": "THROUGHPUT"}),
            Setting("2 streams", backend, raw={"NUM_STREAMS": 2}),
            Setting("hyper-threading", backend, raw={"ENABLE_HYPER_THREADING": True}),
            Setting("cores reserved", backend, raw={"ENABLE_CPU_RESERVATION": True}),
            Setting("denormals as zero", backend, raw={"CPU_DENORMALS_OPTIMIZATION": True}),
            Setting("bfloat16", backend, raw={"INFERENCE_PRECISION_HINT": "bf16"}),
        ]
    return common + [
        Setting("not spinning" if ours.spinning else "spinning", backend, {"spinning": not ours.spinning}),
        Setting("no arena", backend, raw={"options.enable_cpu_mem_arena": False}),
        Setting("arena shrunk after a run", backend, raw={"run.memory.enable_memory_arena_shrinkage": "cpu:0"}),
        Setting("no memory pattern", backend, raw={"options.enable_mem_pattern": False}),
        Setting("parallel branches", backend, raw={"options.execution_mode": "ORT_PARALLEL"}),
        Setting("dynamic block size 4", backend, raw={"session.dynamic_block_base": "4"}),
        Setting("denormals as zero", backend, raw={"session.set_denormal_as_zero": "1"}),
    ]


def onnxruntime_run(file: Path, setting: Setting, options: Options, feeds: dict[str, np.ndarray]) -> Callable[[], Any]:
    """A session with the setting; what it returns runs once."""
    import onnxruntime as ort

    from qat.engine.onnxruntime_backend import session_options

    told, run = session_options(options), ort.RunOptions()
    if setting.built:
        told.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name, value in setting.raw.items():
        if name.startswith("options."):
            value = getattr(ort.ExecutionMode, value) if name.endswith("execution_mode") else value
            setattr(told, name.removeprefix("options."), value)
        elif name.startswith("run."):
            run.add_run_config_entry(name.removeprefix("run."), value)
        else:
            told.add_session_config_entry(name, value)
    session = ort.InferenceSession(str(file), told, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds, run)


def openvino_run(
    file: Path, setting: Setting, options: Options, feeds: dict[str, np.ndarray], precision: str
) -> Callable[[], Any]:
    """A request with the setting; what it returns runs once."""
    import openvino as ov

    from qat.engine import openvino_backend

    told = {**openvino_backend.settings(precision, options, "CPU"), **setting.raw}
    if setting.built:
        compiled = ov.Core().import_model(file.read_bytes(), "CPU", told)
    else:
        model = ov.Core().read_model(file)
        openvino_backend.shift_concatenated(model)
        compiled = ov.Core().compile_model(model, "CPU", told)
    request, arrays = compiled.create_infer_request(), list(feeds.values())

    def run() -> list[np.ndarray]:
        results = request.infer(arrays, share_inputs=True, share_outputs=True)
        return [results[i].copy() for i in range(len(compiled.outputs))]

    return run


def peak_rss() -> float:
    """MB, of this process so far. (Not getrusage's: on Linux that begins with the parent's.)"""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def serve(spec: dict[str, Any]) -> None:
    """A worker: loads, says so, then runs a turn for every line that it reads; each answer is a line of JSON."""
    setting = Setting(**spec["setting"])
    options = Options(**{"threads": spec["threads"], "cache": None, **setting.options})
    with np.load(spec["feeds"]) as arrays:
        feeds = dict(arrays)
    begin = time.perf_counter()
    if setting.backend == "openvino":
        run = openvino_run(Path(spec["file"]), setting, options, feeds, spec["precision"])
    else:
        run = onnxruntime_run(Path(spec["file"]), setting, options, feeds)
    loaded = time.perf_counter() - begin
    run()
    print(json.dumps({"load_ms": loaded * 1e3}), flush=True)
    for _ in sys.stdin:
        run()
        wall, cpu = [], []
        for _ in range(spec["repeats"]):
            time.sleep(spec["pause"])
            used, begin = time.process_time(), time.perf_counter()
            run()
            wall.append((time.perf_counter() - begin) * 1e3)
            time.sleep(spec["pause"])
            cpu.append((time.process_time() - used) * 1e3)
        print(json.dumps({"ms": wall, "cpu_ms": cpu, "peak_rss_mb": peak_rss()}), flush=True)


@dataclass
class Row:
    """One setting's figures: of each round the median latency, of all runs the processor time."""

    setting: Setting
    load_ms: float
    rounds: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    peak_rss_mb: float = 0.0


class Worker:
    """A setting's process."""

    def __init__(self, setting: Setting, spec: dict[str, Any]) -> None:
        described = json.dumps({**spec, "setting": asdict(setting)})
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker", described],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.row = Row(setting, 0.0)
        self.row.load_ms = self._answer()["load_ms"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"{self.row.setting.backend}, {self.row.setting.name}: its process ended; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def turn(self) -> None:
        """One round."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.row.rounds.append(float(np.median(answer["ms"])))
        self.row.cpu_ms += answer["cpu_ms"]
        self.row.peak_rss_mb = answer["peak_rss_mb"]

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(workers: Sequence[Worker], rounds: int, say: Callable[[str], None]) -> None:
    """Lets the workers run in turn."""
    for turn in range(rounds):
        for place in range(len(workers)):
            workers[(place + turn) % len(workers)].turn()
        say(f"round {turn + 1} of {rounds}")


def report(rows: Sequence[Row], title: str) -> list[dict[str, Any]]:
    """Prints a backend's table, and returns its figures."""
    table = Table(title=title)
    for name in ("setting", "ms", "ratio", "quartiles", "load ms", "peak RSS MB", "CPU ms"):
        table.add_column(name, justify="left" if name == "setting" else "right")
    base = np.array(rows[0].rounds)
    found = []
    for row in rows:
        low, ratio, high = np.percentile(np.array(row.rounds) / base, (25, 50, 75))
        figures = {
            "name": row.setting.name,
            "backend": row.setting.backend,
            "ms": float(np.median(row.rounds)),
            "ratio": float(ratio),
            "quartiles": [float(low), float(high)],
            "load_ms": row.load_ms,
            "peak_rss_mb": row.peak_rss_mb,
            "cpu_ms": float(np.median(row.cpu_ms)),
            "rounds_ms": row.rounds,
        }
        found.append(figures)
        table.add_row(
            row.setting.name,
            f"{figures['ms']:.2f}",
            f"{ratio:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{row.load_ms:.0f}",
            f"{row.peak_rss_mb:.0f}",
            f"{figures['cpu_ms']:.1f}",
        )
    Console(width=120).print(table)
    return found


def shipped_part(folder: Path) -> Path:
    """camera-tiny's camera.backbone in FP32, exported."""
    from qat.export.checkpoint import export_checkpoint

    written, _ = export_checkpoint("model/camera-tiny/camera-tiny.pth", "fp32", str(folder / "onnx"), only=[PART])
    return written / f"{PART}.onnx"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status: 0 measured, 2 bad use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, metavar="FILE", help=f"a part (default: camera-tiny's {PART}, FP32)")
    parser.add_argument("--backend", nargs="+", default=list(CPU_BACKENDS), choices=CPU_BACKENDS)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "int8"), help="what the part was exported for")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default 0: one on each core")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="default 20")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="counted runs in a round (default 5)")
    parser.add_argument("--pause", type=float, default=10.0, metavar="MS", help="before a run (default 10)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these settings, beside the default")
    parser.add_argument("--out", type=Path, metavar="JSON", help="also write the figures to a file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        serve(json.loads(args.worker))
        return 0

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        for name in ("rounds", "repeats"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name}: found {getattr(args, name)}, expected at least 1")
        found = []
        with tempfile.TemporaryDirectory() as folder:
            part = args.onnx or shipped_part(Path(folder))
            for backend in args.backend:
                chosen = settings(backend)
                if args.only:
                    chosen = [s for s in chosen if s.name == DEFAULT or s.name in args.only]
                engine = build(part, backend, args.precision, Options(args.threads, cache=Path(folder) / "cache"))
                feeds, built = Path(folder) / "feeds.npz", Path(folder) / f"part{ending(backend)}"
                engine.save(built)
                np.savez(feeds, **engine.example_feeds())
                del engine
                spec = {
                    "feeds": str(feeds),
                    "threads": args.threads,
                    "repeats": args.repeats,
                    "pause": args.pause / 1e3,
                    "precision": args.precision,
                }
                with ExitStack() as stack:
                    workers = []
                    for setting in chosen:
                        say(f"{backend}: {setting.name}")
                        worker = Worker(setting, {**spec, "file": str(built if setting.built else part)})
                        stack.callback(worker.close)
                        workers.append(worker)
                    measure(workers, args.rounds, say)
                title = f"{backend}, {part.name}, {args.precision}, {threads_of(args.threads)} threads"
                found += report([worker.row for worker in workers], title)
        print(", ".join(f"{name} {version}" for name, version in versions().items()))
        if args.out:
            write_json(args.out, {"part": part.name, "rows": found, "versions": versions()})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
