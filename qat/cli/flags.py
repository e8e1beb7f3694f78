"""Flags that verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.core.errors import PictureSizeError, UserError

if TYPE_CHECKING:
    from qat.compare import Sources

MODEL = Path("model/camera-tiny")
EXAMPLE = Path("example-data")
VERSION_HELP = "required if ROOT holds several, such as v1.0-mini"
SPLIT_HELP = "split of the data"


def add_config_flag(parser: argparse.ArgumentParser, default: Path | None = None, when: str = "") -> None:
    """Adds --config. when: text for the help if there is no default."""
    parser.add_argument(
        "--config",
        type=Path,
        default=default,
        metavar="FILE",
        help=f"the network's config, YAML or Python ({when or f'default {default}'})",
    )
    parser.add_argument(
        "--no-python-config", action="store_true", help="refuse a --config in Python, which is code that is run"
    )


def check_config(args: argparse.Namespace) -> None:
    """Raises `UserError` for a config in Python with --no-python-config."""
    config = getattr(args, "config", None)
    if getattr(args, "no_python_config", False) and config is not None and config.suffix == ".py":
        raise UserError(f"{config}: found a config in Python with --no-python-config, expected YAML: it would be run")


def add_checkpoint(parser: argparse.ArgumentParser, what: str, folder: bool = False) -> None:
    """CKPT, or --ckpt CKPT as other verbs have it; `checkpoint_of` reads them. folder: --onnx DIR is a third way."""
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("source", nargs="?", type=Path, metavar="CKPT|DIR" if folder else "CKPT", help=what)
    either.add_argument("--ckpt", dest="ckpt", type=Path, metavar="CKPT", help="same as the positional argument")
    if folder:
        either.add_argument("--onnx", type=Path, metavar="DIR", help="same, for a folder")


def checkpoint_of(args: argparse.Namespace) -> Path:
    """The path that `add_checkpoint`'s flags name."""
    found: Path = next(path for path in (args.source, args.ckpt, getattr(args, "onnx", None)) if path is not None)
    return found


def add_out_flag(parser: argparse.ArgumentParser, metavar: str, default: Path | str, what: str = "") -> None:
    """Adds --out. what: what is written. default: a path, or a text if it follows from other flags."""
    what = what or {"DIR": "folder to write", "CKPT": "checkpoint to write"}.get(metavar, "file to write")
    parser.add_argument(
        "--out",
        type=Path,
        default=default if isinstance(default, Path) else None,
        metavar=metavar,
        help=f"{what} (default {default})",
    )


def add_seed_flag(parser: argparse.ArgumentParser) -> None:
    """--seed."""
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default 0)")


def add_rounds_flags(parser: argparse.ArgumentParser, rounds: int, repeats: int | None) -> None:
    """Adds --rounds and, unless `repeats` is None, --repeats of a latency measurement, with their defaults."""
    parser.add_argument(
        "--rounds", type=int, default=rounds, metavar="N", help=f"latency rounds: turns of each row (default {rounds})"
    )
    if repeats is not None:
        parser.add_argument(
            "--repeats", type=int, default=repeats, metavar="N", help=f"counted runs of a turn (default {repeats})"
        )


def add_data_flags(parser: argparse.ArgumentParser, split: str, what: str) -> None:
    """Adds --data, --version, --split and --frames, which choose keyframes of a data set. what: the verb in --frames' help."""
    parser.add_argument(
        "--data", type=Path, default=EXAMPLE, metavar="ROOT", help=f"nuScenes-format data (default {EXAMPLE})"
    )
    parser.add_argument("--version", metavar="NAME", help=VERSION_HELP)
    parser.add_argument("--split", default=split, metavar="NAME", help=f"{SPLIT_HELP} (default {split})")
    parser.add_argument("--frames", type=int, metavar="N", help=f"{what} N frames spread over the split (default all)")


def add_data_sets_flags(parser: argparse.ArgumentParser, what: str, held_out: str) -> None:
    """Adds --data (repeatable), --version, --split and --held-out; `data_sets` reads the first three."""
    parser.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="ROOT[:SPLIT]",
        help=f"{what}; repeatable",
    )
    parser.add_argument("--version", metavar="NAME", help=VERSION_HELP)
    parser.add_argument("--split", metavar="NAME", help=f"{SPLIT_HELP}, of each ROOT without :SPLIT")
    parser.add_argument("--held-out", metavar="ROOT:SPLIT", help=held_out)


def data_sets(args: argparse.Namespace) -> list[tuple[Path, str]]:
    """(root, split) of each --data.

    Raises:
        UserError: a --data has no split, neither its own nor from --split.
    """
    return [
        (Path(text), args.split)
        if args.split and (Path(text).is_dir() or ":" not in text)
        else root_and_split(text, "--data")
        for text in args.data
    ]


def root_and_split(text: str, flag: str) -> tuple[Path, str]:
    """Splits ROOT:SPLIT in two.

    Raises:
        UserError: the text has another form.
    """
    root, _, split = text.rpartition(":")
    if not (root and split):
        raise UserError(f"{flag}: found {text!r}, expected ROOT:SPLIT such as data/fit:fit")
    return Path(root), split


