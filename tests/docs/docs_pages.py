"""Reads commands, Python and links out of the documentation."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("bevqat", "python", "torchrun", "pip", "make", "git", "cd", "trtexec", "ruff", "pytest")
SHELL, PYTHON, TEXT = "shell", "python", "text"
LANGUAGES = {"bash": SHELL, "sh": SHELL, "shell": SHELL, "python": PYTHON, "text": TEXT, "yaml": TEXT, "json": TEXT}


@dataclass(frozen=True)
class Block:
    """A code block: its language (None where the page does not say), its text and the line it begins at."""

    kind: str | None
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """words: as a shell would split them, variables and what stands before the program's name taken off."""

    words: tuple[str, ...]
    variables: tuple[str, ...]
    where: str

    @property
    def program(self) -> str:
        return Path(self.words[0]).name


def pages() -> list[Path]:
    """Everything that tells a user what to type."""
    found = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "example-data/README.md",
        ROOT / "benchmarks/README.md",
    ]
    for pattern in ("docs/*.md", "model/*/README.md", "examples/**/README.md"):
        found += sorted(ROOT.glob(pattern))
    return found


def blocks(text: str) -> list[Block]:
    """A page's fenced and indented code blocks."""
    found: list[Block] = []
    lines = text.splitlines()
    i = 0
    while i < len(lines):
        fence = re.match(r"( *)```(\w*)", lines[i])
        if fence:
            end = next((j for j in range(i + 1, len(lines)) if lines[j].strip() == "```"), len(lines))
            found.append(Block(LANGUAGES.get(fence[2]), "\n".join(lines[i + 1 : end]), i + 2))
            i = end + 1
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            end = i
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            found.append(Block(None, "\n".join(line[4:] for line in lines[i:end]).rstrip(), i + 1))
            i = end
        else:
            i += 1
    return found


def is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def kind_of(block: Block) -> str | None:
    """The block's language: as the page says, or by its first word; None for what cannot be told."""
    if block.kind is not None:
        return block.kind
    words = [word for word in block.text.split() if "=" not in word.split("(")[0]]
    if words and Path(words[0]).name in PROGRAMS:
        return SHELL
    if block.text.startswith(("error:", "warning:")):
        return TEXT
    return PYTHON if is_python(block.text) else None


def commands(text: str, where: str, first: int = 1) -> list[Command]:
    """Shell lines: continuations joined, comments left out, `&&` taken apart."""
    found: list[Command] = []
    line = ""
    for number, piece in enumerate(text.splitlines(), first):
        line += re.sub(
            r"(^|\s)#.*", "", piece
        )  # here, for shlex would begin a comment inside a word, or trip over its quotes
        if line.endswith("\\"):
            line = line[:-1] + " "
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split, lexer.commenters = True, ""
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word != "&&":
                words.append(word)
                continue
            variables = []
            while words and re.match(r"[A-Z_]+=", words[0]):
                variables.append(words.pop(0))
            if words:
                found.append(Command(tuple(words), tuple(variables), f"{where}:{number}"))
            words = []
        line = ""
    return found


def examples_of(help_text: str, where: str) -> list[Command]:
    """The commands of a verb's help."""
    lines: list[str] = []
    for line in map(str.strip, help_text.splitlines()):
        if line.split(" ")[0] in PROGRAMS or (lines and lines[-1].endswith("\\")):
            lines.append(line)
    return commands("\n".join(lines), where)


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)}


def links(text: str) -> list[str]:
    """Targets of Markdown links and pictures, but for those of other sites."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", target)]


class ParsedError(Exception):
    """Raised in the place of a script's work, when its arguments have been read."""


def read_arguments(path: Path, words: list[str]) -> None:
    """Runs the script until its arguments are parsed; a flag that it has not is argparse's SystemExit."""
    real = argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        real(self, args, namespace)
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [str(path), *words])
        patch.syspath_prepend(str(path.parent))
        spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        with pytest.raises(ParsedError):
            module.main()
