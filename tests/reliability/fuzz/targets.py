"""What a user does with a file of each kind, and what has to come of it: one clear line, or a right result."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from qat.calibrate import load_ptq
from qat.calibrate.foreign import load_foreign_file
from qat.checkpoints.pickled import is_plainly_saved
from qat.checkpoints.reading import load_checkpoint
from qat.core.errors import UserError
from qat.core.onnx_file import read_outline
from qat.engine import Engine, Options, build
from qat.families.bevfusion.config import load_config
from qat.families.bevfusion.detector import build_model
from qat.families.bevfusion.family import FAMILY
from qat.manifest import load_manifest
from qat.runtime import Pipeline
from qat.runtime.engines import engine_section, load_engines, part_precisions, run_options
from qat.runtime.verify import verify_folder
from tests.reliability.fuzz.seeds import ROOT

LONGEST = 600
OPTIONS = Options(threads=1, cache=None)
REFUSED, READ = "refused", "read"


class Finding(Exception):
    """What a case did that it must not."""


def refusal(error: UserError, *names: str) -> str:
    """REFUSED, if the message is one line of reasonable length that names one of the files."""
    text = str(error)
    if len(text) > LONGEST or not text.isprintable():
        raise Finding(f"a message of {len(text)} characters, or of several lines: {text[:200]!r}")
    if not any(name in text for name in names):
        raise Finding(f"a message that names no file: {text!r}")
    return REFUSED


def _rarely(data: bytes, times: int) -> bool:
    """Whether this case is one of those, about 1 in `times`, that go the long way."""
    return hashlib.sha256(data).digest()[0] % times == 0


class Target:
    """Reads files of one kind. names: of the seeds. others: their bytes, to splice with."""

    every = 1  # of what is slow, one case in so many
    large: tuple[str, ...] = ()  # seeds that are drawn less often than the others, since a case of them takes long

    def __init__(self, seeds: Path, work: Path) -> None:
        self.seeds, self.work = seeds, work
        self.files = self.find()
        self.others = list(self.files.values())

    def find(self) -> dict[str, bytes]:
        """The seeds by name."""
        raise NotImplementedError

    def read(self, name: str, data: bytes) -> str:
        """REFUSED or READ; raises whatever else happens."""
        raise NotImplementedError


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and bool(torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b))
        )
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return type(a) is type(b) and bool(a == b)


class Checkpoints(Target):
    every = 40
    large = ("ptq", "float")

    def find(self) -> dict[str, bytes]:
        return {path.stem: path.read_bytes() for path in sorted((self.seeds / "checkpoint").glob("*.pth"))}

    def read(self, name: str, data: bytes) -> str:
        path = self.work / "fuzzed.pth"
        path.write_bytes(data)
        try:
            found = load_checkpoint(path)
        except UserError as error:
            return refusal(error, path.name)
        self.compare(path, found)
        own = found.get("format") == "bevqat-ptq" or name in ("float", "ptq")
        if own or "quantizers" in found:
            if not _rarely(data, self.every):
                return READ
            try:
                if found.get("format") == "bevqat-ptq":
                    load_ptq(path)
                elif "quantizers" in found:
                    load_foreign_file(path, found, FAMILY, load_config(self.seeds / "config" / "small.yaml"))
                else:
                    from qat.export.checkpoint import Source, open_source

                    open_source(Source(path))
            except UserError as error:
                return refusal(error, path.name)
        return READ

    def compare(self, path: Path, found: dict[str, Any]) -> None:
        """Beside torch's own reader, where that reads the file (and is not led astray: `is_plainly_saved`)."""
        if max(map(len, path.read_bytes().split()), default=0) >= 10_000 and not is_plainly_saved(path):
            return
        try:
            theirs = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # it refuses, or stumbles in any way
            return
        states = [theirs, *theirs.values()] if isinstance(theirs, dict) else []
        states = [state for state in states if isinstance(state, dict)]
        for key, value in found["state_dict"].items():
            if isinstance(value, torch.Tensor) and not any(key in s and _equal(value, s[key]) for s in states):
                raise Finding(f"{key!r}: another tensor than torch.load gives")


class Configs(Target):
    every = 6
    large = ("camera-tiny", "resnet50", "swint")

    def find(self) -> dict[str, bytes]:
        return {path.stem: path.read_bytes() for path in sorted((self.seeds / "config").glob("*.yaml"))}

    def read(self, name: str, data: bytes) -> str:
        path = self.work / "fuzzed.yaml"
        path.write_bytes(data)
        try:
            config = load_config(path, "camera" if name == "fusion" else None)
        except UserError as error:
            return refusal(error, path.name)
        if _rarely(data, 40 if name in self.large else self.every):
            try:
                model = build_model(config)
            except UserError as error:
                return refusal(error, "config", "model.")
            if sum(p.numel() for p in model.parameters()) == 0:
                raise Finding("a network without weights")
        return READ


