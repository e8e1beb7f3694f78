"""Build every part of an exported folder into engines for this machine.

The folder has one built file for each part and a manifest.json; `qat.runtime.Pipeline.load(folder)` runs it
without the ONNX graphs. Built files are for the version of the backend and the processor or GPU that built them.

example:
  bevqat calibrate --out runs/ptq.pth
  bevqat export-camera --ckpt runs/ptq.pth --flavour openvino
  bevqat build --onnx runs/onnx_int8_openvino --backend openvino          # into runs/engines_int8_openvino
  bevqat build --onnx runs/onnx_int8_openvino --backend openvino --threads 2 --pinning --out runs/robot

On a machine with an NVIDIA GPU:
  bevqat export-camera --ckpt runs/ptq.pth --fp16
  bevqat export-camera --ckpt runs/ptq.pth
  bevqat build --onnx runs/onnx_fp16 --backend onnxruntime-tensorrt
  bevqat build --onnx runs/onnx_int8 --backend tensorrt --timing-cache runs/timing.cache --workspace 1024
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.cli.engine_flags import add_engine_flags, add_tensorrt_flags, engine_options
from qat.cli.flags import add_out_flag
from qat.cli.json_output import add_json_flag, emit_json
from qat.engine import BACKENDS, PRECISIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument(
        "--onnx", type=Path, required=True, metavar="DIR", help="a folder that export-camera wrote: all parts"
    )
    parser.add_argument("--backend", required=True, choices=tuple(BACKENDS), help="backend that builds and runs them")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="default: the folder's; an fp16 folder can be built as fp32 too"
    )
    add_out_flag(parser, "DIR", "engines_PRECISION_BACKEND next to --onnx")
    add_engine_flags(parser)
    add_tensorrt_flags(parser)
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Builds and prints what was written."""
    from qat.cli import OK
    from qat.core.progress import progress_bar
    from qat.manifest import load_manifest
    from qat.runtime import build_engines

    options = engine_options(args, [args.backend])
    parts = load_manifest(args.onnx, check_files=False)["parts"]
    # TensorRT reports the progress of each part.
    with progress_bar("build", len(parts), show=args.backend != "tensorrt") as done:
        begun = list(parts)
        folder, manifest = build_engines(
            args.onnx, args.backend, args.precision, args.out, options, lambda part: done(begun.index(part), part)
        )
    for part in manifest["parts"].values():
        print(f"{folder / part['file']}: {part['built_for']}, {part['bytes'] / 1e6:.1f} MB")
    engine = manifest["engine"]
    print(f"{folder}: for {engine['backend']} {engine['version']} on {engine['device']}")
    emit_json(args, {"out": folder, "manifest": manifest})
    return OK
