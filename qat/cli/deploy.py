"""Run a deploy config: MMDeploy's for mmdet3d, or AWML's.

DEPLOY_CFG and MODEL_CFG are Python, and are run.

With `codebase_config` it is MMDeploy's (docs/mmdeploy.md): IMG is a point cloud; end2end.onnx and the backend's files are written
into --work-dir, compared with PyTorch, and drawn beside it. `python tools/deploy.py` is the same.

With `components` it is AWML's (docs/centerpoint.md#deploy-configs): parts are exported into its work_dir, engines built where there
is a GPU, all backends compared, and evaluated. Exit status 1 when backends disagree.

examples:
  bevqat deploy configs/mmdet3d/voxel-detection/voxel-detection_onnxruntime_dynamic.py tests/mmdet3d/configs/centerpoint_small.py \\
      random example-data/samples/LIDAR_TOP/synth-0007-00000__LIDAR_TOP__1700000000000000.pcd.bin --work-dir runs/deployed
  bevqat deploy tests/deploy/deploy_small.py tests/mmdet3d/configs/awml_small.py random --work-dir runs/deployed
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.cli.flags import EXAMPLE, SPLIT_HELP, VERSION_HELP
from qat.cli.json_output import add_json_flag, emit_json
from qat.core.errors import UserError

LEVELS = ("CRITICAL", "FATAL", "ERROR", "WARN", "WARNING", "INFO", "DEBUG", "NOTSET")
# Flags of one kind of config; their defaults are None or False, so that one that was given is refused with the other kind.
MMDEPLOY = (
    "test_img",
    "calib_dataset_cfg",
    "calib_frames",
    "device",
    "log_level",
    "show",
    "dump_info",
    "quant",
    "names",
)
AWML = ("verify", "evaluate", "rot_y_axis_reference", "replace_onnx_models", "data", "version", "split", "calib_split")
REFUSED = {
    "uri": "names a remote device; files are built and tried on this machine",
    "quant_image_dir": "is ncnn's; INT8 is calibrated on the frames of --calib-dataset-cfg",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    from qat.deploy.mmdeploy.maps import LATEST, RELEASES

    parser.add_argument(
        "deploy_cfg", type=Path, metavar="DEPLOY_CFG", help="the deploy config: a path, or one in configs/"
    )
    parser.add_argument("model_cfg", type=Path, metavar="MODEL_CFG", help="the model's config")
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CKPT",
        help="float weights, or random or random:SEED (AWML: default the config's checkpoint_path)",
    )  # fmt: skip
    parser.add_argument("image", nargs="?", metavar="IMG", help="MMDeploy: a cloud (.bin), or mmdet3d infos (.pkl)")
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="folder to write (default: this one; AWML: the config's work_dir)"
    )
    add_json_flag(parser)
    mm = parser.add_argument_group("with MMDeploy's configs")
    mm.add_argument("--test-img", nargs="+", type=Path, metavar="FILE", help="clouds to compute boxes of (default IMG)")
    mm.add_argument(
        "--calib-dataset-cfg", type=Path, metavar="CFG",
        help="config whose val set INT8 is calibrated on, or .bin files (default MODEL_CFG's val set)",
    )  # fmt: skip
    mm.add_argument("--calib-frames", type=int, metavar="N", help="frames of it (default 32, or all)")
    mm.add_argument("--device", metavar="NAME", help="cpu or cuda:N (default cpu)")
    mm.add_argument(
        "--log-level", choices=LEVELS, help="what is printed on stderr (default INFO; DEBUG: every comparison)"
    )
    mm.add_argument("--show", action="store_true", help="open the pictures where there is a display")
    mm.add_argument("--dump-info", action="store_true", help="write deploy.json, pipeline.json and detail.json")
    mm.add_argument("--quant", action="store_true", help="INT8, also where the config does not ask for it")
    mm.add_argument(
        "--names",
        choices=tuple(RELEASES),
        help=f"the outputs' names, of this release on (default the config's, or {LATEST})",
    )
    awml = parser.add_argument_group("with AWML's configs")
    awml.add_argument(
        "--verify", action="store_true", help="check that all backends agree, also where the config does not"
    )
    awml.add_argument("--evaluate", action="store_true", help="evaluate each backend, also where the config does not")
    awml.add_argument(
        "--rot-y-axis-reference",
        action="store_true",
        help="boxes in Autoware's convention: --layout autoware of export",
    )
    awml.add_argument("--replace-onnx-models", action="store_true", help="not needed: the parts export as they are")
    awml.add_argument("--data", type=Path, metavar="ROOT", help=f"nuScenes-format data (default {EXAMPLE})")
    awml.add_argument("--version", metavar="NAME", help=VERSION_HELP)
    awml.add_argument("--split", metavar="NAME", help=f"{SPLIT_HELP} (default eval)")
    awml.add_argument("--calib-split", metavar="NAME", help="split to calibrate INT8 on (default calib)")
    for name in REFUSED:
        parser.add_argument(_flag(name), metavar="VALUE", help=argparse.SUPPRESS)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse(args: argparse.Namespace, names: tuple[str, ...], kind: str) -> None:
    """Raises `UserError` for flags of the other kind of config."""
    if given := [name for name in names if getattr(args, name) not in (None, False)]:
        raise UserError(f"{args.deploy_cfg}: found {_flag(given[0])}, which is for {kind} configs; leave it out")


def run(args: argparse.Namespace) -> int:
    """Deploys, then prints what was written and what was found."""
    from qat.deploy.mmdeploy.config import find, load

    for name, why in REFUSED.items():
        if getattr(args, name) is not None:
            raise UserError(f"{_flag(name)} {why}; leave it out")
    path = find(args.deploy_cfg)
    values = load(path)
    if "codebase_config" in values:
        _refuse(args, AWML, "AWML's")
        return _mmdeploy(args, values, str(path))
    _refuse(args, MMDEPLOY, "MMDeploy's")
    if args.image is not None:
        raise UserError(f"{path}: found IMG {args.image}, which is for MMDeploy's configs; leave it out")
    return _awml(args, values, str(path))


def _mmdeploy(args: argparse.Namespace, values: Mapping[str, Any], source: str) -> int:
    from dataclasses import replace

    from qat.cli import FAILED, OK
    from qat.deploy.mmdeploy.config import parsed
    from qat.deploy.mmdeploy.deploy import LOGGER, Request, deploy, draw_pictures, dump_info

    config = parsed(values, source)
    if args.checkpoint is None or args.image is None:
        raise UserError(
            f"{source}: found no {'CKPT' if args.checkpoint is None else 'IMG'}, expected CKPT and IMG after MODEL_CFG"
        )
    config = config.quantized() if args.quant else config
    config = replace(config, release=args.names) if args.names else config
    if config.precision != "int8" and (args.calib_dataset_cfg or args.calib_frames is not None):
        given = "--calib-dataset-cfg" if args.calib_dataset_cfg else "--calib-frames"
        raise UserError(f"{source}: found {given} with {config.precision}, expected INT8: --quant, or an int8 config")
    request = Request(
        args.model_cfg, args.checkpoint, args.image, args.test_img or (), args.work_dir or Path(), args.device or "cpu",
        args.calib_dataset_cfg, args.calib_frames,
    )  # fmt: skip
    handler = logging.StreamHandler()
    LOGGER.propagate = False
    LOGGER.addHandler(handler)
    LOGGER.setLevel(args.log_level or "INFO")
    try:
        done = deploy(config, request)
        infos = dump_info(config, request) if args.dump_info else []
        pictures = draw_pictures(config, done, request.work_dir, args.show)
    finally:
        LOGGER.removeHandler(handler)
    for file in done.files:
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    for file in (*infos, *pictures):
        print(file)
    for line in done.summary:
        print(line)
    for problem in done.problems:
        print(f"FAILED: {problem}")
    emit_json(args, {**done.described(), "infos": infos, "pictures": pictures})
    return FAILED if done.problems else OK


def _awml(args: argparse.Namespace, values: Mapping[str, Any], source: str) -> int:
    from qat.cli import FAILED, OK
    from qat.compare import print_summary
    from qat.core.console import note
    from qat.deploy.components import parsed
    from qat.deploy.mmdeploy.detector import source_of
    from qat.deploy.run import Data, deploy, with_flags

    config = with_flags(parsed(values, source), args.work_dir, args.verify, args.evaluate)
    if args.replace_onnx_models:
        note("--replace-onnx-models: not needed: parts are exported from the model as it is")
    checkpoint = args.checkpoint or config.checkpoint
    if checkpoint is None:
        raise UserError(f"{args.deploy_cfg}: found no checkpoint_path, expected one, or CKPT after MODEL_CFG")
    network = source_of(args.model_cfg, checkpoint)
    if network.checkpoint is None and (config.verify or config.evaluate):
        raise UserError(
            "CKPT: found random with verification or evaluation, expected a checkpoint: both compare with its file"
        )
    data = Data(args.data or EXAMPLE, args.split or "eval", args.calib_split or "calib", args.version)
    done = deploy(config, network, data, "autoware" if args.rot_y_axis_reference else None)
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
