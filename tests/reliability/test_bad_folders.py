"""Exported folders and engines that disagree with their manifest, and backends that are not there."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qat.core.errors import UserError
from qat.core.files import sha256
from qat.engine import Options, build
from qat.runtime import Pipeline

FUSER = "fuser.onnx"


def _manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _other_shapes(folder: Path) -> None:
    """A graph for another grid, whose hash the manifest has."""
    maps = [("camera", [1, 10, 18, 12]), ("middle", [1, 24, 18, 12])]
    given, made = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in maps)
    weight = onnx.numpy_helper.from_array(np.ones((24, 10, 1, 1), np.float32), "weight")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["camera", "weight"], ["middle"])], "fuser", [given], [made], [weight]
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), folder / FUSER
    )
    _manifest(folder, lambda manifest: manifest["parts"]["fuser"].update(sha256=sha256(folder / FUSER)))


def _cut(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:400])


FOLDERS = {
    "missing": (shutil.rmtree, "fp32/manifest.json: no such file; expected a folder written by export-camera"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "fp32/manifest.json: no such file"),
    "manifest cut": (_cut, "fp32/manifest.json: not valid JSON"),
    "another file": (lambda folder: (folder / "manifest.json").write_text("[1]"), "not a manifest of exported parts"),
    "newer": (
        lambda folder: _manifest(folder, lambda m: m.update(schema=9)),
        "found schema 9, expected 1; export again",
    ),
    "a byte changed": (
        lambda folder: _flip(folder / FUSER),
        "fp32/fuser.onnx: found sha256",
    ),
    "a part gone": (lambda folder: (folder / FUSER).unlink(), "fp32/fuser.onnx: no such file, expected part fuser"),
    "a part not listed": (
        lambda folder: _manifest(folder, lambda m: m["parts"].pop("fuser")),
        "found no parts fuser, expected all; export again without --parts",
    ),
    "out of the folder": (
        lambda folder: _manifest(folder, lambda m: m["parts"]["fuser"].update(file="../config.yaml")),
        "found file '../config.yaml', expected the name of a file in the manifest's folder",
    ),
    "another format": (
        lambda folder: _manifest(folder, lambda m: m.update(format_of_parts="pt2")),
        "found parts of format pt2, expected onnx",
    ),
    "another precision": (
        lambda folder: _manifest(folder, lambda m: m.update(precision="int4")),
        "int4",
    ),
    "no pipeline": (lambda folder: _manifest(folder, lambda m: m.pop("pipeline")), "pipeline: found none, expected"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_parts_that_is_not_whole(kind, work, own, refused):
    """For build, verify, benchmark and Pipeline.load."""
    change, words = FOLDERS[kind]
    change(own("fp32"))
    (work / "engines_out").mkdir()
    (work / "engines_out" / "earlier").write_text("earlier")
    refused(["build", "--onnx", "fp32", "--backend", "onnxruntime", "--out", "built"], words)
    arguments = ["benchmark", "--onnx", "fp32", "--backends", "onnxruntime", "--rounds", "1"]
    refused([*arguments, "--out", "timed"], words)
    if kind not in (
        "a byte changed",
        "a part gone",
        "a part not listed",
        "another precision",
        "no pipeline",
    ):  # which verify tells as its result
        refused(["verify", "fp32"], words)
    with pytest.raises(UserError) as error:
        Pipeline.load("fp32", "onnxruntime")
    assert words in str(error.value)


def test_graphs_of_other_shapes_than_the_manifest_says(own, refused):
    _other_shapes(own("fp32"))
    words = (
        "fuser.onnx: camera: found shape [1, 10, 18, 12]",
        "expected [1, 10, 16, 12] as in manifest.json; export again",
    )
    refused(["build", "--onnx", "fp32", "--backend", "onnxruntime", "--out", "built"], *words)
    with pytest.raises(UserError, match=r"fuser\.onnx: camera: found shape"):
        Pipeline.load("fp32", "onnxruntime")


def test_fields_that_nobody_knows_do_no_harm(own, capsys):
    from qat.cli import main

    folder = own("fp32")
    _manifest(folder, lambda manifest: manifest.update(weather="fine"))
    assert main(["verify", "fp32", "--part", "fuser"]) == 0


def test_verification_frames_that_are_damaged(work, own, refused):
    folder = own("fp32")
    file = folder / json.loads((folder / "manifest.json").read_text())["verification"]["file"]
    file.write_bytes(file.read_bytes()[:100])
    refused(["verify", "fp32"], file.name)


ENGINES = {
    "another version": (
        lambda folder: _manifest(folder, lambda m: m["engine"].update(version="1.0")),
        "engines/manifest.json: built by onnxruntime 1.0, found",
    ),
    "another processor": (
        lambda folder: _manifest(folder, lambda m: m["engine"].update(device="Cortex", device_fingerprint="other")),
        "engines/manifest.json: built for Cortex, found",
    ),
    "a byte changed": (lambda folder: _flip(next(folder.glob("fuser.*"))), "engines/fuser"),
    "a file gone": (lambda folder: next(folder.glob("fuser.*")).unlink(), "no such file, expected part fuser"),
    "no section": (lambda folder: _manifest(folder, lambda m: m.pop("engine")), "found no section engine"),
}


@pytest.mark.parametrize("kind", ENGINES)
def test_engines_that_were_built_elsewhere_or_changed(kind, own, refused):
    change, words = ENGINES[kind]
    change(own("engines"))
    arguments = ["benchmark", "--onnx", "engines", "--rounds", "1", "--out", "timed"]
    refused(arguments, words, "run `bevqat build` again")
    with pytest.raises(UserError) as error:
        Pipeline.load("engines")
    assert words in str(error.value)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_damaged_entry_of_the_engine_cache_is_built_again(backend, work):
    options = Options(cache=work / "cache")
    grid = {"camera": np.random.default_rng(0).normal(size=(1, 10, 16, 12)).astype(np.float32)}
    first = build("fp32/fuser.onnx", backend, "fp32", options).run(grid)
    entries = [path for path in (work / "cache").rglob("*") if path.is_file()]
    assert entries
    for path in entries:
        path.write_bytes(b"damaged")
    again = build("fp32/fuser.onnx", backend, "fp32", options).run(grid)
    np.testing.assert_array_equal(first["middle"], again["middle"])


def test_a_backend_that_is_not_installed(monkeypatch, refused):
    """Its line names the pip command."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "qat.engine.openvino_backend", raising=False)
    words = "backend openvino: the package openvino is not installed; fix by: pip install openvino"
    refused(["build", "--onnx", "fp32", "--backend", "openvino", "--out", "built"], words)
    refused(["verify", "fp32", "--backend", "openvino"], words)
    compare = ["compare", "--ckpt", "float.pth", "--config", "config.yaml", "--fp32", "fp32", "--data", "data"]
    refused([*compare, "--backends", "openvino", "--rounds", "1", "--out", "compared"], words)
    with pytest.raises(UserError, match="pip install openvino"):
        Pipeline.load("fp32", "openvino")


