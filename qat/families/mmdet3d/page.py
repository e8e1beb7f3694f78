"""inputs.html: the tree of a model's inputs as a page, with what was verified."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any


def _keys(path: str) -> list[str]:
    """`inputs.points[0]` → inputs, points, [0]."""
    return re.findall(r"\[\d+\]|[^.\[\]]+", path)


def shape_of(entry: Mapping[str, Any]) -> list[int | str]:
    """The shape of a tensor in metadata.json, an axis that varies by its name."""
    dynamic = entry.get("dynamic", {})
    return [dynamic.get(str(place), size) for place, size in enumerate(entry["shape"])]


def _tree(metadata: Mapping[str, Any]) -> dict[str, Any]:
    axes = [("tensors", True), ("unused_inputs", False)]
    root: dict[str, Any] = {}
    for key, used in axes:
        for entry in metadata[key]:
            about = {"name": entry.get("name", ""), "dtype": entry["dtype"], "sizes": shape_of(entry)}
            _put(root, entry["path"], {"tensor": True, "used": used, **about})
    for entry in metadata["constants"]:
        _put(root, entry["path"], {"tensor": False, "used": False, "value": entry["value"]})
    return root


def _put(root: dict[str, Any], path: str, leaf: dict[str, Any]) -> None:
    *above, last = _keys(path)
    for key in above:
        root = root.setdefault(key, {})
    root[last] = {"leaf": leaf}


def rows(metadata: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every comparison with PyTorch, a row each."""
    found = metadata["verification"]
    runs = [("model.pt2", "torch.export.load", found["pt2"]["samples"])] if "pt2" in found else []
    runs += [
        ("model.onnx", name, entry["samples"]) for name, entry in found.get("onnx", {}).get("backends", {}).items()
    ]
    runs += [("model.vmfb", "IREE", (metadata["iree"] or {}).get("samples", []))]
    for file, by, samples in runs:
        for row in samples:
            boxes = row.get("boxes")
            yield {
                "file": file,
                "by": by,
                "sizes": ", ".join(f"{size} {name}" for name, size in row["sizes"].items()) or "the example",
                "sqnr_db": row["sqnr_db"],
                "db": "equal" if row["sqnr_db"] >= 200 else f"{row['sqnr_db']:.0f} dB",
                "max_abs": f"{row['max_abs']:.1e}",
                "boxes": "" if not boxes else f"{boxes['found']} of {boxes['count']}",
                "passed": row["passed"],
                "wrong": row["wrong"],
            }


def iree_line(metadata: Mapping[str, Any]) -> str:
    """What came of model.pt2 in the IREE compiler; empty where there is none."""
    found = metadata["iree"]
    if found is None:
        return ""
    release = f" {found['versions']['iree-base-compiler']}" if found["versions"] else ""
    if "failed" in found:
        return f"IREE{release}: model.pt2 was not compiled: {found['failed']}"
    wrong = next((row["wrong"] for row in found["samples"] if not row["passed"]), "")
    least = min(row["sqnr_db"] for row in found["samples"])
    return f"IREE{release}: model.vmfb, {wrong or f'{least:.0f} dB beside PyTorch'}"


def inputs_page(metadata: Mapping[str, Any]) -> str:
    """The page, with everything in it."""
    from jinja2 import Environment, StrictUndefined

    source = resources.files("qat.families.mmdet3d").joinpath("templates", "inputs.html").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return (
        environment.from_string(source).render(
            m=metadata, tree=_tree(metadata), rows=list(rows(metadata)), iree=iree_line(metadata)
        )
        + "\n"
    )
