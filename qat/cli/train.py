"""Train a float detector on nuScenes-format data; a killed run resumes where it was.

example:
  bevqat synth --out data/fit --scenes 450 --seed 101 --keyframes 2 --azimuths 180 --sweeps 0 --splits fit=450
  bevqat train --data data/fit:fit --stage image --steps 2400 --out runs/image
  bevqat train --data data/fit:fit --stage bev --init runs/image/model.pth --steps 2200 --batch 4 --out runs/bev
  bevqat train --data data/fit:fit --init runs/bev/model.pth --lr 3e-4 --out runs/all
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

from qat.cli.flags import root_and_split
from qat.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("--config", default="model/camera-tiny/config.yaml", metavar="YAML")
    parser.add_argument(
        "--data", action="append", required=True, metavar="ROOT:SPLIT", help="training data; may be given again"
    )
    parser.add_argument("--held-out", metavar="ROOT:SPLIT", help="evaluate on this at the end")
    parser.add_argument("--out", type=Path, default=Path("runs/train"), metavar="DIR")
    parser.add_argument("--init", type=Path, metavar="CKPT", help="start from these weights")
    parser.add_argument(
        "--stage",
        default="all",
        choices=("all", "image", "bev"),
        help="train the whole detector; the image part alone, on depth and on what each pixel shows; or all but the "
        "image part, on its frozen outputs (default all)",
    )
    parser.add_argument(
        "--variants", type=int, default=2, help="image augmentations of a keyframe that --stage bev keeps (default 2)"
    )
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--decay", type=float, default=0.35, help="share of the steps over which the rate falls (default 0.35)"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Trains and prints the held-out figures."""
    from qat.core.config import is_camera_branch, load_config, need_training
    from qat.data import NuScenesDataset
    from qat.train import TrainOptions, train

    for name, low in (("steps", 1), ("batch", 1), ("variants", 1)):
        if getattr(args, name) < low:
            raise UserError(f"--{name}: found {getattr(args, name)}, expected at least {low}")
    for name, value, good, expected in (
        ("lr", args.lr, 0 < args.lr < math.inf, "a number above 0"),
        ("decay", args.decay, 0 <= args.decay <= 1, "a share from 0 to 1"),
    ):
        if not good:
            raise UserError(f"--{name}: found {value}, expected {expected}")
    config = load_config(args.config)
    if not is_camera_branch(config):
        need_training(config, str(args.config))

    def opened(text: str, flag: str = "--data") -> NuScenesDataset:
        return NuScenesDataset(*root_and_split(text, flag), config)

    names = {field.name for field in dataclasses.fields(TrainOptions)}
    options = TrainOptions(**{name: value for name, value in vars(args).items() if name in names})
    held_out = opened(args.held_out, "--held-out") if args.held_out else None
    metrics = train(
        config,
        [opened(text) for text in args.data],
        args.out,
        options,
        held_out,
        args.init,
        lambda s: print(s, flush=True),
    )
    print(f"{args.out / 'model.pth'}: trained for {options.steps} steps")
    if metrics:
        print(f"held out: mAP {metrics['map']:.4f}, NDS {metrics['nds']:.4f} over {metrics['samples']} keyframes")
        for name, ap in metrics["per_class_ap"].items():
            print(f"  {name:22s} AP {ap:.3f}")
    return 0
