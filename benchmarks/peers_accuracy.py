"""Our PTQ beside its peers': one float checkpoint, one set of calibration frames, one evaluation.

example:
  python benchmarks/peers_accuracy.py --data example-data --split eval --out runs/peers

Every candidate is a whole detector behind `qat.runtime.Pipeline`; boxes are kept under --out/cache, so an interrupted run
goes on. docs/peers.md says what is compared, and with which settings.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from command import check_least, one_line_errors
from rich.console import Console
from rich.table import Table

from qat.calibrate.job import calibrate_checkpoint
from qat.calibrate.options import CalibrateOptions
from qat.compare.accuracy import run_accuracy
from qat.compare.machine import machine_facts
from qat.compare.rows import Row, Sources, load_rows
from qat.core.errors import UserError
from qat.core.files import read_json, sha256, write_json
from qat.core.progress import progress_bar
from qat.core.versions import versions
from qat.data import NuScenesDataset, Sample
from qat.engine import Options, build
from qat.evaluate import difference, evaluate_detections, resample
from qat.export import torch_parts
from qat.export.checkpoint import export_checkpoint
from qat.export.options import ExportOptions
from qat.families.bevfusion.config import load_config
from qat.families.bevfusion.state import load_float_model
from qat.lean.flavours import DEFAULT
from qat.lean.observe import counting_macs
from qat.manifest import load_manifest
from qat.model.opening import Source
from qat.model.runners import run_frame
from qat.runtime import Pipeline

# What ours quantizes; the vtransform's downsampling stays float, as in CUDA-BEVFusion, unless --vtransform.
PARTS = ("camera.backbone", "camera.vtransform", "fuser", "head.bbox")
QUANTIZED_PARTS = ("camera.backbone", "fuser", "head.bbox")
# The convolutions over the depth map in metres, which ours keeps in float: as they are called in the ONNX part, and in
# the torch detector.
DEPTH_NODES, DEPTH_MODULES = "/dtransform/", "*vtransform.dtransform*"
DOWNSAMPLE_MODULES = "*vtransform.downsample*"

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Setting:
    """One way to use a peer.

    peer, name: as in --peers PEER:NAME. backend: what runs the result. depth_float: keep the depth map's convolutions
    in float, as ours does. options: for the peer's function.
    """

    peer: str
    name: str
    backend: str
    depth_float: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """For messages and as a folder's name."""
        return f"{self.peer}:{self.name}"


def quantize_static(part: Path, feeds: Sequence[Feeds], out: Path, setting: Setting, exclude: list[str]) -> None:
    """ONNX Runtime's own PTQ as its documentation advises for a CPU with VNNI: U8S8, QDQ, weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> Feeds | None:
            return next(self.left, None)

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(part), str(prepared))
    quantize(
        str(prepared),
        str(out),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=exclude,
        calibrate_method=CalibrationMethod[setting.options["method"]],
    )
    prepared.unlink()


def nncf_ptq(part: Path, feeds: Sequence[Feeds], out: Path, setting: Setting, exclude: list[str]) -> None:
    """NNCF's PTQ of the OpenVINO model: its defaults (fast bias correction; each range the mean of the frames' extremes)
    but for what the setting says."""
    import nncf
    import openvino as ov
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level(logging.ERROR)
    advanced = None
    if "ranges" in setting.options:
        estimator = getattr(RangeEstimatorParametersSet, setting.options["ranges"])
        advanced = AdvancedQuantizationParameters(activations_range_estimator_params=estimator)
    quantized = nncf.quantize(
        ov.Core().read_model(part),
        nncf.Dataset(feeds),
        preset=nncf.QuantizationPreset[setting.options["preset"]],
        subset_size=len(feeds),
        # Patterns, because OpenVINO's reader makes several nodes of an ONNX one and adds to their names.
        ignored_scope=nncf.IgnoredScope(patterns=[f"{re.escape(name)}.*" for name in exclude]) if exclude else None,
        fast_bias_correction=setting.options.get("fast_bias_correction", True),
        advanced_parameters=advanced,
    )
    ov.save_model(quantized, out, compress_to_fp16=False)


def modelopt_onnx(part: Path, feeds: Sequence[Feeds], out: Path, setting: Setting, exclude: list[str]) -> None:
    """ModelOpt's ONNX PTQ, calibrated on the CPU; what is not INT8 stays FP32 (its default is FP16)."""
    from modelopt.onnx.quantization import quantize

    quantize(
        str(part),
        quantize_mode="int8",
        calibration_data={name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]},
        calibration_method=setting.options["method"],
        calibration_eps=["cpu"],
        nodes_to_exclude=[f"^{name}$" for name in exclude],
        high_precision_dtype="fp32",
        output_path=str(out),
        log_level="ERROR",
    )


