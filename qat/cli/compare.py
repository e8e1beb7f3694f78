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
from qat.cli.flags import MODEL, add_config_flag, add_data_flags, add_ema_flag, add_out_flag, add_rounds_flags
from qat.cli.json_output import add_json_flag, emit_json
from qat.core.errors import UserError

if TYPE_CHECKING:
    from qat.compare import Comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    weights = MODEL / "camera-tiny.pth"
    parser.add_argument(
        "--ckpt", type=Path, default=weights, metavar="CKPT", help=f"float checkpoint (default {weights})"
    )
    add_config_flag(parser, when="default: the one inside or next to the checkpoint")
    add_ema_flag(parser)
    parser.add_argument("--ptq", type=Path, metavar="CKPT", help="calibrate's checkpoint, for the simulated INT8 row")
    parser.add_argument(
        "--onnx",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="exported parts, FP32 and INT8",
    )
    for name in ("fp32", "int8"):  # the spelling until 0.1
        parser.add_argument(f"--{name}", type=Path, action="append", default=[], help=argparse.SUPPRESS)
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
    from qat.compare import CompareOptions, Sources, compare, print_summary
    from qat.manifest import load_manifest

    backends = backends_of(args.backends)
    folders = {"fp32": list(args.fp32), "int8": list(args.int8)}
    for folder in args.onnx:
        precision = load_manifest(folder, check_files=False)["precision"]
        if precision not in folders:
            raise UserError(
                f"{folder}: found {precision} parts, expected fp32 or int8: use `bevqat benchmark` for fp16 on a GPU"
            )
        folders[precision].append(folder)
    comparison = compare(
        CompareOptions(
            sources=Sources(args.ckpt, args.ptq, folders["fp32"], folders["int8"], args.config, args.ema),
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
