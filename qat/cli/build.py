"""Build every part of an exported folder into engines for this machine.

The folder that it writes has one built file for each part and a manifest.json; `qat.runtime.Pipeline.load(folder)` runs it
without the ONNX graphs. Built files are for the version of the backend and the processor or GPU that built them.

examples:
  bevqat build --onnx runs/onnx_int8_openvino --backend openvino      into runs/engines_int8_openvino
  bevqat build --onnx runs/onnx_int8_onnxruntime --backend onnxruntime --threads 4 --pinning --out robot/engines
  bevqat build --onnx runs/onnx_fp16 --backend onnxruntime-tensorrt
  bevqat build --onnx runs/onnx_int8 --backend tensorrt --timing-cache runs/timing.cache --workspace 1024
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from qat.core.errors import UserError
from qat.engine import BACKENDS, PRECISIONS, Options, TensorRtOptions
from qat.engine.tensorrt_options import TACTIC_SOURCES, Profile

FLAGS = {"tf32": "--no-tf32", "fp16": "--no-fp16", "profiles": "--profile"}  # where they are not the fields' names


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


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """--threads, --pinning and --no-spinning: fields of `qat.engine.Options`, by their names."""
    group = parser.add_argument_group("on the CPU", "noted in the manifest, for whoever loads the engines")
    group.add_argument("--threads", type=int, default=0, metavar="N", help="threads (default 0: one on each core)")
    group.add_argument(
        "--pinning", action="store_true", help="each thread stays on its core: for a process that has them to itself"
    )
    group.add_argument(
        "--no-spinning", dest="spinning", action="store_false", help="threads sleep while they wait (onnxruntime)"
    )


def add_tensorrt_flags(parser: argparse.ArgumentParser) -> None:
    """Fields of `qat.engine.TensorRtOptions`; None where a flag is not given."""
    group = parser.add_argument_group("with --backend tensorrt", "docs/tensorrt.md says what each does")
    group.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="tactics' times, read before and written after"
    )
    group.add_argument("--workspace", type=int, metavar="MIB", help="scratch memory of a layer (default: the GPU's)")
    group.add_argument("--no-tf32", dest="tf32", action="store_false", default=None, help="FP32 layers in full FP32")
    group.add_argument("--no-fp16", dest="fp16", action="store_false", default=None, help="INT8 beside FP32 alone")
    group.add_argument("--tactic-sources", nargs="+", metavar="NAME", help=f"of {', '.join(TACTIC_SOURCES)}")
    group.add_argument(
        "--profile",
        dest="profiles",
        action="append",
        metavar="NAME=MIN:OPT:MAX",
        help="shapes of an input with dynamic axes, such as img=1x6x3x256x704:1x6x3x256x704:4x6x3x256x704; repeatable",
    )
    group.add_argument("--version-compatible", action="store_true", default=None, help="for later versions too (≥ 8.6)")
    group.add_argument("--plugins", nargs="+", type=Path, metavar="FILE", help="libraries of plugins")
    group.add_argument("--input-formats", nargs="+", metavar="TYPE:LAYOUT", help="as trtexec's, such as fp16:chw")
    group.add_argument("--output-formats", nargs="+", metavar="TYPE:LAYOUT", help="as trtexec's, such as fp16:chw")
    group.add_argument("--optimization-level", type=int, metavar="0..5", help="how long TensorRT searches (≥ 8.6)")


def tensorrt_options(args: argparse.Namespace) -> TensorRtOptions:
    """The options that `add_tensorrt_flags`' flags say.

    Raises:
        UserError: a flag is out of range, or was given for another backend.
    """
    given: dict[str, Any] = {field.name: getattr(args, field.name, None) for field in fields(TensorRtOptions)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    given = {name: value for name, value in given.items() if value is not None}
    if given and args.backend != "tensorrt":
        flags = ", ".join(FLAGS.get(name, f"--{name.replace('_', '-')}") for name in given)
        raise UserError(f"--backend: found {args.backend}, expected tensorrt for {flags}")
    if "workspace" in given:
        given["workspace"] *= 2**20
    if "profiles" in given:
        given["profiles"] = tuple(Profile.parse(text) for text in given["profiles"])
    return TensorRtOptions(**given)


def engine_options(args: argparse.Namespace) -> Options:
    """The options that the flags say. Raises `UserError` as `tensorrt_options`."""
    return Options(threads=args.threads, pinning=args.pinning, spinning=args.spinning, tensorrt=tensorrt_options(args))


def run(args: argparse.Namespace) -> int:
    """Builds and prints what was written."""
    from qat.cli import OK
    from qat.runtime import build_engines

    def say(part: str) -> None:
        print(f"build {part}", file=sys.stderr, flush=True)

    folder, manifest = build_engines(
        args.onnx, args.backend, args.precision, args.out, engine_options(args), progress=say
    )
    for part in manifest["parts"].values():
        print(f"{folder / part['file']}: {part['built_for']}, {part['bytes'] / 1e6:.1f} MB")
    engine = manifest["engine"]
    print(f"{folder}: for {engine['backend']} {engine['version']} on {engine['device']}")
    return OK