# peer: (what must import, what pip installs for it, the package whose version counts, what makes a part)
PEERS: dict[str, tuple[str, str, str, Callable[..., None] | None]] = {
    "quantize_static": ("onnxruntime.quantization", "onnxruntime", "onnxruntime", quantize_static),
    "nncf": ("nncf", "nncf", "nncf", nncf_ptq),
    "modelopt-onnx": ("modelopt.onnx.quantization", "-e '.[peers]'", "nvidia-modelopt", modelopt_onnx),
    "modelopt-torch": ("modelopt.torch.quantization", "-e '.[peers]'", "nvidia-modelopt", None),
}
SETTINGS = (
    Setting("quantize_static", "minmax", "onnxruntime", options={"method": "MinMax"}),
    Setting("quantize_static", "minmax-depth-float", "onnxruntime", True, {"method": "MinMax"}),
    Setting("quantize_static", "entropy-depth-float", "onnxruntime", True, {"method": "Entropy"}),
    Setting("quantize_static", "percentile-depth-float", "onnxruntime", True, {"method": "Percentile"}),
    Setting("nncf", "performance", "openvino", options={"preset": "PERFORMANCE"}),
    Setting("nncf", "mixed", "openvino", options={"preset": "MIXED"}),
    Setting("nncf", "performance-depth-float", "openvino", True, {"preset": "PERFORMANCE"}),
    Setting("nncf", "mixed-depth-float", "openvino", True, {"preset": "MIXED"}),
    Setting("nncf", "minmax-depth-float", "openvino", True, {"preset": "MIXED", "ranges": "MINMAX"}),
    Setting(
        "nncf",
        "minmax-exact-bias-depth-float",
        "openvino",
        True,
        {"preset": "MIXED", "ranges": "MINMAX", "fast_bias_correction": False},
    ),
    Setting("modelopt-onnx", "max", "onnxruntime", options={"method": "max"}),
    Setting("modelopt-onnx", "entropy", "onnxruntime", options={"method": "entropy"}),
    Setting("modelopt-onnx", "max-depth-float", "onnxruntime", True, {"method": "max"}),
    Setting("modelopt-onnx", "entropy-depth-float", "onnxruntime", True, {"method": "entropy"}),
    Setting("modelopt-torch", "max", "pytorch"),
    Setting("modelopt-torch", "max-depth-float", "pytorch", True),
)


@dataclass
class Candidate:
    """A row to evaluate, and what is told about it.

    convolutions: (INT8, all), or None. share: of the multiply-accumulates in INT8, or None. seconds: that calibration
    and quantization of all parts took, or None where nothing was calibrated.
    """

    peer: str
    setting: str
    row: Row
    convolutions: tuple[int, int] | None = None
    share: float | None = None
    seconds: float | None = None

    @property
    def label(self) -> str:
        """Peer, setting and backend in one word."""
        return f"{self.peer}:{self.setting}:{self.row.backend}"