def test_a_backend_that_nobody_knows(refused):
    compare = ["compare", "--ckpt", "float.pth", "--config", "config.yaml", "--fp32", "fp32", "--data", "data"]
    words = "found 'tensorflow', expected"
    refused([*compare, "--backends", "tensorflow", "--out", "compared"], words)
    refused(["benchmark", "--onnx", "fp32", "--backends", "tensorflow", "--out", "timed"], words)


def test_a_gpus_backend_without_a_gpu(refused):
    arguments = ["build", "--onnx", "fp32", "--backend", "onnxruntime-cuda", "--out", "built"]
    refused(arguments, "expected CUDAExecutionProvider; fix by: pip", "onnxruntime-gpu")


def test_a_pipeline_does_not_decode_what_is_not_finite(work, small_scene):
    """Boxes of NaN, or none at all, would go on unseen."""
    pipeline = Pipeline.load("fp32", "onnxruntime")
    for name, runner in list(pipeline.parts.items()):
        if name == "fuser":
            pipeline.parts[name] = _Spoiled(runner)
    from qat.families.bevfusion.config import CAMERAS
    from qat.runtime import Calibration

    count = len(CAMERAS)
    images = [small_scene["images"][n % 3] for n in range(count)]
    matrices = [small_scene[name][[n % 3 for n in range(count)]] for name in ("camera_intrinsics", "camera2lidar")]
    with pytest.raises(UserError, match=r"fp32: middle: found NaN or infinity.*bevqat health"):
        pipeline(images, small_scene["points"].astype(np.float32), Calibration(*matrices))


class _Spoiled:
    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self.runner.run(feeds)
        return {name: np.full_like(value, np.nan) for name, value in found.items()}
