"""The rows to compare: one for each backend, precision and flavour, each a whole detector as a `Pipeline`."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qat import __version__
from qat.calibrate import load_ptq
from qat.checkpoints.reading import load_checkpoint
from qat.core.errors import UserError
from qat.core.files import sha256
from qat.engine import Options, find_backend, passed_over, takes_bfloat16
from qat.families import flow_of
from qat.lean.flavours import DEFAULT, FLAVOURS
from qat.lean.modes import quantizers
from qat.manifest import load_manifest, pipeline_of
from qat.model.opening import open_model
from qat.model.quantized import QuantizedModel
from qat.model.runners import flow_for, torch_parts
from qat.runtime import Pipeline

Manifests = Sequence[tuple[Path, str, dict[str, Any]]]  # folder, precision, manifest


@dataclass
class Row:
    """One detector.

    key: hash of everything that its boxes depend on besides the sample: weights, settings, backend and its version. Rows of
    one key are computed once. simulated: computes in float what an integer engine would; its time is not an engine's.
    """

    backend: str
    precision: str
    flavour: str
    pipeline: Pipeline
    size_mb: float
    key: str
    simulated: bool = False

    @property
    def name(self) -> str:
        """For messages, such as "openvino int8"."""
        return f"{self.backend} {self.precision}"


@dataclass
class Sources:
    """The files that the rows are made of.

    ckpt: the float checkpoint. ptq: calibrate's checkpoint, or None for no fake-quant row. fp32, int8: folders of
    exported parts. config: for a float checkpoint that contains none. ema: use its averaged weights.
    """

    ckpt: Path
    ptq: Path | None
    fp32: Sequence[Path]
    int8: Sequence[Path]
    config: Path | None = None
    ema: bool = False


def _key(*values: Any) -> str:
    return hashlib.sha256(json.dumps([__version__, *values], sort_keys=True).encode()).hexdigest()[:24]


def _same_weights(sources: Sources, recipe: dict[str, Any], float_hash: str, ptq_hash: str | None) -> None:
    """Checks that the files come from one training: otherwise the comparison would attribute the difference to quantization."""
    made_from = recipe.get("float_checkpoint", {}).get("sha256", float_hash)
    if made_from != float_hash:
        raise UserError(
            f"{sources.ptq}: calibrated from a checkpoint with sha256 {made_from[:12]}…, {sources.ckpt} has "
            f"{float_hash[:12]}…; calibrate again, or give its float checkpoint with --ckpt"
        )
    if recipe.get("float_checkpoint", {}).get("ema", False) != sources.ema and "float_checkpoint" in recipe:
        made = "the averaged weights" if recipe["float_checkpoint"].get("ema") else "weights that were not averaged"
        raise UserError(f"{sources.ptq}: calibrated from {made} of {sources.ckpt}, expected --ema for both or neither")
    for folder in (*sources.fp32, *sources.int8):
        source = load_manifest(folder, check_files=False).get("checkpoint")
        if source is not None and source["sha256"] not in (float_hash, ptq_hash):
            named = " or ".join(str(path) for path in (sources.ckpt, sources.ptq) if path is not None)
            raise UserError(
                f"{folder}: exported from {source['file']} with sha256 {source['sha256'][:12]}…, expected {named} "
                "as they are now; export again"
            )
        if source is not None and source["sha256"] == float_hash and bool(source.get("ema")) != sources.ema:
            made = "the averaged weights" if source.get("ema") else "weights that were not averaged"
            raise UserError(f"{folder}: exported from {made} of {sources.ckpt}, expected --ema for both or neither")


INSTEAD = "use `bevqat sensitivity` for the loss at a branch's BEV features"


def _check_whole(folders: Sequence[Path]) -> None:
    """Refuses a part of a model, which has no accuracy: the whole model turns its features into boxes."""
    for folder in folders:
        settings = pipeline_of(folder, load_manifest(folder, check_files=False))
        flow_of(settings, source=str(folder)).need_boxes(str(folder), INSTEAD)


def _simulations(detector: QuantizedModel, manifests: Manifests) -> list[tuple[str, tuple[str, ...]]]:
    """The simulations to run: (flavour, parts that are INT8 in the folder but float in calibration) of each INT8 folder, each
    pair once; only the default flavour if there is no INT8 folder."""
    found = []
    for folder, precision, manifest in manifests:
        if precision != "int8":
            continue
        flavour, parts = manifest["flavour"], manifest["parts"]
        if flavour not in FLAVOURS:
            raise UserError(
                f"{folder}: flavour: found {flavour!r}, expected one of {', '.join(FLAVOURS)}; export again"
            )
        with detector.in_flavour(flavour):
            off = detector.parts_off
        scopes = detector.plan.scopes.items()
        int8 = [scope for scope, name in scopes if parts.get(name, {}).get("precision") == "int8"]
        found.append((flavour, tuple(own for own in int8 if own in off)))
    return list(dict.fromkeys(found)) or [(DEFAULT, ())]


def _rounding(detector: QuantizedModel) -> list[str]:
    """Everything about rounding in the flavour and its parts that affects a detector's results."""
    return [f"{name} {q.spec}" for name, q in quantizers(detector.parts).items() if not q._disabled]