class Job:
    """The float detector, its ONNX parts, and what each part takes in on the calibration frames."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out: Path = args.out
        self.ckpt: Path = args.ckpt
        self.config_file: Path = args.config or args.ckpt.parent / "config.yaml"
        self.config = load_config(self.config_file)
        self.options = Options(args.threads)
        self.quantized = tuple(p for p in PARTS if p in QUANTIZED_PARTS or (args.vtransform and p in PARTS[1:2]))
        self.vtransform: bool = args.vtransform
        self.calibration = NuScenesDataset(
            args.calib_data, args.calib_split, self.config, args.calib_version, args.calib_frames
        )
        self.folder, _ = export_checkpoint(
            Source(self.ckpt, self.config_file), ExportOptions("fp32"), self.out / "onnx_fp32"
        )
        self.manifest = load_manifest(self.folder)
        self.settings: dict[str, Any] = self.manifest["pipeline"]
        frames = hashlib.sha256("".join(self.calibration.tokens).encode()).hexdigest()
        self.identity = {"float": sha256(self.ckpt), "frames": frames, "parts": list(self.quantized)}

    @cached_property
    def samples(self) -> list[Sample]:
        """The calibration frames."""
        return list(self.calibration)

    @cached_property
    def feeds(self) -> dict[str, list[Feeds]]:
        """What each part takes in, frame by frame, out of the float pipeline in PyTorch."""
        pipeline = Pipeline(torch_parts(load_float_model(self.config, self.ckpt)), self.settings)
        result: dict[str, list[Feeds]] = {name: [] for name in self.manifest["parts"]}
        for sample in self.samples:
            tensors = pipeline.forward(sample)
            known = {"img": sample.img[None], "depth": sample.depth[None], **tensors}
            known["camera"] = tensors.get("feat_out", tensors["feat_in"])
            for name, part in self.manifest["parts"].items():
                result[name].append({tensor: np.ascontiguousarray(known[tensor]) for tensor in part["inputs"]})
        return result

    def key(self, *values: Any) -> str:
        """Hash of the float weights, the calibration frames, the parts and `values`."""
        return hashlib.sha256(json.dumps([self.identity, *values], sort_keys=True).encode()).hexdigest()[:24]


def integer_convolutions(files: Sequence[Path]) -> tuple[tuple[int, int], float]:
    """Convolutions whose input is rounded, of all: their number, and the share of multiply-accumulates."""
    import openvino as ov

    # A rounded value that goes through these is still on its scale.
    passes = ("Convert", "Subtract", "Multiply", "MaxPool", "Interpolate", "Reshape", "Transpose")

    def rounded(output: Any) -> bool:
        node = output.get_node()
        kind = node.get_type_name()
        if kind == "FakeQuantize":
            return True
        if kind == "Concat":
            return all(rounded(port.get_source_output()) for port in node.inputs())
        return kind in passes and rounded(node.input(0).get_source_output())

    counts, macs = [0, 0], [0, 0]
    for file in files:
        for node in ov.Core().read_model(file).get_ordered_ops():
            if node.get_type_name() not in ("Convolution", "ConvolutionBackpropData"):
                continue
            weight, takes, gives = node.input(1).get_shape(), node.input(0).get_shape(), node.output(0).get_shape()
            # weight [O,I,h,w]; transposed: [I,O,h,w], and each input value meets the whole of its channel's weights
            sites = gives if node.get_type_name() == "Convolution" else takes
            cost = int(np.prod(sites)) * int(np.prod(weight[1:]))
            quantized = rounded(node.input(0).get_source_output())
            counts, macs = [counts[0] + quantized, counts[1] + 1], [macs[0] + quantized * cost, macs[1] + cost]
    return (counts[0], counts[1]), macs[0] / max(macs[1], 1)


def our_candidates(job: Job, ptq: Path | None) -> tuple[Row, list[Candidate]]:
    """PyTorch FP32, and our PTQ simulated and on both engines. ptq: a checkpoint of calibrate, None to calibrate."""
    seconds = None
    if ptq is None:
        ptq = job.out / "ours" / "ptq.pth"
        begin = time.perf_counter()
        frames = job.calibration
        calibrate_checkpoint(
            Source(job.ckpt, job.config_file),
            CalibrateOptions(Path(frames.nusc.dataroot), frames.split, frames.nusc.version, len(frames)),
            ptq,
        )
        seconds = time.perf_counter() - begin
    folders = {}
    for flavour in ("openvino", "onnxruntime", DEFAULT):
        folders[flavour], _ = export_checkpoint(
            Source(ptq), ExportOptions("int8", flavour), job.out / "ours" / f"onnx_int8_{flavour}"
        )
    engines = ("openvino", "onnxruntime")
    sources = Sources(job.ckpt, ptq, [], [folders[backend] for backend in engines], job.config_file)
    rows, facts = load_rows(sources, engines, job.options)
    simulated, _ = load_rows(Sources(job.ckpt, ptq, [], [], job.config_file), (), job.options)  # in the default flavour
    result = []
    for row in [*simulated[1:], *(row for row in rows[1:] if not row.simulated)]:
        folder = folders.get(row.backend, folders[DEFAULT])
        files = [folder / part["file"] for part in load_manifest(folder)["parts"].values()]
        result.append(Candidate("ours", facts["recipe"]["method"], row, *integer_convolutions(files), seconds))
    return rows[0], result


def reference_row(job: Job) -> Row:
    """PyTorch FP32 alone."""
    rows, _ = load_rows(Sources(job.ckpt, None, [], [], job.config_file), (), job.options)
    return rows[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the peers' own bars and remarks out of the output, file descriptors included."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.devnull, "w") as nowhere:
        saved = [os.dup(1), os.dup(2)]
        try:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, own in enumerate(saved, start=1):
                os.dup2(own, target)
                os.close(own)


def make_part(source: Path, feeds: Sequence[Feeds], file: Path, setting: Setting, exclude: list[str]) -> float:
    """Quantizes one part with its peer; the seconds that it took, without imports."""
    module, _, _, make = PEERS[setting.peer]
    assert make is not None
    with quiet():
        importlib.import_module(module)
        begin = time.perf_counter()
        make(source, feeds, file, setting, exclude)
        return time.perf_counter() - begin


def peer_parts(job: Job, setting: Setting) -> tuple[dict[str, Path], float]:
    """The peer's quantized files, and our FP32 ones of the other parts; seconds that quantizing took when it was done."""
    package = PEERS[setting.peer][2]
    folder = job.out / "parts" / setting.label.replace(":", "-")
    suffix = ".xml" if setting.backend == "openvino" else ".onnx"
    files = {name: folder / f"{name}{suffix}" for name in job.quantized if name in job.manifest["parts"]}
    key = job.key(setting.label, dict(setting.options), setting.depth_float, metadata.version(package))
    done = folder / "done.json"
    if not (done.is_file() and read_json(done)["key"] == key):
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        seconds = 0.0
        # In a process of its own: ModelOpt replaces functions of onnxruntime.quantization, which then fails without it.
        with get_context("spawn").Pool(1) as pool:
            for name, file in files.items():
                source = job.folder / job.manifest["parts"][name]["file"]
                exclude = depth_nodes(source) if setting.depth_float else []
                seconds += pool.apply(make_part, (source, job.feeds[name], file, setting, exclude))
        write_json(done, {"key": key, "seconds": round(seconds, 2)})
    others = {n: job.folder / p["file"] for n, p in job.manifest["parts"].items() if n not in files}
    return {name: {**files, **others}[name] for name in job.manifest["parts"]}, read_json(done)["seconds"]


