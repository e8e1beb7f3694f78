"""pydantic models of the manifest.json that qat.export writes. Engine, runtime and verify read it without pydantic
(`qat.manifest`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qat.core.files import leads_down, write_json
from qat.core.validation import Expected, Section, number, validated, whole, wrong
from qat.manifest import FILE, FORMAT, SCHEMA

Text = Annotated[str, Field(max_length=1000), Expected("a text")]
File = Annotated[str, Expected("the name of a file in the manifest's folder", test=leads_down)]
Decibels = Annotated[float, number("a number of decibels", -1e9, 1e9)]
Index = Annotated[int, whole(0, 1 << 30)]
Opset = Annotated[int, whole(1, 1000)]
Batch = Annotated[int, whole(1, 1024)]


class Axis(Section):
    min: Annotated[int, whole(0, 1 << 31)]
    opt: Annotated[int, whole(0, 1 << 31)]
    max: Annotated[int, whole(0, 1 << 31)] | None = None


class Tensor(Section):
    """An input or output. A text in its shape names an axis that varies."""

    dtype: Text
    shape: Annotated[list[Text | Annotated[int, whole(-1, 1 << 40)]], Field(max_length=32)]
    axes: dict[str, Axis] = {}


class Tolerances(Section):
    """For each frame: the least SQNR against the simulation, and against the float network (null if not checked)."""

    tolerance_db: list[Decibels]
    float_tolerance_db: list[Decibels | None] | None = None


class Verified(Section):
    frames: Tolerances


class Pair(Section):
    """One quantizer: its tensor, and the scales and zero points in the file."""

    tensor: Text
    node: Text
    module: Text
    dtype: Text
    scale: Annotated[list[Annotated[float, number("a scale", 0, 1e30)]], Field(min_length=1)]
    zero_point: Annotated[list[Annotated[int, whole(-128, 255)]], Field(min_length=1)]


class Sites(Section):
    frame: Index
    pairs: list[Pair]
    outputs: list[Text]
    problems: list[Text]


class Part(Section):
    """The fields of a part in every format."""

    file: File
    sha256: Text
    precision: Text
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    operators: Any


class GraphPart(Part):
    """An ONNX file."""

    opset: Opset
    operators: dict[str, int]
    verification: Annotated[dict[str, Verified], Field(min_length=1)]
    sites: Sites | None = None


class Checkpoint(Section):
    file: Text
    sha256: Text
    ema: bool = False


class Verification(Section):
    """Contents of the folder's verification.npz. stored: the indices of each part's stored frames."""

    frames: list[Text]
    seed: Annotated[int, whole(0, 1 << 62)]
    batch: Batch
    file: File
    sha256: Text
    stored: dict[str, Annotated[list[Index], Field(min_length=1)]]
    made_sha256: Text


class Manifest(Section):
    """The fields of every manifest; for torch.export programs (`format_of_parts` "pt2") these are all."""

    format: Literal[FORMAT]  # type: ignore[valid-type]
    schema_: Literal[SCHEMA] = Field(alias="schema")  # type: ignore[valid-type]
    format_of_parts: Literal["onnx", "pt2"] = "onnx"
    model: Text | None = None
    precision: Text
    checkpoint: Checkpoint | None = None
    calibration: dict[str, Any] | None = None
    command: str | None = None
    versions: dict[str, str | None]
    pipeline: dict[str, Any]  # the family's (`Flow.check`)
    parts: dict[str, Part]
    verification: dict[str, Any]


class GraphManifest(Manifest):
    """The manifest of ONNX files."""

    flavour: Text
    types: Text
    opset: Opset
    io: Literal["fp32", "fp16"]
    batch: Batch | None = None
    reduce_range: bool
    parts: dict[str, GraphPart]  # type: ignore[assignment]
    verification: Verification  # type: ignore[assignment]

    @model_validator(mode="after")
    def _frames(self) -> GraphManifest:
        for name, part in self.parts.items():
            stored = self.verification.stored.get(name)
            if not stored or max(stored) >= len(self.verification.frames):
                raise wrong(["verification", "stored", name], "numbers of the frames")
            if not set(part.verification) <= set(part.outputs):
                raise wrong(["parts", name, "verification"], "the part's outputs")
            for output, row in part.verification.items():
                lists = (row.frames.tolerance_db, row.frames.float_tolerance_db)
                if any(limits is not None and len(limits) <= max(stored) for limits in lists):
                    raise wrong(["parts", name, "verification", output, "frames"], "a tolerance for each frame")
            if part.sites is not None and part.sites.frame not in stored:
                raise wrong(["parts", name, "sites", "frame"], "one of the stored frames")
        return self


def write_manifest(folder: Path, manifest: dict[str, Any], model: type[Manifest]) -> None:
    """Writes manifest.json. A manifest that does not fit its model is a bug in this program; then the folder is not kept."""
    validated(model, manifest, str(folder / FILE), fix="please report this", index="[{}]")
    write_json(folder / FILE, manifest)
