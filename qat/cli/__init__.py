"""The command line: `bevqat VERB`, and the scripts `python qat/VERB.py` beside this folder.

One module a verb, imported only when it is asked for. A module has `HELP` (one line), `add_arguments(parser)` and
`run(args) -> int` (the exit status): it parses, calls one function, prints.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import qat
from qat.cli.failures import one_line_of
from qat.core.errors import UserError

VERBS = {
    "demo": "calibrate, export, build, compare and report on example-data, on the CPU",
    "synth": "write generated driving scenes in the nuScenes format",
    "show": "draw a sample's lidar points and boxes over its six images",
    "train": "train a float detector",
    "calibrate": "insert TensorQuantizers and run PTQ over calibration frames",
    "import-ptq": "make a PTQ checkpoint of a network that another tool quantized",
    "finetune": "train a PTQ checkpoint with its quantizers on (QAT), from the float network's outputs",
    "inspect": "print what a PTQ checkpoint quantizes, with which scales, and what stays float",
    "sensitivity": "measure the damage that each quantized unit does alone",
    "health": "name the first layer that gives NaN or infinity, and quantizers that saturate",
    "export-camera": "write a checkpoint's ONNX parts and their manifest",
    "build": "build an exported folder's parts into engines for this machine, which a robot's process loads",
    "verify": "check exported parts against PyTorch's outputs, on any machine, without PyTorch",
    "compare": "run every backend and precision over the evaluation frames, beside FP32",
    "benchmark": "time exported parts and the whole detector on this machine, by backend and precision",
    "report": "make report.html from results.json",
}

OK, FAILED, BAD_USE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status: 0 fine, 1 checks failed, 2 bad use, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="bevqat", description=qat.__doc__)
    parser.add_argument("--version", action="version", version=f"bevqat {qat.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    asked = next((word for word in arguments if word in VERBS), None)
    for verb, summary in VERBS.items():
        subparser = verbs.add_parser(
            verb,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if verb == asked:
            module = importlib.import_module(f"qat.cli.{verb.replace('-', '_')}")
            subparser.epilog = module.__doc__.split("\n\n", 1)[-1] if module.__doc__ else None
            module.add_arguments(subparser)
    args = parser.parse_args(arguments)
    try:
        return int(module.run(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_USE
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        return INTERRUPTED
    except (OSError, MemoryError, RuntimeError) as error:
        line = one_line_of(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return BAD_USE
