"""Export of a checkpoint file, float or quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.core.errors import UserError
from qat.export.parts import export_parts
from qat.export.pt2 import export_pt2
from qat.model.opening import Model, open_model, random_model


@dataclass
class Source:
    """What is exported. network: in the state in which it is. folder: where its exports go by themselves."""

    model: Model
    network: Any
    precision: str
    folder: Path

    @property
    def recipe(self) -> dict[str, Any] | None:
        """How the quantizers were calibrated; None of a float network."""
        return self.model.recipe if self.precision == "int8" else None


def open_source(
    path: str | Path | None,
    precision: str | None = None,
    config: str | Path | None = None,
    prefix: str | None = None,
    seed: int = 0,
    ema: bool = False,
) -> Source:
    """The network of a checkpoint, in the state in which it is exported.

    Args:
        path: of the checkpoint (`qat.model.opening.open_model`); None for random weights of `config`.
        precision: "int8", "fp16" or "fp32"; None for INT8 of a quantized checkpoint and FP32 of a float one.
        config, prefix, ema: as for `open_model`.
        seed: of random weights.

    Raises:
        UserError: the checkpoint does not load or does not fit its config, or is a float one and INT8 is asked for.
    """
    if path is None:
        if config is None:
            raise UserError("--init random: found no --config, expected the network's")
        if precision == "int8":
            raise UserError("--init random: found no scales for INT8; fix by bevqat calibrate --init random first")
        if ema:
            raise UserError("--ema: found with --init random, expected a checkpoint that has averaged weights")
        model = random_model(config, seed, prefix)
        return Source(model, model.network, precision or "fp32", Path("runs") / Path(config).resolve().parent.name)
    # FP32 and FP16 parts are of the float network: weights that were trained for rounding are not it without rounding.
    model = open_model(path, config, prefix, ema, as_float=precision not in (None, "int8"))
    if model.quantized is None and precision == "int8":
        raise UserError(f"{path}: a float checkpoint has no scales for INT8; fix by running calibrate on it first")
    return Source(model, model.best, precision or ("fp32" if model.quantized is None else "int8"), Path(path).parent)


def export_checkpoint(
    path: str | Path | None,
    precision: str | None = None,
    out: str | Path | None = None,
    config: str | Path | None = None,
    flavour: str = "tensorrt",
    prefix: str | None = None,
    frames: Callable[[Model], Sequence[Any]] | None = None,
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
        frames: the model → real frames to verify on too, as for `export_parts`.
        form: what else `export_parts` takes: opset, batch, dynamic_batch, only, parts_int8, reduce_range, io.

    Returns:
        the folder and its manifest.

    Raises:
        UserError: as `open_source` and `export_parts`.
    """
    source = open_source(path, precision, config, prefix, seed, ema)
    usual = f"onnx_{source.precision}" if flavour == "tensorrt" else f"onnx_{source.precision}_{flavour}"
    folder = Path(out) if out is not None else source.folder / usual
    manifest = export_parts(
        source.network,
        folder,
        source.precision,
        flavour=flavour,
        checkpoint=source.model.path,
        ema=ema,
        recipe=source.recipe,
        frames=frames(source.model) if frames is not None else (),
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
        source.network,
        folder,
        source.precision,
        checkpoint=source.model.path,
        ema=ema,
        recipe=source.recipe,
        parts=parts,
    )
    return folder, manifest
