"""Check exported parts against PyTorch's outputs at their export, on any machine, without PyTorch.

Checks every part's file, opset and tensors, and its results on the frames stored at the export. By default ONNX Runtime runs each
graph as it is in its file; with --backend, as that backend builds it for use on this machine.
Exit status 1 when a part differs or was changed, 2 when nothing can be verified.

example:
  bevqat calibrate --out runs/ptq.pth
  bevqat export-camera --ckpt runs/ptq.pth
  bevqat verify runs/onnx_int8
  bevqat verify runs/onnx_int8 --parts fuser --backend openvino
  bevqat verify runs/onnx_int8 --json runs/verified.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.cli.engine_flags import add_threads_flag
from qat.cli.json_output import add_json_flag, emit_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="a folder that export-camera wrote")
    either.add_argument("--onnx", type=Path, metavar="DIR", help="same as the positional argument")
    parser.add_argument("--parts", nargs="+", action="extend", metavar="PART", help="only these parts, such as fuser")
    parser.add_argument("--part", dest="parts", action="append", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--backend",
        choices=("onnxruntime", "openvino"),
        help="verify the parts as this backend builds them (default: the file itself, in ONNX Runtime)",
    )
    add_threads_flag(parser)
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Verifies and prints."""
    from qat.cli import FAILED, OK
    from qat.core.progress import progress_bar
    from qat.engine import Options
    from qat.manifest import load_manifest
    from qat.runtime.verify import print_verification, verify_folder

    folder, options = args.folder or args.onnx, Options(threads=args.threads)
    parts = args.parts or load_manifest(folder, check_files=False)["parts"]
    with progress_bar("verify", len(parts)) as done:
        found = verify_folder(folder, args.parts, args.backend, options, done)
    print_verification(found)
    emit_json(args, found)
    return OK if found["passed"] else FAILED