class Manifests(Target):
    every = 16

    def find(self) -> dict[str, bytes]:
        found = {}
        self.engines: dict[str, dict[str, Engine]] = {}
        for folder in sorted((self.seeds / "manifest").iterdir()):
            shutil.copytree(folder, self.work / folder.name)
            data = (folder / "manifest.json").read_bytes()
            found[folder.name] = data
            manifest = json.loads(data)
            if manifest.get("format_of_parts", "onnx") == "onnx":
                self.engines[folder.name] = {
                    part: build(folder / entry["file"], "onnxruntime", entry["precision"], OPTIONS)
                    for part, entry in manifest["parts"].items()
                }
        return found

    def read(self, name: str, data: bytes) -> str:
        folder = self.work / name
        path = folder / "manifest.json"
        path.write_bytes(data)
        original = json.loads(self.files[name])
        kind = original.get("format_of_parts", "onnx")
        named = (name,)  # of the folder
        try:
            manifest = load_manifest(folder, format_of_parts=kind)
        except UserError as error:
            return refusal(error, *named)
        if repr(manifest) != repr(json.loads(data)):
            raise Finding("another dictionary than the file has")
        try:
            if kind == "engine":
                noted = engine_section(folder, manifest)
                run_options(noted, None, path)
                if _rarely(data, self.every):
                    engines, manifest, _ = load_engines(folder)
                    Pipeline(engines, manifest["pipeline"], source=str(folder))
            elif kind == "onnx":
                self.run(name, folder, manifest, original)
                if _rarely(data, self.every):
                    verify_folder(folder, options=OPTIONS)
        except UserError as error:
            return refusal(error, *named, "pipeline", "BEV pooling")
        return READ

    def run(self, name: str, folder: Path, manifest: dict[str, Any], original: dict[str, Any]) -> None:
        """As `Pipeline.load`, with the engines that were built of the same files (their hashes were checked)."""
        files = {entry["file"]: self.engines[name][part] for part, entry in original["parts"].items()}
        parts = {
            part: files[os.path.normpath(manifest["parts"][part]["file"])]
            for part in part_precisions(folder, manifest, None, "onnxruntime")
        }
        if manifest["pipeline"] == original["pipeline"] and parts == self.engines[name]:
            return
        pipeline = Pipeline(parts, manifest["pipeline"], 1, str(folder))
        count = len(pipeline.cameras)
        random = np.random.default_rng(0)
        images = [random.integers(0, 256, (70, 100, 3), dtype=np.uint8)] * count
        intrinsics = np.tile(np.diag([75, 75, 1, 1]).astype(np.float32), (count, 1, 1))
        intrinsics[:, :2, 2] = 50, 35
        camera2lidar = np.tile(
            np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]], np.float32), (count, 1, 1)
        )
        from qat.runtime import Calibration

        pipeline(images, random.uniform(-9, 9, (200, 5)).astype(np.float32), Calibration(intrinsics, camera2lidar))


class Graphs(Target):
    every = 12

    def find(self) -> dict[str, bytes]:
        shutil.copy(self.seeds / "onnx" / "weights.bin", self.work)
        (self.work.parent / "secret.bin").write_bytes(bytes(432))
        (self.work / "link.bin").symlink_to(self.work.parent / "secret.bin")
        return {path.stem: path.read_bytes() for path in sorted((self.seeds / "onnx").glob("*.onnx"))}

    def read(self, name: str, data: bytes) -> str:
        path = self.work / "fuzzed.onnx"
        path.write_bytes(data)
        results = [self.attempt(path, self.outline)]
        if _rarely(data, 1 if len(data) < 5000 else 6):
            results.append(self.attempt(path, lambda file: build(file, "onnxruntime", "int8", OPTIONS)))
        if _rarely(data[::-1], self.every):
            results.append(self.attempt(path, lambda file: build(file, "openvino", "int8", OPTIONS)))
        return READ if READ in results else REFUSED

    @staticmethod
    def attempt(path: Path, reader: Callable[[Path], Any]) -> str:
        try:
            reader(path)
        except UserError as error:
            return refusal(error, path.name)
        return READ

    @staticmethod
    def outline(path: Path) -> None:
        found = read_outline(path)
        for name in ("has_qdq", "has_fp16", "stores_int8", "has_uint8", "typed", "quantized"):
            getattr(found, name)
        try:
            model = onnx.ModelProto.FromString(path.read_bytes())
        except Exception:  # protobuf's error is not importable by a name that stays
            return
        if [node.op_type for node in model.graph.node] != [node.kind for node in found.nodes]:
            raise Finding("other operators than onnx reads")


TARGETS: dict[str, type[Target]] = {
    "manifest": Manifests,
    "config": Configs,
    "checkpoint": Checkpoints,
    "onnx": Graphs,
}
__all__ = ["READ", "REFUSED", "ROOT", "TARGETS", "Finding", "Target"]
