"""A deploy config's run: export, engines, whether all backends agree, accuracy and latency of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qat.calibrate.job import calibrate_checkpoint
from qat.calibrate.options import CalibrateOptions
from qat.compare import CompareOptions, Comparison, Sources, compare
from qat.compare.agreement import Pair, agree
from qat.compare.rows import load_rows
from qat.core.console import note
from qat.core.errors import UserError
from qat.core.progress import progress_bar
from qat.deploy.components import BACKENDS, POLICIES, DeployConfig
from qat.engine import CPU_FLAVOURS, Options, TensorRtOptions, identify
from qat.export.checkpoint import export_checkpoint
from qat.export.options import ExportOptions
from qat.families import flow_of
from qat.manifest import load_manifest
from qat.model.opening import Source, read_config
from qat.plan import BATCH, Plan
from qat.runtime import build_engines


@dataclass(frozen=True)
class Data:
    """nuScenes-format keyframes. split: to verify and evaluate on; calib: to calibrate on."""

    root: Path
    split: str
    calib: str
    version: str | None = None


@dataclass
class Deployed:
    """What came of it. folders: by what they hold. missing: why a backend of the config was left out, by its name."""

    folders: dict[str, Path] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    comparison: Comparison | None = None


def check_plan(config: DeployConfig, plan: Plan) -> None:
    """Raises `UserError` where a deploy config contradicts the model: its parts, the order of tensors, profiles of other sizes."""

    def fail(key: str, found: object, expected: object) -> UserError:
        return UserError(f"{config.source}: {key}: found {found}, expected {expected}, as the model has it")

    def fits(size: int, own: int | str | None) -> bool:
        if isinstance(own, str):
            return own == BATCH or plan.axes[own].holds(size)
        return own is None or size == own

    if set(config.components) != set(plan.parts):
        raise fail("components", ", ".join(config.components), ", ".join(plan.parts))
    for name, component in config.components.items():
        part = plan.parts[name]
        for key, own in (("inputs", list(part.inputs)), ("outputs", list(part.outputs))):
            if (found := list(getattr(component, key))) and found != own:
                raise fail(f"components: {name}: {key}", ", ".join(found), ", ".join(own))
    tensors = {own: plan.tensors[tensor] for part in plan.parts.values() for own, tensor in part.inputs.items()}
    for profile in config.profiles:
        if profile.input not in tensors:
            raise fail("tensorrt_profile", profile.input, ", ".join(tensors))
        shape = tensors[profile.input].shape
        for sizes in (profile.min, profile.opt, profile.max):
            if len(sizes) != len(shape) or not all(map(fits, sizes, shape)):
                limits = [f"{n} ({plan.axes[n]})" if isinstance(n, str) and n in plan.axes else str(n) for n in shape]
                raise fail(f"profile of {profile.input}", " × ".join(map(str, sizes)), " × ".join(limits))


def check_classes(settings: Mapping[str, Any], source: str) -> None:
    """Raises `UserError` where a model's tasks do not have the classes of its config."""
    tasks = [name for task in settings.get("head", {}).get("tasks", ()) for name in task]
    if tasks and tasks != list(settings["classes"]):
        raise UserError(
            f"{source}: class_names: found {', '.join(settings['classes'])}, expected those of the head's tasks: {', '.join(tasks)}"
        )


