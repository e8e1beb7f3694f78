"""Export of a checkpoint file, float or quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qat.core.errors import UserError
from qat.export.options import ExportOptions, Origin
from qat.export.parts import export_parts
from qat.export.pt2 import export_pt2
from qat.model.opening import Model, Source, open_model, random_model


@dataclass(frozen=True)
class Opened:
    """A network ready for export. folder: the default place of its exports."""

    model: Model
    network: Any
    precision: str
    folder: Path

    @property
    def origin(self) -> Origin:
        """Its origin, for the manifest."""
        recipe = self.model.recipe if self.precision == "int8" else None
        return Origin(self.model.path, recipe, self.model.ema)


def open_source(source: Source, precision: str | None = None) -> Opened:
    """The network of a source, ready for export.

    Args:
        precision: "int8", "fp16" or "fp32"; None for INT8 of a quantized checkpoint and FP32 of a float one.

    Raises:
        UserError: the checkpoint does not load or does not fit its config, or is a float one and INT8 is requested.
    """
    if source.checkpoint is None:
        config = source.checked_config()
        if precision == "int8":
            raise UserError("--init random: found no scales for INT8; run bevqat calibrate --init random first")
        model = random_model(config, source.seed, source.prefix)
        return Opened(model, model.network, precision or "fp32", Path("runs") / Path(config).resolve().parent.name)
    # FP32 and FP16 parts come from the float network: weights that were trained with rounding differ from it.
    path, as_float = Path(source.checkpoint), precision not in (None, "int8")
    model = open_model(path, source.config, source.prefix, source.ema, as_float=as_float)
    if model.quantized is None and precision == "int8":
        raise UserError(f"{path}: a float checkpoint has no scales for INT8; run calibrate on it first")
    return Opened(model, model.best, precision or ("fp32" if model.quantized is None else "int8"), path.parent)


def export_checkpoint(
    source: Source,
    options: ExportOptions | None = None,
    out: str | Path | None = None,
    frames: Callable[[Model], Sequence[Any]] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Writes a checkpoint's ONNX parts and manifest.

    Args:
        out: the folder; None for onnx_{precision} next to the checkpoint (onnx_int8_onnxruntime for that flavour), or for
            random weights under runs/.
        frames: returns the model's real frames to verify on too, as in `export_parts`.

    Returns:
        the folder and its manifest.

    Raises:
        UserError: like `open_source` and `export_parts`.
    """
    options = options or ExportOptions()
    opened = open_source(source, options.precision)
    usual = f"onnx_{opened.precision}" + ("" if options.flavour == "tensorrt" else f"_{options.flavour}")
    folder = Path(out) if out is not None else opened.folder / usual
    settled = replace(options, precision=opened.precision)
    real = frames(opened.model) if frames is not None else ()
    return folder, export_parts(opened.network, folder, settled, real, opened.origin)


def export_programs(
    source: Source, options: ExportOptions | None = None, out: str | Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """Writes a checkpoint's parts as torch.export programs (`qat.export.pt2`); returns the folder and its manifest.

    Args, Raises: as `export_checkpoint` and `export_pt2`; the folder is pt2_{precision}.
    """
    options = options or ExportOptions()
    options.check_programs()
    opened = open_source(source, options.precision)
    folder = Path(out) if out is not None else opened.folder / f"pt2_{opened.precision}"
    settled = replace(options, precision=opened.precision)
    return folder, export_pt2(opened.network, folder, settled, opened.origin)
