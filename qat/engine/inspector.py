"""TensorRT's engine inspector output as a table: each layer's precision, formats, and the ONNX nodes fused in it.

The inspector's JSON differs between versions, and with the detail that a plan was built with:

    8.5, 8.6   {"Layers": […], "Bindings": ["img", …]}; tensors have "Format/Datatype": "Thirty-two wide channel vectorized row
               major Int8 format"; a layer's name is that of its nodes, joined by " + "
    10         the same; "Format/Datatype" may be only the type ("Half"), and "Metadata" names the nodes:
               "[ONNX Layer: /a]\\x1f[ONNX Layer: /b]"
    11         {"Layers": […], "I/O Tensors": [{"Name": "img", …}, …]}; "Format" and "Datatype" are two fields
    any        plans built without detail have layers that are strings; and the text of LayerInformationFormat.ONELINE, one
               layer a line
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qat.core.errors import UserError

TYPE_NAMES = {
    "fp32": "fp32", "float": "fp32", "fp16": "fp16", "half": "fp16", "int8": "int8", "uint8": "uint8", "bf16": "bf16",
    "bfloat16": "bf16", "fp8": "fp8", "fp4": "fp4", "int4": "int4", "int32": "int32", "int64": "int64", "bool": "bool",
    "tf32": "tf32", "double": "fp64",
}  # fmt: skip
_TYPE = re.compile(rf"\b({'|'.join(TYPE_NAMES)})\b", re.IGNORECASE)
_WIDE = {"two": 2, "four": 4, "eight": 8, "sixteen": 16, "thirty-two": 32}
_LINE = re.compile(r"(?:.*\[TRT\]\s*)?Name: (?P<name>.*?), LayerType: (?P<type>[^,]+)(?P<rest>.*)", re.DOTALL)
REFORMAT = ("reformat",)
# In a plan's words for a convolution or product: "CaskConvolution", "CudaDepthwiseConvolution", "gemm", "MatrixMultiply".
WEIGHTED = ("conv", "gemm", "matrixmultiply", "matmul", "fullyconnected")


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a plan.

    type: TensorRT's word for the kernel. precision: what it computes in; "" where the plan does not say.
    inputs, outputs: type and layout of each tensor, such as "int8:chw32". nodes: labels of the ONNX nodes in it.
    ms: measured time of a run, None before `with_times`.
    """

    name: str
    type: str = ""
    precision: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    tactic: str = ""
    ms: float | None = None

    @property
    def reformats(self) -> bool:
        """Whether it only copies a tensor into another type or layout (Q and DQ that were not fused are such, too)."""
        return any(word in self.type.lower() for word in REFORMAT) or self.name.startswith("Reformatting CopyNode")

    @property
    def weighted(self) -> bool:
        """Whether it is a convolution or a product with weights, as far as its kind says."""
        return any(word in self.type.lower() for word in WEIGHTED)


def _type_of(text: str) -> str:
    found = _TYPE.search(text)
    return TYPE_NAMES[found[1].lower()] if found else ""


def _layout_of(text: str) -> str:
    """ "Thirty-two wide channel vectorized row major Int8 format" → "chw32"; "" where the text has none."""
    lowered = text.lower()
    named = re.search(r"\(k([a-z0-9_]+)\)", lowered)
    if named:
        return "chw" if named[1] == "linear" else named[1]
    if wide := re.search(r"(\S+) wide channel vectorized", lowered):
        return f"chw{_WIDE.get(wide[1], '?')}"
    if "channel major" in lowered:
        step = re.search(r"channel % (\d+)", lowered) or re.search(r"channel == (\d+)", lowered)
        return f"hwc{step[1]}" if step else "hwc"
    return "chw" if "row major" in lowered or lowered == "linear" else ""


def _format_of(tensor: Any) -> str:
    """A tensor's "type:layout" from whichever fields its version has."""
    if not isinstance(tensor, Mapping):
        return ""
    joined = tensor.get("Format/Datatype")
    if joined is not None:
        kind, layout = _type_of(str(joined)), _layout_of(str(joined))
    else:
        form = str(tensor.get("Format", ""))
        kind = _type_of(str(tensor.get("Datatype", tensor.get("DataType", "")))) or _type_of(form)
        layout = _layout_of(form)
    return f"{kind}:{layout}" if layout else kind


