"""Time exported detectors on this machine, part by part and end to end, for each backend and precision, interleaved.

Precision and flavour come from each folder's manifest. Every row runs in its own process. Writes benchmark.json,
benchmark.csv and benchmark.svg; docs/benchmark.md says how to read them. Needs neither torch nor a config. Without --onnx
nothing is measured: --compare then reads the new figures from --out.

example:
  bevqat calibrate --out runs/ptq.pth
  bevqat export-camera --ckpt runs/ptq.pth --fp32
  bevqat export-camera --ckpt runs/ptq.pth --flavour openvino
  bevqat benchmark --onnx runs/onnx_fp32 runs/onnx_int8_openvino --backends openvino --out runs/benchmark
  bevqat benchmark --onnx runs/onnx_int8_openvino --compare runs/benchmark/benchmark.json --out runs/after
  bevqat benchmark --compare runs/benchmark/benchmark.json --out runs/after
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qat.cli.engine_flags import (
    add_backends_flag,
    add_engine_flags,
    add_tensorrt_flags,
    backends_of,
    engine_options,
)
from qat.cli.flags import SPLIT_HELP, VERSION_HELP, add_out_flag, add_rounds_flags
from qat.cli.json_output import add_json_flag, emit_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument(
        "--onnx", type=Path, nargs="+", action="extend", default=[], metavar="DIR", help="exported parts, or engines"
    )
    add_backends_flag(parser, None, "openvino,onnxruntime, and those of engines given")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="nuScenes-format data (default: generated frames)")
    parser.add_argument("--version", metavar="NAME", help=VERSION_HELP)
    parser.add_argument("--split", metavar="NAME", help=f"{SPLIT_HELP} (default all)")
    parser.add_argument("--frames", type=int, default=4, metavar="N", help="frames, in turn (default 4)")
    add_rounds_flags(parser, 20, 3)
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep built engines there (default: rebuild each time)"
    )
    add_out_flag(parser, "DIR", Path("runs/benchmark"))
    add_json_flag(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write benchmark.csv there too")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="print changes since then that exceed the noise"
    )
    parser.add_argument(
        "--threshold", type=float, metavar="SHARE", help="with --compare: ignore smaller changes (default 0.03)"
    )
    add_engine_flags(parser)
    add_tensorrt_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints the tables, compares."""
    from qat.benchmark import plan
    from qat.benchmark.changes import THRESHOLD, load_results, print_changes
    from qat.benchmark.run import NAME, BenchmarkOptions, benchmark, csv_text
    from qat.benchmark.table import print_files, print_results
    from qat.cli import INTERRUPTED
    from qat.core.command import command_line
    from qat.core.errors import UserError
    from qat.core.files import write_text

    written = args.out / f"{NAME}.json"
    if args.data is None and (args.split or args.version):
        raise UserError("--split, --version: only apply with --data; add --data ROOT")
    if args.threshold is not None and args.compare is None:
        raise UserError("--threshold: only applies with --compare; add --compare OLD.json")
    if not args.onnx and args.compare is None:
        raise UserError("--onnx: found none, expected at least one folder that export-camera wrote, or --compare")
    old = None if args.compare is None else load_results(args.compare)
    if args.onnx:
        backends = None if args.backends is None else backends_of(args.backends)
        options = BenchmarkOptions(
            folders=args.onnx,
            out=args.out,
            backends=backends,
            data=args.data,
            split=args.split or "all",
            version=args.version,
            frames=args.frames,
            rounds=args.rounds,
            repeats=args.repeats,
            engine=engine_options(args, plan.asked_backends(args.onnx, backends), cache=args.cache),
            command=command_line(),
        )
        try:
            new = benchmark(options)
        except KeyboardInterrupt:
            kept = f"{written} is unchanged" if written.is_file() else f"{written} was not written"
            print(f"interrupted; {kept}", file=sys.stderr)
            return INTERRUPTED
        print_results(new)
        print_files(args.out, tuple(f"{NAME}.{suffix}" for suffix in ("json", "csv", "svg")))
    else:
        new = load_results(written)
    if args.csv:
        write_text(args.csv, csv_text(new))
        print(args.csv)
    if old is not None:
        print_changes(old, new, args.compare, THRESHOLD if args.threshold is None else args.threshold)
    emit_json(args, new)
    return 0
