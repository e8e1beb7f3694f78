"""Write generated driving scenes in the nuScenes v1.0 format.

example:
  bevqat synth --out data/streets --scenes 10 --seed 1 --splits fit=8,eval=2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.cli.flags import add_seed_flag
from qat.cli.json_output import add_json_flag, emit_json
from qat.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--scenes", type=int, required=True, metavar="N", help="how many")
    add_seed_flag(parser)
    parser.add_argument(
        "--keyframes", type=int, default=20, metavar="N", help="keyframes a scene, at 2 Hz (default 20)"
    )
    parser.add_argument("--splits", default="", metavar="NAME=N,…", help="scenes of each split, in order (default 4:1)")
    parser.add_argument("--native", default="400x225", metavar="WxH", help="image size in pixels (default 400x225)")
    parser.add_argument(
        "--azimuths", type=int, default=360, metavar="N", help="lidar columns a revolution (default 360)"
    )
    parser.add_argument("--sweeps", type=int, default=4, metavar="N", help="lidar sweeps between keyframes (default 4)")
    parser.add_argument("--jpeg-quality", type=int, default=75, metavar="N", help="1 to 95 (default 75)")
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes (default 2); the result does not depend on it"
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Generates the data set."""
    from qat.data.synth import SynthOptions, generate

    try:
        width, height = (int(v) for v in args.native.lower().split("x"))
    except ValueError:
        raise UserError(f"--native: found {args.native!r}, expected WIDTHxHEIGHT such as 400x225") from None
    splits: dict[str, int] = {}
    for item in filter(None, args.splits.split(",")):
        name, _, count = item.partition("=")
        if not name or not count.isdigit():
            raise UserError(f"--splits: found {item!r}, expected NAME=COUNT such as eval=2")
        splits[name] = int(count)
    options = SynthOptions(
        scenes=args.scenes,
        seed=args.seed,
        keyframes=args.keyframes,
        width=width,
        height=height,
        azimuths=args.azimuths,
        sweeps=args.sweeps,
        jpeg_quality=args.jpeg_quality,
        splits=splits,
    )
    root = generate(args.out, options, args.workers)
    print(f"{root}: {args.scenes} scenes of {args.keyframes} keyframes")
    emit_json(args, {"out": root, "scenes": args.scenes, "keyframes": args.scenes * args.keyframes})
    return 0
