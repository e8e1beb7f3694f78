"""Links lead somewhere, and flags that pages name exist."""

from __future__ import annotations

import argparse
import contextlib
import re

import pytest
from docs_pages import ROOT, anchors, links, pages, read_arguments

from qat.cli.parser import VERBS, make_parser

# Flags of other programs that pages name.
FOREIGN = {
    "trtexec": "--stronglyTyped --fp16 --int8 --best --calib --useDLACore --allowGPUFallback --inputIOFormats "
    "--outputIOFormats --onnx --saveEngine",
    "pip": "--no-deps --target",
    "pytest": "--noconftest",
    "ruff": "--fix",
    "torchrun": "--nproc-per-node",
}
IDS = [page.relative_to(ROOT).as_posix() for page in pages()]


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Of every verb and script."""
    known = set(" ".join(FOREIGN.values()).split()) | {"--version", "--help"}
    parser = make_parser()
    for verb in VERBS:  # with earlier spellings, which --help does not show
        known |= set(parser.verb_parser(verb)._option_string_actions)
    seen: list[argparse.ArgumentParser] = []
    real = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:

        def parse(self, args=None, namespace=None):
            seen.append(self)
            return real(self, args, namespace)

        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        for path in sorted(
            [
                *(ROOT / "benchmarks").glob("*.py"),
                *(ROOT / "tools").glob("*.py"),
                *(ROOT / "tests").glob("**/__main__.py"),
                *(ROOT / "examples").glob("**/*.py"),
            ]
        ):
            if "parse_args(" in path.read_text():
                with contextlib.suppress(SystemExit):  # of one that needs arguments; its parser is seen before
                    read_arguments(path, [])
    for parser in seen:
        known |= set(parser._option_string_actions)
    return known


@pytest.mark.parametrize("page", pages(), ids=IDS)
def test_flags_that_a_page_names_exist(page, flags):
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", page.read_text()))
    assert not named - flags, f"{page.relative_to(ROOT)}: no parser has {sorted(named - flags)}"


@pytest.mark.parametrize("page", pages(), ids=IDS)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for link in links(page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        where = f"{page.relative_to(ROOT)}: {link}"
        assert target.exists() and target.is_relative_to(ROOT), f"{where}: nothing there"
        if anchor:
            assert anchor in anchors(target), f"{where}: no such heading; there is {sorted(anchors(target))}"


def test_every_page_is_reached_from_the_index():
    index = {
        (ROOT / "docs" / link.partition("#")[0]).resolve() for link in links((ROOT / "docs/README.md").read_text())
    }
    missing = set((ROOT / "docs").glob("*.md")) - index - {ROOT / "docs/README.md"}
    assert not missing, f"docs/README.md: a row is missing for {sorted(page.name for page in missing)}"