def add_init_flags(parser: argparse.ArgumentParser, source: argparse._MutuallyExclusiveGroup) -> None:
    """Adds --init random, an alternative to --ckpt (in the group `source`), and --seed; `init_seed` reads them."""
    source.add_argument(
        "--init", choices=("random",), help="random weights instead of a checkpoint, for numerics and latency"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="random seed, only with --init random (default 0)")


def init_seed(args: argparse.Namespace) -> int:
    """The seed of `add_init_flags`.

    Raises:
        UserError: a seed without --init.
    """
    if args.seed is not None and args.init is None:
        raise UserError("--seed: only applies with --init random; omit it")
    return args.seed or 0


def add_prefix_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --prefix: the place of the camera branch in a checkpoint."""
    parser.add_argument(
        "--prefix",
        metavar="NAME",
        help="use only the camera branch, under NAME in the checkpoint: encoders.camera in a whole camera+lidar "
        "model, '' in a state dict of the branch alone",
    )


def add_ema_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --ema, which chooses between two sets of weights in a float checkpoint."""
    parser.add_argument(
        "--ema",
        action="store_true",
        help="use the checkpoint's averaged weights (ema_*, state_dict_ema, ema_state_dict)",
    )


def add_verification_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --data, --version, --split and --frames of an export: the real keyframes to verify on."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="ROOT",
        help="nuScenes-format data, or a folder with one keyframe and its info.json, to verify on besides a generated frame "
        f"(default {EXAMPLE} where there is one)",
    )
    parser.add_argument("--version", metavar="NAME", help=VERSION_HELP)
    parser.add_argument("--split", metavar="NAME", help=f"{SPLIT_HELP} (default all)")
    parser.add_argument(
        "--frames", type=int, metavar="N", help="verify on N frames spread over the split (default 1), 0 for none"
    )


def verification_frames(args: argparse.Namespace) -> Callable[[Any], Sequence[Any]] | None:
    """A function from a `qat.model.opening.Model` to the keyframes that `add_verification_flags`' flags choose; None for none.

    Raises:
        UserError: the flags contradict each other. From the function: the data cannot be read, or has too few frames.
    """
    root, count = args.data, 1 if args.frames is None else args.frames
    chosen = root is not None
    if count < 0:
        raise UserError(f"--frames: found {count}, expected 0 (only the generated frame) or more")
    if root is None and EXAMPLE.is_dir():
        root = EXAMPLE
    if root is None:
        given = [f"--{name}" for name in ("version", "split", "frames") if getattr(args, name)]
        if given:
            raise UserError(f"{', '.join(given)}: only applies with --data; add --data ROOT (there is no {EXAMPLE})")
        return None
    if count == 0:
        return None

    def load(model: Any) -> Sequence[Any]:
        from qat.core.console import note

        if (root / "info.json").is_file():
            if count > 1 or args.split or args.version:
                raise UserError(
                    f"{root}: found one keyframe, expected neither --version nor --split, and --frames 1 or 0"
                )
            return [model.family.frame(root, model.config)]
        dataset = model.family.dataset(root, args.split or "all", model.config, args.version, count)
        if not chosen:
            try:
                dataset[0]
            except PictureSizeError as error:
                note(f"{root}: verified on the generated frame only, because {error}; choose other data with --data")
                return []
        return dataset

    return load


def add_rows_flags(parser: argparse.ArgumentParser) -> None:
    """--ckpt, --config, --ema, --ptq and --onnx: the files of a comparison's rows; `rows_of` reads them."""
    weights = MODEL / "camera-tiny.pth"
    parser.add_argument(
        "--ckpt", type=Path, default=weights, metavar="CKPT", help=f"float checkpoint (default {weights})"
    )
    add_config_flag(parser, when="default: the one inside or next to the checkpoint")
    add_ema_flag(parser)
    parser.add_argument("--ptq", type=Path, metavar="CKPT", help="calibrate's checkpoint, for the simulated INT8 row")
    parser.add_argument(
        "--onnx",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="exported parts, FP32 and INT8",
    )
    for name in ("fp32", "int8"):  # the spelling until 0.1
        parser.add_argument(f"--{name}", type=Path, action="append", default=[], help=argparse.SUPPRESS)


def rows_of(args: argparse.Namespace) -> Sources:
    """What `add_rows_flags` names."""
    from qat.compare import Sources
    from qat.manifest import load_manifest

    folders = {"fp32": list(args.fp32), "int8": list(args.int8)}
    for folder in args.onnx:
        precision = load_manifest(folder, check_files=False)["precision"]
        if precision not in folders:
            raise UserError(
                f"{folder}: found {precision} parts, expected fp32 or int8: use `bevqat benchmark` for fp16 on a GPU"
            )
        folders[precision].append(folder)
    return Sources(args.ckpt, args.ptq, folders["fp32"], folders["int8"], args.config, args.ema)
