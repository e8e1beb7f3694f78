"""Train a float detector on nuScenes-format data; the same command resumes a killed run.

example:
  bevqat train --data example-data:calib --stage image --steps 4 --out runs/image
  bevqat train --data example-data:calib --ckpt runs/image/model.pth --steps 4 --out runs/train

The shipped model was trained on 750 scenes of `bevqat synth`, in three stages (docs/train.md).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from qat.cli.flags import (
    MODEL,
    add_config_flag,
    add_data_sets_flags,
    add_ema_flag,
    add_out_flag,
    add_seed_flag,
    data_sets,
    root_and_split,
)
from qat.cli.json_output import add_json_flag, emit_json
from qat.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    add_config_flag(parser, MODEL / "config.yaml")
    add_data_sets_flags(parser, "annotated keyframes to train on", "mAP and NDS on this at the end")
    add_out_flag(parser, "DIR", Path("runs/train"))
    parser.add_argument("--ckpt", type=Path, metavar="CKPT", help="float checkpoint to start from (default: none)")
    parser.add_argument(
        "--init", dest="ckpt", type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )  # until 0.1
    add_ema_flag(parser)
    parser.add_argument(
        "--stage",
        default="all",
        choices=("all", "image", "bev"),
        help="all: the whole detector; image: the image part, on depth and on the class of each pixel; bev: all but the "
        "image part, on its frozen outputs (default all)",
    )
    parser.add_argument(
        "--variants",
        type=int,
        default=2,
        metavar="N",
        help="image augmentations of a keyframe that --stage bev keeps (default 2)",
    )
    parser.add_argument("--steps", type=int, default=4000, metavar="N", help="number of steps (default 4000)")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="keyframes of a step (default 2)")
    parser.add_argument("--lr", type=float, default=1e-3, metavar="RATE", help="highest learning rate (default 1e-3)")
    parser.add_argument(
        "--decay",
        type=float,
        default=0.35,
        metavar="SHARE",
        help="share of the steps over which the rate falls (default 0.35)",
    )
    parser.add_argument(
        "--save-seconds", type=float, default=120.0, metavar="S", help="write resume.pth every S seconds (default 120)"
    )
    add_seed_flag(parser)
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Trains and prints the held-out figures."""
    from qat.data import version_in
    from qat.model.opening import read_config

    for name, low in (("steps", 1), ("batch", 1), ("variants", 1)):
        if getattr(args, name) < low:
            raise UserError(f"--{name}: found {getattr(args, name)}, expected at least {low}")
    for name, value, good, expected in (
        ("lr", args.lr, 0 < args.lr < math.inf, "a number above 0"),
        ("decay", args.decay, 0 <= args.decay <= 1, "a share from 0 to 1"),
    ):
        if not good:
            raise UserError(f"--{name}: found {value}, expected {expected}")
    if args.ema and args.ckpt is None:
        raise UserError("--ema: found no --ckpt, expected the checkpoint that has averaged weights")
    family, config = read_config(args.config)
    family.check_training(config, str(args.config))

    def opened(root: Path, split: str) -> Any:
        return family.dataset(root, split, config, version_in(root, args.version))

    held_out = opened(*root_and_split(args.held_out, "--held-out")) if args.held_out else None
    metrics = family.train(
        config,
        [opened(*pair) for pair in data_sets(args)],
        args.out,
        vars(args),
        held_out,
        args.ckpt,
        lambda s: print(s, flush=True),
        args.ema,
    )
    print(f"{args.out / 'model.pth'}: trained for {args.steps} steps")
    if metrics:
        print(f"held out: mAP {metrics['map']:.4f}, NDS {metrics['nds']:.4f} over {metrics['samples']} keyframes")
        for name, ap in metrics["per_class_ap"].items():
            print(f"  {name:22s} AP {ap:.3f}")
    emit_json(args, {"out": args.out / "model.pth", "steps": args.steps, "metrics": metrics})
    return 0
