"""Print a script that completes verbs, flags, choices and files in a shell.

example:
  bevqat completion bash

For the current shell: source <(bevqat completion bash)
docs/commands.md says where each shell looks for it at start-up.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.cli import OK

SHELLS = ("bash", "zsh", "fish", "tcsh")
FOLDERS = ("DIR", "ROOT", "ROOT[:SPLIT]", "ROOT:SPLIT")  # metavars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's flags."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}")


def script(shell: str) -> str:
    """The script for one of SHELLS, made from the parsers of all verbs."""
    import shtab

    from qat.cli.parser import VERBS, make_parser

    parser = make_parser()
    for verb in VERBS:
        for action in parser.verb_parser(verb).shown():
            if action.choices is None and action.metavar in FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.choices is None and (action.type is Path or action.metavar == "FILE"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell=shell))


def run(args: argparse.Namespace) -> int:
    """Prints the script."""
    print(script(args.shell))
    return OK
