"""Name the first layer that gives NaN or infinity, and the quantizers that saturate, in a checkpoint or exported parts.

Exit status 1 if anything is not finite.

example:
  bevqat calibrate --out runs/calibrate/ptq.pth
  bevqat health runs/calibrate/ptq.pth --data example-data --split calib --frames 4
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qat.cli.flags import add_data_flags, add_prefix_flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument(
        "source", type=Path, metavar="CKPT|DIR", help="a float or PTQ checkpoint, or a folder that export-camera wrote"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="YAML",
        help="for a folder, the config whose test pipeline reads the data (default camera-tiny's); for a float checkpoint, "
        "instead of the one inside or beside it",
    )
    add_prefix_flag(parser)
    add_data_flags(parser, "calib", "check on")
    parser.add_argument(
        "--saturation",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="name quantizers with a larger share of values beyond their range (default 0.01)",
    )


def run(args: argparse.Namespace) -> int:
    """Checks and prints."""
    from qat.calibrate import load_ptq
    from qat.cli import FAILED, OK
    from qat.compare.health import check_detector, check_parts, print_health
    from qat.core.config import load_config
    from qat.core.errors import UserError
    from qat.core.manifest import load_manifest
    from qat.data import NuScenesDataset
    from qat.export.checkpoint import config_of
    from qat.models import load_checkpoint, load_float_branch, load_float_model

    if not 0 <= args.saturation <= 1:
        raise UserError(f"--saturation: found {args.saturation}, expected a share from 0 to 1")
    folder = args.source.is_dir()
    checkpoint = {} if folder else load_checkpoint(args.source)
    if args.prefix is not None and (folder or checkpoint.get("format") == "bevqat-ptq"):
        what = "a folder of exported parts" if folder else "a PTQ checkpoint"
        raise UserError(f"{args.source}: {what} knows whether it is a camera branch alone; leave --prefix out")
    if folder:
        branch = load_manifest(args.source, check_files=False)["pipeline"].get("branch")
        config = load_config(args.config or Path("model/camera-tiny/config.yaml"), branch)
        frames = NuScenesDataset(args.data, args.split, config, args.version, args.frames)
        found = check_parts(args.source, frames)
    else:
        if checkpoint.get("format") == "bevqat-ptq":
            model: Any = load_ptq(args.source, finite=False)[0]
        elif args.prefix is not None:
            model, _ = load_float_branch(
                config_of(args.source, checkpoint, args.config, "camera"), args.source, args.prefix, finite=False
            )
        else:
            model = load_float_model(config_of(args.source, checkpoint, args.config), args.source, finite=False)
        found = check_detector(model, NuScenesDataset(args.data, args.split, model.config, args.version, args.frames))
    print_health(found, args.saturation)
    return OK if found.first is None else FAILED
