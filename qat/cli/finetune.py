"""Train a PTQ checkpoint with its quantizers on (QAT) to match the float network's outputs; no annotation is read.

The same command resumes a killed run. The result is exported, compared and inspected like a PTQ checkpoint.

example:
  bevqat calibrate --out runs/calibrate/ptq.pth
  bevqat finetune --ckpt runs/calibrate/ptq.pth --data example-data:calib --steps 20 --out runs/finetune
  bevqat export-camera --ckpt runs/finetune/qat.pth

Several processes share each step's frames:
  torchrun --nproc-per-node 2 qat/finetune.py --ckpt runs/calibrate/ptq.pth --data example-data:calib --out runs/two
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from qat.cli.flags import add_data_sets_flags, add_out_flag, add_seed_flag, data_sets, root_and_split
from qat.cli.json_output import add_json_flag, emit_json
from qat.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("--ckpt", type=Path, required=True, metavar="CKPT", help="a checkpoint of calibrate")
    add_data_sets_flags(parser, "keyframes to train on", "mAP and NDS of float, PTQ and QAT on this at the end")
    add_out_flag(parser, "DIR", Path("runs/finetune"))
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="number of steps (default 1000)")
    parser.add_argument(
        "--batch", type=int, default=2, metavar="N", help="keyframes of a step, of all processes together (default 2)"
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=3e-5,
        metavar="RATE",
        help="highest learning rate; it falls as a cosine (default 3e-5)",
    )
    parser.add_argument(
        "--warmup", type=int, default=50, metavar="N", help="steps over which the rate rises (default 50)"
    )
    parser.add_argument(
        "--clip", type=float, default=35.0, metavar="NORM", help="largest norm of the gradient (default 35)"
    )
    parser.add_argument(
        "--average",
        dest="ema",
        type=float,
        default=0.0,
        metavar="DECAY",
        help="save a moving average of the weights, such as 0.999",
    )
    parser.add_argument("--ema", type=float, default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # until 0.1
    parser.add_argument("--learn-ranges", action="store_true", help="train the ranges of activations too")
    parser.add_argument(
        "--range-lr",
        type=float,
        default=1e-3,
        metavar="RATE",
        help="learning rate of the ranges, in log2 units (default 1e-3)",
    )
    parser.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="augment frames as the config's augment2d and augment3d say (default yes)",
    )
    parser.add_argument(
        "--amp", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 layers on a GPU (default yes)"
    )
    parser.add_argument(
        "--loss-weight",
        action="append",
        default=[],
        metavar="NAME=W",
        help="weight of one of the family's losses; of BEVFusion image (1), bev (1), heat (50), box (0.3); repeatable",
    )
    for name in ("image", "bev", "heat", "box"):
        parser.add_argument(f"--{name}-weight", type=float, metavar="W", help=f"the same as --loss-weight {name}=W")
    parser.add_argument(
        "--save-seconds", type=float, default=60.0, metavar="S", help="write resume.pth every S seconds (default 60)"
    )
    add_seed_flag(parser)
    add_json_flag(parser)


def _weights(args: argparse.Namespace) -> dict[str, float]:
    """The given weights of losses, by name.

    Raises:
        UserError: a text is not NAME=W.
    """
    found: dict[str, float] = {}
    for name in ("image", "bev", "heat", "box"):
        if (weight := getattr(args, f"{name}_weight")) is not None:
            found[name] = weight
    for text in args.loss_weight:
        name, _, weight = text.partition("=")
        try:
            found[name] = float(weight)
        except ValueError:
            raise UserError(f"--loss-weight: found {text!r}, expected NAME=W such as bev=2") from None
    return found


def run(args: argparse.Namespace) -> int:
    """Trains and prints the held-out figures."""
    from qat.calibrate import load_ptq
    from qat.calibrate.distributed import process_group
    from qat.calibrate.finetune import FinetuneOptions, finetune

    names = {field.name for field in dataclasses.fields(FinetuneOptions)}
    given = {name: value for name, value in vars(args).items() if name in names}
    options = FinetuneOptions(**given, weights=_weights(args))
    data = data_sets(args)
    held_out = root_and_split(args.held_out, "--held-out") if args.held_out else None
    if held_out is not None:  # opened before the work begins, so that its errors come first
        model = load_ptq(args.ckpt)[0]
        model.flow.need_boxes("--held-out", "omit --held-out")
        _held_out(args, held_out, model).check_annotated()
    with process_group() as (rank, _):
        result = finetune(args.ckpt, data, args.out, options, args.version, lambda s: print(s, flush=True))
    if rank > 0:
        return 0
    metrics = None if held_out is None else _held_out_figures(args, held_out, result.checkpoint)
    print(result.checkpoint)
    emit_json(args, {"out": result.checkpoint, "steps": options.steps, "metrics": metrics})
    return 0


def _held_out(args: argparse.Namespace, held_out: tuple[Path, str], model: Any) -> Any:
    from qat.data import version_in

    return model.family.dataset(*held_out, model.config, version_in(held_out[0], args.version))


def _held_out_figures(args: argparse.Namespace, held_out: tuple[Path, str], trained: Path) -> dict[str, Any]:
    """Measures float, PTQ and QAT, prints and writes the figures."""
    from qat.calibrate import load_ptq
    from qat.calibrate.checkpoint import load_float_reference
    from qat.core.files import write_json
    from qat.core.progress import progress_bar
    from qat.evaluate import evaluate_detections
    from qat.model.runners import detect

    models = {"float": load_float_reference(args.ckpt)[0], "ptq": load_ptq(args.ckpt)[0], "qat": load_ptq(trained)[0]}
    figures = {}
    for name, model in models.items():
        dataset = _held_out(args, held_out, model)
        with progress_bar(f"held out, {name}", len(dataset)) as done:
            figures[name] = evaluate_detections(dataset, detect(model, dataset, done))
        print(f"{name:5s} mAP {figures[name]['map']:.4f}, NDS {figures[name]['nds']:.4f} over {len(dataset)} keyframes")
    write_json(args.out / "metrics.json", figures)
    return figures