def deploy(config: DeployConfig, source: Source, data: Data, layout: str | None = None) -> Deployed:
    """Does what a deploy config asks for.

    Args:
        source: the float checkpoint and its config. layout: as `ExportOptions.layout`.

    Raises:
        UserError: contradictions, before anything is written; as the stages raise.
    """
    family, description = read_config(source.config or "")
    settings = family.settings(description)
    check_classes(settings, str(source.config))
    flow = flow_of(settings)
    check_plan(config, flow.plan)
    if config.unneeded:
        note(f"{config.source}: not read: {', '.join(config.unneeded)}; see docs/centerpoint.md#deploy-configs")
    result = Deployed()
    precision, flavour, tf32 = POLICIES["int8" if config.int8 else config.policy]
    work = config.work_dir
    ptq: Path | None = None
    if config.export:
        if config.int8:
            ptq = work / "ptq.pth"
            options = CalibrateOptions(data.root, data.calib, data.version, keep_float=config.keep_float)
            calibrate_checkpoint(source, options, ptq)
        _export(config, source, ptq, ExportOptions(precision, flavour, config.opset, layout=layout), result)
    else:
        _find(config, result, work)
        ptq = result.folders.get("ptq")
    backends = _backends(config, result)
    if config.build and "tensorrt" in backends:
        engines, _ = build_engines(
            result.folders["onnx"], "tensorrt", out=work / "tensorrt", options=_options(config, tf32)
        )
        result.folders["tensorrt"] = engines
    if not (config.verify or config.evaluate):
        return result
    fp32 = [result.folders["float"]]
    kept = {*CPU_FLAVOURS, *(["onnx"] if config.int8 and "tensorrt" in backends else [])}
    int8 = [folder for name, folder in result.folders.items() if name in kept]
    rows_of = Sources(Path(source.checkpoint or ""), ptq, fp32, int8, Path(source.config or ""))
    if config.verify:
        rows, facts = load_rows(rows_of, backends, _options(config, tf32))
        frames = facts["family"].dataset(data.root, data.split, facts["config"], data.version, config.verify)
        with progress_bar("agree", len(frames)) as done:
            result.pairs = agree(rows, frames, done)
    if config.evaluate:
        count = None if config.evaluate < 0 else config.evaluate
        result.comparison = compare(
            CompareOptions(
                rows_of,
                data.root,
                work / "evaluation",
                data.split,
                data.version,
                count,
                backends,
                engines=_options(config, tf32),
            )
        )
    return result


def _options(config: DeployConfig, tf32: bool) -> Options:
    return Options(tensorrt=TensorRtOptions(tf32=tf32, workspace=config.workspace, profiles=tuple(config.profiles)))


def _runs_on_cpus(precision: str | None, flavour: str) -> bool:
    """Whether graphs are FP32-typed without QDQ."""
    return flavour == "tensorrt" and precision in ("fp32", "fp16")


def _export(config: DeployConfig, source: Source, ptq: Path | None, options: ExportOptions, result: Deployed) -> None:
    """onnx/: the parts that TensorRT builds. float/: the same network in FP32, which CPUs run; a folder for each CPU in INT8."""
    work = config.work_dir
    quantized = source if ptq is None else Source(ptq)
    written = {"onnx": (quantized, options)}
    if not _runs_on_cpus(options.precision, options.flavour):
        written["float"] = (source, ExportOptions("fp32"))
    if ptq is not None:
        written |= {flavour: (quantized, ExportOptions("int8", flavour)) for flavour in CPU_FLAVOURS}
    for name, (network, chosen) in written.items():
        folder, manifest = export_checkpoint(network, chosen, work / name)
        result.folders[name] = folder
        if not manifest["verification"]["passed"]:
            raise UserError(
                f"{folder}: a part and PyTorch differ by more than the tolerance; see {folder / 'manifest.json'}"
            )
    result.folders.setdefault("float", result.folders["onnx"])  # FP32-typed graphs
    if ptq is not None:
        result.folders["ptq"] = ptq


def _find(config: DeployConfig, result: Deployed, work: Path) -> None:
    """The folders of an earlier export."""
    onnx = config.onnx_path or work / "onnx"
    manifest = load_manifest(onnx)
    result.folders["onnx"] = onnx
    typed = _runs_on_cpus(manifest["precision"], manifest["flavour"])
    result.folders["float"] = onnx if typed else onnx.parent / "float"
    for name in CPU_FLAVOURS:
        if (onnx.parent / name / "manifest.json").is_file():
            result.folders[name] = onnx.parent / name
    if (onnx.parent / "ptq.pth").is_file():
        result.folders["ptq"] = onnx.parent / "ptq.pth"


def _backends(config: DeployConfig, result: Deployed) -> list[str]:
    """The backends of the config that this machine has."""
    found = []
    for name in config.backends:
        for backend in BACKENDS[name]:
            if backend == "pytorch":
                continue
            try:
                identify(backend)
            except UserError as error:
                result.missing[backend] = str(error)
            else:
                found.append(backend)
    return found


def with_flags(
    config: DeployConfig, work_dir: Path | None = None, verify: bool = False, evaluate: bool = False
) -> DeployConfig:
    """A config with what the command's flags ask for besides."""
    return replace(
        config,
        work_dir=work_dir or config.work_dir,
        verify=config.verify or int(verify),
        evaluate=config.evaluate or (-1 if evaluate else 0),
    )
