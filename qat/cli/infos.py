"""Write mmdetection3d's info files of nuScenes-format data, or the same data in KITTI's form.

example:
  bevqat infos --data example-data --form nuscenes --out runs/infos
  bevqat infos --data example-data --form kitti --out runs/kitti
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.cli.flags import EXAMPLE, SPLIT_HELP, VERSION_HELP
from qat.cli.json_output import add_json_flag, emit_json
from qat.core.errors import UserError

FRONT = "CAM_FRONT"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument(
        "--data", type=Path, default=EXAMPLE, metavar="ROOT", help=f"nuScenes-format data (default {EXAMPLE})"
    )
    parser.add_argument(
        "--form",
        choices=("nuscenes", "kitti"),
        required=True,
        help="nuscenes: nuscenes_infos_SPLIT.pkl alone; kitti: a folder of velodyne, calib, label_2, image_2 and "
        "kitti_infos_SPLIT.pkl",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; of kitti a new one")
    parser.add_argument("--version", metavar="NAME", help=VERSION_HELP)
    parser.add_argument("--split", metavar="NAME", help=f"{SPLIT_HELP} (default each of splits.json)")
    parser.add_argument(
        "--camera", metavar="NAME", help=f"of kitti, the channel that becomes image_2 (default {FRONT})"
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the infos."""
    from qat.families.mmdet3d.infos import write_nuscenes_infos
    from qat.families.mmdet3d.kitti_form import write_kitti

    splits = [args.split] if args.split else None
    if args.form == "kitti":
        paths = write_kitti(args.data, args.out, splits, args.version, args.camera or FRONT, quiet=False)
    elif args.camera:
        raise UserError("--camera only applies to --form kitti: nuScenes' infos have every camera; leave it out")
    else:
        paths = write_nuscenes_infos(args.data, args.out, splits, args.version, quiet=False)
    for path in paths:
        print(path)
    emit_json(args, {"out": args.out, "form": args.form, "infos": paths})
    return 0
