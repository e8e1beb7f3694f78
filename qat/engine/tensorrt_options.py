"""TensorRT's options for building and running a plan. Needs no TensorRT: options are checked where they are written."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qat.core.errors import UserError
from qat.core.files import sha256

# As `trtexec --inputIOFormats` spells them, with the member of tensorrt.TensorFormat.
FORMATS = {
    "chw": "LINEAR",
    "chw2": "CHW2",
    "chw4": "CHW4",
    "chw16": "CHW16",
    "chw32": "CHW32",
    "hwc": "HWC",
    "hwc8": "HWC8",
    "hwc16": "HWC16",
    "dla_linear": "DLA_LINEAR",
    "dla_hwc4": "DLA_HWC4",
}
TYPES = {"fp32": "FLOAT", "fp16": "HALF", "int8": "INT8", "int32": "INT32"}
TACTIC_SOURCES = ("CUBLAS", "CUBLAS_LT", "CUDNN", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
LEVELS = range(6)


@dataclass(frozen=True)
class Profile:
    """The shapes that an input with dynamic axes may take: TensorRT tunes for `opt`.

    input: tensor name. min, opt, max: whole shapes, in elements.
    """

    input: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __post_init__(self) -> None:
        shapes = [tuple(int(n) for n in shape) for shape in (self.min, self.opt, self.max)]
        for name, shape in zip(("min", "opt", "max"), shapes, strict=True):
            object.__setattr__(self, name, shape)  # lists, as JSON has them, become tuples
        ordered = len({len(shape) for shape in shapes}) == 1 and all(
            1 <= low <= middle <= high for low, middle, high in zip(*shapes, strict=True)
        )
        if not ordered:
            found = ":".join("x".join(map(str, shape)) for shape in shapes)
            raise UserError(
                f"profile of {self.input}: found {found}, expected three shapes of one rank, 1 ≤ min ≤ opt ≤ max"
            )

    @classmethod
    def parse(cls, text: str) -> Profile:
        """Reads "img=1x6x3x256x704:1x6x3x256x704:4x6x3x256x704", or one shape for all three.

        Raises:
            UserError: not of that form.
        """
        name, equals, rest = text.rpartition("=")
        shapes = [re.fullmatch(r"\d+(x\d+)*", shape) for shape in rest.split(":")]
        if not (equals and name and len(shapes) in (1, 3) and all(shapes)):
            raise UserError(
                f"profile: found {text!r}, expected NAME=MIN:OPT:MAX such as img=1x3x64x64:2x3x64x64:4x3x64x64"
            )
        parsed = [tuple(int(n) for n in shape.split("x")) for shape in rest.split(":")]
        return cls(name, *(parsed * 3 if len(parsed) == 1 else parsed))


@dataclass(frozen=True)
class TensorRtOptions:
    """How TensorRT builds a plan and runs it.

    fp16: layers without Q/DQ in an INT8 plan may use FP16 (precision "int8"; "fp16" always does, "fp32" never).
        Has no effect on a strongly typed network, whose graph fixes the types.
    tf32: FP32 layers may round their inputs to TF32's ten bits of mantissa. Off, unlike TensorRT's default, so that FP32 means
        FP32 in every backend.
    workspace: bytes that a layer's scratch memory may take; None for TensorRT's own limit (the device's memory).
    timing_cache: file of measured tactics, read before a build and written after it; builds on one GPU and version share it.
    tactic_sources: libraries and kinds of kernels to choose from, of `TACTIC_SOURCES`; None for TensorRT's own choice.
    profiles: one for each input with dynamic axes.
    version_compatible: a plan that later versions of TensorRT load too (8.6 and later; slower, larger).
    plugins: shared libraries of plugins that the graph uses.
    input_formats, output_formats: type and layout of inputs and outputs in the graph's order, as trtexec takes them, such
        as ("fp16:chw",) (one for all); empty: as the graph has them.
    cuda_graph: replay a captured CUDA graph instead of enqueuing layer by layer. Does not enter the plan.
    optimization_level: 0 (build fast) to 5 (search longest), from 8.6 on; None for TensorRT's default.

    Raises:
        UserError: a value outside what is listed here, or a plugin that is not a file.
    """

    fp16: bool = True
    tf32: bool = False
    workspace: int | None = None
    timing_cache: Path | None = None
    tactic_sources: tuple[str, ...] | None = None
    profiles: tuple[Profile, ...] = ()
    version_compatible: bool = False
    plugins: tuple[Path, ...] = ()
    input_formats: tuple[str, ...] = ()
    output_formats: tuple[str, ...] = ()
    cuda_graph: bool = True
    optimization_level: int | None = None

    def __post_init__(self) -> None:
        if self.workspace is not None and self.workspace < 1:
            raise UserError(f"workspace: found {self.workspace}, expected bytes, 1 or more; omit it for no limit")
        for source in self.tactic_sources or ():
            if source not in TACTIC_SOURCES:
                raise UserError(f"tactic source: found {source!r}, expected one of {', '.join(TACTIC_SOURCES)}")
        if self.optimization_level is not None and self.optimization_level not in LEVELS:
            raise UserError(
                f"optimization level: found {self.optimization_level}, expected {LEVELS[0]} to {LEVELS[-1]}"
            )
        names = [profile.input for profile in self.profiles]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"profile of {twice}: found twice, expected one for each input")
        for text in (*self.input_formats, *self.output_formats):
            split_format(text)
        for plugin in self.plugins:
            if not Path(plugin).is_file():
                raise UserError(f"{plugin}: no such file, expected a library of TensorRT plugins")
        if self.timing_cache is not None and Path(self.timing_cache).is_dir():
            raise UserError(f"{self.timing_cache}: found a folder, expected the name of a timing cache file")

    def described(self) -> dict[str, Any]:
        """The options that the plan depends on, as JSON values: all except how it is run and where timings are kept."""
        values = asdict(self)
        del values["timing_cache"], values["cuda_graph"]
        values["plugins"] = [f"{Path(plugin).name} {sha256(plugin)}" for plugin in self.plugins]
        return values


def split_format(text: str) -> tuple[str, str]:
    """ "fp16:chw" → the members of tensorrt.DataType and tensorrt.TensorFormat, "HALF" and "LINEAR".

    Raises:
        UserError: another type or layout.
    """
    kind, colon, layout = text.partition(":")
    if not colon or kind not in TYPES or layout not in FORMATS:
        raise UserError(
            f"format: found {text!r}, expected TYPE:LAYOUT with a type of {', '.join(TYPES)} and a layout of {', '.join(FORMATS)}"
        )
    return TYPES[kind], FORMATS[layout]


def spread_formats(formats: tuple[str, ...], names: list[str], what: str) -> dict[str, str]:
    """Each tensor's format: a single one for all, or one for each in order. what: "input" or "output", for errors."""
    if not formats:
        return {}
    if len(formats) not in (1, len(names)):
        raise UserError(f"{what} formats: found {len(formats)}, expected 1 or {len(names)}: {', '.join(names)}")
    return dict(zip(names, formats * len(names) if len(formats) == 1 else formats, strict=True))
