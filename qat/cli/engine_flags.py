"""Flags of the verbs that build and run engines: fields of `qat.engine.Options`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from qat.core.errors import UserError
from qat.engine import BACKENDS, PRECISIONS, Options, TensorRtOptions, takes_bfloat16
from qat.engine.tensorrt_options import TACTIC_SOURCES, Profile

FLAGS = {"fp16": "--no-fp16", "profiles": "--profile"}  # flags whose names differ from the fields' names


def add_threads_flag(parser: argparse._ActionsContainer) -> None:
    """Adds --threads."""
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default 0: one on each core)")


def add_backends_flag(parser: argparse.ArgumentParser, default: str | None, when: str = "") -> None:
    """Adds --backends; `backends_of` reads it. when: text for the help if there is no default."""
    parser.add_argument(
        "--backends",
        default=default,
        metavar="NAMES",
        help=f"comma-separated, of {', '.join(BACKENDS)} (default {when or default})",
    )


def backends_of(text: str) -> list[str]:
    """The names in --backends."""
    return [name for name in (word.strip() for word in text.split(",")) if name]


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --threads, --pinning, --no-spinning and --bfloat16, fields of `qat.engine.Options`."""
    group = parser.add_argument_group("on the CPU")
    add_threads_flag(group)
    group.add_argument(
        "--pinning", action="store_true", help="pin each thread to a core: for a process that has the cores to itself"
    )
    group.add_argument(
        "--no-spinning", dest="spinning", action="store_false", help="threads sleep while they wait (onnxruntime)"
    )
    group.add_argument(
        "--bfloat16",
        action="store_true",
        help="run float layers of INT8 parts in bfloat16 (openvino, CPUs that have it)",
    )


def add_tensorrt_flags(parser: argparse.ArgumentParser) -> None:
    """Adds fields of `qat.engine.TensorRtOptions`; a flag that is not given is None."""
    group = parser.add_argument_group("with --backend tensorrt", "see docs/tensorrt.md")
    group.add_argument("--timing-cache", type=Path, metavar="FILE", help="file of measured tactics, read and updated")
    group.add_argument("--workspace", type=int, metavar="MIB", help="scratch memory of a layer (default: the GPU's)")
    group.add_argument("--tf32", action="store_true", default=None, help="FP32 layers may round to TF32: faster")
    group.add_argument("--no-fp16", dest="fp16", action="store_false", default=None, help="INT8 and FP32 only")
    group.add_argument("--tactic-sources", nargs="+", metavar="NAME", help=f"of {', '.join(TACTIC_SOURCES)}")
    group.add_argument(
        "--profile",
        dest="profiles",
        action="append",
        metavar="NAME=MIN:OPT:MAX",
        help="shapes of an input with dynamic axes, such as img=1x6x3x256x704:1x6x3x256x704:4x6x3x256x704; repeatable",
    )
    group.add_argument(
        "--version-compatible", action="store_true", default=None, help="a plan that later versions load (≥ 8.6)"
    )
    group.add_argument("--plugins", nargs="+", type=Path, metavar="FILE", help="libraries of plugins")
    group.add_argument("--input-formats", nargs="+", metavar="TYPE:LAYOUT", help="as trtexec's, such as fp16:chw")
    group.add_argument("--output-formats", nargs="+", metavar="TYPE:LAYOUT", help="as trtexec's, such as fp16:chw")
    group.add_argument("--optimization-level", type=int, metavar="0..5", help="how long TensorRT searches (≥ 8.6)")


def tensorrt_options(args: argparse.Namespace, backends: Sequence[str]) -> TensorRtOptions:
    """The options from the flags of `add_tensorrt_flags`.

    Raises:
        UserError: a flag is out of range, or was given for another backend.
    """
    given: dict[str, Any] = {field.name: getattr(args, field.name, None) for field in fields(TensorRtOptions)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    given = {name: value for name, value in given.items() if value is not None}
    if given and "tensorrt" not in backends:
        flags = ", ".join(FLAGS.get(name, f"--{name.replace('_', '-')}") for name in given)
        raise UserError(f"backend: found {', '.join(backends)}, expected tensorrt for {flags}")
    if "workspace" in given:
        given["workspace"] *= 2**20
    if "profiles" in given:
        given["profiles"] = tuple(Profile.parse(text) for text in given["profiles"])
    return TensorRtOptions(**given)


def engine_options(args: argparse.Namespace, backends: Sequence[str], **more: Any) -> Options:
    """The options from the flags. more: fields without a flag.

    Raises:
        UserError: a flag is out of range, or applies to none of the backends.
    """
    if args.bfloat16 and not any(
        takes_bfloat16(backend, precision) for backend in backends for precision in PRECISIONS
    ):
        raise UserError(f"backend: found {', '.join(backends)}, expected openvino for --bfloat16")
    return Options(
        threads=args.threads,
        pinning=args.pinning,
        spinning=args.spinning,
        bfloat16=args.bfloat16,
        tensorrt=tensorrt_options(args, backends),
        **more,
    )
