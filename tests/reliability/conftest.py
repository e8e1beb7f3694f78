"""A tiny network with all that the commands make of it, and the one check that every bad input goes through."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from qat.cli import main
from qat.data.synth import SynthOptions, generate
from qat.runtime import build_engines

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
# Input in the page's table of bad input → the test, with its case, that sees the line.
HELD_BY = {
    "truncated checkpoint": "test_bad_checkpoint.py::test_a_file_that_is_no_checkpoint[truncated]",
    "another network's checkpoint": "test_bad_checkpoint.py::test_another_networks_names",
    "NaN in the weights": "test_bad_checkpoint.py::test_weights_that_are_not_finite[nan]",
    "float checkpoint where a PTQ one is needed": "test_bad_checkpoint.py::test_a_float_checkpoint_for_a_quantized_one",
    "image size and stride differ": "test_bad_config.py::test_an_image_size_that_no_stride_divides",
    "table missing": "test_bad_data.py::test_data_that_cannot_be_used[a table missing]",
    "camera missing": "test_bad_data.py::test_data_that_cannot_be_used[a channel absent]",
    "unreadable image": "test_bad_data.py::test_data_that_cannot_be_used[a picture of text]",
    "image of unsuitable size": "test_bad_data.py::test_pictures_of_a_size_that_the_model_was_not_made_for",
    "lidar of another format": "test_bad_data.py::test_data_that_cannot_be_used[lidar of four values]",
    "unknown split": "test_bad_data.py::test_a_split_a_version_or_frames_that_are_not_there[split]",
    "changed export": "test_bad_folders.py::test_a_folder_of_parts_that_is_not_whole[a byte changed]",
    "engines of another machine": "test_bad_folders.py::test_engines_that_were_built_elsewhere_or_changed[another processor]",
    "backend not installed": "test_bad_folders.py::test_a_backend_that_is_not_installed",
    "full disk": "test_bad_output.py::test_the_machines_refusals_are_one_line",
}
TRAINING = {
    "point_cloud_range": [-16.0, -12.0, -5.0, 16.0, 12.0, 3.0],
    "grid_size": [128, 96, 1],
    "voxel_size": [0.25, 0.25, 8],
    "out_size_factor": 8,
    "dense_reg": 1,
    "gaussian_overlap": 0.1,
    "max_objs": 100,
    "min_radius": 2,
    "code_weights": [1.0] * 10,
}


@pytest.fixture(scope="session")
def bad_config(make_config) -> Callable[[], dict]:
    """() → a fresh config that fits the lab's data and checkpoints."""

    def make() -> dict:
        config = copy.deepcopy(make_config())
        config["data"]["test"]["pipeline"][0]["resize_lim"] = [1.0, 1.0]
        head = config["model"]["heads"]["object"]
        head["train_cfg"] = dict(TRAINING)
        head["loss_cls"] = {"type": "GaussianFocalLoss", "reduction": "mean"}
        head["loss_bbox"] = {"type": "L1Loss", "reduction": "mean", "loss_weight": 0.25}
        config["augment2d"] = {"resize": [[0.9, 1.1], [1.0, 1.0]], "rotate": [-1, 1]}
        config["augment3d"] = {"scale": [0.9, 1.1], "rotate": [-0.1, 0.1], "translate": 0.5}
        return config

    return make


@pytest.fixture(scope="session")
def lab(tmp_path_factory, bad_config, make_detector) -> Path:
    """A folder with data, config.yaml, float.pth, ptq.pth, the exports fp32 and int8, and engines; nothing may change it."""
    folder = tmp_path_factory.mktemp("lab")
    options = SynthOptions(
        scenes=2, keyframes=1, width=96, height=64, azimuths=60, sweeps=0, splits={"calib": 1, "eval": 1}
    )
    generate(folder / "data", options, workers=1, quiet=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(bad_config()))
    torch.save({"state_dict": make_detector(bad_config()).state_dict()}, folder / "float.pth")
    at = {name: str(folder / name) for name in ("config.yaml", "float.pth", "ptq.pth", "data", "fp32")}
    shared = ["--config", at["config.yaml"], "--ckpt", at["float.pth"], "--data", at["data"]]
    assert main(["calibrate", *shared, "--out", at["ptq.pth"]]) == 0
    assert main(["export-camera", *shared, "--split", "calib", "--out", at["fp32"]]) == 0
    build_engines(folder / "fp32", "onnxruntime", out=folder / "engines")
    return folder


@pytest.fixture
def work(lab, tmp_path, monkeypatch) -> Path:
    """The test's own folder, which is the current one: links to what the lab has, by the same names."""
    for item in lab.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own(work) -> Callable[[str], Path]:
    """A name of the lab → a copy of it in `work`, to spoil."""

    def take(name: str) -> Path:
        path = work / name
        source = path.resolve()
        path.unlink()
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, path)
        return path

    return take


