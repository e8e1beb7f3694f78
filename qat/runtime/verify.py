"""A folder of exported parts beside what PyTorch gave at the export, on any machine, without PyTorch.

The folder's verification.npz holds the inputs and summaries of PyTorch's outputs (`qat.core.verification`), manifest.json
the tolerances.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qat.core.errors import UserError
from qat.core.files import sha256
from qat.core.manifest import FILE, load_manifest, pipeline_of
from qat.core.manifest_schema import check_verification
from qat.core.onnx_file import check_graph, graph_opset
from qat.core.verification import Summary, compare_summary
from qat.engine import CPU_BACKENDS, Options, TensorSpec, build

AS_IT_IS = "onnxruntime, optimizer off"


class _Runner(Protocol):
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    def run(self, feeds: Mapping[str, np.ndarray], /) -> dict[str, np.ndarray]: ...


def _fits(described: Mapping[str, Any], found: TensorSpec) -> bool:
    """Whether a manifest's tensor is the graph's; a dimension that is no positive number may vary."""
    shape = described["shape"]
    fixed = [n if isinstance(n, int) and n > 0 else None for n in shape]
    return (
        described["dtype"] == found.dtype
        and len(shape) == len(found.shape)
        and all(a is None or b is None or a == b for a, b in zip(fixed, found.shape, strict=True))
    )


def _tensors(kind: str, described: Mapping[str, Any], found: Mapping[str, TensorSpec]) -> list[str]:
    if list(described) != list(found):
        return [f"{kind}s: found {', '.join(found)}, the manifest has {', '.join(described)}"]
    return [
        f"{kind} {name}: found {found[name]}, the manifest has {spec['dtype']}[{','.join(map(str, spec['shape']))}]"
        for name, spec in described.items()
        if not _fits(spec, found[name])
    ]


def _file_problems(path: Path, part: Mapping[str, Any]) -> list[str]:
    if not path.is_file():
        return ["no such file"]
    if (found := sha256(path)) != part["sha256"]:
        return [f"found sha256 {found[:12]}…, the manifest has {part['sha256'][:12]}…: changed after its export"]
    return []


def _open(path: Path, precision: str, backend: str | None, options: Options) -> _Runner:
    if backend is not None:
        return build(path, backend, precision, options)
    try:
        from qat.engine.onnxruntime_backend import PlainGraph
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "onnxruntime":
            raise
        raise UserError("the package onnxruntime is not installed; mend by: pip install onnxruntime") from None
    check_graph(path)
    return PlainGraph(path, options.threads)


def _verify_part(
    name: str, part: Mapping[str, Any], runner: _Runner, summary: Summary, tokens: list[str]
) -> dict[str, dict[str, Any]]:
    """For each output the frame that is nearest to its tolerance, and all frames."""
    rows: dict[str, list[dict[str, Any]]] = {output: [] for output in part["verification"]}
    for index in summary.frames(name):
        feeds = summary.inputs(name, index)
        found = runner.run(
            {tensor: feeds[tensor].astype(spec.dtype, copy=False) for tensor, spec in runner.inputs.items()}
        )
        for output, described in part["verification"].items():
            limit = described["frames"]["tolerance_db"][index]
            row: dict[str, Any] = {"frame": tokens[index]}
            if np.isfinite(found[output]).all():
                figures, slack = compare_summary(summary.reference(name, index, output), found[output])
                row |= {**figures, "tolerance_db": limit, "passed": bool(figures["sqnr_db"] >= limit - slack)}
            else:
                row |= {"max_abs": None, "cosine": None, "sqnr_db": None, "tolerance_db": limit, "passed": False}
            rows[output].append(row)
    result = {}
    for output, entries in rows.items():
        worst = min(entries, key=lambda e: -np.inf if e["sqnr_db"] is None else e["sqnr_db"] - e["tolerance_db"])
        result[output] = {**worst, "passed": all(e["passed"] for e in entries), "frames": entries}
    return result


def verify_folder(
    folder: str | Path,
    parts: list[str] | None = None,
    backend: str | None = None,
    options: Options | None = None,
    progress: Callable[[int, str], None] = lambda done, part: None,
) -> dict[str, Any]:
    """Repeats an export's verification.

    Args:
        folder: where export-camera wrote the parts, manifest.json and verification.npz.
        parts: names of parts; None for all.
        backend: a backend of `qat.engine`, each part built as it would be for use; None for the graph as it is in its
            file, in ONNX Runtime with its optimizer off, as at the export.
        options: threads, and for a backend the engine cache.
        progress: called before each part with how many are done, and its name.

    Returns:
        folder, model, precision, flavour, backend, passed, and for each part: file, passed, problems (of the file: sha256,
        opset, tensors) and outputs: the figures of the frame that is nearest to its tolerance (max_abs, cosine, sqnr_db,
        tolerance_db, passed, frame; sqnr_db None where values are not finite) and the same for all `frames`. A part
        with problems is not run.

    Raises:
        UserError: no manifest or no verification.npz, a changed verification.npz, or an unknown part or backend.
    """
    folder = Path(folder)
    manifest = load_manifest(folder, check_files=False)
    names = list(manifest["parts"]) if parts is None else list(parts)
    for name in names:
        if name not in manifest["parts"]:
            raise UserError(f"part: found {name!r}, expected one of {', '.join(manifest['parts'])}")
    if "file" in manifest.get("verification", {}):
        check_verification(folder / FILE, manifest, "export again")
    pipeline_of(folder, manifest)
    summary = Summary(folder, manifest)
    tokens = list(manifest["verification"]["frames"])
    options = options or Options()
    report: dict[str, Any] = {}
    for name in names:
        progress(len(report), name)
        part = manifest["parts"][name]
        path = folder / part["file"]
        entry: dict[str, Any] = {"file": part["file"], "problems": _file_problems(path, part), "outputs": {}}
        if not entry["problems"]:
            found = graph_opset(path)
            if found != part["opset"]:
                entry["problems"].append(f"opset: found {found}, the manifest has {part['opset']}")
            precision = part["precision"]
            if precision == "fp16" and (manifest["flavour"] != "tensorrt-strong" or backend in CPU_BACKENDS):
                precision = "fp32"  # what FP32-typed graphs are compared in, and what a CPU has for those typed FP16
            runner = _open(path, precision, backend, options)
            entry["problems"] += _tensors("input", part["inputs"], runner.inputs)
            entry["problems"] += _tensors("output", part["outputs"], runner.outputs)
            if not entry["problems"]:
                entry["outputs"] = _verify_part(name, part, runner, summary, tokens)
        outputs_pass = all(output["passed"] for output in entry["outputs"].values())
        entry["passed"] = not entry["problems"] and outputs_pass
        report[name] = entry
    return {
        "folder": str(folder),
        "model": manifest.get("model"),
        "precision": manifest["precision"],
        "flavour": manifest["flavour"],
        "backend": backend or AS_IT_IS,
        "passed": all(entry["passed"] for entry in report.values()),
        "parts": report,
    }


def print_verification(found: Mapping[str, Any]) -> None:
    """Prints `verify_folder`'s result: a table of outputs, then what is wrong."""
    from rich.table import Table

    from qat.core.console import results_console

    table = Table(title=f"{found['folder']}: {found['precision']} parts in {found['backend']}", title_justify="left")
    for column in ("part", "output"):
        table.add_column(column, overflow="fold")
    for column in ("max abs", "cosine", "SQNR, dB", "expected", "frames", ""):
        table.add_column(column, justify="right")
    wrong = []
    for name, part in found["parts"].items():
        wrong += [f"{part['file']}: {problem}" for problem in part["problems"]]
        for output, row in part["outputs"].items():
            finite = row["sqnr_db"] is not None
            figures = (
                (f"{row['max_abs']:.2g}", f"{row['cosine']:.6f}", f"{row['sqnr_db']:.1f}") if finite else ("",) * 3
            )
            verdict = "ok" if row["passed"] else "FAILED"
            table.add_row(name, output, *figures, f"{row['tolerance_db']:.1f}", str(len(row["frames"])), verdict)
            if not row["passed"]:
                what = f"{row['sqnr_db']:.1f} dB SQNR" if finite else "NaN or infinite values"
                wrong.append(
                    f"{part['file']}: {output}: found {what} on frame {row['frame']}, expected "
                    f"{row['tolerance_db']:.1f} dB or more"
                )
    results_console(120).print(table)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if not wrong:
        print(f"{len(found['parts'])} parts give what PyTorch gave at their export")
