"""Export of a checkpoint file, float or quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qat.calibrate import load_ptq
from qat.calibrate.checkpoint import load_float_reference
from qat.core.config import Branch, camera_branch, check_config, load_config
from qat.core.errors import UserError
from qat.export.parts import export_parts
from qat.models import build_model, load_checkpoint, load_state

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
        if branch is None:
            return config
        check_config(config, f"{path}: config", branch)
        return camera_branch(config)
    beside = path.parent / "config.yaml"
    if beside.is_file():
        return load_config(beside, branch)
    raise UserError(f"{path}: holds no config and {beside} does not exist; name the run's configs.yaml with --config")


def export_checkpoint(
    path: str | Path,
    precision: str | None = None,
    out: str | Path | None = None,
    config: str | Path | None = None,
    flavour: str = "tensorrt",
    prefix: str | None = None,
    frames: Callable[[dict[str, Any]], Sequence[Any]] | None = None,
    **form: Any,
) -> tuple[Path, dict[str, Any]]:
    """Writes a checkpoint's ONNX parts and manifest.

    Args:
        path: a checkpoint of calibrate (PTQ), or a float one: {"state_dict": …} or a bare state dict.
        precision: "int8", "fp16" or "fp32"; None for INT8 of a PTQ checkpoint and FP32 of a float one.
        out: the folder; None for onnx_{precision} beside the checkpoint (onnx_int8_onnxruntime for that flavour).
        flavour: as for `export_parts`.
        config: for a float checkpoint; None for the one inside it, else config.yaml beside it.
        prefix: for a float checkpoint, takes the camera branch alone, which lies under it, as `calibrate_checkpoint` has
            it; camera.backbone and camera.vtransform are then all that is written.
        frames: the model's config → real frames to verify on too, as for `export_parts`.
        form: opset, batch, dynamic_batch, only, parts_int8, reduce_range: as for `export_parts`.

    Returns:
        the folder and its manifest.

    Raises:
        UserError: the checkpoint does not load or does not fit its config, or is a float one and INT8 is asked for.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path)
    quantized = checkpoint.get("format") == PTQ_FORMAT
    precision = precision or ("int8" if quantized else "fp32")
    detector: Any
    recipe: dict[str, Any] | None = None
    if quantized:
        if config is not None:
            raise UserError(f"{path}: a PTQ checkpoint carries its config; leave --config out")
        if prefix is not None:
            raise UserError(f"{path}: a PTQ checkpoint knows whether it is a camera branch alone; leave --prefix out")
        # FP32 and FP16 parts are of the float network: weights that were trained for rounding are not it without rounding.
        detector, recipe = load_ptq(path) if precision == "int8" else (load_float_reference(path)[0], None)
    elif precision == "int8":
        raise UserError(f"{path}: a float checkpoint has no scales for INT8; mend by running calibrate on it first")
    else:
        detector = build_model(config_of(path, checkpoint, config, None if prefix is None else "camera"))
        load_state(detector, checkpoint["state_dict"], str(path), prefix)
    usual = f"onnx_{precision}" if flavour == "tensorrt" else f"onnx_{precision}_{flavour}"
    folder = Path(out) if out is not None else path.parent / usual
    real = frames(detector.config) if frames is not None else ()
    manifest = export_parts(
        detector, folder, precision, flavour=flavour, checkpoint=path, recipe=recipe, frames=real, **form
    )
    return folder, manifest