def _nodes_of(name: str, metadata: str) -> tuple[str, ...]:
    """ONNX labels: of the metadata where there is one, else of the layer's name."""
    if found := re.findall(r"\[ONNX Layer: ([^\]]*)\]", metadata):
        return tuple(dict.fromkeys(found))
    names = []
    for part in re.split(r" \+ | \|\| ", name):
        wrapped = re.fullmatch(r"(?:PWN|\w+)\((.*)\)", part.strip())  # PWN(…): pointwise operators, fused
        names += re.split(r",\s*| \+ ", wrapped[1]) if wrapped else [part.strip()]
    return tuple(dict.fromkeys(name.strip(" (){}") for name in names if name.strip(" (){}")))


def _precision_of(layer: Mapping[str, Any], kind: str, inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """The type a layer computes in: with weights, their type and the input's; otherwise the output's.

    A weighted kernel whose input is INT8 multiplies integers, whatever it writes; an FP32 one may round to TF32, which only
    the kernel's name tells.
    """
    tactic = str(layer.get("TacticName", ""))
    weights = layer.get("Weights")
    stored = _type_of(str(weights.get("Type", ""))) if isinstance(weights, Mapping) else ""
    first = inputs[0].split(":")[0] if inputs else ""
    out = outputs[0].split(":")[0] if outputs else ""
    if stored or any(word in kind.lower() for word in WEIGHTED) or re.search(r"gemm|fprop|conv", tactic):
        found = "int8" if "int8" in (stored, first) and stored in ("", "int8") else stored or first or out
        return "tf32" if found == "fp32" and "tf32" in tactic else found
    if any(word in kind.lower() for word in REFORMAT) and first and out and first != out:
        return f"{first}→{out}"
    return out or first


def _from_mapping(layer: Mapping[str, Any]) -> LayerInfo:
    name, kind = str(layer.get("Name", "")), str(layer.get("LayerType", ""))
    inputs = tuple(_format_of(tensor) for tensor in layer.get("Inputs") or ())
    outputs = tuple(_format_of(tensor) for tensor in layer.get("Outputs") or ())
    return LayerInfo(
        name=name,
        type=kind,
        precision=_precision_of(layer, kind, inputs, outputs),
        inputs=inputs,
        outputs=outputs,
        nodes=_nodes_of(name, str(layer.get("Metadata") or "")),
        tactic=str(layer.get("TacticName", "")),
    )


def _from_line(text: str) -> LayerInfo:
    """A layer of ONELINE's text, or a bare name."""
    found = _LINE.match(text)
    if not found:
        return LayerInfo(text, nodes=_nodes_of(text, ""))
    layer: dict[str, Any] = {"Name": found["name"], "LayerType": found["type"].strip()}
    before, _, after = found["rest"].partition("Outputs: [")
    for key, part in (("Inputs", before), ("Outputs", after.partition("}]")[0])):
        texts = re.findall(r"Format/Datatype: ([^}]*)", part)
        layer[key] = [{"Format/Datatype": each.strip()} for each in texts]
    if weights := re.search(r'Weights: \{"Type": "(\w+)"', after):
        layer["Weights"] = {"Type": weights[1]}
    for key in ("TacticName", "Metadata"):
        if value := re.search(rf"{key}: ([^,\n]*)", after):
            layer[key] = value[1].strip()
    return _from_mapping(layer)


def read_layers(information: str | Mapping[str, Any] | Sequence[Any]) -> list[LayerInfo]:
    """Layers from the inspector's output: its JSON (text or parsed), one layer's or the engine's, or its one-line text.

    Raises:
        UserError: neither.
    """
    value: Any = information
    if isinstance(information, str):
        try:
            value = json.loads(information, strict=False)  # 10's metadata holds raw control characters
        except ValueError:
            lines = [line for line in re.split(r"\n(?=.*Name: )", information) if _LINE.match(line.strip())]
            if not lines:
                raise UserError("engine inspector: found neither JSON nor lines of layers") from None
            return [_from_line(line.strip()) for line in lines]
    if isinstance(value, Mapping):
        value = value.get("Layers", [value])
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError("engine inspector: found JSON without layers")
    return [_from_mapping(layer) if isinstance(layer, Mapping) else _from_line(str(layer)) for layer in value]


def read_io(information: Mapping[str, Any]) -> list[str]:
    """Names of inputs and outputs: 11's "I/O Tensors", "Bindings" before."""
    tensors = information.get("I/O Tensors", information.get("Bindings", []))
    return [str(tensor["Name"] if isinstance(tensor, Mapping) else tensor) for tensor in tensors]


def with_times(layers: Iterable[LayerInfo], times: Mapping[str, float]) -> list[LayerInfo]:
    """The layers with milliseconds by name, in order; timed names that are not among them come last."""
    layers = list(layers)
    timed = [replace(layer, ms=times.get(layer.name)) for layer in layers]
    known = {layer.name for layer in layers}
    return timed + [
        LayerInfo(name, nodes=_nodes_of(name, ""), ms=ms) for name, ms in times.items() if name not in known
    ]


@dataclass(frozen=True)
class Findings:
    """Findings about INT8 in a plan.

    reformats: layers that only copy between types and layouts. int8: quantized nodes that run in INT8. fallbacks: those that
    run in another precision, with it. hidden: those that no layer names (fused into a region without names, or a plan without
    detail).
    """

    layers: int
    reformats: tuple[str, ...]
    int8: tuple[str, ...]
    fallbacks: tuple[tuple[str, str], ...]
    hidden: tuple[str, ...]

    def lines(self, limit: int = 5) -> list[str]:
        """For people."""

        def named(names: Sequence[str]) -> str:
            more = f" and {len(names) - limit} more" if len(names) > limit else ""
            return f": {', '.join(names[:limit])}{more}" if names else ""

        total = len(self.int8) + len(self.fallbacks) + len(self.hidden)
        lines = [f"{self.layers} layers, {len(self.reformats)} of them reformats{named(self.reformats)}"]
        if total:
            lines.append(f"{len(self.int8)} of {total} quantized convolutions and products run in INT8")
        if self.fallbacks:
            fallen = [f"{name} in {precision.upper()}" for name, precision in self.fallbacks]
            lines.append(f"{len(fallen)} fell back{named(fallen)}")
        if self.hidden:
            lines.append(f"{len(self.hidden)} are named by no layer{named(self.hidden)}")
        return lines


def find(layers: Sequence[LayerInfo], quantized: Collection[str] = ()) -> Findings:
    """Reformats, and what became of the quantized ONNX nodes (`qat.core.onnx_file.Outline.quantized`)."""
    int8, fallbacks, hidden = [], [], []
    for node in quantized:
        # Copies around a node may name it too: the layer with weights is the one that computes it.
        holders = sorted(
            (layer for layer in layers if node in layer.nodes and not layer.reformats), key=lambda one: not one.weighted
        )
        precision = holders[0].precision if holders else ""
        if precision == "int8":
            int8.append(node)
        elif precision:
            fallbacks.append((node, precision))
        else:
            hidden.append(node)
    reformats = tuple(layer.name for layer in layers if layer.reformats)
    return Findings(len(layers), reformats, tuple(int8), tuple(fallbacks), tuple(hidden))


def table(layers: Sequence[LayerInfo], slowest: int | None = None, width: int = 60) -> list[str]:
    """Lines of a table: share and time where measured, precision, formats, nodes. slowest: that many, the slowest first."""
    shown = sorted(layers, key=lambda layer: -(layer.ms or 0.0))[:slowest] if slowest else list(layers)
    total = sum(layer.ms or 0.0 for layer in layers)
    rows = [("ms", "share", "precision", "type", "in", "out", "nodes")]
    for layer in shown:
        ms = "" if layer.ms is None else f"{layer.ms:.4f}"
        share = f"{100 * layer.ms / total:.1f} %" if layer.ms is not None and total else ""
        nodes = " + ".join(layer.nodes) or layer.name
        formats = (" ".join(dict.fromkeys(layer.inputs)), " ".join(dict.fromkeys(layer.outputs)))
        rows.append(
            (
                ms,
                share,
                layer.precision,
                layer.type,
                *formats,
                nodes if len(nodes) <= width else f"{nodes[: width - 1]}…",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  ".join(
            cell.rjust(w) if i < 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        )
        + f"  {row[-1]}".rstrip()
        for row in rows
    ]
