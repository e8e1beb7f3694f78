"""Compares a folder of exported parts with PyTorch's outputs at the export, on any machine, without PyTorch.

The folder's verification.npz holds inputs and outputs (`qat.core.verification`) and the reference
of each site (`qat.core.sites`), manifest.json the tolerances, scales and zero points.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qat.core.errors import UserError
from qat.core.files import sha256
from qat.core.onnx_cut import Cut
from qat.core.onnx_file import check_graph, graph_opset
from qat.core.sites import check_sites, grid_problems, runner_of, site_line
from qat.core.verification import Summary, compare_stored, what_is_wrong
from qat.engine import CPU_BACKENDS, Options, TensorSpec, build
from qat.families import flow_of
from qat.manifest import FILE, check_verification, load_manifest, pipeline_of
from qat.runtime.axes import check_profiles, options_of_part

AS_IT_IS = "onnxruntime, optimizer off"
SHOWN = 5  # problems listed for one part


class _Runner(Protocol):
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    def run(self, feeds: Mapping[str, np.ndarray], /) -> dict[str, np.ndarray]: ...


def _fits(described: Mapping[str, Any], found: TensorSpec) -> bool:
    """Whether a manifest's tensor matches the graph's; a dimension that is not a positive number may vary."""
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


def _open(path: Path, precision: str, backend: str | None, options: Options, optimized: bool = False) -> _Runner:
    if backend is not None:
        return build(path, backend, precision, options)
    try:
        from qat.engine.onnxruntime_backend import PlainGraph
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "onnxruntime":
            raise
        raise UserError("the package onnxruntime is not installed; fix by: pip install onnxruntime") from None
    check_graph(path)
    return PlainGraph(path, options.threads, optimized)


def _compare(stored: Mapping[str, np.ndarray], found: np.ndarray, limit: float) -> dict[str, Any]:
    if not np.isfinite(found).all():
        return {"max_abs": None, "cosine": None, "sqnr_db": None, "tolerance_db": limit, "passed": False}
    figures, slack = compare_stored(stored, found)
    return {**figures, "tolerance_db": limit, "passed": bool(figures["sqnr_db"] >= limit - slack)}


def _verify_part(
    name: str,
    part: Mapping[str, Any],
    runner: _Runner,
    summary: Summary,
    tokens: list[str],
    optimized: _Runner | None = None,
) -> dict[str, dict[str, Any]]:
    """For each output: the frame nearest to its tolerance, and all frames; the last one also with `optimized`'s results."""
    rows: dict[str, list[dict[str, Any]]] = {output: [] for output in part["verification"]}
    for index in summary.frames(name):
        feeds = summary.inputs(name, index)

        def run(one: _Runner, feeds: Mapping[str, np.ndarray] = feeds) -> dict[str, np.ndarray]:
            return one.run(
                {tensor: feeds[tensor].astype(spec.dtype, copy=False) for tensor, spec in one.inputs.items()}
            )

        found = run(runner)
        again = run(optimized) if optimized is not None and index == summary.frames(name)[-1] else {}
        for output, described in part["verification"].items():
            limits = described["frames"]
            limit = limits["tolerance_db"][index]
            stored = summary.reference(name, index, output)
            row: dict[str, Any] = {"frame": tokens[index], **_compare(stored, found[output], limit)}
            if (least := (limits.get("float_tolerance_db") or {index: None})[index]) is not None:
                beside = _compare(summary.unquantized(name, index, output), found[output], least)
                row |= {"float_db": beside["sqnr_db"], "float_tolerance_db": least}
                row["passed"] &= beside["passed"]
            if output in again:
                beside = _compare(stored, again[output], limit)
                row["optimized_db"] = beside["sqnr_db"]
                row["passed"] &= beside["passed"]
            rows[output].append(row)
    result = {}
    for output, entries in rows.items():
        worst = min(entries, key=lambda e: (e["passed"], _reserve(e)))
        result[output] = {**worst, "passed": all(e["passed"] for e in entries), "frames": entries}
    return result


def _reserve(row: Mapping[str, Any]) -> float:
    """A row's smallest margin to its tolerances, in dB."""
    pairs = (("sqnr_db", "tolerance_db"), ("optimized_db", "tolerance_db"), ("float_db", "float_tolerance_db"))
    return min(-np.inf if row[key] is None else row[key] - row[limit] for key, limit in pairs if key in row)


