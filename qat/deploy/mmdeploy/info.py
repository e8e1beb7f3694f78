"""deploy.json, pipeline.json and detail.json of a deployment, in MMDeploy's form (`--dump-info`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.deploy.mmdeploy.config import FILES, TASK, VoxelConfig
from qat.deploy.mmdeploy.maps import INPUTS, names_in
from qat.families.flow import Flow

FORM = "1.3.1"  # the release of MMDeploy whose form these files have
FILE_NAMES = ("deploy.json", "pipeline.json", "detail.json")


def written(
    config: VoxelConfig, flow: Flow, steps: list[dict[str, Any]], model_cfg: str | Path, checkpoint: str | Path
) -> dict[str, Any]:
    """The content of each of `FILE_NAMES`.

    steps: the model config's test pipeline. checkpoint: as the command has it.
    """
    name = str(flow.settings["family"])
    onnx_file = Path(config.save_file)
    weights = onnx_file.with_suffix(".bin").name if config.backend == "openvino" else ""
    model = {
        "name": name,
        "net": onnx_file.with_suffix(FILES[config.backend]).name,
        "weights": weights,
        "backend": config.backend,
        "precision": config.precision.upper(),
        "batch_size": 1,
        "dynamic_shape": True,
    }
    return {
        "deploy.json": {"version": FORM, "task": "VoxelDetector", "models": [model], "customs": []},
        "pipeline.json": {"pipeline": _pipeline(config, flow, steps, name)},
        "detail.json": _detail(config, model_cfg, checkpoint),
    }


def _pipeline(config: VoxelConfig, flow: Flow, steps: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Three tasks: the test pipeline and the voxelization, the file, the decoding. Its parameters are those that this project decodes by."""
    voxelize = {"type": "Voxelize", **flow.settings["voxel"]}
    outputs = names_in(flow, config.release)
    before = {
        "type": "Task", "module": "Transform", "name": "Preprocess",
        "input": ["points"], "output": ["prep_output"], "transforms": [*steps, voxelize],
    }  # fmt: skip
    network = {
        "name": name, "type": "Task", "module": "Net", "is_batched": False, "input": ["prep_output"], "output": ["infer_output"],
        "input_map": {own: own for own in INPUTS}, "output_map": {own: own for own in outputs},
    }  # fmt: skip
    after = {
        "type": "Task", "module": "mmdet3d", "name": "postprocess", "component": f"{name}Head",
        "params": {**flow.settings["head"], "class_names": flow.classes},
        "output": ["post_output"], "input": ["prep_output", "infer_output"],
    }  # fmt: skip
    return {"input": ["points"], "output": ["post_output"], "tasks": [before, network, after]}


def _detail(config: VoxelConfig, model_cfg: str | Path, checkpoint: str | Path) -> dict[str, Any]:
    from qat.families.mmdet3d.library import versions

    sections: dict[str, Mapping[str, Any]] = {
        key: config.values.get(key) or {}
        for key in ("codebase_config", "onnx_config", "backend_config", "calib_config")
    }
    codebase = {
        "task": TASK, "codebase": "mmdet3d", "version": versions()["mmdet3d"],
        "pth": str(checkpoint), "config": str(model_cfg),
    }  # fmt: skip
    return {"version": FORM, "codebase": codebase, **sections}