def depth_nodes(part: Path) -> list[str]:
    """Names of the nodes over the depth map."""
    import onnx

    return [node.name for node in onnx.load(part).graph.node if DEPTH_NODES in node.name]


def peer_candidate(job: Job, setting: Setting) -> Candidate:
    """Quantizes the parts with a peer, or takes them as an earlier run left them, and builds them."""
    if setting.peer == "modelopt-torch":
        return modelopt_torch(job, setting)
    files, seconds = peer_parts(job, setting)
    # The engine cache goes by the hash of one file, and an OpenVINO IR is two.
    options = Options(job.options.threads, None if setting.backend == "openvino" else job.options.cache)
    parts = {
        name: build(file, setting.backend, "int8" if name in job.quantized else "fp32", options)
        for name, file in files.items()
    }
    stored = [f for file in files.values() for f in (file, file.with_suffix(".bin")) if f.is_file()]
    hashes = {file.name: sha256(file) for file in stored}
    key = job.key(setting.backend, metadata.version(setting.backend), hashes, job.settings)
    size = sum(file.stat().st_size for file in stored) / 1e6
    pipeline = Pipeline(parts, job.settings, job.options.threads)
    row = Row(setting.backend, "int8", setting.label, pipeline, size, key)
    return Candidate(setting.peer, setting.name, row, *integer_convolutions(list(files.values())), seconds)