@cache
def table() -> dict[str, str]:
    """docs/reliability.md's table of bad input: what is wrong → how the line begins."""
    section = PAGE.read_text().partition("## Bad input")[2].partition("\n## ")[0]
    rows = [row.strip("| ").split(" | ") for row in section.splitlines() if row.startswith("| ")][1:]
    return {found: line.strip("`") for found, line in rows}


def rows_of(file: str, name: str) -> list[str]:
    """The lines that rows give for a test's case; a row held by a test without a case gives them for each."""
    names = {f"{file}::{name}", f"{file}::{name.partition('[')[0]}"}
    return [line for found, line in table().items() if HELD_BY[found] in names]


def matches(row: str, line: str) -> bool:
    """Whether a row's line is the beginning of a command's; `…` stands for anything."""
    return re.match(".*".join(map(re.escape, row.split("…"))), line) is not None


def contents(folder: Path) -> dict[str, str]:
    """What every file of a folder holds, and every folder in it; what links lead to is not looked at."""
    found = {}
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            item = Path(path) / name
            inside = item.is_symlink() or item.is_dir()
            found[str(item.relative_to(folder))] = "" if inside else hashlib.sha256(item.read_bytes()).hexdigest()
    return found


@pytest.fixture
def refused(request, work, capsys) -> Iterator[Callable[..., str]]:
    """(arguments, words…) → the line, after checking that the command ends with status 2 and this one line on stderr, which
    has the words in it, and that it left everything in `work` as it was: nothing new, and earlier results byte for byte.

    At the end, what docs/reliability.md says that this test sees must be among the lines that it saw."""
    lines: list[str] = []

    def check(arguments: list[object], *words: str) -> str:
        before = contents(work)
        capsys.readouterr()
        status = main([str(word) for word in arguments])
        said = capsys.readouterr().err
        assert status == 2, said
        own = [line for line in said.splitlines() if not re.fullmatch(r"build [\w.]+", line)]  # without progress
        assert len(own) == 1 and own[0].startswith("error: ") and said.endswith(f"{own[0]}\n"), said
        for word in words:
            assert word in said, said
        assert contents(work) == before
        lines.append(own[0].removeprefix("error: ").replace("`", ""))
        return said

    yield check
    for row in rows_of(request.node.path.name, request.node.name) if lines else ():
        assert any(matches(row, line) for line in lines), f"docs/reliability.md has {row!r}, found {lines}"


@pytest.fixture
def verbs(work) -> SimpleNamespace:
    """Command lines of the verbs that read a checkpoint, a config or data, whose outputs have earlier results in their place."""
    (work / "out").mkdir()
    for name in ("ptq.pth", "qat.pth", "sheet.png", "model.pth"):
        (work / "out" / name).write_text("earlier")
    data, config = ["--data", "data"], ["--config", "config.yaml"]
    quick = ["--rounds", "1", "--repeats", "1", "--resamples", "0"]

    def floats(ckpt: str, config: list[str] = config) -> dict[str, list[str]]:
        return {
            "calibrate": ["calibrate", "--ckpt", ckpt, *config, *data, "--out", "out/ptq.pth"],
            "export-camera": ["export-camera", "--ckpt", ckpt, *config, *data, "--out", "out/onnx"],
            "health": ["health", ckpt, *config, *data],
            "compare": ["compare", "--ckpt", ckpt, *config, "--fp32", "fp32", *data, *quick, "--out", "out/compare"],
            "train": [
                "train",
                "--init",
                ckpt,
                *config,
                "--data",
                "data:calib",
                "--steps",
                "1",
                "--batch",
                "1",
                "--out",
                "out/train",
            ],
            "import-ptq": ["import-ptq", "--ckpt", ckpt, *config, "--out", "out/ptq.pth"],
        }

    def quantized(ckpt: str) -> dict[str, list[str]]:
        return {
            "inspect": ["inspect", ckpt],
            "sensitivity": ["sensitivity", ckpt, *data, "--out", "out/sensitivity"],
            "export-camera": ["export-camera", "--ckpt", ckpt, "--int8", *data, "--out", "out/onnx"],
            "finetune": ["finetune", "--ckpt", ckpt, "--data", "data:calib", "--steps", "1", "--batch", "1", "--out", "out"],
            "health": ["health", ckpt, *data],
            "compare": ["compare", "--ckpt", "float.pth", *config, "--ptq", ckpt, "--fp32", "fp32", *data, *quick,
                        "--out", "out/compare"],
        }  # fmt: skip

    return SimpleNamespace(floats=floats, quantized=quantized)
