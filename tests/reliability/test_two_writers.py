"""Two processes with one output: one writes it, the other says who does and leaves everything alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.reliability.killing import commands
from tests.reliability.stages import STAGES, Inputs, check_whole, failed, tree

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="counts files' changes as Linux does")

AT_WORK = 6  # changes of files: with the lock, and some way from the end


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, make_config, make_detector) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"), commands(), make_config(), make_detector)


def states(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {str(path): path.stat() for path in folder.rglob("*")}
    return {name: (state.st_ino, state.st_size, state.st_mtime_ns) for name, state in found.items()}


@pytest.mark.parametrize(
    "name",
    ["synth", "calibrate", "sensitivity", "finetune", "train", "export", "build", "compare", "benchmark", "report"],
)
def test_the_second_process_names_the_first_and_changes_nothing(name, inputs, tmp_path):
    stage, run, folder = STAGES[name], commands(), tmp_path / "out"
    folder.mkdir()
    argv = stage.argv(inputs, folder / stage.out)
    first = run.begin(argv, folder, tmp_path / "first.log", stop=AT_WORK)
    before = states(folder)
    second = run.run(argv, folder, tmp_path / "second.log")
    assert states(folder) == before
    assert second.status == 2, failed(second)
    (said,) = (line for line in second.said.splitlines() if line.startswith("error:"))
    assert f"process {first} on " in said and f"bevqat {argv[0]}" in said and "is writing here" in said
    assert str(folder) in said and "Traceback" not in second.said
    ended = run.finish(first, stopped=True)
    assert ended.status == 0, failed(ended)
    check_whole(folder)
    assert (folder / stage.out / stage.result).exists()
    assert [path for path in folder.rglob(".*")] == []


def test_of_several_that_start_together_those_that_end_well_leave_what_one_leaves(inputs, tmp_path):
    run, stage = commands(), STAGES["build"]
    once, many = tmp_path / "once", tmp_path / "many"
    for folder in (once, many):
        folder.mkdir()
    assert run.run(stage.argv(inputs, once / "result"), once, tmp_path / "log").status == 0
    argv = stage.argv(inputs, many / "result")
    pids = [run.begin(argv, many, tmp_path / f"log{n}") for n in range(4)]
    ended = [run.finish(pid) for pid in pids]
    assert {each.status for each in ended} <= {0, 2} and any(each.status == 0 for each in ended)
    for each in ended:
        assert each.status == 0 or "is writing here" in each.said
    assert tree(many) == tree(once)
