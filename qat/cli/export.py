"""Write a checkpoint's parts (ONNX opset 13, simplified, verified) with manifest.json.

example:
  bevqat calibrate --out runs/ptq.pth
  bevqat export --ckpt runs/ptq.pth                                # INT8 (QDQ) into runs/onnx_int8
  bevqat export --ckpt runs/ptq.pth --flavour onnxruntime          # INT8 into runs/onnx_int8_onnxruntime
  bevqat export --ckpt runs/ptq.pth --fp16                         # for a builder's FP16 flag, into runs/onnx_fp16
  bevqat export --ckpt runs/ptq.pth --flavour tensorrt-strong      # for TensorRT 10 and 11
  bevqat export --ckpt runs/ptq.pth --parts fuser head.bbox --out runs/two_parts

A float checkpoint, and random weights to measure latency with:
  bevqat export --ckpt model/camera-tiny/camera-tiny.pth --out runs/onnx_fp32
  bevqat export --config model/resnet50/config.yaml --init random --fp16     # into runs/resnet50/onnx_fp16

Each part is verified against PyTorch on a generated frame and on real frames, by default from example-data (--data).
Exit status 1 if a part and PyTorch differ by more than the tolerance; the files are written anyway.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from qat.cli import FAILED, OK
from qat.cli.flags import (
    add_config_flag,
    add_ema_flag,
    add_init_flags,
    add_out_flag,
    add_prefix_flag,
    add_verification_flags,
    init_seed,
)
from qat.cli.json_output import add_json_flag, emit_json

if TYPE_CHECKING:
    from qat.export.options import ExportOptions
    from qat.model.opening import Source

SHOWN = 5  # diverging layers shown for a part


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--ckpt",
        type=Path,
        metavar="CKPT",
        help="a checkpoint of calibrate, a float one, or one that another tool quantized",
    )
    add_init_flags(parser, source)
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--precision", choices=("fp32", "fp16", "int8"), help="default: int8 for a PTQ checkpoint, fp32 for a float one"
    )
    for name, what in (
        ("int8", "--precision int8: QDQ at the calibrated scales"),
        ("fp16", "--precision fp16: no QDQ; FP16 by the engine builder's flag"),
        ("fp32", "--precision fp32: no QDQ"),
    ):
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name, help=what)
    parser.add_argument(
        "--flavour",
        choices=("tensorrt", "tensorrt-strong", "onnxruntime", "openvino"),
        default="tensorrt",
        help="form of the graph: tensorrt (default; 8.5 to 10), tensorrt-strong (precision in its types: 10, 11), "
        "onnxruntime or openvino (INT8 as these fuse it on a CPU)",
    )
    parser.add_argument(
        "--format",
        type=_format,
        choices=("onnx", "pt2"),
        default="onnx",
        help="of the parts: onnx (default) graphs; pt2: torch.export programs",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX operator set, 13 (default) to 20")
    batch = parser.add_argument_group("batch")
    batch.add_argument(
        "--batch", type=int, default=1, metavar="N", help="samples, of all cameras, in an input (default 1)"
    )
    batch.add_argument("--dynamic-batch", action="store_true", help="any number of samples in an input")
    chosen = parser.add_argument_group("parts")
    chosen.add_argument("--parts", nargs="+", action="extend", metavar="PART", help="only these parts, such as fuser")
    chosen.add_argument(
        "--parts-int8",
        nargs="+",
        default=[],
        metavar="PART",
        help="also quantize a part that is float by default; `bevqat inspect` names them",
    )
    parser.add_argument(
        "--reduce-range",
        action="store_true",
        help="seven-bit weights, for CPUs without VNNI (onnxruntime, openvino): their u8·s8 sums saturate",
    )
    parser.add_argument(
        "--io", choices=("fp32", "fp16"), default="fp32", help="type of inputs and outputs (tensorrt-strong)"
    )
    parser.add_argument(
        "--layout", choices=("autoware",), help="form that another runtime loads: autoware (CenterPoint over pillars)"
    )
    add_config_flag(parser, when="default: the one inside or next to a float checkpoint; a PTQ checkpoint has its own")
    add_prefix_flag(parser)
    add_ema_flag(parser)
    add_verification_flags(parser)
    add_out_flag(parser, "DIR", "onnx_PRECISION[_FLAVOUR] next to the checkpoint")
    add_json_flag(parser)


def _format(word: str) -> str:
    if word == "onnx-e2e":
        raise argparse.ArgumentTypeError(
            "onnx-e2e was removed; omit --format to export the parts, run them with qat.runtime.Pipeline and time the "
            "whole detector with `bevqat benchmark`"
        )
    return word


def run(args: argparse.Namespace) -> int:
    """Exports, then prints the files and how close they are to PyTorch."""
    from qat.cli.flags import verification_frames
    from qat.core.verification import what_is_wrong
    from qat.export.bisect import describe
    from qat.export.checkpoint import export_checkpoint
    from qat.export.options import ExportOptions
    from qat.model.opening import Source

    source = Source(args.ckpt, args.config, args.prefix, args.ema, init_seed(args))
    options = ExportOptions(
        args.precision,
        args.flavour,
        args.opset,
        args.batch,
        args.dynamic_batch,
        args.parts,
        args.parts_int8,
        args.reduce_range,
        args.io,
        args.layout,
    )
    if args.format == "pt2":
        return _programs(args, source, options)
    folder, manifest = export_checkpoint(source, options, args.out, verification_frames(args))
    for part in manifest["parts"].values():
        size = (folder / part["file"]).stat().st_size / 1e6
        worst = min(part["verification"].items(), key=lambda item: item[1]["sqnr_db"] - item[1]["tolerance_db"])
        name, figures = worst
        print(
            f"{folder / part['file']}: {part['precision']}, {size:.1f} MB; against PyTorch {name} has "
            f"{figures['sqnr_db']:.0f} dB SQNR ({figures['tolerance_db']:.0f} dB or more expected)"
        )
        if (typed := part.get("types")) and "fp32" in typed:
            reasons = Counter(node["reason"] for node in typed["fp32"])
            kept = "; ".join(f"{count} in FP32: {reason}" for reason, count in sorted(reasons.items()))
            print(f"  {typed['fp16']} of {typed['nodes']} operators in FP16" + (f"; {kept}" if kept else ""))
    passed = manifest["verification"]["passed"]
    emit_json(args, {"out": folder, "passed": passed, "manifest": manifest})
    if passed:
        return OK
    for part in manifest["parts"].values():
        if not part["scales"]["passed"]:
            print(
                f"error: {folder / part['file']}: found {part['scales']['unknown']} scales that no quantizer has and "
                f"{part['scales']['missing']} quantizers' scales missing, expected 0 of both",
                file=sys.stderr,
            )
        for name, figures in part["verification"].items():
            if not figures["passed"]:
                print(f"error: {folder / part['file']}: {name}: {what_is_wrong(figures)}", file=sys.stderr)
        for problem in part.get("sites", {}).get("problems", ()):
            print(f"error: {folder / part['file']}: {problem}", file=sys.stderr)
        for layer in part.get("divergence", ())[:SHOWN]:
            print(f"error: {folder / part['file']}: {describe(layer)}", file=sys.stderr)
    return FAILED


def _programs(args: argparse.Namespace, source: Source, options: ExportOptions) -> int:
    """Writes torch.export programs, and prints whether the reloaded programs compute the same."""
    from qat.export.checkpoint import export_programs
    from qat.export.options import only_for_graphs

    for name in ("data", "version", "split", "frames"):
        if getattr(args, name) is not None:
            raise only_for_graphs(f"--{name}")
    folder, manifest = export_programs(source, options, args.out)
    for part in manifest["parts"].values():
        file = folder / part["file"]
        print(f"{file}: {manifest['precision']}, {file.stat().st_size / 1e6:.1f} MB")
    passed = manifest["verification"]["passed"]
    emit_json(args, {"out": folder, "passed": passed, "manifest": manifest})
    if passed:
        print("each file, loaded again, equals its module bit for bit")
        return OK
    print(f"error: {folder}: a reloaded program differs from its module: {manifest['verification']}", file=sys.stderr)
    return FAILED
