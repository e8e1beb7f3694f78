"""All stages in order with the shipped model and data: `make demo`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qat.calibrate import load_ptq
from qat.calibrate.job import calibrate_checkpoint
from qat.calibrate.options import CalibrateOptions
from qat.calibrate.sensitivity import measure_sensitivity, write_sensitivity
from qat.compare.rows import Sources
from qat.compare.run import CACHE, CompareOptions, Comparison, compare
from qat.core.errors import UserError
from qat.core.files import sha256
from qat.core.locks import one_writer
from qat.core.machine import threads_of
from qat.data.synth.generate import SynthOptions, generate
from qat.export.checkpoint import export_checkpoint
from qat.export.options import ExportOptions
from qat.model.opening import Source, read_config

# folder name, precision, flavour: each CPU backend gets the flavour that it fuses
EXPORTS = (
    ("fp32", "fp32", "tensorrt"),
    ("int8", "int8", "tensorrt"),
    ("int8_openvino", "int8", "openvino"),
    ("int8_onnxruntime", "int8", "onnxruntime"),
)


# model → the generated data that it is shown on, where example-data does not fit: four revolutions in half a second
GENERATED = {
    "lidar-tiny": SynthOptions(
        scenes=10, seed=23, keyframes=5, width=64, height=36, azimuths=540, sweeps=2, splits={"calib": 2, "eval": 8}
    ),
}
HISTOGRAMS = 8  # number of the most harmful units, the command's default
SENSITIVITY_FRAMES = 2  # enough to rank the units; each costs a pass through a part of the network for each of them


@dataclass
class Demo:
    """The comparison, and whether every exported part agrees with PyTorch within its tolerance."""

    comparison: Comparison
    verified: bool


def _sensitivity(ptq: Path, data: Path, out: Path) -> None:
    """Measures the calibrated units and writes out/sensitivity.json; out/cache has earlier measurements."""
    quantized, recipe = load_ptq(ptq)
    dataset = quantized.family.dataset(data, "calib", quantized.config)
    few = np.linspace(0, len(dataset) - 1, min(SENSITIVITY_FRAMES, len(dataset))).round().astype(int)
    frames = [dataset[int(index)] for index in few]
    found = measure_sensitivity(quantized, frames, out / CACHE, sha256(ptq), recipe=recipe, worst=HISTOGRAMS)
    facts = {"name": data.resolve().name, "version": dataset.nusc.version, "split": dataset.split}
    write_sensitivity(out / "sensitivity.json", found, ptq, facts)


@one_writer("out", inside=True)
def demo(
    model: Path,
    data: Path | None,
    out: Path,
    frames: int | None = None,
    rounds: int = 5,
    say: Callable[[str], None] = print,
) -> Demo:
    """Calibrates, exports FP32 and INT8 parts, builds them on every backend, compares and reports.

    Args:
        model: folder of `config.yaml` (or config.py, which is run) and `<its name>.pth`.
        data: nuScenes-format data with the splits calib and eval; None generates a model's own (`GENERATED`) into out/data.
        out: folder for ptq.pth, sensitivity.json, onnx_fp32/, onnx_int8/, results.json and report.html.
        frames: number of keyframes of the split to evaluate on; None for all.
        say: called with a line at the start of each step.

    Raises:
        UserError: a file of the model or of the data is missing or damaged.
    """
    started = time.monotonic()

    def step(what: str) -> None:
        say(f"[{time.monotonic() - started:4.0f} s] {what}")

    if rounds < 1:
        raise UserError(f"--rounds: found {rounds}, expected at least 1")
    config_file = model / "config.yaml"
    if not config_file.is_file() and (model / "config.py").is_file():
        config_file = model / "config.py"
    if data is None:
        data = out / "data"
        step(f"generate scenes into {data}")
        generate(data, GENERATED[model.name], threads_of(0), quiet=True)
    if frames is not None:  # checked now, not after the calibration and the exports
        if frames < 1:
            raise UserError(f"--frames: found {frames}, expected at least 1")
        family, config = read_config(config_file)
        family.dataset(data, "eval", config, frames=frames)
    checkpoint, ptq = model / f"{model.name}.pth", out / "ptq.pth"
    step(f"calibrate {checkpoint} over the calibration frames of {data}")
    calibrate_checkpoint(Source(checkpoint, config_file), CalibrateOptions(data, "calib"), ptq)
    step(f"sensitivity: one unit in INT8 at a time, over {SENSITIVITY_FRAMES} calibration frames")
    _sensitivity(ptq, data, out)
    folders, verified = {}, True
    for name, precision, flavour in EXPORTS:
        folders[name] = out / f"onnx_{name}"
        step(f"export {precision.upper()} parts, flavour {flavour}, to {folders[name]}")
        _, manifest = export_checkpoint(Source(ptq), ExportOptions(precision, flavour), folders[name])
        verified &= manifest["verification"]["passed"]
    step("build on every backend and compare over the evaluation keyframes")
    comparison = compare(
        CompareOptions(
            sources=Sources(
                checkpoint,
                ptq,
                [folders["fp32"]],
                [folders[name] for name, precision, _ in EXPORTS if precision == "int8"],
                config_file,
            ),
            data=data,
            split="eval",
            frames=frames,
            out=out,
            rounds=rounds,
            repeats=2,
            model=model.name,
            sensitivity=out / "sensitivity.json",
        )
    )
    step("done")
    return Demo(comparison, verified)
