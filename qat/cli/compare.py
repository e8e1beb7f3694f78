"""Run the whole detector over the evaluation keyframes with PyTorch and each backend × precision; write the report.

Accuracy is what the nuScenes devkit computes on all keyframes; latency is measured interleaved. An interrupted run
resumes. With --sensitivity the report shows which layers lose accuracy in INT8 and which stay float.

example:
  bevqat calibrate --out runs/tiny/ptq.pth
  bevqat sensitivity runs/tiny/ptq.pth --frames 4 --out runs/tiny
  bevqat export-camera --ckpt runs/tiny/ptq.pth
  bevqat export-camera --ckpt runs/tiny/ptq.pth --fp32
  bevqat compare --ptq runs/tiny/ptq.pth --onnx runs/tiny/onnx_fp32 runs/tiny/onnx_int8 --sensitivity runs/tiny/sensitivity.json --out runs/tiny
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.cli.engine_flags import (
    add_backends_flag,
    add_engine_flags,
    add_tensorrt_flags,
    backends_of,
    engine_options,
)
from qat.cli.flags import add_data_flags, add_out_flag, add_rounds_flags, add_rows_flags, rows_of
from qat.cli.json_output import add_json_flag, emit_json

if TYPE_CHECKING:
    from qat.compare import Comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    add_rows_flags(parser)
    add_backends_flag(parser, "openvino,onnxruntime")
    add_data_flags(parser, "eval", "evaluate on")
    add_rounds_flags(parser, 10, 3)
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="resamples of the scenes for the 95 %% intervals of mAP and NDS differences (default 1000, 0: none)",
    )
    parser.add_argument(
        "--sensitivity",
        type=Path,
        metavar="FILE",
        help="sensitivity.json of --ptq's checkpoint, to report its worst layers and what stays float",
    )
    add_out_flag(parser, "DIR", Path("runs/compare"))
    add_json_flag(parser)
    add_engine_flags(parser)
    add_tensorrt_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Compares, prints the table and the verdict."""
    from qat.compare import CompareOptions, compare, print_summary

    backends = backends_of(args.backends)
    comparison = compare(
        CompareOptions(
            sources=rows_of(args),
            data=args.data,
            version=args.version,
            split=args.split,
            frames=args.frames,
            out=args.out,
            backends=backends,
            rounds=args.rounds,
            repeats=args.repeats,
            resamples=args.resamples,
            engines=engine_options(args, backends),
            sensitivity=args.sensitivity,
        )
    )
    print_summary(comparison)
    emit_json(args, comparison_json(comparison))
    return 0


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """For --json: the verdict, the files' paths, and results.json without the report's pictures."""
    verdict = comparison.verdict
    results = {key: value for key, value in comparison.results.items() if key != "frames"}
    return {
        "verdict": {"headline": verdict.headline, "reasons": verdict.reasons, "ship": verdict.ship},
        "results": comparison.results_file,
        "report": comparison.report_file,
        **results,
    }
