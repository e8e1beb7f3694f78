"""Opens a checkpoint file as a `Model`, which is read once and passed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.calibrate.checkpoint import FORMAT as PTQ_FORMAT
from qat.calibrate.checkpoint import ptq_of, reference_of
from qat.checkpoints.reading import float_weights, load_checkpoint
from qat.core.errors import UserError
from qat.families import DEFAULT, KEY, family_named, family_of, of_python_config
from qat.families.family import Family

if TYPE_CHECKING:
    from qat.model.quantized import QuantizedModel


@dataclass(frozen=True)
class Source:
    """The network that a stage opens.

    checkpoint: its file; None for random weights of `config`, drawn with `seed`. config: for a checkpoint that is not ours;
    None for the one inside it, or else config.yaml next to it. prefix: opens the part of a larger model under this name (for
    BEVFusion the camera branch: "encoders.camera" in a whole model, "" in a state dict of the branch alone), and reads only
    that part of the config. ema: use the averaged weights of a float checkpoint that has two sets.
    """

    checkpoint: str | Path | None = None
    config: str | Path | None = None
    prefix: str | None = None
    ema: bool = False
    seed: int = 0

    def checked_config(self) -> Path:
        """The config of random weights.

        Raises:
            UserError: there is no config, or averaged weights are requested.
        """
        if self.config is None:
            raise UserError("--init random: found no --config, expected the network's")
        if self.ema:
            raise UserError("--ema: found --init random, expected a checkpoint with averaged weights")
        return Path(self.config)


@dataclass
class Model:
    """The content of a checkpoint.

    network: the float network. quantized: for a PTQ checkpoint, or one that another tool quantized; None for a float one.
    recipe: how it was quantized. path: None for random weights. left_out: names in the file that are not weights of this
    network.
    """

    family: Family
    network: Any
    quantized: QuantizedModel | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    ema: bool = False
    left_out: int = 0

    @property
    def config(self) -> Any:
        """The model's config, which a checkpoint may have completed."""
        return (self.network if self.quantized is None else self.quantized).config

    @property
    def best(self) -> Any:
        """The quantized network if there is one, else the float one."""
        return self.network if self.quantized is None else self.quantized


def find_config(
    path: Path, checkpoint: Mapping[str, Any], given: str | Path | None, prefix: str | None
) -> tuple[Family, dict[str, Any]]:
    """The config of a float checkpoint and its family. Uses the given config, or the one inside the checkpoint, or config.yaml
    next to it.

    Raises:
        UserError: there is no config, or it describes a network that cannot be built.
    """
    beside = path.parent / "config.yaml"
    if given is None and isinstance(config := checkpoint.get("config"), dict):
        family = family_of(config, f"{path}: config")
        return family, family.check_config(config, f"{path}: config", prefix)
    if given is None and not beside.is_file():
        raise UserError(
            f"{path}: holds no config and {beside} does not exist; give the run's configs.yaml with --config"
        )
    return read_config(beside if given is None else given, prefix)


def read_config(path: str | Path, prefix: str | None = None) -> tuple[Family, dict[str, Any]]:
    """A config file and its family; raises as `Family.load_config`."""
    family = family_named(_family_in(Path(path)))
    return family, family.load_config(path, prefix)


