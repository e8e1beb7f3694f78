"""Write generated driving scenes in the nuScenes v1.0 format.

example:
  bevqat synth --out data/streets --scenes 10 --seed 1 --splits fit=8,eval=2
"""

from __future__ import annotations

import argparse
import sys

from qat.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write the data set into")
    parser.add_argument("--scenes", type=int, required=True, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument(
        "--keyframes", type=int, default=20, metavar="K", help="keyframes a scene, at 2 Hz (default 20)"
    )
    parser.add_argument("--splits", default="", metavar="NAME=N,…", help="scenes of each split, in order (default 4:1)")
    parser.add_argument("--native", default="400x225", metavar="WxH", help="image size in pixels (default 400x225)")
    parser.add_argument("--azimuths", type=int, default=360, help="lidar columns a revolution (default 360)")
    parser.add_argument("--sweeps", type=int, default=4, help="lidar sweeps between keyframes (default 4)")
    parser.add_argument("--jpeg-quality", type=int, default=75)
    parser.add_argument("--workers", type=int, default=2, help="processes (the result does not depend on it)")


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
    root = generate(args.out, options, args.workers, quiet=not sys.stderr.isatty())
    print(f"{root}: {args.scenes} scenes of {args.keyframes} keyframes")
    return 0