def modelopt_torch(job: Job, setting: Setting) -> Candidate:
    """ModelOpt's INT8_DEFAULT_CFG on the torch detector, as simulated in PyTorch."""
    import copy

    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.quantization.nn import TensorQuantizer
    from torch import nn

    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    off = [] if job.vtransform else [DOWNSAMPLE_MODULES]
    off += [DEPTH_MODULES] if setting.depth_float else []
    config["quant_cfg"] += [{"quantizer_name": name, "enable": False} for name in off]
    detector = load_float_model(job.config, job.ckpt).eval()
    macs: dict[str, int] = {}

    def forward(model: Any) -> None:
        for sample in job.samples:
            run_frame(model, sample)

    job.samples  # noqa: B018  # read before the clock starts
    begin = time.perf_counter()
    with quiet(), torch.no_grad():
        mtq.quantize(detector, config, forward)
    seconds = time.perf_counter() - begin
    with torch.no_grad(), counting_macs(detector, macs):
        run_frame(detector, job.samples[0])
    detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    convolutions = {n: m for n, m in detector.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)}
    rounded = [n for n, m in convolutions.items() if getattr(m.input_quantizer, "is_enabled", False)]
    ranges = {
        name: q.amax.detach().numpy().tobytes().hex()
        for name, q in detector.named_modules()
        if isinstance(q, TensorQuantizer) and q.is_enabled and q.amax is not None
    }
    key = job.key("modelopt-torch", metadata.version("nvidia-modelopt"), metadata.version("torch"), ranges)
    pipeline = Pipeline(torch_parts(detector), job.settings, job.options.threads)
    row = Row("pytorch", "int8-fake", setting.label, pipeline, job.ckpt.stat().st_size / 1e6, key, simulated=True)
    share = sum(macs[name] for name in rounded if name in macs) / sum(macs.values())
    return Candidate(setting.peer, setting.name, row, (len(rounded), len(convolutions)), share, seconds)


def chosen(text: str) -> tuple[bool, list[Setting]]:
    """Reads --peers: whether ours is asked for, and the peers' settings.

    Raises:
        UserError: a name that is not known.
    """
    ours, result = False, []
    for word in text.split(","):
        found = [s for s in SETTINGS if word in (s.peer, s.label)]
        if word != "ours" and not found:
            known = ["ours", *PEERS, *(s.label for s in SETTINGS)]
            raise UserError(f"--peers: found {word!r}, expected some of {','.join(known)}")
        ours |= word == "ours"
        result += [s for s in found if s not in result]
    return ours, result


def installed(peer: str, say: Callable[[str], None]) -> bool:
    """Whether a peer imports; says what to install where it does not."""
    os.environ.setdefault("NNCF_CI", "1")  # keeps NNCF from reporting its use over the network
    module, install, _, _ = PEERS[peer]
    try:
        with quiet():
            importlib.import_module(module)
    except ImportError as error:
        say(f"{peer}: skipped, {error}; to have it: pip install {install}")
        return False
    return True


