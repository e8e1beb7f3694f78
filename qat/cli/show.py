"""Draw a sample's lidar points and annotated boxes over its images, as the network sees them.

example:
  bevqat show --data example-data --split eval --index 3 --out runs/sample.png
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from qat.cli.flags import EXAMPLE, MODEL, SPLIT_HELP, VERSION_HELP, add_config_flag
from qat.cli.json_output import add_json_flag, emit_json
from qat.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    add_config_flag(parser, MODEL / "config.yaml")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", type=Path, default=EXAMPLE, metavar="ROOT", help=f"nuScenes-format data (default {EXAMPLE})"
    )
    source.add_argument("--frame", type=Path, metavar="DIR", help="one keyframe: images, a sweep and info.json")
    parser.add_argument("--version", metavar="NAME", help=VERSION_HELP)
    parser.add_argument("--split", default="all", metavar="NAME", help=f"{SPLIT_HELP} (default all)")
    parser.add_argument(
        "--index", type=int, default=0, metavar="N", help="keyframe of the split, by number (default 0)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="file to write")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Draws the sheet."""
    from PIL import Image

    from qat.core.files import atomic_path
    from qat.data.overlay import draw_sample
    from qat.model.opening import read_config

    family, config = read_config(args.config)
    if args.frame:
        sample = family.frame(args.frame, config)
    else:
        dataset = family.dataset(args.data, args.split, config, args.version)
        if not 0 <= args.index < len(dataset):
            raise UserError(
                f"--index: found {args.index}, expected one of split {args.split!r}'s keyframes 0 to {len(dataset) - 1}"
            )
        sample = dataset[args.index]
    buffer = io.BytesIO()
    Image.fromarray(draw_sample(sample)).save(buffer, "PNG")
    with atomic_path(args.out) as temporary:
        temporary.write_bytes(buffer.getvalue())
    print(f"{args.out}: {len(sample.gt_boxes)} boxes, {len(sample.points)} points")
    emit_json(
        args, {"out": args.out, "token": sample.token, "boxes": len(sample.gt_boxes), "points": len(sample.points)}
    )
    return 0
