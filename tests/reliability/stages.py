"""Every stage over tiny inputs, for the tests that kill stages and that let two of them write one output."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from PIL import Image

from qat.families.bevfusion.config import load_config
from qat.manifest import load_manifest
from tests.reliability.killing import Commands, Ended

ROOT = Path(__file__).resolve().parents[2]

# What differs from run to run, in any file of JSON.
TIMES = {
    "created", "command", "latency_ms", "stages_ms", "stages_p95_ms", "speedup_vs_fp32", "pattern_rebuild_ms", "machine", "build_seconds",
}  # fmt: skip


class Inputs:
    """Makes each stage's inputs when they are first asked for, by the stages before it.

    config, weights: of a detector for 64×96 images, as `make_config` and `make_detector` of tests/conftest.py have it.
    """

    def __init__(
        self, folder: Path, run: Commands, config: dict[str, Any], make_detector: Callable[[Any], Any]
    ) -> None:
        self.folder, self._run = folder, run
        whole = load_config(ROOT / "model" / "camera-tiny" / "config.yaml")
        for key in ("augment2d", "augment3d"):
            config[key] = whole[key]
        head, size = config["model"]["heads"]["object"], config["point_cloud_range"]
        head["loss_bbox"] = {"loss_weight": 0.25}
        head["train_cfg"] = {
            **whole["model"]["heads"]["object"]["train_cfg"],
            "point_cloud_range": size, "grid_size": [128, 96, 1], "voxel_size": [0.25, 0.25, 8.0], "out_size_factor": 8,
        }  # fmt: skip
        config["data"]["test"]["pipeline"][0]["resize_lim"] = [1.0, 1.0]
        self.model = folder / "small"
        self.model.mkdir()
        (self.model / "config.yaml").write_text(yaml.safe_dump(config))
        torch.save({"state_dict": make_detector(config).state_dict()}, self.model / "small.pth")

    def _made(self, name: str, stage: str) -> Path:
        path = self.folder / name
        if not path.exists():
            ended = self._run.run(STAGES[stage].argv(self, path), self.folder, self.folder / "log")
            assert ended.status == 0, ended.said
        return path

    @property
    def data(self) -> Path:
        return self._made("data", "synth")

    @property
    def ptq(self) -> Path:
        return self._made("ptq.pth", "calibrate")

    @property
    def parts(self) -> Path:
        return self._made("parts", "export all")

    @property
    def results(self) -> Path:
        return self._made("compared", "compare") / "results.json"


@dataclass(frozen=True)
class Stage:
    """argv: of inputs and what is written. out: the name of that. result: the main file in it ("" where it is one file). says: what
    it prints when it goes on from where a killed one was, if it prints that."""

    argv: Callable[[Inputs, Path], list[str]]
    result: str = ""
    says: str = ""
    out: str = "result"


def _words(*words: object) -> list[str]:
    return [str(word) for word in words]


STAGES = {
    "synth": Stage(
        lambda i, out: _words(
            "synth", "--scenes", 4, "--keyframes", 1, "--splits", "calib=2,eval=2", "--native", "96x64", "--azimuths", 40,
            "--sweeps", 0, "--workers", 1, "--out", out,
        ),
        "v1.0-synth/sample.json",
    ),
    "calibrate": Stage(
        lambda i, out: _words(
            "calibrate", "--config", i.model / "config.yaml", "--ckpt", i.model / "small.pth", "--data", i.data, "--frames", 1,
            "--method", "max", "--out", out,
        ),
        out="result.pth",
    ),
    "sensitivity": Stage(
        lambda i, out: _words("sensitivity", i.ptq, "--data", i.data, "--frames", 2, "--out", out), "sensitivity.json"
    ),
    "finetune": Stage(
        lambda i, out: _words(
            "finetune", "--ckpt", i.ptq, "--data", f"{i.data}:calib", "--steps", 3, "--batch", 1, "--save-seconds", 0,
            "--no-augment", "--out", out,
        ),
        "qat.pth",
        "resumed at step",
    ),
    "train": Stage(
        lambda i, out: _words(
            "train", "--config", i.model / "config.yaml", "--data", f"{i.data}:calib", "--steps", 3, "--batch", 1,
            "--save-seconds", 0, "--out", out,
        ),
        "model.pth",
        "resumed at step",
    ),
    "export": Stage(
        lambda i, out: _words("export-camera", "--ckpt", i.ptq, "--frames", 0, "--parts", "fuser", "--out", out),
        "manifest.json",
    ),
    "export all": Stage(
        lambda i, out: _words("export-camera", "--ckpt", i.model / "small.pth", "--fp32", "--frames", 0, "--out", out)
    ),
    "build": Stage(
        lambda i, out: _words("build", "--onnx", i.parts, "--backend", "onnxruntime", "--threads", 1, "--out", out),
        "manifest.json",
    ),
    "compare": Stage(
        lambda i, out: _words(
            "compare", "--ckpt", i.model / "small.pth", "--fp32", i.parts, "--backends", "onnxruntime", "--data", i.data,
            "--rounds", 1, "--repeats", 1, "--resamples", 0, "--threads", 1, "--out", out,
        ),
        "results.json",
    ),
    "report": Stage(lambda i, out: _words("report", i.results, "--out", out), out="result.html"),
    "benchmark": Stage(
        lambda i, out: _words(
            "benchmark", "--onnx", i.parts, "--backends", "onnxruntime", "--rounds", 1, "--repeats", 1, "--frames", 1,
            "--threads", 1, "--out", out,
        ),
        "benchmark.json",
    ),
}  # fmt: skip


def _plain(value: Any) -> Any:
    """What compares with ==, without what differs from run to run."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    return value


def content(path: Path) -> Any:
    """What a file holds, read by what reads such files; raises for one that is not whole."""
    if path.suffix == ".json":
        if path.name == "manifest.json":
            kind = json.loads(path.read_text()).get("format_of_parts", "onnx")
            load_manifest(path.parent, format_of_parts=kind)  # every file beside it is the one that it tells of
        return _plain(json.loads(path.read_text()))
    if path.suffix == ".pth":
        return _plain(torch.load(path, weights_only=True))
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: array.tobytes() for name, array in arrays.items()}
    if path.suffix in (".png", ".jpg"):
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".onnx":
        onnx.load(path)
    elif path.suffix in (".html", ".svg"):
        assert path.read_text().rstrip().endswith(f"</{path.suffix[1:]}>")
        return "whole"
    elif path.suffix == ".csv":
        return len(path.read_text().splitlines())
    return path.read_bytes()


def tree(root: Path) -> dict[str, Any]:
    """Everything below a folder by its name, hidden files too."""
    return {str(path.relative_to(root)): content(path) for path in sorted(root.rglob("*")) if path.is_file()}


def check_whole(root: Path) -> None:
    """Everything that has its final name can be read: nothing below a hidden folder has, and no hidden file."""
    for path in root.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            content(path)


def failed(ended: Ended) -> str:
    """For the message of an assertion."""
    return f"status {ended.status} after {ended.events} changes:\n{ended.said[-3000:]}"
