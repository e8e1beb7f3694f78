"""Run the whole detector over the evaluation keyframes with PyTorch and each backend × precision; write the report.

Accuracy is what the nuScenes devkit computes on all keyframes; latency is measured interleaved. An interrupted run
goes on where it was. With --sensitivity the report tells which layers pay for INT8 and what stays float.

example:
  bevqat calibrate --out runs/tiny/ptq.pth
  bevqat sensitivity runs/tiny/ptq.pth --frames 4 --out runs/tiny
  bevqat export-camera --ckpt runs/tiny/ptq.pth
  bevqat export-camera --ckpt runs/tiny/ptq.pth --fp32
  bevqat compare --ptq runs/tiny/ptq.pth --fp32 runs/tiny/onnx_fp32 --int8 runs/tiny/onnx_int8 --sensitivity runs/tiny/sensitivity.json --out runs/tiny
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.cli.engine_flags import add_engine_flags, add_tensorrt_flags, engine_options
from qat.cli.flags import add_data_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("--ckpt", type=Path, default=Path("model/camera-tiny/camera-tiny.pth"), help="float checkpoint")
    parser.add_argument("--config", type=Path, metavar="YAML", help="config of a float checkpoint that carries none")
    parser.add_argument("--ptq", type=Path, metavar="CKPT", help="calibrate's checkpoint, for the simulated INT8 row")
    parser.add_argument("--fp32", type=Path, action="append", default=[], metavar="DIR", help="exported FP32 parts")
    parser.add_argument(
        "--int8", type=Path, action="append", default=[], metavar="DIR", help="INT8 parts; may be given again"
    )
    parser.add_argument(
        "--backends", default="openvino,onnxruntime", metavar="NAMES", help="default openvino,onnxruntime"
    )
    add_data_flags(parser, "eval", "evaluate on")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="latency rounds (default 10)")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="counted runs of a row in a round (default 3)"
    )
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
        help="what `bevqat sensitivity` wrote of --ptq's checkpoint (sensitivity.json): worst layers, what stays float",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="DIR")
    add_engine_flags(parser)
    add_tensorrt_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Compares, prints the table and the verdict."""
    from qat.compare import CompareOptions, Sources, compare, print_summary

    backends = [name for name in args.backends.split(",") if name]
    comparison = compare(
        CompareOptions(
            sources=Sources(args.ckpt, args.ptq, args.fp32, args.int8, args.config),
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
    return 0
