"""The parsers of all verbs, made from their modules: for the command line and for what is generated from it."""

from __future__ import annotations

import argparse
import difflib
import importlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NoReturn

import qat
from qat import families

VERBS = {
    "demo": "calibrate, export, build, compare and report on example-data, on the CPU",
    "doctor": "show what this machine can run, and what to install for the rest",
    "synth": "write generated driving scenes in the nuScenes format",
    "infos": "write mmdetection3d's info files of nuScenes-format data, or the data in KITTI's form",
    "show": "draw a sample's lidar points and boxes over its images",
    "train": "train a float detector",
    "calibrate": "insert TensorQuantizers and run PTQ over calibration frames",
    "import-ptq": "make a PTQ checkpoint of a network that another tool quantized",
    "finetune": "train a PTQ checkpoint with its quantizers on (QAT), from the float network's outputs",
    "inspect": "print what a PTQ checkpoint quantizes, with which scales, and what stays float",
    "sensitivity": "measure the accuracy loss of each quantized unit, one at a time",
    "health": "find the first layer with NaN or infinity, and quantizers that saturate",
    "export": "write a checkpoint's ONNX parts and their manifest",
    "export-camera": "same as export (its earlier name)",
    **{verb: summary for verb, (_, summary) in families.VERBS.items()},
    "deploy": "run a deploy config of MMDeploy's or AWML's: export, the backends' files, comparison with PyTorch",
    "test": "run a deployed mmdet3d detector over its config's test set: KITTI AP or nuScenes metrics, speed, pictures",
    "build": "build an exported folder's parts into engines for this machine, which a robot's process loads",
    "verify": "check exported parts against PyTorch's outputs, on any machine, without PyTorch",
    "agree": "compare the outputs and boxes of every pair of backends on the same frames",
    "compare": "measure accuracy and latency of every backend and precision against FP32",
    "benchmark": "time exported parts and the whole detector on this machine, by backend and precision",
    "report": "make report.html from results.json, or a comparison of two",
    "completion": "print a script that completes verbs, flags, choices and files in a shell",
}

# The modules of verbs with another name, and of a family's verbs.
MODULES = {"export-camera": "qat.cli.export", **{verb: module for verb, (module, _) in families.VERBS.items()}}
REMOVED = {
    "--calibration-cache": "was removed with implicit INT8; omit it: the exported graph has the scales as explicit QDQ, which "
    "trtexec --int8 and `bevqat build` read",
    "--no-roofline": "was removed with the roofline; omit it: no peaks are measured",
}


def module_of(verb: str) -> str:
    """The module that has a verb's flags and runs it."""
    return MODULES.get(verb, f"qat.cli.{verb.replace('-', '_')}")


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X?", or "" if no known name is similar."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def verb_of(arguments: Sequence[str]) -> str | None:
    """The first argument that is not a flag: flags before the verb have no values."""
    return next((word for word in arguments if not word.startswith("-")), None)


class Parser(argparse.ArgumentParser):
    """`bevqat`, or one of its verbs by `verb_parser`."""

    verbs: argparse._SubParsersAction[Parser]

    def verb_parser(self, verb: str) -> Parser:
        """The parser of one verb."""
        return self.verbs.choices[verb]

    def refuse_unknown(self, words: Sequence[str]) -> NoReturn:
        """Ends with exit status 2 for unknown arguments."""
        flag = next((word for word in words if word.startswith("-")), words[0]).partition("=")[0]
        if flag in REMOVED:
            self.error(f"{flag} {REMOVED[flag]}")
        hint = nearest(flag, (name for name in self._option_string_actions if name.startswith("--")))
        self.error(f"unknown: {' '.join(words)}{hint}")

    def shown(self) -> Iterator[argparse.Action]:
        """Its arguments and flags, without old spellings and --help."""
        for action in self._actions:
            if action.help != argparse.SUPPRESS and action.dest != "help":
                yield action


def make_parser(load: Collection[str] = tuple(VERBS)) -> Parser:
    """The parser of `bevqat`. load: verbs whose modules are imported for their flags; the others are known only by name."""
    parser = Parser(
        prog="bevqat",
        description=qat.__doc__,
        epilog="exit status: 0 fine, 1 checks failed, 2 bad use or bad input, 130 interrupted; docs/commands.md",
    )
    parser.add_argument("--version", action="version", version=f"bevqat {qat.__version__}")
    parser.verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, summary in VERBS.items():
        subparser = parser.verbs.add_parser(
            verb,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if verb in load:
            module = importlib.import_module(module_of(verb))
            subparser.epilog = module.__doc__.split("\n\n", 1)[-1] if module.__doc__ else None
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser
