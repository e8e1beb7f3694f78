"""The calibration stage: reads config, checkpoint and data, and writes a PTQ checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from qat.calibrate.budget import Budget, draw_budget, keep_within_budget, print_budget
from qat.calibrate.checkpoint import save_ptq
from qat.calibrate.distributed import device, only_writers, place
from qat.calibrate.options import BudgetOptions, CalibrateOptions
from qat.calibrate.ptq import CalibrationReport, calibrate, int8_layers
from qat.calibrate.sensitivity import measure_sensitivity
from qat.core.console import results_console
from qat.core.files import atomic_set, sha256, write_json
from qat.core.locks import one_writer
from qat.core.progress import progress_bar
from qat.core.provenance import made_by
from qat.lean import Inventory
from qat.lean.equalize import INSIDE
from qat.lean.module import check_rules
from qat.lean.placement import Kept
from qat.model.opening import Model, Source, open_float
from qat.model.quantized import QuantizedModel

FEW_FRAMES = 8


@dataclass
class CalibrationResult:
    """The quantized detector, the calibration's report, its recipe, and the result of a budget."""

    model: QuantizedModel
    report: CalibrationReport
    recipe: dict[str, object]
    budget: Budget | None = None


@one_writer("out", lock=only_writers)
def calibrate_checkpoint(source: Source, options: CalibrateOptions, out: Path, frames: Any = None) -> CalibrationResult:
    """Calibrates a float network over a split and writes the PTQ checkpoint to `out`.

    frames: a data set instead of the one in `options.data`, with `tokens`, `load(token)` and `share`, as `Family.dataset` returns them.

    With a budget, `<out>.budget.json` and `.budget.png` are written next to `out`.
    Under torchrun (inside `process_group`) the processes share the frames, and rank 0 writes.

    Raises:
        UserError: the options, the files or their content are wrong.
    """
    options.check(source)
    opened = open_float(source)
    family, model, settings, budget = opened.family, opened.network, opened.config, options.budget
    flow = family.flow(settings)
    if budget is not None:
        flow.need_boxes("--budget", "leave --budget out")
    usual, method, by_layer = family.recipe(settings), options.method, tuple(options.by_layer)
    if method == "auto":
        method, by_layer = usual.method, (*by_layer, *usual.by_layer)
    model.to(device())
    dataset = frames
    if dataset is None:
        dataset = family.dataset(options.data, options.split, settings, options.version, options.frames)
    scored = None
    if budget is not None:  # opened before the work begins, so that errors are reported at once
        scored = family.dataset(budget.data, budget.split, settings, budget.version, budget.frames)
        scored.check_annotated()
    rank, size = place()
    pictures: set[tuple[int, int]] = set()

    def load(token: str) -> Any:
        sample = dataset.load(token)
        pictures.update(getattr(sample, "native_sizes", ()))
        return sample

    own = dataset.share(rank, size, bool(flow.plan.state))
    equalize = usual.equalize if options.equalize else None

    def passed(model: QuantizedModel, kind: str | None, what: str) -> tuple[QuantizedModel, CalibrationReport]:
        with progress_bar(what, len(own), show=rank == 0) as done:
            samples = (load(token) for token in own)
            return calibrate(model, samples, method, options.percentile, done, by_layer, kind)

    whole = QuantizedModel(model, (*options.rules, *usual.keep_float))
    layers = [path for inventory in whole.inventory.values() for path in inventory.quantized]
    check_rules(options.rules, [path for inventory in whole.inventory.values() for path in inventory.kept], layers)
    quantized, report = passed(whole, equalize, "calibrating")
    if equalize == INSIDE and quantized.equalized:
        quantized, report = passed(quantized, None, "calibrating equalized channels")
    origin = None if opened.path is None else sha256(opened.path)
    found = None
    if budget is not None and scored is not None and origin is not None:
        found = _keep_within(budget, quantized, scored, out, origin)
    quantized.cpu()
    model.cpu()
    if len(pictures) == 1:  # recorded in exports
        quantized.config = family.note_pictures(quantized.config, *pictures)
    report.int8 = int8_layers(quantized)
    recipe: dict[str, object] = {
        "method": options.method,
        "default_method": method,
        "by_layer": [list(pair) for pair in by_layer],
        "percentile": options.percentile if "percentile" in (method, *(other for _, other in by_layer)) else None,
        "equalize": equalize,
        "equalized": sorted(quantized.equalized),
        "frames": report.frames,
        "split": options.split,
        "dataset": options.data.name,
        "frames_sha256": hashlib.sha256("".join(dataset.tokens).encode()).hexdigest(),
        **_weights(source, opened, origin),
        "int8_share_of_macs": round(report.int8_share, 4),
        "unexcited": report.unexcited,
        "made": {"calibrate": made_by()},
    }
    if found is not None:
        recipe["budget"] = {"drop": found.budget, "of": found.of, "float_units": found.chosen.floats}
    curve = [out.with_suffix(f".budget.{kind}") for kind in ("json", "png")]
    if rank == 0:
        with atomic_set(out, *curve) as stage:
            save_ptq(stage / out.name, quantized, model, recipe)
            if found is not None:
                write_json(stage / curve[0].name, found.to_json())
                draw_budget(found, stage / curve[1].name)
    return CalibrationResult(quantized, report, recipe, found)


