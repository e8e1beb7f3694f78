"""Write generated driving scenes in the nuScenes v1.0 format, or in KITTI's.

example:
  bevqat synth --out data/streets --scenes 10 --seed 1 --splits fit=8,eval=2
  bevqat synth --out data/kitti --format kitti --scenes 10 --seed 1 --splits train=8,val=2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.cli.flags import add_seed_flag
from qat.cli.json_output import add_json_flag, emit_json
from qat.core.errors import UserError

SIZES = {"nuscenes": ("400x225", 360), "kitti": ("1242x375", 1024)}  # of images, and columns of a revolution
SCENE_JPEG = 95  # quality of the images between the scenes and KITTI's PNG files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--scenes", type=int, required=True, metavar="N", help="how many")
    add_seed_flag(parser)
    parser.add_argument(
        "--keyframes", type=int, default=20, metavar="N", help="keyframes a scene, at 2 Hz (default 20)"
    )
    parser.add_argument("--splits", default="", metavar="NAME=N,…", help="scenes of each split, in order (default 4:1)")
    parser.add_argument(
        "--format",
        choices=tuple(SIZES),
        default="nuscenes",
        help="nuscenes: six cameras, a 32-beam lidar, tables; kitti: camera 2 and a 64-beam lidar, mounted as on KITTI's car, in KITTI's "
        "form with mmdetection3d's infos (default nuscenes)",
    )
    parser.add_argument(
        "--native",
        metavar="WxH",
        help="image size in pixels (default 400x225; of kitti 1242x375, on which its difficulties depend)",
    )
    parser.add_argument(
        "--azimuths",
        type=int,
        metavar="N",
        help="lidar columns a revolution (default 360; of kitti 1024, of which KITTI has twice as many)",
    )
    parser.add_argument(
        "--sweeps", type=int, metavar="N", help="lidar sweeps between keyframes (default 4); kitti has none"
    )
    parser.add_argument(
        "--jpeg-quality", type=int, metavar="N", help="1 to 95 (default 75); kitti's images are PNG files"
    )
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes (default 2); the result does not depend on it"
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Generates the data set."""
    from qat.data.synth import SynthOptions, generate

    kitti = args.format == "kitti"
    for flag, value in (("--sweeps", args.sweeps), ("--jpeg-quality", args.jpeg_quality)):
        if kitti and value is not None:
            raise UserError(
                f"{flag} only applies to --format nuscenes: KITTI has no sweeps, and PNG images; leave it out"
            )
    usual, columns = SIZES[args.format]
    native = args.native or usual
    try:
        width, height = (int(v) for v in native.lower().split("x"))
    except ValueError:
        raise UserError(f"--native: found {native!r}, expected WIDTHxHEIGHT such as 400x225") from None
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
        azimuths=columns if args.azimuths is None else args.azimuths,
        sweeps=0 if kitti else 4 if args.sweeps is None else args.sweeps,
        jpeg_quality=SCENE_JPEG if kitti else 75 if args.jpeg_quality is None else args.jpeg_quality,
        splits=splits,
        rig=args.format,
    )
    if kitti:
        from qat.families.mmdet3d.kitti_form import generate_kitti

        generate_kitti(args.out, options, args.workers)
    else:
        generate(args.out, options, args.workers)
    print(f"{args.out}: {args.scenes} scenes of {args.keyframes} keyframes")
    emit_json(args, {"out": args.out, "scenes": args.scenes, "keyframes": args.scenes * args.keyframes})
    return 0
