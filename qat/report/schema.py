"""results.json: what compare hands to the report, and the checks that a page can be made of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.core.errors import UserError
from qat.core.files import read_json

SCHEMA = 1
Results = dict[str, Any]

EXACT_DB = 200  # what compare and sensitivity write for equal tensors
MOST_BINS = 512  # of a histogram
MOST = 1e15  # far above any figure; Python's own whole numbers have no end, and drawings compute with floats
MOST_METRES = 10_000  # around the car: a ring is drawn every ten

_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}\Z")
_BOX_KINDS = ("truth", "reference", "candidate")


class _Checker:
    """Walks the document; every complaint names the file and the place in it."""

    def __init__(self, source: str, fix: str = "write it again with compare") -> None:
        self.source, self.fix = source, fix

    def fail(self, path: str, found: Any, expected: str) -> UserError:
        text = repr(found)
        text = text if len(text) <= 60 else text[:57] + "…"
        return UserError(f"{self.source}: {path}: found {text}, expected {expected}; {self.fix}")

    def mapping(self, value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(path, value, "an object")
        return value

    def items(self, value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.fail(path, value, "a list")
        return value

    def text(self, value: Any, path: str) -> str:
        if not isinstance(value, str) or not value:
            raise self.fail(path, value, "text")
        return value

    def number(self, value: Any, path: str, low: float = -math.inf, high: float = math.inf) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -MOST <= value <= MOST:
            raise self.fail(path, value, "a finite number")
        if not low <= value <= high:
            raise self.fail(path, value, f"a number from {low:g} to {high:g}")
        return value

    def numbers(self, value: Any, path: str, low: float = -math.inf, high: float = math.inf) -> None:
        for key, number in self.mapping(value, path).items():
            if number is not None:
                self.number(number, f"{path}.{key}", low, high)

    def row(self, row: Any, path: str) -> None:
        self.mapping(row, path)
        for key in ("backend", "precision"):
            self.text(row.get(key), f"{path}.{key}")
        if row.get("flavour") is not None:
            self.text(row["flavour"], f"{path}.flavour")
        for key in ("map", "nds"):
            self.number(row.get(key), f"{path}.{key}", 0, 1)
        self.numbers(row.get("per_class_ap"), f"{path}.per_class_ap", 0, 1)
        latency = self.mapping(row.get("latency_ms"), f"{path}.latency_ms")
        for key in ("median", "p99"):
            self.number(latency.get(key), f"{path}.latency_ms.{key}", 0)
        if latency["median"] == 0:
            raise self.fail(f"{path}.latency_ms.median", 0, "more than 0")
        self.number(latency.get("samples"), f"{path}.latency_ms.samples", 1)
        for key in ("speedup_vs_fp32", "size_mb"):
            if row.get(key) is not None:
                self.number(row[key], f"{path}.{key}", 0)
        for metric, interval in self.mapping(row.get("change", {}), f"{path}.change").items():
            where = f"{path}.change.{metric}"
            for key in ("low", "high"):
                self.number(self.mapping(interval, where).get(key), f"{where}.{key}", -1, 1)
        for key in ("sqnr_db", "stages_ms", "tp_errors"):
            self.numbers(row.get(key, {}), f"{path}.{key}")

    def texts(self, value: Any, path: str) -> None:
        for n, text in enumerate(self.items(value, path)):
            self.text(text, f"{path}[{n}]")

    def above_zero(self, value: Any, path: str) -> None:
        if self.number(value, path, 0) == 0:
            raise self.fail(path, value, "more than 0")

    def damage(self, unit: Any, path: str) -> None:
        self.text(self.mapping(unit, path).get("name"), f"{path}.name")
        self.texts(unit.get("layers"), f"{path}.layers")
        self.number(unit.get("macs_share"), f"{path}.macs_share", 0, 1)
        self.numbers(unit.get("sqnr_db"), f"{path}.sqnr_db", -1000, EXACT_DB)
        if not unit["sqnr_db"] or None in unit["sqnr_db"].values():
            raise self.fail(f"{path}.sqnr_db", unit["sqnr_db"], "a number for each tensor")
        if unit.get("drop") is not None:
            self.numbers(unit["drop"], f"{path}.drop")

    def histogram(self, histogram: Any, path: str) -> None:
        self.mapping(histogram, path)
        for key in ("unit", "method"):
            self.text(histogram.get(key), f"{path}.{key}")
        self.texts(histogram.get("layers"), f"{path}.layers")
        for key in ("amax", "bin_width"):
            self.above_zero(histogram.get(key), f"{path}.{key}")
        self.number(histogram.get("largest"), f"{path}.largest", 0)
        self.number(histogram.get("values"), f"{path}.values", 0)
        for key in ("zeros", "to_zero", "clipped"):
            self.number(histogram.get(key), f"{path}.{key}", 0, 1)
        counts = self.items(histogram.get("counts"), f"{path}.counts")
        if not 1 <= len(counts) <= MOST_BINS:
            raise self.fail(f"{path}.counts", counts, f"1 to {MOST_BINS} counts")
        for n, count in enumerate(counts):
            self.number(count, f"{path}.counts[{n}]", 0)

    def sensitivity(self, section: Any, path: str) -> None:
        prefix = f"{path}." if path else ""
        self.number(self.mapping(section, path or "the document").get("frames"), f"{prefix}frames", 1)
        for key in ("checkpoint", "dataset"):
            for name, value in self.mapping(section.get(key), f"{prefix}{key}").items():
                self.text(value, f"{prefix}{key}.{name}")
        units = self.items(section.get("units"), f"{prefix}units")
        if not units:
            raise self.fail(f"{prefix}units", units, "at least one unit")
        for n, unit in enumerate(units):
            self.damage(unit, f"{prefix}units[{n}]")
        self.damage(section.get("together"), f"{prefix}together")
        if section.get("reference") is not None:
            self.numbers(section["reference"], f"{prefix}reference")
        if "units_in_all" in section:
            self.number(section["units_in_all"], f"{prefix}units_in_all", len(units))
        for n, group in enumerate(self.items(section.get("floats"), f"{prefix}floats")):
            where = f"{prefix}floats[{n}]"
            for key in ("part", "rule", "reason"):
                self.text(self.mapping(group, where).get(key), f"{where}.{key}")
            self.texts(group.get("layers"), f"{where}.layers")
            self.number(group.get("macs_share"), f"{where}.macs_share", 0, 1)
        for n, histogram in enumerate(self.items(section.get("histograms"), f"{prefix}histograms")):
            self.histogram(histogram, f"{prefix}histograms[{n}]")

    def commands(self, commands: Any, path: str) -> None:
        for n, entry in enumerate(self.items(commands, path)):
            where = f"{path}[{n}]"
            for key in ("what", "command"):
                self.text(self.mapping(entry, where).get(key), f"{where}.{key}")
            for name, version in self.mapping(entry.get("versions", {}), f"{where}.versions").items():
                self.text(version, f"{where}.versions.{name}")

    def frame(self, frame: Any, path: str, rows: int) -> None:
        self.mapping(frame, path)
        for key in ("reference", "candidate"):
            self.number(frame.get(key), f"{path}.{key}", 0, rows - 1)
        self.number(frame.get("range"), f"{path}.range", 1, MOST_METRES)
        if frame.get("min_score") is not None:
            self.number(frame["min_score"], f"{path}.min_score", 0, 1)
        size = self.items(frame.get("image_size"), f"{path}.image_size")
        if len(size) != 2:
            raise self.fail(f"{path}.image_size", size, "[width, height]")
        for value in size:
            self.number(value, f"{path}.image_size", 0)  # of a detector without cameras
        for n, camera in enumerate(self.items(frame.get("cameras"), f"{path}.cameras")):
            where = f"{path}.cameras[{n}]"
            self.text(self.mapping(camera, where).get("name"), f"{where}.name")
            if not _BASE64.match(self.text(camera.get("jpeg"), f"{where}.jpeg")):
                raise self.fail(f"{where}.jpeg", camera["jpeg"], "a JPEG in base64")
        boxes = self.mapping(frame.get("boxes"), f"{path}.boxes")
        for kind in _BOX_KINDS:
            for n, box in enumerate(self.items(boxes.get(kind), f"{path}.boxes.{kind}")):
                where = f"{path}.boxes.{kind}[{n}]"
                self.text(self.mapping(box, where).get("label"), f"{where}.label")
                if box.get("score") is not None:
                    self.number(box["score"], f"{where}.score", 0, 1)
                outlines = self.mapping(box.get("outlines"), f"{where}.outlines")
                for corners, width in ((box.get("corners"), 2), *((lines, 4) for lines in outlines.values())):
                    for point in self.items(corners, where):
                        if len(self.items(point, where)) != width:
                            raise self.fail(where, point, f"{width} numbers")
                        for value in point:
                            self.number(value, where)


def check_results(results: Any, source: str = "results") -> Results:
    """Returns `results` when a report can be made of it.

    Args:
        results: a parsed results.json.
        source: what to call it in an error.

    Raises:
        UserError: another schema, or a missing or impossible value, named by its path.
    """
    checker = _Checker(source)
    checker.mapping(results, "the document")
    if results.get("schema") != SCHEMA:
        raise UserError(
            f"{source}: schema: found {results.get('schema')!r}, expected {SCHEMA}; write it again with compare"
        )
    checker.text(results.get("model"), "model")
    dataset = checker.mapping(results.get("dataset"), "dataset")
    checker.number(dataset.get("samples"), "dataset.samples", 1)
    if dataset.get("objects") is not None:
        checker.numbers(dataset["objects"], "dataset.objects", 0)
    checker.mapping(results.get("machine"), "machine")
    rows = checker.items(results.get("rows"), "rows")
    if not rows:
        raise checker.fail("rows", rows, "at least one row")
    for n, row in enumerate(rows):
        checker.row(row, f"rows[{n}]")
    for key in ("measurement", "provenance"):
        checker.mapping(results.get(key, {}), key)
    if "pattern_rebuild_ms" in results.get("measurement", {}):
        checker.number(results["measurement"]["pattern_rebuild_ms"], "measurement.pattern_rebuild_ms", 0)
    checker.items(results.get("provenance", {}).get("files", []), "provenance.files")
    checker.commands(results.get("provenance", {}).get("commands", []), "provenance.commands")
    if results.get("sensitivity") is not None:
        checker.sensitivity(results["sensitivity"], "sensitivity")
    for n, frame in enumerate(checker.items(results.get("frames", []), "frames")):
        checker.frame(frame, f"frames[{n}]", len(rows))
    return results


def check_sensitivity(section: Any, source: str, fix: str) -> dict[str, Any]:
    """Returns what can be results.json's entry `sensitivity`.

    Args:
        source: the file that it is from. fix: what to do about a complaint.

    Raises:
        UserError: a missing or impossible value, named by its path.
    """
    _Checker(source, fix).sensitivity(section, "")
    return dict(section)


def load_results(results: Mapping[str, Any] | str | Path) -> Results:
    """Checked results, from a results.json or as they are.

    Raises:
        UserError: the file cannot be read, is not JSON, or fails `check_results`.
    """
    if isinstance(results, Mapping):
        return check_results(dict(results))
    return check_results(read_json(results), str(results))
