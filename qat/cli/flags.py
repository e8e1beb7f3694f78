"""Flags that several verbs have."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qat.core.errors import UserError


def add_data_flags(parser: argparse.ArgumentParser, split: str, what: str) -> None:
    """--data, --version, --split and --frames: which keyframes of a data set. what: the verb for --frames' help."""
    parser.add_argument("--data", type=Path, default=Path("example-data"), metavar="ROOT", help="nuScenes-format data")
    parser.add_argument("--version", metavar="NAME", help="needed where ROOT holds several, such as v1.0-mini")
    parser.add_argument("--split", default=split, help=f"default {split}")
    parser.add_argument("--frames", type=int, metavar="N", help=f"{what} N frames spread over the split (default all)")


def root_and_split(text: str, flag: str) -> tuple[Path, str]:
    """ROOT:SPLIT as its two parts.

    Raises:
        UserError: there are not two.
    """
    root, _, split = text.rpartition(":")
    if not (root and split):
        raise UserError(f"{flag}: found {text!r}, expected ROOT:SPLIT such as data/fit:fit")
    return Path(root), split


def add_init_flags(parser: argparse.ArgumentParser, source: argparse._MutuallyExclusiveGroup) -> None:
    """--init random, in the place of --ckpt (`source` holds that flag), and --seed; `init_seed` reads them."""
    source.add_argument(
        "--init", choices=("random",), help="no checkpoint: random weights of --config, for numerics and latency"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of --init random (default 0)")


def init_seed(args: argparse.Namespace) -> int:
    """The seed of `add_init_flags`.

    Raises:
        UserError: a seed without --init.
    """
    if args.seed is not None and args.init is None:
        raise UserError("--seed: found without --init random, expected both: a checkpoint's weights are not drawn")
    return args.seed or 0


def add_prefix_flag(parser: argparse.ArgumentParser) -> None:
    """--prefix: where the camera branch lies in a checkpoint."""
    parser.add_argument(
        "--prefix",
        metavar="NAME",
        help="take the camera branch alone, which lies under NAME in the checkpoint: encoders.camera in a whole camera+lidar "
        "model, '' in a state dict of the branch by itself",
    )


EXAMPLE = Path("example-data")


def add_verification_flags(parser: argparse.ArgumentParser) -> None:
    """--data, --version, --split and --frames of an export: which real keyframes it is verified on."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="ROOT",
        help="nuScenes-format data, or a folder with one keyframe and its info.json, to verify on beside a random frame "
        f"(default {EXAMPLE} where there is one)",
    )
    parser.add_argument("--version", metavar="NAME", help="needed where ROOT holds several, such as v1.0-mini")
    parser.add_argument("--split", metavar="SPLIT", help="default: all keyframes")
    parser.add_argument(
        "--frames", type=int, metavar="N", help="N frames spread over the split (default 1), 0 for none"
    )


def verification_frames(args: argparse.Namespace) -> Callable[[dict[str, Any]], Sequence[Any]] | None:
    """A model's config → the keyframes that `add_verification_flags`' flags choose; None for no real ones.

    Raises:
        UserError: flags that do not go together. The function: the data cannot be read, or has not so many frames.
    """
    root, count = args.data, 1 if args.frames is None else args.frames
    if count < 0:
        raise UserError(f"--frames: found {count}, expected 0 (the random frame alone) or more")
    if root is None and EXAMPLE.is_dir():
        root = EXAMPLE
    if root is None:
        given = [f"--{name}" for name in ("version", "split", "frames") if getattr(args, name)]
        if given:
            raise UserError(
                f"{', '.join(given)}: found no data to choose from, expected --data ROOT; there is no {EXAMPLE}"
            )
        return None
    if count == 0:
        return None

    def load(config: dict[str, Any]) -> Sequence[Any]:
        from qat.data import NuScenesDataset
        from qat.data.frame import load_frame

        if (root / "info.json").is_file():
            if count > 1 or args.split or args.version:
                raise UserError(f"{root}: one keyframe, expected neither --version nor --split, and --frames 1 or 0")
            return [load_frame(root, config)]
        return NuScenesDataset(root, args.split or "all", config, args.version, count)

    return load