def _family_in(path: Path) -> str:
    """The family named by a line of a YAML config, or the default; for a config in Python, the family of its model."""
    if path.suffix == ".py":
        return of_python_config(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return DEFAULT  # the family's reader reports errors of the file
    found = [line.split(":", 1)[1].strip().strip("\"'") for line in lines if line.startswith(f"{KEY}:")]
    return family_of({KEY: found[0]}, str(path)).name if found else DEFAULT


def random_model(config: str | Path, seed: int = 0, prefix: str | None = None) -> Model:
    """A network with random weights, to measure latency and numerics with."""
    family, settings = read_config(config, prefix)
    return Model(family, family.random(settings, seed))


def open_model(
    path: str | Path,
    config: str | Path | None = None,
    prefix: str | None = None,
    ema: bool = False,
    finite: bool = True,
    as_float: bool = False,
    read: dict[str, Any] | None = None,
) -> Model:
    """Opens a checkpoint.

    Args:
        path: a checkpoint of calibrate (PTQ); one that another tool quantized (`qat.calibrate.foreign`); or a float one:
            {"state_dict": …}, a bare state dict, a pickled network.
        config: for a checkpoint that is not ours; None for the one inside it, or else config.yaml next to it.
        prefix: for such a checkpoint, opens the part of a larger model under this name (for BEVFusion the camera branch).
        ema: for a float checkpoint with two sets of weights, use the averaged ones.
        finite: False accepts weights that are NaN or infinite, to examine their effect.
        as_float: return the float network: from a PTQ checkpoint its float weights, with all quantizers off.
        read: the result of `load_checkpoint(path)`, if available.

    Raises:
        UserError: the checkpoint does not load or does not fit its config.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path, ema) if read is None else read
    if checkpoint.get("format") == PTQ_FORMAT:
        if config is not None:
            raise UserError(f"{path}: a PTQ checkpoint contains its config; omit --config")
        if prefix is not None:
            raise UserError(f"{path}: a PTQ checkpoint records whether it is a camera branch; omit --prefix")
        quantized, network = reference_of(checkpoint, path) if as_float else ptq_of(checkpoint, path, finite)
        return Model(quantized.family, network, quantized, dict(checkpoint["recipe"]), path)
    family, settings = find_config(path, checkpoint, config, prefix)
    if "quantizers" in checkpoint and not as_float:
        from qat.calibrate.foreign import load_foreign_file

        quantized, network, report = load_foreign_file(path, checkpoint, family, settings, prefix)
        recipe = {"method": "imported", "float_layers": report["float_layers"], "merged": report["merged"]}
        return Model(family, network, quantized, recipe, path, ema)
    return _float(family, settings, checkpoint, path, prefix, ema, finite)


def _float(
    family: Family,
    config: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    path: Path,
    prefix: str | None,
    ema: bool,
    finite: bool,
) -> Model:
    meta = checkpoint.get("meta")
    config = family.trained_with(config, meta if isinstance(meta, Mapping) else {}, str(path))
    network = family.build(config)
    left_out = family.load_state(network, float_weights(checkpoint, path), str(path), prefix, finite)
    return Model(family, network.eval(), path=path, ema=ema, left_out=left_out)


def load_float(
    family: Family,
    config: Mapping[str, Any],
    path: str | Path,
    prefix: str | None = None,
    ema: bool = False,
    finite: bool = True,
) -> Model:
    """The network of a checked config with a float checkpoint's weights; args as in `open_model`, raises like `open_float`."""
    return _float(family, config, _read_float(path, ema), Path(path), prefix, ema, finite)


def _read_float(path: str | Path, ema: bool) -> dict[str, Any]:
    checkpoint = load_checkpoint(path, ema)
    if checkpoint.get("format") == PTQ_FORMAT:
        raise UserError(
            f"{path}: found a quantized checkpoint, expected the float one that it was calibrated from; use that"
        )
    return checkpoint


def open_float(source: Source) -> Model:
    """Opens a float network: a checkpoint's, or one with random weights.

    Raises:
        UserError: like `open_model`; or it is a quantized checkpoint.
    """
    if source.checkpoint is None:
        return random_model(source.checked_config(), source.seed, source.prefix)
    path = Path(source.checkpoint)
    given = None if source.config is None else read_config(source.config, source.prefix)
    checkpoint = _read_float(path, source.ema)
    family, config = given or find_config(path, checkpoint, None, source.prefix)
    return _float(family, config, checkpoint, path, source.prefix, source.ema, finite=True)
