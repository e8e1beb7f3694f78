"""Measure the accuracy loss of each quantized unit of a PTQ checkpoint, one at a time.

A unit is one activation quantizer with the weights of the layers that it feeds. An interrupted run resumes.

example:
  bevqat calibrate --out runs/calibrate/ptq.pth
  bevqat sensitivity runs/calibrate/ptq.pth --data example-data --split calib --frames 4 --out runs/sensitivity
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.cli.flags import add_checkpoint, add_data_flags, add_out_flag, checkpoint_of
from qat.cli.json_output import add_json_flag, emit_json
from qat.core.locks import one_writer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    add_checkpoint(parser, "a checkpoint that calibrate wrote")
    add_data_flags(parser, "calib", "measure on")
    parser.add_argument(
        "--metric",
        choices=("sqnr", "map"),
        default="sqnr",
        help="map: mAP and NDS of each unit too, by the official devkit over the same frames (default sqnr)",
    )
    parser.add_argument(
        "--histograms",
        type=int,
        default=8,
        metavar="N",
        help="activation histograms of the N worst units, with their ranges (default 8, 0: none)",
    )
    add_out_flag(parser, "DIR", Path("runs/sensitivity"))
    add_json_flag(parser)


@one_writer("args.out", inside=True)
def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes sensitivity.json and sensitivity.png."""
    from qat.calibrate import load_ptq
    from qat.calibrate.sensitivity import (
        draw_sensitivity,
        measure_sensitivity,
        print_sensitivity,
        write_sensitivity,
    )
    from qat.core.files import atomic_set, sha256
    from qat.evaluate import devkit_metric

    path = checkpoint_of(args)
    model, recipe = load_ptq(path)
    dataset = model.family.dataset(args.data, args.split, model.config, args.version, args.frames)
    found = measure_sensitivity(
        model,
        dataset,
        args.out / "cache",
        sha256(path),
        devkit_metric(dataset) if args.metric == "map" else None,
        recipe,
        args.histograms,
    )
    print_sensitivity(found)
    facts = {"name": args.data.resolve().name, "version": dataset.nusc.version, "split": dataset.split}
    with atomic_set(args.out / "sensitivity.json", args.out / "sensitivity.png") as stage:
        write_sensitivity(stage / "sensitivity.json", found, path, facts)
        draw_sensitivity(found, stage / "sensitivity.png")
    print(args.out / "sensitivity.json")
    print(args.out / "sensitivity.png")
    emit_json(args, found.to_json())
    return 0
