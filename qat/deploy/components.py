"""AWML's deploy configs: `components`, each an ONNX file and an engine, with what is exported, verified and evaluated.

Both spellings are read: `components`, `tensorrt_config` at the top, or inside `onnx_config` and `backend_config`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat.core.errors import UserError
from qat.engine.tensorrt_options import Profile

MODES = {"onnx": (True, False), "trt": (False, True), "both": (True, True), "none": (False, False)}  # export, build
# precision_policy → (precision, flavour, TF32) of the parts that TensorRT builds
POLICIES = {
    "auto": ("fp32", "tensorrt", True),
    "fp32_tf32": ("fp32", "tensorrt", True),
    "fp16": ("fp16", "tensorrt", False),
    "strongly_typed": ("fp16", "tensorrt-strong", False),
    "int8": ("int8", "tensorrt-strong", False),
}
BACKENDS = {"pytorch": ("pytorch",), "onnx": ("onnxruntime", "openvino"), "tensorrt": ("tensorrt",)}
# Of the tools that these configs are for: here the model's config and plan have them, --data and each backend its device.
UNNEEDED = ("task_type", "model_io", "custom_imports", "default_scope", "devices", "runtime_io")
REPLACED = ("tolerance", "scenarios")  # each output has a limit in its own unit, and all pairs are compared
READ = (
    "checkpoint_path",
    "export",
    "components",
    "onnx_config",
    "tensorrt_config",
    "backend_config",
    "evaluation",
    "verification",
    "quantization",
)


@dataclass(frozen=True)
class Component:
    """One part. inputs, outputs: names in the order that the config has them; empty where it has none."""

    onnx_file: str
    engine_file: str
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()


@dataclass(frozen=True)
class DeployConfig:
    """What a deploy config asks for.

    checkpoint: None where only the command names one. export, build: what is written. components: by the part's name. profiles: of
    TensorRT. verify, evaluate: the number of frames, 0 for none. backends: that are evaluated. keep_float: patterns of layers that
    stay float where `int8`. unneeded: keys that nothing here reads.
    """

    source: str
    work_dir: Path
    export: bool
    build: bool
    onnx_path: Path | None
    components: Mapping[str, Component]
    checkpoint: Path | None = None
    opset: int | None = None
    policy: str = "auto"
    workspace: int | None = None
    profiles: Sequence[Profile] = ()
    verify: int = 0
    evaluate: int = 0
    backends: Sequence[str] = ()
    int8: bool = False
    keep_float: Sequence[str] = ()
    unneeded: Sequence[str] = field(default=())


def parsed(config: Mapping[str, Any], source: str) -> DeployConfig:
    """A deploy config's values as what they ask for.

    Raises:
        UserError: it is another tool's, or asks for what there is not, by the name of the key.
    """

    def fail(key: str, found: object, expected: str) -> UserError:
        return UserError(f"{source}: {key}: found {found!r}, expected {expected}")

    # What a config defines for its own use is a plain value: only sections are asked for.
    sections = [key for key, value in config.items() if isinstance(value, dict)]
    if unknown := [key for key in sections if key not in (*READ, *UNNEEDED)]:
        raise fail(unknown[0], "a section that is not known", f"some of {', '.join(READ)}")
    onnx, export = _section(config, "onnx_config", source), _section(config, "export", source)
    components = config.get("components", onnx.get("components"))
    if not isinstance(components, Mapping) or not components:
        raise fail("components", components, "a dict with the two parts: pts_voxel_encoder and pts_backbone_neck_head")
    mode = export.get("mode", "both")
    if mode not in MODES:
        raise fail("export: mode", mode, f"one of {', '.join(MODES)}")
    writes, builds = MODES[mode]
    given = export.get("onnx_path")
    if mode == "trt" and not given:
        raise fail("export: onnx_path", given, "the folder of the ONNX parts, for mode 'trt'")
    older = _section(config, "backend_config", source)
    tensorrt = config.get("tensorrt_config", older.get("common_config") or {})
    policy = tensorrt.get("precision_policy", "auto")
    if policy not in POLICIES:
        raise fail("precision_policy", policy, f"one of {', '.join(POLICIES)}")
    quantization = _section(config, "quantization", source)
    int8 = bool(quantization.get("enabled", False)) or policy == "int8"
    if quantization.get("mode", "ptq") != "ptq":
        raise fail(
            "quantization: mode", quantization["mode"], "'ptq'; train with `bevqat finetune` and export its checkpoint"
        )
    verification, evaluation = (_section(config, key, source) for key in ("verification", "evaluation"))
    wanted = bool(verification.get("enabled", export.get("verify", False)))
    backends = evaluation.get("backends", evaluation.get("models", dict.fromkeys(BACKENDS)))
    if other := [name for name in backends if name not in BACKENDS]:
        raise fail("evaluation: backends", other[0], f"some of {', '.join(BACKENDS)}")
    chosen = [name for name, one in backends.items() if not isinstance(one, Mapping) or one.get("enabled", True)]
    named = {str(entry.get("name", key)): entry for key, entry in components.items()}
    checkpoint = config.get("checkpoint_path")
    return DeployConfig(
        source=source,
        work_dir=Path(export.get("work_dir", "work_dirs/deployment")),
        export=writes,
        build=builds,
        onnx_path=None if given is None else Path(given),
        components={name: _component(name, entry, fail) for name, entry in named.items()},
        checkpoint=None if checkpoint is None else Path(checkpoint),
        opset=onnx.get("opset_version"),
        policy=policy,
        workspace=tensorrt.get("max_workspace_size"),
        profiles=_profiles(named, older),
        verify=int(verification.get("num_verify_samples", 1)) if wanted else 0,
        evaluate=int(evaluation.get("num_samples", -1)) if evaluation.get("enabled", False) else 0,
        backends=chosen,
        int8=int8,
        keep_float=tuple(map(str, quantization.get("sensitive_layers", ()))),
        unneeded=[
            *(key for key in UNNEEDED if key in config),
            *(f"verification: {key}" for key in REPLACED if key in verification),
        ],
    )


def _section(config: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise UserError(f"{source}: {key}: found {found!r}, expected a dict")
    return found


def _component(name: str, entry: Mapping[str, Any], fail: Any) -> Component:
    onnx, engine = entry.get("onnx_file", f"{name}.onnx"), entry.get("engine_file", f"{name}.engine")
    if onnx != f"{name}.onnx" or engine != f"{name}.engine":
        raise fail(f"components: {name}", f"{onnx}, {engine}", f"{name}.onnx and {name}.engine, which runtimes load")
    io = entry.get("io") or {}
    names = {
        key: [one if isinstance(one, str) else one["name"] for one in io.get(key, ())] for key in ("inputs", "outputs")
    }
    return Component(onnx, engine, names["inputs"], names["outputs"])


def _profiles(named: Mapping[str, Mapping[str, Any]], older: Mapping[str, Any]) -> list[Profile]:
    """TensorRT's profiles: of each component, or of `backend_config`'s list."""
    shapes: dict[str, Mapping[str, Any]] = {}
    for entry in named.values():
        shapes.update(entry.get("tensorrt_profile") or {})
    for model in older.get("model_inputs") or ():
        shapes.update(model.get("input_shapes") or {})
    return [
        Profile(name, *(tuple(one[f"{key}_shape"]) for key in ("min", "opt", "max"))) for name, one in shapes.items()
    ]
