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
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from command import check_least, one_line_errors
from rich.console import Console
from rich.table import Table
from setting_rows import Setting, SettingRow

from qat.benchmark.worker import Worker
from qat.core.files import write_json
from qat.core.machine import cores, threads_of
from qat.core.rounds import turned
from qat.core.versions import versions
from qat.engine import CPU_BACKENDS, Options, build, ending

PART = "camera.backbone"
DEFAULT = "default"


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


@dataclass
class Row:
    """One setting's figures: of each round the median latency, of all runs the processor time."""

    setting: Setting
    worker: Worker
    load_ms: float = 0.0
    rounds: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    peak_rss_mb: float = 0.0

    def turn(self, repeats: int) -> None:
        """One round."""
        answer = self.worker.ask("turn", repeats)
        self.rounds.append(float(np.median(answer["ms"])))
        self.cpu_ms += answer["cpu_ms"]
        self.peak_rss_mb = answer["peak_rss_mb"]


def measure(rows: Sequence[Row], rounds: int, repeats: int, say: Callable[[str], None]) -> None:
    """Lets the rows run in turn."""
    for turn in range(rounds):
        for row in turned(rows, turn):
            row.turn(repeats)
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
    from qat.export.options import ExportOptions
    from qat.model.opening import Source

    source = Source("model/camera-tiny/camera-tiny.pth")
    written, _ = export_checkpoint(source, ExportOptions("fp32", parts=[PART]), folder / "onnx")
    return written / f"{PART}.onnx"


@one_line_errors
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
    args = parser.parse_args(argv)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    check_least(args, rounds=1, repeats=1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        part = args.onnx or shipped_part(Path(folder))
        for backend in args.backend:
            chosen = settings(backend)
            if args.only:
                chosen = [s for s in chosen if s.name == DEFAULT or s.name in args.only]
            engine = build(part, backend, args.precision, Options(args.threads, cache=Path(folder) / "cache"))
            built = Path(folder) / f"part{ending(backend)}"
            engine.save(built)
            feeds = engine.example_feeds()
            del engine
            with ExitStack() as stack:
                rows = []
                for setting in chosen:
                    say(f"{backend}: {setting.name}")
                    file = built if setting.built else part
                    made = (setting, file, args.threads, args.precision, feeds, args.pause / 1e3)
                    row = Row(setting, Worker(f"{backend}, {setting.name}", SettingRow, *made))
                    stack.callback(row.worker.close)
                    row.load_ms = row.worker.described()["load_ms"]
                    rows.append(row)
                measure(rows, args.rounds, args.repeats, say)
            title = f"{backend}, {part.name}, {args.precision}, {threads_of(args.threads)} threads"
            found += report(rows, title)
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    if args.out:
        write_json(args.out, {"part": part.name, "rows": found, "versions": versions()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
