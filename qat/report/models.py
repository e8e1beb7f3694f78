"""pydantic models of results.json, from which a page is made. Other keys are not checked."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from qat.core.validation import Expected, Section, number, whole, wrong
from qat.report.schema import EXACT_DB, SCHEMA

MOST_BINS = 512  # of a histogram
MOST = 1e15  # far above any figure; Python's integers are unbounded, but drawings compute with floats
MOST_METRES = 10_000  # around the car: a ring is drawn every ten

Text = Annotated[str, Expected("text", test=bool)]
Texts = list[Text]
Finite = Annotated[float, number("a finite number", -MOST, MOST)]
FromZero = Annotated[float, number("a number from 0", 0, MOST)]
FromOne = Annotated[float, number("a number from 1", 1, MOST)]
AboveZero = Annotated[float, number("more than 0", 0, MOST, above=0)]
Share = Annotated[float, number("a number from 0 to 1", 0, 1)]
Change = Annotated[float, number("a number from -1 to 1", -1, 1)]
Decibels = Annotated[float, number(f"a number from -1000 to {EXACT_DB}", -1000, EXACT_DB)]
Figures = dict[str, Finite | None]
Base64 = Annotated[str, Expected("a JPEG in base64", test=re.compile(r"[A-Za-z0-9+/]+={0,2}\Z").match)]


class Latency(Section):
    median: AboveZero
    p99: FromZero
    samples: FromOne


class Interval(Section):
    low: Change
    high: Change


class Row(Section):
    backend: Text
    precision: Text
    flavour: Text | None = None
    map: Share
    nds: Share
    per_class_ap: dict[str, Share | None]
    latency_ms: Latency
    speedup_vs_fp32: FromZero | None = None
    size_mb: FromZero | None = None
    change: dict[str, Interval] = {}
    sqnr_db: Figures = {}
    stages_ms: Figures = {}
    tp_errors: Figures = {}
    by_distance: Figures = {}
    map_iou50: Share | None = None
    boxes_per_frame: FromZero | None = None
    stages_p95_ms: Figures = {}


class Unit(Section):
    name: Text
    layers: Texts
    macs_share: Share
    sqnr_db: Annotated[dict[str, Decibels], Field(min_length=1)]
    drop: Figures | None = None


class FloatGroup(Section):
    part: Text
    rule: Text
    reason: Text
    layers: Texts
    macs_share: Share


class Histogram(Section):
    unit: Text
    method: Text
    layers: Texts
    amax: AboveZero
    bin_width: AboveZero
    largest: FromZero
    values: FromZero
    zeros: Share
    to_zero: Share
    clipped: Share
    counts: Annotated[list[FromZero], Field(min_length=1, max_length=MOST_BINS)]


class Sensitivity(Section):
    frames: FromOne
    checkpoint: dict[str, Text]
    dataset: dict[str, Text]
    units: Annotated[list[Unit], Field(min_length=1)]
    units_in_all: FromOne = MOST
    together: Unit
    reference: Figures | None = None
    floats: list[FloatGroup]
    histograms: list[Histogram]


class Camera(Section):
    name: Text
    jpeg: Base64


class Box(Section):
    label: Text
    score: Share | None = None
    corners: list[Annotated[list[Finite], Field(min_length=2, max_length=2)]]
    outlines: dict[str, list[Annotated[list[Finite], Field(min_length=4, max_length=4)]]]


class Boxes(Section):
    truth: list[Box]
    reference: list[Box]
    candidate: list[Box]


class Frame(Section):
    reference: Annotated[int, whole(0, 10_000)]  # numbers of rows
    candidate: Annotated[int, whole(0, 10_000)]
    range: Annotated[float, number(f"a number from 1 to {MOST_METRES}", 1, MOST_METRES)]
    min_score: Share | None = None
    image_size: Annotated[list[FromZero], Field(min_length=2, max_length=2)]  # 0 of a detector without cameras
    cameras: list[Camera]
    boxes: Boxes


class Command(Section):
    what: Text
    command: Text
    versions: dict[str, Text] = {}


class Dataset(Section):
    samples: FromOne
    objects: dict[str, FromZero | None] | None = None


class Measurement(Section):
    pattern_rebuild_ms: FromZero = 0


class Provenance(Section):
    files: list[Any] = []
    commands: list[Command] = []


class Results(Section):
    schema_: Literal[SCHEMA] = Field(alias="schema")  # type: ignore[valid-type]
    model: Text
    dataset: Dataset
    machine: dict[str, Any]
    rows: Annotated[list[Row], Field(min_length=1)]
    measurement: Measurement = Measurement()
    provenance: Provenance = Provenance()
    sensitivity: Sensitivity | None = None
    frames: list[Frame] = []


def check_rows(results: Results) -> None:
    """Checks that frames refer to existing rows, and that at least as many units are counted as shown."""
    for n, frame in enumerate(results.frames):
        for key in ("reference", "candidate"):
            if getattr(frame, key) >= len(results.rows):
                raise wrong(f"frames.{n}.{key}", f"a number from 0 to {len(results.rows) - 1}")
    if results.sensitivity is not None and results.sensitivity.units_in_all < len(results.sensitivity.units):
        raise wrong("sensitivity.units_in_all", f"{len(results.sensitivity.units)} or more")