def run(args: argparse.Namespace) -> int:
    """Quantizes, evaluates, prints the table and writes peers.json."""
    if args.threads < 0:
        raise UserError(f"--threads: found {args.threads}, expected 0 (all cores) or more")
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    ours, settings = chosen(args.peers)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", file=sys.stderr, flush=True)

    settings = [
        s for p in dict.fromkeys(s.peer for s in settings) if installed(p, say) for s in settings if s.peer == p
    ]
    say("export FP32 parts")
    job = Job(args)
    dataset = NuScenesDataset(args.data, args.split, job.config, args.version, args.frames)
    candidates: list[Candidate] = []
    failed: dict[str, str] = {}
    if ours:
        say(f"calibrate ours over {len(job.calibration)} frames" if args.ptq is None else f"ours: {args.ptq}")
        reference, candidates = our_candidates(job, args.ptq)
    else:
        reference = reference_row(job)
    for setting in settings:
        say(setting.label)
        try:
            candidates.append(peer_candidate(job, setting))
        except UserError:
            raise
        except Exception as error:  # a peer's own trouble must not cost the others' results
            failed[setting.label] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            say(f"{setting.label}: failed: {failed[setting.label]}")
    say(f"{len(candidates) + 1} detectors over {len(dataset)} keyframes of {args.data.name}:{args.split}")
    rows = [reference, *(candidate.row for candidate in candidates)]
    with progress_bar("keyframes", len(dataset)) as progress:
        accuracies, _ = run_accuracy(rows, dataset, args.out / "cache", lambda index, sample: None, progress)
    say("nuScenes metrics")
    metrics = [evaluate_detections(dataset, accuracy.detections) for accuracy in accuracies]
    say(f"intervals from {args.resamples} resamples of the scenes")
    found = {c.label: a.detections for c, a in zip(candidates, accuracies[1:], strict=True)}
    with progress_bar("intervals", len(found) + 1) as progress:
        tables = resample(dataset, {"float": accuracies[0].detections, **found}, args.resamples, progress=progress)
    ours = {c.row.backend: c.label for c in reversed(candidates) if c.peer == "ours"}
    results = []
    for candidate, accuracy, figures in zip(candidates, accuracies[1:], metrics[1:], strict=True):
        results.append(
            {
                "peer": candidate.peer,
                "setting": candidate.setting,
                "backend": candidate.row.backend,
                "map": figures["map"],
                "nds": figures["nds"],
                "change": intervals(tables[candidate.label], tables["float"]),
                "ours_minus": None
                if candidate.peer == "ours" or candidate.row.backend not in ours
                else intervals(tables[ours[candidate.row.backend]], tables[candidate.label]),
                "int8_convolutions": candidate.convolutions,
                "int8_share_of_macs": None if candidate.share is None else round(candidate.share, 4),
                "calibration_seconds": None if candidate.seconds is None else round(candidate.seconds, 1),
                "size_mb": round(candidate.row.size_mb, 3),
                "per_class_ap": figures["per_class_ap"],
                "sqnr_db": {name: round(value, 2) for name, value in accuracy.sqnr_db().items()},
            }
        )
    result = {
        "schema": 1,
        "model": job.ckpt.resolve().parent.name,
        "float_sha256": job.identity["float"],
        "dataset": {"name": args.data.resolve().name, "split": args.split, "keyframes": len(dataset)},
        "calibration": {"split": job.calibration.split, "frames": len(job.calibration)},
        "quantized_parts": list(job.quantized),
        "float": {key: metrics[0][key] for key in ("map", "nds", "per_class_ap")},
        "rows": results,
        "failed": failed,
        "machine": machine_facts(args.threads),
        "versions": versions() | peer_versions(),
        "command": args.command,
    }
    file = args.out / f"peers-{args.data.resolve().name}-{args.split}.json"
    write_json(file, result)
    print_table(result)
    print(f"results: {file}")
    return 0