def _simulated_rows(
    detector: QuantizedModel, ptq: Path, manifests: Manifests, known: Sequence[Any], settings: Any, threads: int
) -> list[Row]:
    """A row for each flavour among the INT8 folders.

    Flavours that round alike (tensorrt and tensorrt-strong; onnxruntime and openvino) share a detector and a key.

    Args:
        known: other parts of the keys besides the rounding.
    """
    rows: list[Row] = []
    pipelines: dict[str, Pipeline] = {}
    for flavour, parts_int8 in _simulations(detector, manifests):
        with detector.in_flavour(flavour, parts_int8):
            key = _key("pytorch", *known, _rounding(detector))
        if key not in pipelines:
            own = copy.deepcopy(detector)  # fifty times as fast as `load_ptq`
            own.use(flavour, parts_int8)
            pipelines[key] = Pipeline(torch_parts(own), settings, threads)
        size = ptq.stat().st_size / 1e6
        rows.append(Row("pytorch", "int8-fake", flavour, pipelines[key], size, key, simulated=True))
    return rows


def _engine_rows(manifests: Manifests, backends: Sequence[str], options: Options) -> list[Row]:
    """A row for each folder on each backend that can run it."""
    rows = []
    forms = {(precision, manifest["flavour"]) for _, precision, manifest in manifests}
    for backend in backends:
        for folder, precision, manifest in manifests:
            if passed_over(backend, precision, manifest["flavour"], forms):
                continue
            pipeline = Pipeline.load(folder, backend, precision, options)
            hashes = {name: part["sha256"] for name, part in manifest["parts"].items()}
            size = sum((folder / part["file"]).stat().st_size for part in manifest["parts"].values())
            version = find_backend(backend).version
            # other settings that change a result
            more: list[Any] = ["bfloat16"] if options.bfloat16 and takes_bfloat16(backend, precision) else []
            more += [options.tensorrt.described()] if backend == "tensorrt" else []
            key = _key(backend, precision, version, hashes, manifest["pipeline"], *more)
            rows.append(Row(backend, precision, manifest["flavour"], pipeline, size / 1e6, key))
    return rows


def _part_files(manifests: Manifests) -> list[dict[str, str]]:
    """The parts' files and hashes, for the results."""
    return [
        {
            "what": f"{precision} part, {manifest['flavour']}",
            "file": f"{folder.name}/{part['file']}",
            "sha256": part["sha256"],
        }
        for folder, precision, manifest in manifests
        for part in manifest["parts"].values()
    ]


def load_rows(sources: Sources, backends: Sequence[str], options: Options) -> tuple[list[Row], dict[str, Any]]:
    """Loads or builds every row; PyTorch FP32, the reference, comes first.

    Returns:
        the rows, and {"family", "config", "recipe", "files", "made"}: the model's family and config, how it was calibrated, the files' hashes, and
        (folder's name, {"command", "versions"}) of each folder of parts.

    Raises:
        UserError: a file is missing, damaged or not of the same weights; a backend is unknown or not installed.
    """
    checkpoint = load_checkpoint(sources.ckpt, sources.ema)
    if checkpoint.get("format") == "bevqat-ptq":
        raise UserError(
            f"--ckpt: found {sources.ckpt}, a quantized checkpoint, expected the float one that it was calibrated from; "
            "--ckpt names the float checkpoint, --ptq the quantized one"
        )
    float_hash, ptq_hash = sha256(sources.ckpt), None
    files = [{"what": "float checkpoint", "file": sources.ckpt.name, "sha256": float_hash}]
    recipe: dict[str, Any] = {}
    quantized = None
    if sources.ptq is not None:
        quantized, recipe = load_ptq(sources.ptq)
        ptq_hash = sha256(sources.ptq)
        files.append({"what": "PTQ checkpoint", "file": sources.ptq.name, "sha256": ptq_hash})
        quantized.flow.need_boxes(str(sources.ptq), INSTEAD)
    _check_whole((*sources.fp32, *sources.int8))
    _same_weights(sources, recipe, float_hash, ptq_hash)
    float_model = open_model(sources.ckpt, sources.config, ema=sources.ema, as_float=True, read=checkpoint)
    detector, config = float_model.network, float_model.config
    flow_for(detector).need_boxes(str(sources.ckpt), "use the whole detector's config")
    settings = flow_for(detector).settings
    folders = [("fp32", folder) for folder in sources.fp32] + [("int8", folder) for folder in sources.int8]
    manifests = [(folder, precision, load_manifest(folder)) for precision, folder in folders]
    files += _part_files(manifests)
    torch_version = metadata.version("torch")
    for network in (detector, quantized):
        if network is not None:  # makes convolutions on a CPU a third faster
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    reference = Pipeline(torch_parts(detector), settings, options.threads)
    key = _key("pytorch", torch_version, float_hash, settings, *(["ema"] if sources.ema else []))
    rows = [Row("pytorch", "fp32", "float", reference, sources.ckpt.stat().st_size / 1e6, key)]
    if quantized is not None and sources.ptq is not None:
        known = torch_version, ptq_hash, settings
        rows += _simulated_rows(quantized, sources.ptq, manifests, known, settings, options.threads)
    rows += _engine_rows(manifests, backends, options)
    made = [
        (folder.name, {name: manifest.get(name) for name in ("command", "versions")})
        for folder, _, manifest in manifests
    ]
    return rows, {"family": float_model.family, "config": config, "recipe": recipe, "files": files, "made": made}
