"""Run a deployed detector over its config's test set; score, time, write and draw its boxes.

DEPLOY_CFG is MMDeploy's, MODEL_CFG mmdet3d's; both are Python, and are run. The data set is the one of MODEL_CFG's test_dataloader:
KITTI's form is scored by KITTI AP, nuScenes' by its devkit, both on the CPU, with mmdet3d's keys. `python tools/test.py` is the same.

example:
  bevqat infos --data example-data --form kitti --split eval --out runs/test/kitti
  bevqat test configs/mmdet3d/voxel-detection/voxel-detection_onnxruntime_dynamic.py tests/mmdet3d/configs/pointpillars_small.py \\
      --model random --metrics bbox --device cpu \\
      --cfg-options test_dataloader.dataset.data_root=runs/test/kitti/ test_dataloader.dataset.ann_file=kitti_infos_eval.pkl
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from qat.cli.json_output import add_json_flag, emit_json
from qat.core.errors import UserError

# Flags of MMDeploy's that have no meaning here, and why.
REFUSED = {
    "uri": "names a remote device; detectors run on this machine",
    "wait_time": "is for a window that shows one frame after another; pictures are files, of --show-dir",
}


def positive(word: str) -> int:
    """A whole number from 1 on."""
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {word}, expected a whole number from 1 on")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("deploy_cfg", metavar="DEPLOY_CFG", help="the deploy config: a path, or a name in configs/")
    parser.add_argument(
        "model_cfg", metavar="MODEL_CFG", help="the model's config: a path, or a name in mmdet3d's wheel"
    )
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        metavar="FILE",
        help="the backend's files; or a checkpoint (.pth), tested in PyTorch; or results of --out (.pkl), scored again",
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda:N (default cpu)")
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=1,
        metavar="N",
        help="clouds read at a time; the file is for one, so they run one by one (default 1)",
    )
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="change MODEL_CFG, as mmengine's DictAction"
    )
    results = parser.add_argument_group("results")
    results.add_argument("--out", type=Path, metavar="PKL", help="write all detections")
    results.add_argument("--format-only", action="store_true", help="write the data set's own form, and do not score")
    results.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="KITTI: bbox, img_bbox; nuScenes: bbox (default: of test_evaluator)",
    )
    results.add_argument(
        "--metric-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="KITTI: pcd_limit_range, default_cam_key, submission_prefix, pklfile_prefix; nuScenes: jsonfile_prefix",
    )
    results.add_argument("--json-file", type=Path, metavar="FILE", help="write the metrics as JSON, by mmdet3d's keys")
    results.add_argument("--log2file", type=Path, metavar="FILE", help="also write what is printed there")
    results.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="folder for metrics.json, results/ and pictures/ (default runs/test/NAME)",
    )
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument(
        "--show", action="store_true", help="open each picture, or print its path where there is no display"
    )
    pictures.add_argument("--show-dir", type=Path, metavar="DIR", help="write a picture of each frame there")
    pictures.add_argument(
        "--show-score-thr",
        dest="score_thr",
        type=float,
        metavar="S",
        help="draw boxes that score S or more (default 0.3)",
    )
    pictures.add_argument("--interval", type=positive, metavar="N", help="draw every Nth frame (default 1)")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--speed-test", action="store_true", help="medians of voxelize, network and post")
    speed.add_argument("--warmup", type=int, metavar="N", help="frames before the clock starts (default 10)")
    speed.add_argument(
        "--log-interval", type=positive, metavar="N", help="frames between lines of medians (default 100)"
    )
    add_json_flag(parser)
    for name in REFUSED:
        parser.add_argument(_flag(name), metavar="VALUE", help=argparse.SUPPRESS)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run(args: argparse.Namespace) -> int:
    """Tests, and prints the metrics."""
    from qat.deploy.mmdeploy.testing import Asked, finite, test

    for name, why in REFUSED.items():
        if getattr(args, name) is not None:
            raise UserError(f"{_flag(name)} {why}; leave it out")
    done = test(Asked(**{field.name: getattr(args, field.name) for field in fields(Asked)}))
    emit_json(
        args,
        {
            "frames": done.frames,
            "boxes": done.boxes,
            "metrics": finite(done.values),
            "speed_ms": done.speed or None,
            "written": done.written,
            "pictures": done.pictures,
        },
    )
    return 0