def intervals(candidate: np.ndarray, reference: np.ndarray) -> dict[str, dict[str, float]]:
    """Differences of mAP and NDS, with their bounds."""
    return {name: value.to_json() for name, value in difference(candidate, reference).items()}


def peer_versions() -> dict[str, str]:
    """Of the installed peers."""
    found = {}
    for package in ("nncf", "nvidia-modelopt"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def print_table(result: Mapping[str, Any]) -> None:
    """Prints the rows, least loss of mAP first, and the versions."""
    data, exact = result["dataset"], result["float"]
    table = Table(
        title=f"{result['model']} on {data['keyframes']} keyframes of {data['name']}:{data['split']}; "
        f"float mAP {exact['map']:.4f}, NDS {exact['nds']:.4f}"
    )
    headings = (
        *("peer", "setting", "backend", "mAP", "change [95 %]", "ours − it [95 %]", "NDS", "change [95 %]"),
        *("INT8 convs", "MACs", "s"),
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:3] else "right")

    def change(values: Mapping[str, float]) -> str:
        return f"{values['difference']:+.4f} [{values['low']:+.4f}, {values['high']:+.4f}]"

    for row in sorted(result["rows"], key=lambda row: -row["map"]):
        convolutions, share, seconds = (
            row[key] for key in ("int8_convolutions", "int8_share_of_macs", "calibration_seconds")
        )
        table.add_row(
            row["peer"],
            row["setting"],
            row["backend"],
            f"{row['map']:.4f}",
            change(row["change"]["map"]),
            "" if row["ours_minus"] is None else change(row["ours_minus"]["map"]),
            f"{row['nds']:.4f}",
            change(row["change"]["nds"]),
            "" if convolutions is None else f"{convolutions[0]}/{convolutions[1]}",
            "" if share is None else f"{share:.1%}",
            "" if seconds is None else f"{seconds:.0f}",
        )
    console = Console()
    # Piped output has no width of its own; rich's 80 columns would cut the names.
    (console if console.is_terminal else Console(width=200)).print(table)
    print(", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    for label, error in result["failed"].items():
        print(f"failed: {label}: {error}")


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Parses the flags; bad use ends with one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = Path("model/camera-tiny")
    parser.add_argument("--ckpt", type=Path, default=model / "camera-tiny.pth", help="float checkpoint")
    parser.add_argument("--config", type=Path, metavar="YAML", help="default: config.yaml beside the checkpoint")
    parser.add_argument("--data", type=Path, default=Path("example-data"), metavar="ROOT", help="evaluate on")
    parser.add_argument("--version", metavar="NAME", help="of --data, needed where it holds several")
    parser.add_argument("--split", default="eval", help="default eval")
    parser.add_argument("--frames", type=int, metavar="N", help="N keyframes spread over the split (default all)")
    parser.add_argument("--calib-data", type=Path, default=Path("example-data"), metavar="ROOT", help="calibrate on")
    parser.add_argument("--calib-version", metavar="NAME", help="of --calib-data")
    parser.add_argument("--calib-split", default="calib", help="default calib")
    parser.add_argument("--calib-frames", type=int, metavar="N", help="N keyframes spread over it (default all)")
    parser.add_argument(
        "--peers",
        default=",".join(["ours", *PEERS]),
        help=f"comma-separated, PEER or PEER:SETTING; default all: ours,{','.join(s.label for s in SETTINGS)}",
    )
    parser.add_argument(
        "--ptq", type=Path, metavar="CKPT", help="a checkpoint of calibrate as ours (default: calibrate)"
    )
    parser.add_argument(
        "--vtransform", action="store_true", help="let the peers quantize the view transform's part too"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default 0: all cores")
    parser.add_argument("--resamples", type=int, default=1000, metavar="N", help="for the intervals (default 1000)")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), metavar="DIR")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    args.command = shlex.join(["python", "benchmarks/peers_accuracy.py", *words])
    try:
        check_least(args, resamples=1)
        return run(args)
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
