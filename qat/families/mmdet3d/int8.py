"""The INT8 form of a model whose parts a family has: calibrated and exported by the stages that every family goes through."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from qat.calibrate.job import calibrate_checkpoint
from qat.calibrate.options import CalibrateOptions
from qat.checkpoints.reading import save_plain
from qat.core.errors import UserError
from qat.export.checkpoint import export_checkpoint
from qat.export.options import ExportOptions
from qat.lean.flavours import FLAVOURS
from qat.model.opening import Source, read_config

RANDOM_FRAMES = 4


def _linked(files: Sequence[Path], folder: Path) -> Path:
    """One root for several files: links in a folder."""
    if len(files) == 1:
        return files[0]
    for n, file in enumerate(files):
        if not file.is_file():
            raise UserError(f"{file}: found no such file, expected points (.bin) for --calib; or name one folder alone")
        os.symlink(file.resolve(), folder / f"{n:05d}.bin")
    return folder


def _made_up(config: Path, folder: Path, seed: int) -> Path:
    """Made-up clouds as files, in the config's columns."""
    family, described = read_config(config)
    flow: Any = family.flow(described)
    for n in range(RANDOM_FRAMES):
        points = flow.made_frame(seed + n).points
        full = np.zeros((len(points), described["load_dim"]), np.float32)
        full[:, : points.shape[1]] = points
        (folder / f"{n:05d}.bin").write_bytes(full.tobytes())
    return folder


def write_int8(
    config: Path, model: nn.Module, calib: Sequence[Path] | None, out: Path, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Calibrates a model and writes its parts in every flavour: out/ptq.pth, out/FLAVOUR/.

    Args:
        model: the float network with its weights. calib: .bin files, or one folder; None for made-up clouds.

    Returns:
        for metadata.json: what is INT8 and what it costs, by flavour.

    Raises:
        UserError: no family has such a model's parts, or the data cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model.pth"
        save_plain({"state_dict": model.state_dict()}, weights)
        clouds = Path(folder) / "clouds"
        clouds.mkdir()
        data = _made_up(config, clouds, seed) if calib is None else _linked(calib, clouds)
        say("INT8: calibrated")
        result = calibrate_checkpoint(Source(weights, config), CalibrateOptions(data, "all"), out / "ptq.pth")
        report = result.report
        found: dict[str, Any] = {
            "ptq": "int8/ptq.pth",
            "calibration": "made-up clouds" if calib is None else [str(path) for path in calib],
            "int8_share_of_macs": report.int8_share,
            "parts_off": list(result.model.parts_off),
            "flavours": {},
        }

        def frames(opened: Any) -> Any:
            return opened.family.dataset(data, "all", opened.config, None, 1)

        for flavour in FLAVOURS:
            say(f"INT8: {flavour}")
            _, manifest = export_checkpoint(
                Source(out / "ptq.pth"), ExportOptions("int8", flavour), out / flavour, frames
            )
            found["flavours"][flavour] = {
                "folder": f"int8/{flavour}",
                "passed": manifest["verification"]["passed"],
                "parts": {name: _part(part, out / flavour) for name, part in manifest["parts"].items()},
            }
    return found


def _part(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a part's entry in the manifest says of its cost."""
    entries = part["verification"].values()
    found = [
        entry.get("float_db", entry.get("quantization_db")) for entry in entries
    ]  # the file's, else the simulation's
    costs = [value for value in found if value is not None]
    return {
        "file": part["file"],
        "precision": part["precision"],
        "bytes": (folder / part["file"]).stat().st_size,
        "sqnr_db_beside_float": min(costs) if costs else None,
    }
