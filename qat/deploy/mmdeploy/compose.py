"""`end2end.onnx` of two graphs: voxels to the grid, and the exported part `pts_backbone_neck_head`.

voxels, num_points, coors ─► (front) ─► spatial_features ─► (pts_backbone_neck_head) ─► maps ─► (Concat) ─► MMDeploy's outputs
                               └─► alone, 0 or NaN ───────────────────────────────────────────► (Add) to the classes
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from qat.core.errors import UserError
from qat.deploy.mmdeploy.maps import channels_of, groups, names_in
from qat.export.lookups import opset_of
from qat.families.flow import Flow

GRID, ALONE = "spatial_features", "alone"
NOTES = "bevqat"  # key of a file's metadata
# Operators with the same inputs, attributes and results from opset 11 to 13 (later ones only take more types).
SAME_SINCE_11 = {
    "Add",
    "AveragePool",
    "Cast",
    "Concat",
    "Constant",
    "Conv",
    "ConvTranspose",
    "Identity",
    "MaxPool",
    "Mul",
    "Relu",
    "Sigmoid",
}


def compose(
    front: onnx.ModelProto, part: onnx.ModelProto, flow: Flow, release: str, notes: Mapping[str, Any]
) -> onnx.ModelProto:
    """The whole file. release: whose names its outputs have. notes: kept in its metadata (`notes_of`).

    Raises:
        UserError: the release has no names for the model's outputs.
    """
    names = names_in(flow, release)
    kept = {"rename_inputs": False, "rename_outputs": False}
    front = onnx.compose.add_prefix(front, "front/", **kept)
    part = onnx.compose.add_prefix(part, "network/", rename_inputs=False)
    part.ir_version = front.ir_version = max(front.ir_version, part.ir_version)
    model = onnx.compose.merge_models(
        front, part, [(GRID, GRID)], outputs=[*(value.name for value in part.graph.output), ALONE], name="end2end"
    )
    opset = opset_of(model)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", opset))
    model.producer_name, model.producer_version = "bevqat", ""
    model.doc_string = model.graph.doc_string = ""
    made = []
    del model.graph.output[:]
    for name, maps in zip(names, groups(flow), strict=True):
        given = [f"network/{own}" for own in maps]
        classes = name in names[:: len(names) // _levels(names)]
        result = f"{name}/joined" if classes else name
        if len(given) > 1:
            made.append(helper.make_node("Concat", given, [result], axis=1, name=f"join/{name}"))
        else:
            made.append(helper.make_node("Identity", given, [result], name=f"join/{name}"))
        if classes:
            made.append(helper.make_node("Add", [result, ALONE], [name], name=f"alone/{name}"))
        shape = [1, sum(channels_of(flow, own) for own in maps), *flow.plan.tensors[maps[0]].shape[2:]]
        model.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    model.graph.node.extend(made)
    helper.set_model_props(model, {NOTES: json.dumps(dict(notes), sort_keys=True)})
    onnx.checker.check_model(model, full_check=True)
    return model


def _levels(names: list[str]) -> int:
    return sum(name.startswith(("cls_score", "scores")) for name in names)


def at_opset(part: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The part at a lower opset than it was exported for. (onnx's own converter has no way down from 13.)

    Raises:
        UserError: it has an operator that is another one there.
    """
    own = opset_of(part)
    if own <= opset:
        return part
    others = sorted({node.op_type for node in part.graph.node} - SAME_SINCE_11)
    if others:
        raise UserError(
            f"onnx_config: opset_version: found {opset}, expected {own} or more: the model has {', '.join(others)}"
        )
    found = onnx.ModelProto()
    found.CopyFrom(part)
    del found.opset_import[:]
    found.opset_import.append(helper.make_opsetid("", opset))
    onnx.checker.check_model(found, full_check=True)
    return found


def notes_of(path: Path) -> dict[str, Any]:
    """What `compose` noted in a file; nothing for a file of another tool, or none."""
    if path.suffix != ".onnx" or not path.is_file():
        return {}
    try:
        model = onnx.load(path, load_external_data=False)
        found = {prop.key: prop.value for prop in model.metadata_props}
        notes = json.loads(found.get(NOTES, "{}"))
    except Exception:  # protobuf's own exceptions; the backend says what is wrong with the file
        return {}
    return notes if isinstance(notes, dict) else {}
