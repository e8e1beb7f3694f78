"""Check exported parts against what PyTorch gave at their export, on any machine, without PyTorch.

Every part's file, opset and tensors, and its results on the frames that the export kept. By default each graph runs as it
is in its file, in ONNX Runtime; with --backend, as that backend builds it for use on this machine.
Exit status 1 when a part differs or was changed, 2 when nothing can be verified.

examples:
  bevqat verify runs/onnx_int8
  bevqat verify runs/onnx_int8 --part camera.backbone --backend openvino
  bevqat verify runs/onnx_int8 --json verified.json
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that export-camera wrote")
    parser.add_argument("--part", action="append", metavar="NAME", help="only this part; may be repeated")
    parser.add_argument(
        "--backend", choices=("onnxruntime", "openvino"), help="build the parts with it (default: the file as it is)"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default 0: one on each core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")


def run(args: argparse.Namespace) -> int:
    """Verifies and prints."""
    from qat.cli import FAILED, OK
    from qat.core.files import write_json
    from qat.engine import Options
    from qat.runtime.verify import print_verification, verify_folder

    found = verify_folder(args.folder, args.part, args.backend, Options(threads=args.threads))
    print_verification(found)
    if args.json:
        write_json(args.json, found)
        print(args.json)
    return OK if found["passed"] else FAILED
