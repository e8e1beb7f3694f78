"""Every stage in its order with the shipped model and data: what `make demo` shows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qat.calibrate.job import calibrate_checkpoint
from qat.compare.rows import Sources
from qat.compare.run import CompareOptions, Comparison, compare
from qat.core.locks import one_writer
from qat.export.checkpoint import export_checkpoint

# folder name, precision, flavour: each CPU backend gets the form that it fuses
EXPORTS = (
    ("fp32", "fp32", "tensorrt"),
    ("int8", "int8", "tensorrt"),
    ("int8_openvino", "int8", "openvino"),
    ("int8_onnxruntime", "int8", "onnxruntime"),
)


@dataclass
class Demo:
    """The comparison, and whether every exported part agrees with PyTorch within its tolerance."""

    comparison: Comparison
    verified: bool


@one_writer("out", inside=True)
def demo(
    model: Path, data: Path, out: Path, frames: int | None = None, rounds: int = 5, say: Callable[[str], None] = print
) -> Demo:
    """Calibrates, exports FP32 and INT8 parts, builds them on every backend, compares and reports.

    Args:
        model: folder of `config.yaml` and `<its name>.pth`.
        data: nuScenes-format data with the splits calib and eval.
        out: folder for ptq.pth, onnx_fp32/, onnx_int8/, results.json and report.html.
        frames: evaluate on so many keyframes of the split; None for all.
        say: gets a line as each step begins.

    Raises:
        UserError: a file of the model or of the data is missing or damaged.
    """
    started = time.monotonic()

    def step(what: str) -> None:
        say(f"[{time.monotonic() - started:4.0f} s] {what}")

    checkpoint, ptq = model / f"{model.name}.pth", out / "ptq.pth"
    step(f"calibrate {checkpoint} over the calibration frames of {data}")
    calibrate_checkpoint(config=model / "config.yaml", checkpoint=checkpoint, data=data, split="calib", out=ptq)
    folders, verified = {}, True
    for name, precision, flavour in EXPORTS:
        folders[name] = out / f"onnx_{name}"
        step(f"export {precision.upper()} parts, flavour {flavour}, to {folders[name]}")
        _, manifest = export_checkpoint(ptq, precision, folders[name], flavour=flavour)
        verified &= manifest["verification"]["passed"]
    step("build on every backend and compare over the evaluation keyframes")
    comparison = compare(
        CompareOptions(
            sources=Sources(
                checkpoint,
                ptq,
                [folders["fp32"]],
                [folders[name] for name, precision, _ in EXPORTS if precision == "int8"],
                model / "config.yaml",
            ),
            data=data,
            split="eval",
            frames=frames,
            out=out,
            rounds=rounds,
            repeats=2,
            model=model.name,
            command=f"bevqat demo --model {model} --data {data} --out {out}",
        )
    )
    step("done")
    return Demo(comparison, verified)
