"""Write mmdet3d models as model.pt2, model.onnx and metadata.json, each file compared with PyTorch.

CONFIG is a path, or the name of a config that mmdet3d ships (1.x or 0.x). It is Python, and is run. Without --checkpoint the weights
are random, the same for a seed. One CONFIG is written into --output itself, several into a folder each. docs/mmdet3d.md has more.

example:
  bevqat export-mmdet3d pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py --use-random-data --format onnx
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from qat.cli import BAD_USE, FAILED, OK
from qat.cli.flags import add_seed_flag
from qat.cli.json_output import add_json_flag, emit_json
from qat.core.errors import UserError

DEFAULT = Path("runs/mmdet3d")
FORMATS = {"both": ("pt2", "onnx"), "pt2": ("pt2",), "onnx": ("onnx",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument(
        "configs", nargs="+", metavar="CONFIG", help="an mmdet3d config, or the name of one that it ships"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="weights (default random ones); with one CONFIG alone"
    )
    parser.add_argument(
        "--output", "--out", type=Path, metavar="DIR", help=f"folder to write (default {DEFAULT}/NAME of each config)"
    )
    parser.add_argument("--format", choices=tuple(FORMATS), default="both", help="which files (default both)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where PyTorch runs: cpu or cuda (default cpu)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", type=Path, metavar="FILE",
        help="points (.bin), or mmdet3d infos (.pkl) with its files beside it (default the first sample of the config's data set)",
    )  # fmt: skip
    source.add_argument("--use-random-data", action="store_true", help="made-up points and pictures")
    parser.add_argument("--opset", type=int, metavar="N", help="of model.onnx (default 13, or the lowest that works)")
    parser.add_argument(
        "--int8", action="store_true", help="calibrate, and write the parts with INT8 in every flavour into int8/"
    )
    parser.add_argument(
        "--calib", nargs="+", type=Path, metavar="FILE",
        help="points (.bin), or one folder with them, to calibrate --int8 on (default --data, or made-up clouds)",
    )  # fmt: skip
    parser.add_argument(
        "--verbose", action="store_true", help="print every comparison, and what each attempt failed on"
    )
    add_seed_flag(parser)
    add_json_flag(parser)


def _say(name: str, what: str) -> None:
    print(f"{name}: {what}", file=sys.stderr, flush=True)


def _folder(args: argparse.Namespace, config: Path) -> Path:
    if args.output is None:
        return DEFAULT / config.stem
    return args.output if len(args.configs) == 1 else args.output / config.stem


def _export(args: argparse.Namespace, name: str) -> tuple[Path, dict[str, Any]]:
    """One config into its folder; returns it and metadata.json's content."""
    from qat.families.mmdet3d.config import family_in, find, read
    from qat.families.mmdet3d.exporter import SHARES, Export, Options
    from qat.families.mmdet3d.inputs import Reader
    from qat.families.mmdet3d.model import build, draw, load_weights

    path = find(name)
    config = read(path)
    if args.int8:
        family_in(path)  # before anything is computed
    model = build(config)
    if args.checkpoint is None:
        draw(model, args.seed)
    else:
        load_weights(model, args.checkpoint)
    model.to(args.device)
    reader = Reader(config, model, args.seed)
    if args.use_random_data:
        samples = [reader.random(share) for share in SHARES]
    elif args.data is not None:
        samples = [reader.read(args.data, share) for share in SHARES]
    else:
        samples = [reader.first_of_dataset(share) for share in SHARES]
    options = Options(FORMATS[args.format], args.opset, args.device, args.seed)
    checkpoint = None if args.checkpoint is None else str(args.checkpoint)
    export = Export(model, name, checkpoint, samples, options, lambda what: _say(path.stem, what))
    out = _folder(args, path)

    def int8(folder: Path) -> dict[str, Any]:
        from qat.families.mmdet3d.int8 import write_int8

        calib = args.calib or ([args.data] if args.data is not None and args.data.suffix == ".bin" else None)
        return write_int8(path, model, calib, folder / "int8", args.seed, export.say)

    return out, export.run(out, int8 if args.int8 else None)


