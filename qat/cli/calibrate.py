"""Insert TensorQuantizers into a trained detector and choose their ranges over calibration frames (PTQ).

example:
  bevqat calibrate --data example-data --split calib --out runs/calibrate/ptq.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

MODEL = Path("model/camera-tiny")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("--config", type=Path, default=MODEL / "config.yaml", metavar="YAML")
    parser.add_argument("--ckpt", type=Path, default=MODEL / "camera-tiny.pth", metavar="CKPT", help="float checkpoint")
    parser.add_argument("--data", type=Path, default=Path("example-data"), metavar="ROOT", help="nuScenes-format data")
    parser.add_argument("--version", metavar="NAME", help="needed where ROOT holds several, such as v1.0-mini")
    parser.add_argument("--split", default="calib")
    parser.add_argument(
        "--frames", type=int, metavar="N", help="calibrate on N frames spread over the split (default all)"
    )
    parser.add_argument("--method", default="mse", choices=("max", "percentile", "mse", "entropy"))
    parser.add_argument("--percentile", type=float, default=99.99, help="for --method percentile (default 99.99)")
    parser.add_argument("--out", type=Path, default=Path("runs/calibrate/ptq.pth"), metavar="CKPT")


def run(args: argparse.Namespace) -> int:
    """Calibrates, writes the PTQ checkpoint, prints what is INT8 and what is not."""
    from qat.calibrate.job import calibrate_checkpoint, print_summary

    result = calibrate_checkpoint(
        config=args.config,
        checkpoint=args.ckpt,
        data=args.data,
        version=args.version,
        split=args.split,
        frames=args.frames,
        method=args.method,
        percentile=args.percentile,
        out=args.out,
    )
    print_summary(result)
    print(args.out)
    return 0