def _weights(source: Source, opened: Model, digest: str | None) -> dict[str, object]:
    """The recipe's entries about the source of the float weights. digest: the checkpoint's sha256."""
    if opened.path is None:
        return {"random_weights": {"seed": source.seed}}
    found: dict[str, object] = {
        "float_checkpoint": {"file": opened.path.name, "sha256": digest, **({"ema": True} if opened.ema else {})}
    }
    if source.prefix is not None:
        found["branch"] = {"prefix": source.prefix, "left_out": opened.left_out}
    return found


def _keep_within(options: BudgetOptions, model: QuantizedModel, dataset: Any, out: Path, checkpoint: str) -> Budget:
    cache = out.with_suffix(".budget-cache")
    ranges = hashlib.sha256(b"".join(amax.cpu().numpy().tobytes() for amax in model.amax().values())).hexdigest()
    key = f"{checkpoint} {ranges}"
    few = np.linspace(0, len(dataset) - 1, min(options.ranked_on, len(dataset))).round().astype(int)
    ranking = measure_sensitivity(model, [dataset[int(i)] for i in few], cache, key)
    return keep_within_budget(model, dataset, options.drop, options.metric(dataset), ranking, cache, key)


def by_reason(inventory: Inventory) -> dict[Kept, list[str]]:
    """Layers that stay float, grouped by rule and reason."""
    groups: dict[Kept, list[str]] = {}
    for name, kept in inventory.kept.items():
        groups.setdefault(kept, []).append(name)
    return groups


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def warnings_of(report: CalibrationReport) -> list[str]:
    """Warnings about the ranges, one line each."""
    lines = [f"{name} was zero on every frame; its scale is a floor" for name in report.unexcited]
    if report.frames < FEW_FRAMES:
        lines.append(f"{report.frames} frames are few: ranges may be too narrow for other scenes")
    return lines


def _part_figures(result: CalibrationResult) -> dict[str, dict[str, Any]]:
    """For each part: activation quantizers that are on, layers with INT8 weights, the share of its multiply-accumulates in
    INT8, and whether it is off as a whole."""
    model, report = result.model, result.report
    found = {}
    for part, inventory in model.inventory.items():
        layers = [name for name in report.int8 if name.startswith(part + ".")]
        total = sum(count for name, count in report.macs.items() if name.startswith(part + "."))
        graph = model.parts[part]
        found[part] = {
            "quantizers": sum(
                not graph.get_submodule(name)._disabled and graph.get_submodule(name).role != "output"
                for name in inventory.quantizers
            ),
            "int8_layers": len(layers),
            "int8_share_of_macs": sum(report.macs[name] for name in layers) / total if total else 0.0,
            "off": part in model.parts_off,
        }
    return found


def summarize(result: CalibrationResult) -> dict[str, Any]:
    """The content of `print_summary` for scripts: JSON values, and paths."""
    model, report, budget = result.model, result.report, result.budget
    parts = _part_figures(result)
    return {
        "method": result.recipe["method"],
        "frames": report.frames,
        "int8_share_of_macs": report.int8_share,
        "quantizers": sum(figures["quantizers"] for figures in parts.values()),
        "parts": parts,
        "float": [
            {"part": part, "name": name, "rule": kept.rule, "reason": kept.reason}
            for part, inventory in model.inventory.items()
            for name, kept in inventory.kept.items()
        ],
        "warnings": warnings_of(report),
        "budget": None if budget is None else budget.to_json(),
        "recipe": result.recipe,
    }


def print_summary(result: CalibrationResult) -> None:
    """Prints a table of each part's INT8 layers, and the layers that stay float with reasons."""
    model, report = result.model, result.report
    table = Table(title=f"PTQ over {report.frames} frames, method {result.recipe['method']}")
    for heading in ("part", "activation quantizers", "INT8 layers", "share of MACs in INT8"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part, figures in _part_figures(result).items():
        share = "off" if figures["off"] else f"{figures['int8_share_of_macs']:.1%}"
        table.add_row(part, str(figures["quantizers"]), str(figures["int8_layers"]), share)
    console = results_console()
    console.print(table)
    if isinstance(branch := result.recipe.get("branch"), dict):
        console.print(
            f"camera branch only: {branch['left_out']} tensors of the checkpoint are outside {branch['prefix']!r} and were "
            "ignored",
            highlight=False,
        )
    console.print(f"INT8 share of all MACs: {report.int8_share:.1%}")
    for inventory in model.inventory.values():
        for kept, names in by_reason(inventory).items():
            console.print(f"float: {names[0]}{_more(names)} ({kept.reason})", highlight=False)
    reason = model.family.recipe(model.config).off_reason
    for part in model.parts_off:
        console.print(f"float: all of {part} ({reason})", highlight=False)
    if result.budget is not None:
        print_budget(result.budget)
    for line in warnings_of(report):
        console.print(f"warning: {line}", highlight=False)
