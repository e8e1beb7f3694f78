"""Find the first layer with NaN or infinity, and quantizers that saturate, in a checkpoint or exported parts.

Exit status 1 if anything is not finite.

example:
  bevqat calibrate --out runs/calibrate/ptq.pth
  bevqat health runs/calibrate/ptq.pth --data example-data --split calib --frames 4
"""

from __future__ import annotations

import argparse

from qat.cli.flags import (
    MODEL,
    add_checkpoint,
    add_config_flag,
    add_data_flags,
    add_ema_flag,
    add_prefix_flag,
    checkpoint_of,
)
from qat.cli.json_output import add_json_flag, emit_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    add_checkpoint(parser, "a float or PTQ checkpoint, or a folder that export-camera wrote", folder=True)
    add_config_flag(
        parser,
        when="default: the one inside or next to a float checkpoint; for a folder, whose data are read as its test pipeline "
        f"says, {MODEL / 'config.yaml'}",
    )
    add_prefix_flag(parser)
    add_ema_flag(parser)
    add_data_flags(parser, "calib", "check on")
    parser.add_argument(
        "--saturation",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="name quantizers with a larger share of values beyond their range (default 0.01)",
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Checks and prints."""
    from qat.cli import FAILED, OK
    from qat.compare.health import check_detector, check_parts, print_health, saturated
    from qat.core.errors import UserError
    from qat.core.progress import counted
    from qat.families import DEFAULT, KEY, flow_of
    from qat.manifest import load_manifest, pipeline_of
    from qat.model.opening import open_model, read_config

    if not 0 <= args.saturation <= 1:
        raise UserError(f"--saturation: found {args.saturation}, expected a share from 0 to 1")
    source = checkpoint_of(args)
    folder = source.is_dir()
    if folder and args.ema:
        raise UserError(f"--ema: found {source}, a folder of exported parts, expected a float checkpoint; omit --ema")
    if folder and args.prefix is not None:
        raise UserError(f"{source}: a folder of exported parts records whether it is a camera branch; omit --prefix")
    if folder:
        settings = pipeline_of(source, load_manifest(source, check_files=False))
        flow = flow_of(settings, source=str(source))
        prefix = None if flow.plan.boxes else ""
        family, config = read_config(args.config or MODEL / "config.yaml", prefix)
        if family.name != settings.get(KEY, DEFAULT):
            raise UserError(
                f"{source}: found parts of the family {settings[KEY]}, expected that family's config; give it with --config"
            )
        frames = family.dataset(args.data, args.split, config, args.version, args.frames)
        found = check_parts(source, counted("check", frames, len(frames)))
    else:
        model = open_model(source, args.config, args.prefix, args.ema, finite=False)
        frames = model.family.dataset(args.data, args.split, model.config, args.version, args.frames)
        found = check_detector(model.best, counted("check", frames, len(frames)))
    print_health(found, args.saturation)
    emit_json(
        args,
        {
            "source": source,
            "frames": found.frames,
            "passed": found.first is None,
            "first": None if found.first is None else vars(found.first),
            "quantizers": len(found.saturation),
            "saturated": saturated(found, args.saturation),
        },
    )
    return OK if found.first is None else FAILED
