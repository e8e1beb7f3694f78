"""Options of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qat.core.errors import UserError
from qat.engine import CPU_FLAVOURS, PRECISIONS
from qat.lean.flavours import flavour_of
from qat.lean.modes import quantizers

PROGRAM_PRECISIONS = ("fp32", "int8")
IO = ("fp32", "fp16")
OPSETS = range(13, 21)  # per-channel Q/DQ exists from 13 on; torch's TorchScript exporter supports up to 20


@dataclass(frozen=True)
class ExportOptions:
    """Export options; flags of `bevqat export` have the same names.

    precision: "int8" writes Q/DQ pairs at the network's quantizers; "fp32" none; "fp16" the same graph as "fp32", for a builder
        with an FP16 flag. None for INT8 of a quantized network and FP32 of a float one.
    flavour: "tensorrt" for symmetric s8 Q/DQ on float weights; "tensorrt-strong" for strongly typed networks, with precision in
        the graph's types (`qat.export.flavour_tensorrt_strong`); "onnxruntime" and "openvino" for what these fuse on a CPU, INT8
        only (`qat.lean.flavours`).
    opset: 13 to 20; None for 13, and for INT8 of tensorrt-strong 19, the first with FP16 scales.
    batch: samples (of all cameras) in an input. dynamic_batch: any number of them; `batch` and one more are verified.
    parts: names of the parts to write; None for all.
    parts_int8: parts that calibration left float, to quantize anyway.
    reduce_range: weights to seven bits, for CPUs without VNNI, whose u8·s8 sums of two products saturate at 16 bits.
    io: "fp16" for FP16 inputs and outputs of tensorrt-strong.
    layout: the form of another runtime, of those that the family has (`Family.in_layout`); None for the family's own.

    For torch.export programs (`qat.export.pt2`) only precision and parts apply.
    """

    precision: str | None = None
    flavour: str = "tensorrt"
    opset: int | None = None
    batch: int = 1
    dynamic_batch: bool = False
    parts: Sequence[str] | None = None
    parts_int8: Sequence[str] = ()
    reduce_range: bool = False
    io: str = "fp32"
    layout: str | None = None

    @property
    def strong(self) -> bool:
        """Whether the graph's types fix the precision."""
        return self.flavour == "tensorrt-strong"

    def settled(self, network: Any) -> ExportOptions:
        """The options with a precision, for this network.

        Raises:
            UserError: a combination that is impossible for this network, by the name of the flag.
        """
        found = self._with_precision(network, PRECISIONS, "")
        found._check_graph(network)
        return found

    def settled_for_programs(self, network: Any) -> ExportOptions:
        """`settled` for torch.export programs; also raises for an option that only applies to ONNX graphs."""
        self.check_programs()
        return self._with_precision(network, PROGRAM_PRECISIONS, " for the pt2 format")

    def check_programs(self) -> None:
        """Raises `UserError` for an option that does not apply to torch.export programs."""
        for field in fields(self):
            if field.name not in ("precision", "parts") and getattr(self, field.name) not in (field.default, []):
                raise only_for_graphs(f"--{field.name.replace('_', '-')}")

    def chosen(self, parts: Mapping[str, Any]) -> list[str]:
        """Names of the parts to write, in the order in which they run.

        Raises:
            UserError: the network has no such part.
        """
        for name in self.parts or ():
            if name not in parts:
                raise UserError(f"parts: found {name!r}, expected some of {', '.join(parts)}")
        return [name for name in parts if self.parts is None or name in self.parts]

    def _with_precision(self, network: Any, precisions: Sequence[str], what: str) -> ExportOptions:
        quantized = bool(quantizers(network))
        precision = self.precision or ("int8" if quantized else "fp32")
        if precision not in precisions:
            raise UserError(f"precision: found {precision!r}, expected one of {', '.join(precisions)}{what}")
        if precision == "int8" and not quantized:
            raise UserError("precision int8: found a float detector, expected a calibrated one; run calibrate first")
        return replace(self, precision=precision)

    def _check_graph(self, network: Any) -> None:
        flavour_of(self.flavour)
        if self.flavour in CPU_FLAVOURS and self.precision != "int8":
            raise UserError(f"flavour {self.flavour}: found precision {self.precision}, expected int8; omit --flavour")
        if self.opset is not None and self.opset not in OPSETS:
            raise UserError(f"opset: found {self.opset}, expected {OPSETS[0]} to {OPSETS[-1]}")
        if self.batch < 1:
            raise UserError(f"batch: found {self.batch}, expected at least 1 sample")
        if self.reduce_range and self.flavour not in CPU_FLAVOURS:
            raise UserError(
                f"reduce-range: found flavour {self.flavour}, expected {' or '.join(CPU_FLAVOURS)}: seven bits are for "
                "u8·s8 products"
            )
        if self.io not in IO:
            raise UserError(f"io: found {self.io!r}, expected one of {', '.join(IO)}")
        if self.io == "fp16" and not (self.strong and self.precision != "fp32"):
            raise UserError(
                f"io fp16: found flavour {self.flavour} in {self.precision}, expected tensorrt-strong in fp16 or int8; for "
                "others the engine's builder chooses its inputs' and outputs' type"
            )
        if self.parts_int8 and self.precision != "int8":
            raise UserError(f"parts-int8: found precision {self.precision}, expected int8")
        fixed = getattr(network, "fixed_views", None)
        if self.precision == "int8" and fixed is not None and (self.batch > 1 or self.dynamic_batch):
            raise UserError(
                f"batch: found a backbone that fixes the number of images when it is traced, at {fixed}, expected one that "
                "accepts any; export it for one sample"
            )


def only_for_graphs(flag: str) -> UserError:
    """The error for a flag that does not apply to torch.export programs."""
    return UserError(f"{flag}: only applies to ONNX graphs; omit it with --format pt2")


@dataclass(frozen=True)
class Origin:
    """The origin of an exported network, for the manifest.

    checkpoint: its file, whose name and sha256 are noted; None for random weights. recipe: how its quantizers were calibrated.
    ema: whether the weights are a float checkpoint's averaged ones.
    """

    checkpoint: str | Path | None = None
    recipe: Mapping[str, Any] | None = None
    ema: bool = False
