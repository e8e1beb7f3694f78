"""Make a PTQ checkpoint from a network that another tool quantized, with its weights and ranges.

It reads CUDA-BEVFusion's bevfusion_ptq.pth and other pickled networks (nothing in the file is run, and none of its packages
is needed), and state dicts of pytorch-quantization and NVIDIA ModelOpt. The result is inspected, exported, compared and
fine-tuned like a checkpoint of calibrate. docs/checkpoints.md says which files are read.

example:
  bevqat import-ptq --ckpt bevfusion_ptq.pth --config configs.yaml --prefix encoders.camera --out runs/imported/ptq.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.cli import OK
from qat.cli.flags import add_config_flag, add_out_flag, add_prefix_flag
from qat.cli.json_output import add_json_flag, emit_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("--ckpt", type=Path, required=True, metavar="CKPT", help="the other tool's checkpoint")
    add_config_flag(parser, when="default: config.yaml next to the checkpoint")
    add_prefix_flag(parser)
    add_out_flag(parser, "CKPT", Path("runs/imported/ptq.pth"))
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Imports, and prints how the other tool's ranges were used."""
    from qat.calibrate.foreign import import_checkpoint
    from qat.core.progress import progress_bar

    with progress_bar("import"):
        report = import_checkpoint(args.ckpt, args.out, args.config, args.prefix)
    print(
        f"{len(report['mapped'])} activation ranges imported, {len(report['folded'])} folded batch norms replaced by the identity"
    )
    for what, key in (
        ("tensors whose layers had different ranges (the largest is used)", "merged"),
        ("layers that stay float", "float_layers"),
        ("layers without stored weight ranges (their largest magnitudes are used)", "own_weights"),
        ("adds whose identity is rounded here but not in the file", "also_rounded"),
        ("quantizers that are off because the file has no range for them", "without_range"),
        ("unused quantizers of the file", "unused"),
    ):
        if names := report[key]:
            print(f"{what}: {len(names)}")
            for name in list(names)[:8]:
                print(f"  {name}" + (f": {names[name]}" if isinstance(names, dict) else ""))
            if len(names) > 8:
                print(f"  and {len(names) - 8} more")
    print(args.out)
    emit_json(args, {"out": args.out, **report})
    return OK
