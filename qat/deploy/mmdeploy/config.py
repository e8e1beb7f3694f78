"""MMDeploy's deploy configs (`codebase_config`) for mmdet3d's voxel detection, of 0.4 to 1.3, read as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qat.core.errors import UserError
from qat.deploy.mmdeploy.maps import DECODED, INPUTS, LATEST, release_of
from qat.engine import BACKENDS
from qat.engine.tensorrt_options import Profile
from qat.families.mmdet3d.description import plain

# backend → the ending of its file
FILES = {"onnxruntime": ".onnx", "openvino": ".xml", "tensorrt": ".engine"}
TASK = "VoxelDetection"
MONO = ("MonoDetection", "MonocularDetection")
INT8_OPSET = 13  # the first with scales by channel
# Configs of 0.4 to 0.7 by their names → the same since.
RENAMED = {
    "voxel-detection_tensorrt_dynamic-kitti": "voxel-detection_tensorrt_dynamic-kitti-32x4",
    "voxel-detection_tensorrt_dynamic-nus": "voxel-detection_tensorrt_dynamic-nus-20x5",
    "voxel-detection_openvino_dynamic_kitti": "voxel-detection_openvino_dynamic-kitti-32x4",
    "voxel-detection_openvino_dynamic_nus": "voxel-detection_openvino_dynamic-nus-20x5",
}
OWN = Path(__file__).resolve().parents[3] / "configs"  # beside qat/, in a checkout


@dataclass(frozen=True)
class VoxelConfig:
    """What a deploy config asks for.

    values: all of it, in Python's own values. backend: a key of `FILES`. precision: of the convolutions, fp32, fp16 or int8. release:
    whose names the outputs have, a key of `qat.deploy.mmdeploy.maps.RELEASES`. save_file: the ONNX file's name. profiles, workspace: of TensorRT,
    None for no limit.
    flavour: of the part's graph (`qat.lean.flavours`).
    """

    source: str
    values: Mapping[str, Any]
    backend: str
    precision: str = "fp32"
    flavour: str = "tensorrt"
    opset: int = 11
    save_file: str = "end2end.onnx"
    release: str = LATEST
    profiles: Sequence[Profile] = ()
    workspace: int | None = None

    def quantized(self) -> VoxelConfig:
        """The same in INT8."""
        strong = _section(_section(self.values, "backend_config", ""), "common_config", "").get("strongly_typed")
        own = BACKENDS[self.backend].flavour
        return replace(
            self, precision="int8", flavour="tensorrt-strong" if strong else own, opset=max(self.opset, INT8_OPSET)
        )

    @property
    def voxels(self) -> tuple[int, int | None]:
        """The fewest and the most voxels that its engines take; None for any number."""
        profile = next((one for one in self.profiles if one.input == "voxels"), None)
        return (1, None) if profile is None else (profile.min[0], profile.max[0])


def find(name: str | Path) -> Path:
    """The file of a deploy config: a path, or one of `configs/` by MMDeploy's relative path, in today's names or older ones.

    Raises:
        UserError: there is none.
    """
    path = Path(name)
    renamed = path.with_name(f"{RENAMED.get(path.stem, path.stem)}.py")
    below = path.parts[path.parts.index("configs") + 1 :] if "configs" in path.parts else path.parts
    for found in (path, renamed, OWN.joinpath(*below), OWN.joinpath(*below).with_name(renamed.name)):
        if found.is_file():
            return found
    raise UserError(
        f"{name}: found no such file, expected a deploy config, such as those in configs/mmdet3d/voxel-detection"
    )


def load(path: str | Path) -> Mapping[str, Any]:
    """A deploy config's values. It is Python by mmengine's convention: its code runs.

    Raises:
        UserError: it cannot be read.
    """
    from qat.families.mmdet3d.config import of_python

    return dict(plain(of_python(path, "a deploy config").to_dict()))


def read(config: str | Path | Mapping[str, Any]) -> VoxelConfig:
    """Reads a deploy config: a file (`find`), or mmengine's `Config`, or its values.

    Raises:
        UserError: it cannot be read, is of another codebase, task or backend, or asks for what there is not, by the name of the key.
    """
    if isinstance(config, str | Path):
        path = find(config)
        return parsed(load(path), str(path))
    values = config.to_dict() if hasattr(config, "to_dict") else config
    return parsed(plain(values), str(getattr(config, "filename", None) or "deploy_cfg"))


def parsed(values: Mapping[str, Any], source: str) -> VoxelConfig:
    """The same of a config's values; raises as `read`."""

    def fail(key: str, found: object, expected: str) -> UserError:
        return UserError(f"{source}: {key}: found {found!r}, expected {expected}")

    if "components" in values and "codebase_config" not in values:
        raise fail("components", "one of AWML's", "a config with `codebase_config` (MMDeploy's); use `bevqat deploy`")
    codebase, onnx, backend = (
        _section(values, key, source) for key in ("codebase_config", "onnx_config", "backend_config")
    )
    if codebase.get("type") != "mmdet3d":
        raise fail("codebase_config: type", codebase.get("type"), "'mmdet3d'")
    if codebase.get("task") in MONO:
        raise fail(
            "codebase_config: task", codebase["task"], f"'{TASK}'; export the model whole, with bevqat export-mmdet3d"
        )
    if codebase.get("task") != TASK:
        raise fail("codebase_config: task", codebase.get("task"), f"'{TASK}'")
    if codebase.get("model_type", "end2end") != "end2end":
        raise fail("codebase_config: model_type", codebase["model_type"], "'end2end'")
    kind = backend.get("type")
    if kind not in FILES:
        found = kind or "none: this is a base of other configs"
        raise fail("backend_config: type", found, f"one of {', '.join(FILES)}")
    if tuple(names := onnx.get("input_names", INPUTS)) != INPUTS:
        raise fail("onnx_config: input_names", list(names), ", ".join(INPUTS))
    common = _section(backend, "common_config", source)
    save_file = str(onnx.get("save_file", "end2end.onnx"))
    if Path(save_file).suffix != ".onnx" or Path(save_file).name != save_file:
        raise fail("onnx_config: save_file", save_file, "the name of a file, ending in .onnx")
    precision = _precision(kind, backend, common, fail)
    # The names of 0.11 to 0.14 are of boxes that the file decodes; here the maps have 1.2's, and the host decodes.
    outputs = list(onnx.get("output_names") or ())
    read_config = VoxelConfig(
        source=source,
        values=values,
        backend=kind,
        precision=precision,
        flavour="tensorrt-strong" if precision == "fp16" else "tensorrt",
        opset=_opset(onnx, precision, fail),
        save_file=save_file,
        release=LATEST if not outputs or set(outputs) >= DECODED else release_of(outputs, source),
        profiles=_profiles(backend, source),
        workspace=common.get("max_workspace_size") or None,
    )
    return read_config.quantized() if precision == "int8" else read_config


