"""kill -9 at twenty moments of each stage: what lies there is whole, and the next run ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.killing import Commands, Ended, commands
from tests.reliability.stages import STAGES, Inputs, Stage, check_whole, failed, tree

KILLS, MUST_HIT = 20, 15
SHORT = 0.1  # seconds: a run that is over before it can be hit
LEFT, OVER = 7, 13  # so many kills on what the ones before left, then over a complete result; the others from nothing

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="counts files' changes as Linux does")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, make_config, make_detector) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"), commands(), make_config(), make_detector)


@dataclass
class Runs:
    """One stage's runs in one folder, and what a run that nothing disturbs leaves there."""

    stage: Stage
    run: Commands
    argv: list[str]
    folder: Path
    log: Path
    expected: dict[str, Any]

    def to_the_end(self) -> Ended:
        """A run that is not killed: it leaves what it should, and takes what earlier ones had finished."""
        cached = {path: path.stat().st_mtime_ns for path in self.folder.rglob("cache/*.npz")}
        unfinished = bool(self.stage.says) and any(self.folder.rglob("resume.pth"))
        ended = self.run.run(self.argv, self.folder, self.log)
        self.check(ended)
        assert all(path.stat().st_mtime_ns == written for path, written in cached.items())
        if unfinished:
            assert self.stage.says in ended.said
        return ended

    def check(self, ended: Ended) -> None:
        assert ended.status == 0, failed(ended)
        found = tree(self.folder)
        assert found.keys() == self.expected.keys()
        assert [name for name in found if found[name] != self.expected[name]] == []


@pytest.fixture
def runs(request, inputs, tmp_path) -> Runs:
    stage, folder, log = STAGES[request.param], tmp_path / "out", tmp_path / "log"
    argv = stage.argv(inputs, folder / stage.out)
    folder.mkdir()
    return Runs(stage, commands(), argv, folder, log, {})


@pytest.mark.nightly
@pytest.mark.parametrize(
    "runs",
    ["calibrate", "sensitivity", "finetune", "train", "export", "build", "compare", "report"],
    indirect=True,
)
def test_killed_at_twenty_moments_the_next_run_ends_as_if_nothing_had_been(runs: Runs, request) -> None:
    first = runs.run.run(runs.argv, runs.folder, runs.log)
    assert first.status == 0, failed(first)
    runs.expected.update(tree(runs.folder))
    out = runs.folder / runs.stage.out
    result = out / runs.stage.result
    rng = random.Random(request.node.name)
    moments = ["event", "tear", "tear", "cpu" if first.cpu > SHORT else "event"] * (KILLS // 4)
    rng.shuffle(moments)
    length, hits = first, 0
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    for n in range(KILLS):
        if n == LEFT:
            runs.to_the_end()
            length = runs.to_the_end() if runs.stage.says or any(runs.folder.rglob("cache")) else first
        if n == OVER:
            runs.to_the_end()
        if n >= OVER:
            shutil.rmtree(runs.folder)
            runs.folder.mkdir()
            length = first
        share = rng.random()
        at = (0.02 + 0.9 * share) * length.cpu if moments[n] == "cpu" else 1 + int(share * length.events)
        ended = runs.run.run(runs.argv, runs.folder, runs.log, **{moments[n]: at})
        if ended.status in (-signal.SIGKILL, -signal.SIGXFSZ):
            hits += 1
            check_whole(runs.folder)
        else:
            runs.check(ended)
        assert result.exists() or not LEFT <= n < OVER
    runs.to_the_end()
    assert hits >= MUST_HIT


@pytest.mark.nightly
@pytest.mark.parametrize("runs", ["calibrate", "build"], indirect=True)
def test_ctrl_c_at_any_moment_is_one_line_and_leaves_as_little(runs: Runs, request) -> None:
    first = runs.run.run(runs.argv, runs.folder, runs.log)
    runs.expected.update(tree(runs.folder))
    rng = random.Random(request.node.name)
    for moment in rng.sample(range(1, first.events), 4):
        ended = runs.run.run(runs.argv, runs.folder, runs.log, interrupt=moment)
        assert ended.status == 130, failed(ended)
        assert "interrupted; what was finished is kept" in ended.said and "Traceback" not in ended.said
        check_whole(runs.folder)
        assert (runs.folder / runs.stage.out / runs.stage.result).exists()  # of the first run
    runs.to_the_end()


@pytest.mark.parametrize("runs", ["sensitivity", "compare"], indirect=True)
def test_killed_between_two_keyframes_the_next_run_does_only_the_second(runs: Runs) -> None:
    first = runs.run.run(runs.argv, runs.folder, runs.log)
    assert first.status == 0, failed(first)
    runs.expected.update(tree(runs.folder))
    entries = len(list(runs.folder.rglob("cache/*.npz")))
    found, early, late = 0, 1, first.events
    while not 0 < found < entries:
        assert late - early > 1
        moment = (early + late) // 2
        shutil.rmtree(runs.folder / runs.stage.out)
        assert runs.run.run(runs.argv, runs.folder, runs.log, event=moment).status == -signal.SIGKILL
        found = len(list(runs.folder.rglob("cache/*.npz")))
        early, late = (moment, late) if found == 0 else (early, moment)
    runs.to_the_end()  # which leaves what is in the cache as it is
