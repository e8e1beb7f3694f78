"""Write a checkpoint's ONNX parts (opset 13, simplified, verified) with manifest.json.

examples:
  bevqat export-camera --ckpt runs/ptq.pth              INT8 (QDQ) into runs/onnx_int8
  bevqat export-camera --ckpt runs/ptq.pth --flavour onnxruntime      INT8 into runs/onnx_int8_onnxruntime
  bevqat export-camera --ckpt runs/ptq.pth --fp16       for a builder's FP16 flag, into runs/onnx_fp16
  bevqat export-camera --ckpt model/camera-tiny/camera-tiny.pth    a float checkpoint: FP32 into onnx_fp32
  bevqat export-camera --ckpt runs/ptq.pth --parts camera.backbone camera.vtransform --parts-int8 vtransform

Each part is verified against PyTorch on a random frame and on real ones, example-data's unless --data names others.
Exit status 1 when a part's ONNX and PyTorch differ by more than the tolerance; the files are written all the same.
"""

from __future__ import annotations

import argparse
import sys

from qat.cli import FAILED, OK
from qat.cli.flags import add_verification_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("--ckpt", required=True, metavar="CKPT", help="a checkpoint of calibrate, or a float one")
    precision = parser.add_mutually_exclusive_group()
    for name, what in (
        ("int8", "QDQ at the calibrated scales (default of a PTQ checkpoint)"),
        ("fp16", "no QDQ; FP16 by the engine builder's flag"),
        ("fp32", "no QDQ (default of a float checkpoint)"),
    ):
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name, help=what)
    parser.add_argument(
        "--flavour",
        choices=("tensorrt", "onnxruntime"),
        default="tensorrt",
        help="form of the INT8 graph: tensorrt (default; TensorRT and OpenVINO) or onnxruntime (its CPU's fusions)",
    )
    parser.add_argument("--opset", type=int, default=13, metavar="N", help="ONNX operator set, 13 (default) to 20")
    batch = parser.add_argument_group("batch")
    batch.add_argument(
        "--batch", type=int, default=1, metavar="N", help="samples, of all cameras, in an input (default 1)"
    )
    batch.add_argument("--dynamic-batch", action="store_true", help="any number of samples in an input")
    chosen = parser.add_argument_group("parts")
    chosen.add_argument("--parts", nargs="+", metavar="PART", help="write these alone, such as camera.backbone")
    chosen.add_argument(
        "--parts-int8",
        nargs="+",
        default=[],
        metavar="PART",
        help="quantize a part that stays float by itself: vtransform",
    )
    parser.add_argument(
        "--reduce-range",
        action="store_true",
        help="weights to seven bits, for CPUs without VNNI (flavour onnxruntime): their u8·s8 sums saturate",
    )
    parser.add_argument("--config", metavar="YAML", help="config of a float checkpoint that carries none")
    parser.add_argument(
        "--prefix",
        metavar="NAME",
        help="of a float checkpoint, export the camera branch alone, which lies under NAME: encoders.camera in a whole "
        "camera+lidar model, '' in a state dict of the branch by itself",
    )
    add_verification_flags(parser)
    parser.add_argument("--out", metavar="DIR", help="folder to write (default onnx_PRECISION beside the checkpoint)")


def run(args: argparse.Namespace) -> int:
    """Exports, then prints what was written and how close it is to PyTorch."""
    from qat.cli.flags import verification_frames
    from qat.export.bisect import describe
    from qat.export.checkpoint import export_checkpoint

    frames = verification_frames(args)
    folder, manifest = export_checkpoint(
        args.ckpt,
        args.precision,
        args.out,
        args.config,
        args.flavour,
        prefix=args.prefix,
        frames=frames,
        opset=args.opset,
        batch=args.batch,
        dynamic_batch=args.dynamic_batch,
        only=args.parts,
        parts_int8=args.parts_int8,
        reduce_range=args.reduce_range,
    )
    for part in manifest["parts"].values():
        size = (folder / part["file"]).stat().st_size / 1e6
        worst = min(part["verification"].items(), key=lambda item: item[1]["sqnr_db"] - item[1]["tolerance_db"])
        name, figures = worst
        print(
            f"{folder / part['file']}: {part['precision']}, {size:.1f} MB; beside PyTorch {name} has "
            f"{figures['sqnr_db']:.0f} dB SQNR ({figures['tolerance_db']:.0f} dB or more expected)"
        )
    if manifest["verification"]["passed"]:
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
                print(
                    f"error: {folder / part['file']}: {name}: found {figures['sqnr_db']:.1f} dB SQNR against PyTorch, "
                    f"expected {figures['tolerance_db']:.1f} dB or more",
                    file=sys.stderr,
                )
        for layer in part.get("divergence", ()):
            print(f"error: {folder / part['file']}: {describe(layer)}", file=sys.stderr)
    return FAILED
