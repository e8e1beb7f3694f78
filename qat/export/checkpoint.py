"""Export of a checkpoint file, float or quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.calibrate import load_ptq
from qat.calibrate.checkpoint import load_float_reference
from qat.calibrate.foreign import load_foreign_file
from qat.checkpoints.reading import float_weights, load_checkpoint
from qat.core.errors import UserError
from qat.export.parts import export_parts
from qat.export.pt2 import export_pt2
from qat.export.torch_parts import build_wrappers
from qat.families.bevfusion.config import Branch, camera_branch, check_config, load_config
from qat.families.bevfusion.detector import build_model
from qat.families.bevfusion.random_init import random_model
from qat.families.bevfusion.state import load_state

PTQ_FORMAT = "bevqat-ptq"


def config_of(
    path: Path, checkpoint: dict[str, Any], given: str | Path | None, branch: Branch | None = None
) -> dict[str, Any]:
    """The config of a float checkpoint: the named one, else the one inside it, else config.yaml beside it.

    branch: "camera" for the `camera_branch` of it.
    """
    if given is not None:
        return load_config(given, branch)
    if isinstance(config := checkpoint.get("config"), dict):
        check_config(config, f"{path}: config", branch)
        if branch is None:
            return config
        return camera_branch(config)
    beside = path.parent / "config.yaml"
    if beside.is_file():
        return load_config(beside, branch)
    raise UserError(f"{path}: holds no config and {beside} does not exist; name the run's configs.yaml with --config")


@dataclass
class Source:
    """What is exported. path: of its checkpoint; None for random weights. folder: where its exports go by themselves."""

    detector: Any
    precision: str
    recipe: dict[str, Any] | None
    path: Path | None
    folder: Path


def open_source(
    path: str | Path | None,
    precision: str | None = None,
    config: str | Path | None = None,
    prefix: str | None = None,
    seed: int = 0,
    ema: bool = False,
) -> Source:
    """The detector of a checkpoint, in the state in which it is exported.

    Args:
        path: a checkpoint of calibrate (PTQ); one that another tool quantized (`qat.calibrate.foreign`); or a float one:
            {"state_dict": …}, a bare state dict, a pickled network. None for random weights of `config`.
        precision: "int8", "fp16" or "fp32"; None for INT8 of a quantized checkpoint and FP32 of a float one.
        config: of a checkpoint that is not ours; None for the one inside it, else config.yaml beside it.
        prefix: of such a checkpoint, takes the camera branch alone, which lies under it, as `calibrate_checkpoint` has
            it; camera.backbone and camera.vtransform are then all that is written.
        seed: of random weights.
        ema: of a float checkpoint, the averaged weights that it keeps beside the others.

    Raises:
        UserError: the checkpoint does not load or does not fit its config, or is a float one and INT8 is asked for.
    """
    if path is None:
        if config is None:
            raise UserError("--init random: found no --config, expected the network's")
        if precision == "int8":
            raise UserError("--init random: found no scales for INT8; mend by bevqat calibrate --init random first")
        if ema:
            raise UserError("--ema: found with --init random, expected a checkpoint that has averaged weights")
        branch: Branch | None = None if prefix is None else "camera"
        detector: Any = random_model(load_config(config, branch), seed)
        return Source(detector, precision or "fp32", None, None, Path("runs") / Path(config).resolve().parent.name)
    path = Path(path)
    checkpoint = load_checkpoint(path, ema)
    if checkpoint.get("format") == PTQ_FORMAT:
        precision = precision or "int8"
        if config is not None:
            raise UserError(f"{path}: a PTQ checkpoint carries its config; leave --config out")
        if prefix is not None:
            raise UserError(f"{path}: a PTQ checkpoint knows whether it is a camera branch alone; leave --prefix out")
        # FP32 and FP16 parts are of the float network: weights that were trained for rounding are not it without rounding.
        if precision == "int8":
            detector, recipe = load_ptq(path)
            return Source(detector, precision, recipe, path, path.parent)
        return Source(load_float_reference(path)[0], precision, None, path, path.parent)
    settings = config_of(path, checkpoint, config, None if prefix is None else "camera")
    if "quantizers" in checkpoint:
        quantized, model, report = load_foreign_file(path, checkpoint, settings, prefix)
        if (precision or "int8") == "int8":
            imported = {"method": "imported", "float_layers": report["float_layers"], "merged": report["merged"]}
            return Source(quantized, "int8", imported, path, path.parent)
        return Source(model, str(precision), None, path, path.parent)
    if precision == "int8":
        raise UserError(f"{path}: a float checkpoint has no scales for INT8; mend by running calibrate on it first")
    detector = build_model(settings)
    load_state(detector, float_weights(checkpoint, path), str(path), prefix)
    return Source(detector, precision or "fp32", None, path, path.parent)


def export_checkpoint(
    path: str | Path | None,
    precision: str | None = None,
    out: str | Path | None = None,
    config: str | Path | None = None,
    flavour: str = "tensorrt",
    prefix: str | None = None,
    frames: Callable[[dict[str, Any]], Sequence[Any]] | None = None,
    seed: int = 0,
    ema: bool = False,
    **form: Any,
) -> tuple[Path, dict[str, Any]]:
    """Writes a checkpoint's ONNX parts and manifest.

    Args:
        path, precision, config, prefix, seed, ema: as for `open_source`.
        out: the folder; None for onnx_{precision} beside the checkpoint (onnx_int8_onnxruntime for that flavour), for random
            weights under runs/.
        flavour: as for `export_parts`.
        frames: the model's config → real frames to verify on too, as for `export_parts`.
        form: what else `export_parts` takes: opset, batch, dynamic_batch, only, parts_int8, reduce_range, io.

    Returns:
        the folder and its manifest.

    Raises:
        UserError: as `open_source` and `export_parts`.
    """
    source = open_source(path, precision, config, prefix, seed, ema)
    usual = f"onnx_{source.precision}" if flavour == "tensorrt" else f"onnx_{source.precision}_{flavour}"
    folder = Path(out) if out is not None else source.folder / usual
    real = frames(source.detector.config) if frames is not None else ()
    manifest = export_parts(
        source.detector,
        folder,
        source.precision,
        flavour=flavour,
        checkpoint=source.path,
        ema=ema,
        recipe=source.recipe,
        frames=real,
        **form,
    )
    return folder, manifest


def export_programs(
    path: str | Path | None,
    precision: str | None = None,
    out: str | Path | None = None,
    config: str | Path | None = None,
    prefix: str | None = None,
    seed: int = 0,
    parts: Sequence[str] | None = None,
    ema: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Writes a checkpoint's parts as programs of torch.export (`qat.export.pt2`); the folder and its manifest.

    Args, Raises: as `export_checkpoint` and `export_pt2`; the folder is pt2_{precision}.
    """
    source = open_source(path, precision, config, prefix, seed, ema)
    folder = Path(out) if out is not None else source.folder / f"pt2_{source.precision}"
    manifest = export_pt2(
        source.detector,
        folder,
        source.precision,
        checkpoint=source.path,
        ema=ema,
        recipe=source.recipe,
        parts=list(build_wrappers(source.detector)) if parts is None else parts,
    )
    return folder, manifest
