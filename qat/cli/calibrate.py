"""Insert TensorQuantizers into a trained detector and choose their ranges over calibration frames (PTQ).

example:
  bevqat calibrate --data example-data --split calib --out runs/calibrate/ptq.pth

The camera branch of a camera+lidar model (your configs.yaml and bevfusion.pth):
  bevqat calibrate --config configs.yaml --ckpt bevfusion.pth --prefix encoders.camera --data data/nuscenes --split mini_train --out runs/branch/ptq.pth

Several processes share the frames and end with the same ranges:
  torchrun --nproc-per-node 2 qat/calibrate.py --out runs/calibrate/ptq.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.cli.flags import (
    MODEL,
    add_config_flag,
    add_data_flags,
    add_ema_flag,
    add_init_flags,
    add_out_flag,
    add_prefix_flag,
    init_seed,
)
from qat.cli.json_output import add_json_flag, emit_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    add_config_flag(parser, MODEL / "config.yaml")
    source = parser.add_mutually_exclusive_group()
    weights = MODEL / "camera-tiny.pth"
    source.add_argument(
        "--ckpt", type=Path, default=weights, metavar="CKPT", help=f"float checkpoint (default {weights})"
    )
    add_init_flags(parser, source)
    add_prefix_flag(parser)
    add_ema_flag(parser)
    add_data_flags(parser, "calib", "calibrate on")
    parser.add_argument(
        "--method",
        default="auto",
        choices=("auto", "max", "percentile", "mse", "entropy"),
        help="how ranges are chosen; auto (the default): max in the BEV decoder and the head, mse in the camera part",
    )
    parser.add_argument(
        "--method-for",
        action="append",
        default=[],
        metavar="PATTERN=METHOD",
        help="another method for quantizers whose part.name matches; repeatable (`bevqat inspect` lists names)",
    )
    parser.add_argument(
        "--percentile", type=float, default=99.99, metavar="P", help="for --method percentile (default 99.99)"
    )
    parser.add_argument(
        "--no-equalize",
        action="store_true",
        help="do not equalize channels (of a part's input this saves one product before the rounding)",
    )
    parser.add_argument(
        "--keep-float",
        action="append",
        default=[],
        metavar="PATTERN[=REASON]",
        help="keep layers float whose path in the detector matches (shell style), in every flavour; repeatable",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="DROP",
        help="largest mAP loss of INT8, such as 0.001: the fewest and cheapest layers stay float to meet it",
    )
    parser.add_argument("--budget-data", type=Path, metavar="ROOT", help="annotated data for --budget (default --data)")
    parser.add_argument("--budget-version", metavar="NAME", help="required if --budget-data holds several")
    parser.add_argument("--budget-split", metavar="NAME", help="split of that data (default calib)")
    parser.add_argument("--budget-frames", type=int, metavar="N", help="N frames of that split (default all)")
    add_out_flag(parser, "CKPT", Path("runs/calibrate/ptq.pth"))
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrates, writes the PTQ checkpoint, prints what is INT8 and what is not."""
    from qat.calibrate.distributed import process_group
    from qat.calibrate.job import calibrate_checkpoint, print_summary, summarize
    from qat.calibrate.options import BudgetOptions, CalibrateOptions
    from qat.core.errors import UserError
    from qat.evaluate import devkit_metric
    from qat.model.opening import Source

    seed = init_seed(args)
    by_layer = []
    for text in args.method_for:
        pattern, equals, method = text.rpartition("=")
        if not (pattern and equals):
            raise UserError(f"--method-for: found {text!r}, expected PATTERN=METHOD such as 'camera.*=max'")
        by_layer.append((pattern, method))
    budget = None
    if args.budget is not None:
        data = args.budget_data or args.data
        version = args.budget_version or (args.version if args.budget_data is None else None)
        budget = BudgetOptions(
            args.budget, data, args.budget_split or "calib", devkit_metric, version, args.budget_frames
        )
    else:
        for name in ("data", "version", "split", "frames"):
            if getattr(args, f"budget_{name}") is not None:
                raise UserError(f"--budget-{name}: only applies with --budget; add it, such as --budget 0.001")
    source = Source(None if args.init else args.ckpt, args.config, args.prefix, args.ema, seed)
    options = CalibrateOptions(
        data=args.data,
        split=args.split,
        version=args.version,
        frames=args.frames,
        method=args.method,
        percentile=args.percentile,
        by_layer=by_layer,
        budget=budget,
        equalize=not args.no_equalize,
        keep_float=args.keep_float,
    )
    with process_group() as (rank, _):
        result = calibrate_checkpoint(source, options, args.out)
    if rank == 0:
        print_summary(result)
        print(args.out)
        emit_json(args, {"out": args.out, **summarize(result)})
    return 0