def _section(values: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    found = values.get(key) or {}
    if not isinstance(found, Mapping):
        raise UserError(f"{source}: {key}: found {found!r}, expected a dict")
    return found


def _precision(kind: str, backend: Mapping[str, Any], common: Mapping[str, Any], fail: Any) -> str:
    if kind == "tensorrt":
        return "int8" if common.get("int8_mode") else "fp16" if common.get("fp16_mode") else "fp32"
    found = backend.get("precision", "fp32")
    allowed = ("fp32", "fp16", "int8") if kind == "onnxruntime" else ("fp32", "int8")
    if found not in allowed:
        raise fail("backend_config: precision", found, f"one of {', '.join(allowed)} on {kind}")
    return str(found)


def _opset(onnx: Mapping[str, Any], precision: str, fail: Any) -> int:
    found = onnx.get("opset_version", 11)
    if not isinstance(found, int) or not 11 <= found <= 20:
        raise fail("onnx_config: opset_version", found, "11 to 20")
    return found


def _profiles(backend: Mapping[str, Any], source: str) -> list[Profile]:
    """TensorRT's profiles; OpenVINO's `opt_shapes` are not needed, because the file takes any number of voxels."""
    shapes: dict[str, Mapping[str, Any]] = {}
    for model in backend.get("model_inputs") or ():
        shapes.update(model.get("input_shapes") or {})
    if unknown := [name for name in shapes if name not in INPUTS]:
        raise UserError(f"{source}: backend_config: input_shapes: found {unknown[0]!r}, expected {', '.join(INPUTS)}")
    return [
        Profile(name, *(tuple(one[f"{key}_shape"]) for key in ("min", "opt", "max"))) for name, one in shapes.items()
    ]
