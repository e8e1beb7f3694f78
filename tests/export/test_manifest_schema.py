"""What reads a manifest on a robot, without pydantic, accepts and refuses what the schema that wrote it does."""

import copy
import json
import math

import pytest

from qat.core.checks import Wrong
from qat.core.errors import UserError
from qat.core.validation import validated
from qat.export import ExportOptions, export_parts
from qat.export.pt2 import export_pt2
from qat.families.bevfusion.manifest import PIPELINE
from qat.families.bevfusion.settings import Settings
from qat.manifest import FILE, check_verification, load_manifest, pipeline_of
from qat.manifest_schema import GraphManifest, Manifest
from qat.runtime.axes import axes_of

VALUES = (
    None,
    [],
    {},
    "x",
    "",
    "../x",
    -1,
    0,
    1,
    1.5,
    True,
    math.nan,
    1e12,
    1 << 70,
    [1],
    ["x"],
    [None],
    {"x": 1},
    {"x": {}},
)
# What the schema asks of a writer and nobody reads: `operators`, `calibration`, how it came about.
UNREAD = (
    "model", "checkpoint", "calibration", "command", "versions", "types", "opset", "io", "batch", "reduce_range",
)  # fmt: skip


@pytest.fixture(scope="module")
def manifest(quantized, tmp_path_factory):
    """Of an INT8 export: it has sites."""
    folder = tmp_path_factory.mktemp("manifest") / "int8"
    export_parts(quantized, folder, ExportOptions("int8", "onnxruntime", parts=["fuser", "head.bbox"]))
    return json.loads((folder / FILE).read_text())


def reads(manifest, folder):
    """Whether all that reads the folder's manifest accepts it."""
    (folder / FILE).write_text(json.dumps(manifest))
    try:
        found = load_manifest(folder, check_files=False)
        pipeline_of(folder, found)
        check_verification(folder / FILE, found, "export again")
        for part in found["parts"].values():
            axes_of(part, folder / FILE)
    except UserError:
        return False
    return True


def writes(manifest, model=GraphManifest):
    try:
        validated(model, manifest, "manifest.json")
    except UserError:
        return False
    return True


def places(value, at=()):
    """The path of every key that is read, and of the first two of each list; the pipeline is the family's own."""
    keys = value if isinstance(value, dict) else range(min(2, len(value))) if isinstance(value, list) else ()
    for key in keys:
        # an opset, but not the manifest's
        if (not at and key in UNREAD) or "operators" in (*at, key) or key in ("types", "format_of_parts"):
            continue
        if (*at, key) != ("pipeline",):
            yield (*at, key)
            yield from places(value[key], (*at, key))


def changed(manifest, place, *value):
    made = copy.deepcopy(manifest)
    at = made
    for key in place[:-1]:
        at = at[key]
    if value:
        at[place[-1]] = value[0]
    else:
        del at[place[-1]]
    return made


def test_reader_and_schema_agree_on_every_key_removed_or_changed(manifest, tmp_path):
    assert writes(manifest) and reads(manifest, tmp_path)
    refused, differ = 0, []
    for place in places(manifest):
        tries = {"removed": changed(manifest, place)} if isinstance(place[-1], str) else {}
        tries |= {repr(value): changed(manifest, place, value) for value in VALUES}
        for what, made in tries.items():
            write, read = writes(made), reads(made, tmp_path)
            refused += not write
            if write != read:
                differ.append((place, what, "written" if write else "not written", "read" if read else "not read"))
    assert refused > 1000
    assert not differ, differ


def test_a_familys_reader_and_schema_agree_on_its_section(manifest):
    def fits(section):
        try:
            PIPELINE(section, "pipeline")
        except Wrong:
            return False
        return True

    section, refused, differ = manifest["pipeline"], 0, []
    assert writes(section, Settings) and fits(section)
    for place in set(places(section)) - {
        ("family",),
        ("vtransform", "type"),
        ("vtransform", "in_channels"),
        ("head", "type"),
    }:
        tries = [changed(section, place)] if isinstance(place[-1], str) else []
        for made in [*tries, *(changed(section, place, value) for value in VALUES)]:
            refused += not fits(made)
            if writes(made, Settings) != fits(made):
                differ.append((place, made[place[0]], fits(made)))
    assert refused > 1000 and not differ, differ


def test_programs_of_torch_export_are_written_by_the_schema(quantized, tmp_path):
    """`export_pt2` writes through it; what it wrote is read."""
    export_pt2(quantized, tmp_path / "pt2", ExportOptions("fp32", parts=["fuser"]))
    assert writes(load_manifest(tmp_path / "pt2", format_of_parts="pt2"), Manifest)