def _check_sites(
    name: str, part: Mapping[str, Any], path: Path, summary: Summary, options: Options
) -> tuple[dict[str, Any], list[str]]:
    """The numbers of sites and of failed sites, and their problems, with the optimizer off and on."""
    about = part["sites"]
    cut = Cut(path.read_bytes())
    problems = grid_problems(cut, about["pairs"])
    modules = {entry["tensor"]: entry["module"] for entry in about["pairs"]}
    report: dict[str, Any] = {"checked": len(cut.sites), "failed": 0, "passed": not problems}
    sites = summary.sites(name)
    if set(cut.sites) != set(sites):
        return report, problems
    feeds = summary.inputs(name, about["frame"])
    failed: dict[str, str] = {}
    for optimized in (False, True):
        runner = runner_of(cut, sites, options.threads, optimized)
        for site, entry in check_sites(cut, sites, feeds, runner=runner).items():
            if not entry["passed"] and site not in failed:
                line = site_line({**entry, "codes": site in cut.pairs}, modules.get(site, f"output {site}"))
                failed[site] = line + (" with ONNX Runtime's optimizer on" if optimized else "")
    report |= {"failed": len(failed), "passed": not (problems or failed)}
    return report, problems + list(failed.values())


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
        opset, tensors; of sites: scales and values), sites (how many were checked and failed, of an INT8 graph without a
        backend) and outputs: the figures of the frame that is nearest to its tolerance (max_abs, cosine, sqnr_db,
        tolerance_db, passed, frame; sqnr_db None where values are not finite; float_db and float_tolerance_db of an INT8
        graph against the float module; optimized_db with the optimizer on) and the same for all `frames`. A part whose
        file has problems is not run.

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
    flow = flow_of(pipeline_of(folder, manifest), source=str(folder))
    summary = Summary(folder, manifest, flow)
    tokens = list(manifest["verification"]["frames"])
    options = options or Options()
    check_profiles(manifest, options, folder)
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
                precision = "fp32"  # the precision of FP32-typed graphs, and on a CPU also of FP16-typed ones
            runner = _open(path, precision, backend, options_of_part(part, options, folder / FILE))
            entry["problems"] += _tensors("input", part["inputs"], runner.inputs)
            entry["problems"] += _tensors("output", part["outputs"], runner.outputs)
            if not entry["problems"]:
                optimized = _open(path, precision, None, options, True) if backend is None else None
                entry["outputs"] = _verify_part(name, part, runner, summary, tokens, optimized)
                if backend is None and part.get("sites") is not None:
                    entry["sites"], wrong = _check_sites(name, part, path, summary, options)
                    entry["problems"] += wrong
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
    """Prints `verify_folder`'s result: a table of outputs, then the problems."""
    from rich.table import Table

    from qat.core.console import results_console

    table = Table(title=f"{found['folder']}: {found['precision']} parts in {found['backend']}", title_justify="left")
    for column in ("part", "output"):
        table.add_column(column, overflow="fold")
    for column in ("max abs", "cosine", "SQNR, dB", "expected", "frames", ""):
        table.add_column(column, justify="right")
    wrong = []
    for name, part in found["parts"].items():
        shown = part["problems"][:SHOWN]
        wrong += [f"{part['file']}: {problem}" for problem in shown]
        if len(part["problems"]) > SHOWN:
            wrong.append(f"{part['file']}: and {len(part['problems']) - SHOWN} more")
        for output, row in part["outputs"].items():
            finite = row["sqnr_db"] is not None
            figures = (
                (f"{row['max_abs']:.2g}", f"{row['cosine']:.6f}", f"{row['sqnr_db']:.1f}") if finite else ("",) * 3
            )
            verdict = "ok" if row["passed"] else "FAILED"
            table.add_row(name, output, *figures, f"{row['tolerance_db']:.1f}", str(len(row["frames"])), verdict)
            if not row["passed"]:
                wrong.append(f"{part['file']}: {output}: {what_is_wrong(row)} on frame {row['frame']}")
    results_console(120).print(table)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if not wrong:
        sites = sum(part.get("sites", {}).get("checked", 0) for part in found["parts"].values())
        also = f", at {sites} sites inside them too" if sites else ""
        print(f"{len(found['parts'])} parts match PyTorch's outputs at their export{also}")
