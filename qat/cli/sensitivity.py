"""Measure the damage that each quantized unit does alone: where a PTQ checkpoint's accuracy goes.

A unit is one activation quantizer with the weights of the layers that it feeds. An interrupted run goes on where it was.

example:
  bevqat calibrate --out runs/calibrate/ptq.pth
  bevqat sensitivity runs/calibrate/ptq.pth --data example-data --split calib --frames 4 --out runs/sensitivity
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.cli.flags import add_data_flags
from qat.core.locks import one_writer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("ckpt", type=Path, metavar="CKPT", help="a checkpoint that calibrate wrote")
    add_data_flags(parser, "calib", "measure on")
    parser.add_argument(
        "--metric",
        choices=("sqnr", "map"),
        default="sqnr",
        help="map: mAP and NDS of each unit too, by the official devkit over the same frames (default sqnr)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/sensitivity"), metavar="DIR")


@one_writer("args.out", inside=True)
def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes sensitivity.json and sensitivity.png."""
    from qat.calibrate import load_ptq
    from qat.calibrate.sensitivity import draw_sensitivity, measure_sensitivity, print_sensitivity
    from qat.core.files import atomic_set, sha256, write_json
    from qat.data import NuScenesDataset
    from qat.evaluate import devkit_metric

    model, _ = load_ptq(args.ckpt)
    dataset = NuScenesDataset(args.data, args.split, model.config, args.version, args.frames)

    found = measure_sensitivity(
        model, dataset, args.out / "cache", sha256(args.ckpt), devkit_metric(dataset) if args.metric == "map" else None
    )
    print_sensitivity(found)
    with atomic_set(args.out / "sensitivity.json", args.out / "sensitivity.png") as stage:
        write_json(stage / "sensitivity.json", found.to_json())
        draw_sensitivity(found, stage / "sensitivity.png")
    print(args.out / "sensitivity.json")
    print(args.out / "sensitivity.png")
    return 0
