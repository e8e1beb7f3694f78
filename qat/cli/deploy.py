"""Run a deploy config: export a model's parts, build engines, check that all backends agree, evaluate each.

DEPLOY_CFG is AWML's kind, with `components` (docs/centerpoint.md#deploy-configs). It and MODEL_CFG are Python, and are run. Written into
its work_dir: onnx/, tensorrt/ where there is a GPU, float/ and a folder for each CPU backend where the parts are INT8, evaluation/.
Exit status 1 when backends disagree.

example:
  bevqat deploy tests/deploy/deploy_small.py tests/mmdet3d/configs/awml_small.py random --work-dir runs/deployed
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qat.cli.flags import EXAMPLE, SPLIT_HELP, VERSION_HELP
from qat.cli.json_output import add_json_flag, emit_json
from qat.core.errors import UserError

RANDOM = "random"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("deploy_cfg", type=Path, metavar="DEPLOY_CFG", help="the deploy config")
    parser.add_argument("model_cfg", type=Path, metavar="MODEL_CFG", help="the model's config")
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CKPT", help="float weights, or random (default: the config's checkpoint_path)"
    )
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="folder to write (default: the config's work_dir)")
    parser.add_argument(
        "--verify", action="store_true", help="check that all backends agree, also where the config does not"
    )
    parser.add_argument("--evaluate", action="store_true", help="evaluate each backend, also where the config does not")
    parser.add_argument(
        "--rot-y-axis-reference",
        action="store_true",
        help="boxes in Autoware's convention: --layout autoware of export",
    )
    parser.add_argument("--replace-onnx-models", action="store_true", help="not needed: the parts export as they are")
    parser.add_argument(
        "--data", type=Path, default=EXAMPLE, metavar="ROOT", help=f"nuScenes-format data (default {EXAMPLE})"
    )
    parser.add_argument("--version", metavar="NAME", help=VERSION_HELP)
    parser.add_argument("--split", default="eval", metavar="NAME", help=f"{SPLIT_HELP} (default eval)")
    parser.add_argument(
        "--calib-split", default="calib", metavar="NAME", help="split to calibrate INT8 on (default calib)"
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Deploys, then prints what was written and what was found."""
    from qat.cli import FAILED, OK
    from qat.compare import print_summary
    from qat.core.console import note
    from qat.deploy.components import read
    from qat.deploy.run import Data, deploy, with_flags
    from qat.model.opening import Source

    config = with_flags(read(args.deploy_cfg), args.work_dir, args.verify, args.evaluate)
    if args.replace_onnx_models:
        note("--replace-onnx-models: not needed: parts are exported from the model as it is")
    checkpoint = args.checkpoint or config.checkpoint
    if checkpoint is None:
        raise UserError(f"{args.deploy_cfg}: found no checkpoint_path, expected one, or CKPT after MODEL_CFG")
    random = str(checkpoint) == RANDOM
    if random and (config.verify or config.evaluate):
        raise UserError(
            "CKPT: found random with verification or evaluation, expected a checkpoint: both compare with its file"
        )
    source = Source(None if random else Path(checkpoint), args.model_cfg)
    data = Data(args.data, args.split, args.calib_split, args.version)
    done = deploy(config, source, data, "autoware" if args.rot_y_axis_reference else None)
    for name, why in done.missing.items():
        print(f"{name}: left out: {why}", file=sys.stderr)
    for name, folder in done.folders.items():
        print(f"{name}: {folder}")
    problems = [f"{pair.first} and {pair.second}: {problem}" for pair in done.pairs for problem in pair.problems]
    for problem in problems:
        print(f"FAILED: {problem}")
    if done.pairs and not problems:
        print(f"all {len(done.pairs)} pairs of backends agree")
    if done.comparison is not None:
        print_summary(done.comparison)
    emit_json(
        args,
        {
            "folders": done.folders,
            "missing": done.missing,
            "pairs": [pair.described() for pair in done.pairs],
            "results": None if done.comparison is None else done.comparison.results_file,
            "passed": not problems,
        },
    )
    return FAILED if problems else OK