def _print(metadata: dict[str, Any], verbose: bool) -> None:
    from qat.families.mmdet3d.page import iree_line, rows, shape_of
    from qat.families.mmdet3d.tree import drawn

    lines = []
    for key in ("tensors", "unused_inputs"):
        for entry in metadata[key]:
            shape = f"[{', '.join(map(str, shape_of(entry)))}]"
            lines.append(
                (entry["path"], f"{entry['dtype']} {shape}  {entry.get('name', 'unused: no output depends on it')}")
            )
    lines += [(entry["path"], f"constant: {entry['value']}") for entry in metadata["constants"]]
    print("\n".join(drawn(lines, metadata["model_type"])))
    if line := iree_line(metadata):
        print(line)
    if (int8 := metadata.get("int8")) is not None:
        print(
            f"INT8: {int8['int8_share_of_macs']:.1%} of the multiplications; float: {', '.join(int8['parts_off']) or 'no part'}"
        )
        for entry in int8["flavours"].values():
            parts = "; ".join(
                f"{part['file']} {part['precision']} {part['bytes'] / 1e6:.1f} MB"
                + (
                    f", {part['sqnr_db_beside_float']:.0f} dB beside float"
                    if part["sqnr_db_beside_float"] is not None
                    else ""
                )
                for part in entry["parts"].values()
            )
            print(f"  {entry['folder']}: {'passed' if entry['passed'] else 'FAILED'}: {parts}")
    if not verbose:
        return
    for attempt in metadata["attempts"]:
        print(f"  opset {attempt['opset']} by {attempt['exporter']}: {attempt['failed'] or 'passed'}")
    for row in rows(metadata):
        print(
            f"  {row['file']} {row['by']}, {row['sizes']}: {row['db']}, {row['max_abs']}, boxes {row['boxes']} {row['wrong']}"
        )


def _row(name: str, metadata: dict[str, Any] | None, note: str) -> tuple[str, ...]:
    """A line of the table at the end."""
    if metadata is None:
        return (Path(name).stem, "", "", "", "", "", "", note)
    from qat.families.mmdet3d.page import rows

    done = {None: "", True: "yes", False: "no"}
    found = list(rows(metadata))
    onnx = [row for row in found if row["file"] == "model.onnx"]
    worst = min(onnx, key=lambda row: row["sqnr_db"], default=None)
    success = metadata["export_success"]
    opset = f" ({metadata['opset']})" if success["onnx"] else ""
    sizes = " + ".join(f"{file['bytes'] / 1e6:.1f}" for file in metadata["files"].values())
    return (
        Path(name).stem,
        metadata["model_type"],
        done[success["pt2"]],
        done[success["onnx"]] + opset,
        worst["db"] if worst else "",
        found[0]["boxes"] if found else "",
        sizes,
        note,
    )


def _check(args: argparse.Namespace) -> None:
    import torch

    if args.checkpoint is not None and len(args.configs) > 1:
        raise UserError(f"--checkpoint: found with {len(args.configs)} configs, expected one; export them one by one")
    if args.calib and not args.int8:
        raise UserError("--calib: found without --int8, expected both: nothing else is calibrated")
    if args.opset is not None and not 13 <= args.opset <= 20:
        raise UserError(f"--opset: found {args.opset}, expected 13 to 20")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device: found {args.device!r}, expected a device that this torch has ({str(error).splitlines()[0]})"
        ) from None


def run(args: argparse.Namespace) -> int:
    """Exports every config, and prints the inputs' trees and a table."""
    from rich.table import Table

    from qat.core.console import results_console

    _check(args)
    status, results, table = OK, [], []
    for name in args.configs:
        try:
            folder, metadata = _export(args, name)
        except UserError as error:
            if len(args.configs) == 1:
                raise
            print(f"error: {error}", file=sys.stderr)
            status = BAD_USE
            results.append({"config": name, "error": str(error)})
            table.append(_row(name, None, str(error)))
            continue
        _print(metadata, args.verbose)
        print(folder)
        failures = metadata["failures"]
        for file, why in failures.items():
            print(f"error: {folder}: model.{file}: {why}", file=sys.stderr)
        int8 = [entry["passed"] for entry in metadata.get("int8", {}).get("flavours", {}).values()]
        if False in (*metadata["export_success"].values(), *int8) and status == OK:
            status = FAILED
        results.append({"config": name, "out": folder, "metadata": metadata})
        table.append(_row(name, metadata, "; ".join(dict.fromkeys(failures.values()))))
    shown = Table("config", "model", "pt2", "onnx (opset)", "least SQNR", "boxes", "MB", "note", box=None)
    for row in table:
        shown.add_row(*row)
    results_console().print(shown)
    emit_json(args, {"exports": results, "passed": status == OK})
    return status
