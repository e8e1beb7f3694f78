"""Build every part of an exported folder into engines for this machine.

The folder that it writes has one built file for each part and a manifest.json; `qat.runtime.Pipeline.load(folder)` runs it
without the ONNX graphs. Built files are for the version of the backend and the processor or GPU that built them.

examples:
  bevqat build --onnx runs/onnx_int8_openvino --backend openvino      # into runs/engines_int8_openvino
  bevqat build --onnx runs/onnx_int8_onnxruntime --backend onnxruntime --threads 2 --pinning --out robot/engines
  bevqat build --onnx runs/onnx_fp16 --backend onnxruntime-tensorrt
  bevqat build --onnx runs/onnx_int8 --backend tensorrt --timing-cache runs/timing.cache --workspace 1024
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qat.cli.engine_flags import add_engine_flags, add_tensorrt_flags, engine_options
from qat.engine import BACKENDS, PRECISIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument(
        "--onnx", type=Path, required=True, metavar="DIR", help="a folder that export-camera wrote: all parts"
    )
    parser.add_argument("--backend", required=True, choices=tuple(BACKENDS), help="what builds and runs them")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="default: the folder's; an fp16 folder's graphs take fp32 too"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (default engines_PRECISION_BACKEND beside --onnx)"
    )
    add_engine_flags(parser)
    add_tensorrt_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Builds and prints what was written."""
    from qat.cli import OK
    from qat.runtime import build_engines

    def say(part: str) -> None:
        print(f"build {part}", file=sys.stderr, flush=True)

    folder, manifest = build_engines(
        args.onnx, args.backend, args.precision, args.out, engine_options(args, [args.backend]), progress=say
    )
    for part in manifest["parts"].values():
        print(f"{folder / part['file']}: {part['built_for']}, {part['bytes'] / 1e6:.1f} MB")
    engine = manifest["engine"]
    print(f"{folder}: for {engine['backend']} {engine['version']} on {engine['device']}")
    return OK
