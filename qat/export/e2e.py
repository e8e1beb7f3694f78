"""The whole detector as one ONNX file: the exported parts with BEV pooling between them, in standard operators.

The camera geometry is an input, so a camera that moved needs no new export.

    img, depth ─► camera.backbone ─┬─► depth weights ─┐
                                   └─► features ──────┴─► pooling ─► camera.vtransform ─► fuser ─► head.bbox ─► maps
    camera_intrinsics, camera2lidar, img_aug_matrix, lidar_aug_matrix ─► geometry ─┘ (a cell for each frustum point)

Geometry does what `qat.core.geometry` does, operation by operation: matrices are inverted in double precision (adjugate
over determinant; ONNX has no inverse) and rounded to float32, as numpy inverts them, everything else is float32.

Pooling goes through the channels one after the other (Scan): the depth weights times one channel's features, one value
for each frustum point, are added up by cell (ScatterElements, reduction add). The tensor [N,D,H,W,C] is never made,
only [N,D,H,W]. Points outside the grid go to a spare cell that is cut off. ScatterND on rows of channels would be the
obvious operator, but ONNX Runtime's adds rows from several threads without a lock, and loses some where rows share a
cell (seen in 1.31.1, opset 16 and 18, as soon as there are two threads). ScatterElements is serial, and adds a cell's
points in the order in which `qat.runtime.pool` adds them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from qat.core.errors import UserError
from qat.core.files import atomic_directory, sha256, write_json
from qat.core.locks import only_writer
from qat.core.onnx_file import load_graph
from qat.core.tensors import compare_tensors
from qat.core.verification import judge, random_frame
from qat.engine.onnxruntime_backend import PlainGraph
from qat.export.graph import op_counts, tensor_specs
from qat.export.lookups import opset_of
from qat.families.bevfusion.pooling.geometry import (
    PoolPattern,
    create_frustum,
    depth_bins,
    frustum_to_lidar,
    grid_size,
    pooling_pattern,
)
from qat.manifest import FILE, PARTS, load_manifest, pipeline_of
from qat.runtime import Pipeline

DETECTOR = "detector.onnx"
OPSET = 16  # the first whose ScatterElements adds up
INDEPENDENT_DB = -3.0  # two independent noises of one power, beside one of them
MATRICES = ("camera_intrinsics", "camera2lidar", "img_aug_matrix", "lidar_aug_matrix")


class _Nodes:
    """Nodes and constants under one prefix, named in the order in which they are made: the same calls, the same bytes."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: Any, dtype: type) -> str:
        name = f"{self.prefix}/constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def __call__(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = f"{self.prefix}/{kind}_{len(self.nodes)}"
        output = output or f"{name}_output"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def split(self, value: str, axis: int) -> list[str]:
        """The three slices of a dimension of three, each of size one."""
        name = f"{self.prefix}/Split_{len(self.nodes)}"
        outputs = [f"{name}_output_{i}" for i in range(3)]
        sizes = self.constant([1, 1, 1], np.int64)
        self.nodes.append(helper.make_node("Split", [value, sizes], outputs, name=name, axis=axis))
        return outputs

    def window(self, value: str, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int]) -> str:
        return self("Slice", value, *(self.constant(index, np.int64) for index in (starts, ends, axes)))


def _inverse(op: _Nodes, matrix: str) -> str:
    """Inverses of float32[…,3,3]: adjugate over determinant, in double precision, rounded to float32.

    With rows r₀, r₁, r₂ the cofactor matrix has rows r₁×r₂, r₂×r₀, r₀×r₁; its transpose is the adjugate. A singular
    matrix gives infinities and NaN, and its camera's points then fall outside the grid.
    """
    m = op("Cast", matrix, to=TensorProto.DOUBLE)
    next_one, next_but_one = op.constant([1, 2, 0], np.int64), op.constant([2, 0, 1], np.int64)
    a, b = op("Gather", m, next_one, axis=-2), op("Gather", m, next_but_one, axis=-2)
    products = [
        op("Mul", op("Gather", a, i, axis=-1), op("Gather", b, j, axis=-1))
        for i, j in ((next_one, next_but_one), (next_but_one, next_one))
    ]
    cofactors = op("Sub", *products)
    first = op.constant([0], np.int64)
    row = op("Mul", op("Gather", m, first, axis=-2), op("Gather", cofactors, first, axis=-2))
    determinant = op("ReduceSum", row, op.constant([-1], np.int64), keepdims=1)
    adjugate = op("Transpose", cofactors, perm=[0, 2, 1])
    return op("Cast", op("Div", adjugate, determinant), to=TensorProto.FLOAT)


def _geometry(transform: Mapping[str, Any]) -> _Nodes:
    """The four matrices → geometry/points, float32[N,3,D·fH·fW] in metres, and geometry/index, int64[N·D·fH·fW]: each
    frustum point's cell (z·nx + x)·ny + y, nz·nx·ny for one outside the grid. In the order of the flat depth weights.
    """
    op = _Nodes("geometry")

    def rotation(matrix: str) -> str:
        return op.window(matrix, [0, 0], [3, 3], [-2, -1])

    def translation(matrix: str) -> str:
        return op.window(matrix, [0, 3], [3, 4], [-2, -1])

    intrinsics, camera2lidar, img_aug, lidar_aug = MATRICES
    turn = rotation(lidar_aug)
    combine = op("MatMul", rotation(camera2lidar), _inverse(op, rotation(intrinsics)))
    combine = op("MatMul", turn, combine)
    shift = op("Add", op("MatMul", turn, translation(camera2lidar)), translation(lidar_aug))

    frustum = create_frustum(transform["image_size"], transform["feature_size"], transform["dbound"])
    rays = op.constant(frustum.reshape(1, -1, 3).transpose(0, 2, 1), np.float32)
    rays = op("MatMul", _inverse(op, rotation(img_aug)), op("Sub", rays, translation(img_aug)))
    u, v, depth = op.split(rays, 1)
    rays = op("Concat", op("Mul", u, depth), op("Mul", v, depth), depth, axis=1)
    points = op("Add", op("MatMul", combine, rays), shift, output="geometry/points")

    bounds = [transform[name] for name in ("xbound", "ybound", "zbound")]
    nx, ny, nz = grid_size(*bounds)
    step = np.array([row[2] for row in bounds], np.float32)
    centre = np.array([row[0] + row[2] / 2.0 for row in bounds], np.float32)
    lower = (centre - step / np.float32(2.0)).reshape(3, 1)
    cells = op("Sub", points, op.constant(lower, np.float32))
    cells = op("Div", cells, op.constant(step.reshape(3, 1), np.float32))
    # trunc(f) is in 0 … n − 1 where −1 < f < n. What is outside (or NaN) is made 0 first: a cast of it is undefined.
    inside = op(
        "And",
        op("Greater", cells, op.constant(-1.0, np.float32)),
        op("Less", cells, op.constant(np.reshape([nx, ny, nz], (3, 1)), np.float32)),
    )
    whole = op("Cast", op("Where", inside, cells, op.constant(0.0, np.float32)), to=TensorProto.INT32)
    x, y, z = op.split(whole, 1)
    cell = op("Add", op("Mul", z, op.constant(nx, np.int32)), x)
    cell = op("Add", op("Mul", cell, op.constant(ny, np.int32)), y)
    in_x, in_y, in_z = op.split(inside, 1)
    kept = op("And", op("And", in_x, in_y), in_z)
    index = op("Where", kept, cell, op.constant(nz * nx * ny, np.int32))
    index = op("Cast", index, to=TensorProto.INT64)
    op("Reshape", index, op.constant([-1], np.int64), output="geometry/index")
    return op


def _pooling(transform: Mapping[str, Any], cameras: int) -> _Nodes:
    """camera_depth_weights [N,D,fH,fW], camera_feature [N,fH,fW,C] and geometry/index → feat_in [1,nz·C,nx,ny]."""
    op = _Nodes("pooling")
    nx, ny, nz = grid_size(*(transform[name] for name in ("xbound", "ybound", "zbound")))
    cells, channels = nz * nx * ny, transform["out_channels"]
    pixels = int(np.prod(transform["feature_size"]))
    depths = len(depth_bins(transform["dbound"]))

    def shape(*sizes: int) -> str:
        return op.constant(sizes, np.int64)

    weights = op("Reshape", "camera_depth_weights", shape(cameras, depths, pixels))
    features = op("Transpose", "camera_feature", perm=[3, 0, 1, 2])
    features = op("Reshape", features, shape(channels, cameras, 1, pixels))
    zeros = op.constant(np.zeros(cells + 1), np.float32)
    body = _Nodes("pooling/channel")
    products = body("Mul", weights, "pooling/channel/features")
    products = body("Reshape", products, shape(-1))
    sums = body("ScatterElements", zeros, "geometry/index", products, axis=0, reduction="add")
    body("Slice", sums, shape(0), shape(cells), output="pooling/channel/bev")
    graph = helper.make_graph(
        body.nodes,
        "channel",
        [helper.make_tensor_value_info("pooling/channel/features", TensorProto.FLOAT, [cameras, 1, pixels])],
        [helper.make_tensor_value_info("pooling/channel/bev", TensorProto.FLOAT, [cells])],
    )
    grid = op("Scan", features, body=graph, num_scan_inputs=1)
    if nz > 1:
        grid = op("Transpose", op("Reshape", grid, shape(channels, nz, nx * ny)), perm=[1, 0, 2])
    op("Reshape", grid, shape(1, nz * channels, nx, ny), output="feat_in")
    return op


def _rename(nodes: Sequence[onnx.NodeProto], prefix: str, shared: Mapping[str, str]) -> None:
    """Puts a part's tensors and nodes under its prefix, but for `shared` ones, which are renamed as it says."""

    def renamed(name: str) -> str:
        return name and shared.get(name, f"{prefix}/{name}")

    for node in nodes:
        node.name = f"{prefix}/{node.name}"
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
        for attribute in node.attribute:
            for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _rename(graph.node, prefix, shared)
                for value in (*graph.input, *graph.output, *graph.initializer):
                    value.name = renamed(value.name)
                del graph.value_info[:]


def _check_tensors(part: str, model: onnx.ModelProto, cameras: int) -> None:
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type.elem_type
        if kind != TensorProto.FLOAT:
            name = helper.tensor_dtype_to_np_dtype(kind).name
            raise UserError(
                f"{part}: {value.name}: found {name}, expected float32: merge parts with FP32 inputs and outputs"
            )
        leading = value.type.tensor_type.shape.dim[0]
        expected = cameras if value.name in ("camera_feature", "camera_depth_weights") else 1
        if leading.HasField("dim_value") and leading.dim_value != expected:
            raise UserError(
                f"{part}: {value.name}: found {leading.dim_value} for its first dimension, expected {expected}: "
                "the whole detector takes one sample; export the parts with --batch 1"
            )


def merge_detector(parts: Mapping[str, onnx.ModelProto], settings: Mapping[str, Any]) -> onnx.ModelProto:
    """Joins exported parts into one graph, BEV pooling among them.

    The same parts give the same bytes (serialized deterministically). A part's own tensors are found under
    `PART/name`, those between the parts under their usual names: camera_feature, camera_depth_weights, feat_in,
    feat_out, middle.

    Args:
        parts: the graphs by `qat.manifest.PARTS`; camera.vtransform may be left out. Any precision or flavour with
            float32 inputs and outputs, for one sample. They are left as they are.
        settings: a manifest's `pipeline` section.

    Returns:
        a graph of opset 16, or of the parts' highest one, that takes img [1,N,3,H,W], depth [1,N,1,H,W] (if the model
        has it), camera_intrinsics, camera2lidar, img_aug_matrix, each [N,4,4], and lidar_aug_matrix [4,4], all
        float32, and gives the head's maps in their usual order.

    Raises:
        UserError: a part is missing, is for another batch size, or has inputs or outputs that are not float32.
    """
    transform, cameras = settings["vtransform"], len(settings["cameras"])
    for name in PARTS:
        if name not in parts and name != "camera.vtransform":
            raise UserError(f"{name}: no such part among {', '.join(parts)}; expected all that a detector is made of")
    opsets = {"": OPSET}
    for part in parts.values():
        for imported in part.opset_import:
            opsets[imported.domain] = max(opsets.get(imported.domain, 0), imported.version)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    outputs: dict[str, onnx.ValueInfoProto] = {}
    bev = "feat_in"
    for name in PARTS:
        if name not in parts:
            continue
        _check_tensors(name, parts[name], cameras)
        model = version_converter.convert_version(parts[name], opsets[""])
        shared = {value.name: value.name for value in (*model.graph.input, *model.graph.output)}
        if name == "camera.vtransform":
            bev = "feat_out"
        elif name == "fuser":
            shared["camera"] = bev
        _rename(model.graph.node, name, shared)
        for constant in model.graph.initializer:
            constant.name = f"{name}/{constant.name}"
        nodes += model.graph.node
        constants += model.graph.initializer
        outputs |= {value.name: value for value in model.graph.output}
        if name == "camera.backbone":
            for section in (_geometry(transform), _pooling(transform, cameras)):
                nodes += section.nodes
                constants += section.constants
    height, width = settings["image"]["size"]
    shapes: dict[str, list[int]] = {"img": [1, cameras, 3, height, width]}
    if settings["depth_input"]:
        shapes["depth"] = [1, cameras, 1, height, width]
    shapes |= {matrix: [cameras, 4, 4] for matrix in MATRICES[:3]} | {MATRICES[3]: [4, 4]}
    maps = [outputs[name] for name in settings["head_maps"]]
    for value in maps:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        maps,
        constants,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*item) for item in opsets.items()],
        ir_version=max(8, *(part.ir_version for part in parts.values())),  # 8 is opset 16's
        producer_name="bevqat",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _plain(model: onnx.ModelProto) -> PlainGraph:
    return PlainGraph(model.SerializeToString())


def _geometry_alone(model: onnx.ModelProto) -> onnx.ModelProto:
    """The part of a merged graph that computes points and cells from the matrices."""
    own = "geometry/"
    graph = helper.make_graph(
        [node for node in model.graph.node if node.name.startswith(own)],
        "geometry",
        [value for value in model.graph.input if value.name in MATRICES],
        [
            helper.make_tensor_value_info("geometry/points", TensorProto.FLOAT, ["cameras", 3, "points"]),
            helper.make_tensor_value_info("geometry/index", TensorProto.INT64, ["all"]),
        ],
        [value for value in model.graph.initializer if value.name.startswith(own)],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _without_activation_rounding(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A merged graph whose activations pass by their Q/DQ pairs, weights rounded as before; None if it has no such pair."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    constants = {value.name for value in model.graph.initializer}
    constants |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    before = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants
    }
    if not before:
        return None
    kept = []
    for node in model.graph.node:  # in their order, so what a pair takes has been renamed when the pair is met
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and (
            node.output[0] in before or node.input[0] in before
        ):
            before[node.output[0]] = before.get(node.input[0], node.input[0])
        else:
            node.input[:] = [before.get(name, name) for name in node.input]
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def _points_tolerance(frustum: np.ndarray, frame: Any) -> float:
    """How far two float32 computations of the same frustum points may lie apart, in metres.

    A coordinate is a chain of at most 16 roundings of values no larger than S, the formula with every term taken by
    its magnitude: the pixel's shift (1), `undo` (1) and its product (3), the multiplication by the depth (1),
    the inverse (1), two matrix products (3 each), the last product (3) and the shift's sum (the rest, of smaller
    terms). Each is at most 2⁻²⁴ of its value, on both sides: 32·2⁻²⁴·S.
    """
    worst = 0.0
    turn = np.abs(frame.lidar_aug_matrix.astype(np.float64))
    for n, camera2lidar in enumerate(np.abs(frame.camera2lidar.astype(np.float64))):
        image = frame.img_aug_matrix[n].astype(np.float64)
        undo = np.abs(np.linalg.inv(image[:3, :3]))
        inverse = np.abs(np.linalg.inv(frame.camera_intrinsics[n, :3, :3].astype(np.float64)))
        ray = undo @ np.abs(frustum.reshape(-1, 3) - image[:3, 3]).max(0)
        ray[:2] *= ray[2]
        moved = turn[:3, :3] @ (camera2lidar[:3, :3] @ inverse @ ray + camera2lidar[:3, 3]) + turn[:3, 3]
        worst = max(worst, float(moved.max()))
    return 32 * 2.0**-24 * worst


def _cells(pattern: PoolPattern, points: int) -> np.ndarray:
    """Each frustum point's cell, int64[points]; one past the last cell for a point outside the grid."""
    cells = np.full(points, len(pattern.row_ptr) - 1, np.int64)
    cells[pattern.depth] = pattern.cell
    return cells


def verify_detector(
    model: onnx.ModelProto, parts: Mapping[str, onnx.ModelProto], settings: Mapping[str, Any], frame: Any
) -> dict[str, Any]:
    """Compares a merged graph with `qat.runtime.Pipeline` over the parts that it was made of, all in ONNX Runtime with its
    optimizer off.

    Points: the frustum points of both may differ by float32's rounding (`_points_tolerance`), and a point that lies
    this close to the border of two cells may fall into either (cells_differ). From its own points the graph must make
    exactly numpy's cells: one subtraction, one division and one truncation leave no freedom (cells_unexplained).

    Maps, and the pooled grid (a head's maps may say little about what is far before them): against the Pipeline with the merged graph's own cells, so that what is compared is the same sum. What
    remains is the order of its terms, and what the graphs behind make of it:

    - FP32: 80 dB, as `qat.export.verify` derives it for one part. Both sides are the same graphs here.
    - INT8: a difference in the last bit carries a few activations over a rounding threshold; at most, the two sides'
      rounding noises become independent. Their difference then has twice the power of the rounding noise of
      activations, which is measured as the difference that leaving the activations' Q/DQ out makes: 3 dB below that SQNR.

    Args:
        frame: what `qat.runtime.SampleTensors` describes.

    Returns:
        geometry: points, cells_differ, cells_unexplained, max_abs_m, tolerance_m, passed.
        tensors: for each map, and for the pooled grid feat_in, max_abs, cosine, sqnr_db, tolerance_db, passed, for INT8 quantization_db, and pipeline_db:
            the SQNR against the Pipeline with its own cells.
        passed: all of them.
    """
    transform = settings["vtransform"]
    bounds = [transform[name] for name in ("xbound", "ybound", "zbound")]
    matrices = {name: np.asarray(getattr(frame, name), np.float32) for name in MATRICES}
    frustum = create_frustum(transform["image_size"], transform["feature_size"], transform["dbound"])
    points = frustum_to_lidar(frustum, *matrices.values())
    geometry_found = _plain(_geometry_alone(model)).run(matrices)
    found_points = geometry_found["geometry/points"].transpose(0, 2, 1).reshape(points.shape)
    patterns = [pooling_pattern(values, *bounds) for values in (points, found_points)]
    expected, own = (_cells(pattern, points[..., 0].size) for pattern in patterns)
    distance, tolerance = float(np.abs(found_points - points).max()), _points_tolerance(frustum, frame)
    differing = int((expected != own).sum())
    unexplained = int((geometry_found["geometry/index"] != own).sum())
    geometry = {
        "points": len(expected),
        "cells_differ": differing,
        "cells_unexplained": unexplained,
        "max_abs_m": distance,
        "tolerance_m": tolerance,
        "passed": distance <= tolerance and not unexplained,
    }

    feeds = {"img": frame.img[None], **matrices}
    if settings["depth_input"]:
        feeds["depth"] = frame.depth[None]
    watched = onnx.ModelProto.FromString(model.SerializeToString())
    watched.graph.output.append(helper.make_tensor_value_info("feat_in", TensorProto.FLOAT, [1, None, None, None]))
    found = _plain(watched).run(feeds)
    rounding = _without_activation_rounding(watched)
    unrounded = None if rounding is None else _plain(rounding).run(feeds)
    pipeline = Pipeline({name: _plain(part) for name, part in parts.items()}, settings)
    reference = own_cells = pipeline.forward(frame)
    if differing:
        pipeline.patterns = SimpleNamespace(get=lambda *_: patterns[1])  # type: ignore[assignment]
        own_cells = pipeline.forward(frame)
    tensors: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        rounding_db = (
            None
            if unrounded is None
            else compare_tensors(unrounded[name], value, f"the whole detector: {name}")["sqnr_db"]
        )
        limit = None if rounding_db is None else rounding_db + INDEPENDENT_DB
        tensors[name] = judge(
            compare_tensors(own_cells[name], value, f"the whole detector: {name}"), rounding_db, limit=limit
        )
        tensors[name]["pipeline_db"] = compare_tensors(reference[name], value)["sqnr_db"]
    passed = geometry["passed"] and all(entry["passed"] for entry in tensors.values())
    return {"runtime": "onnxruntime, optimizer off", "passed": passed, "geometry": geometry, "tensors": tensors}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def export_e2e(folder: str | Path, out: str | Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Makes an exported folder's parts into one file, detector.onnx, and verifies it before it is written.

    The same parts give the same bytes.

    Args:
        folder: where export-camera wrote manifest.json and the parts.
        out: None adds the file to `folder`. Another folder gets the file alone, with a manifest that lists no parts; an
            earlier one is replaced. Whole or not at all in both cases.
        seed: of the random frame for verification.

    Returns:
        the manifest's `e2e` entry: file, sha256, precision, opset, inputs, outputs, operators, verification. Its
        `verification["passed"]` is False when the file is out of tolerance; it is written all the same, to be
        looked at.

    Raises:
        UserError: the folder is incomplete or was changed, or its parts cannot be joined (see `merge_detector`).
    """
    folder = Path(folder)
    target = folder if out is None else Path(out)
    here = target.resolve() == folder.resolve()
    if not here and folder.resolve().is_relative_to(target.resolve()):
        raise UserError(
            f"{target}: found the parts inside it, expected a folder that can be replaced; choose another --out"
        )
    with only_writer(
        os.path.realpath(target)
    ):  # from here on, or the parts that are read might not be those that are linked
        return _write_e2e(folder, target, here, seed)


def _write_e2e(folder: Path, target: Path, here: bool, seed: int) -> dict[str, Any]:
    manifest = load_manifest(folder)
    settings = pipeline_of(folder, manifest)
    parts = {name: load_graph(folder / part["file"]) for name, part in manifest["parts"].items()}
    model = merge_detector(parts, settings)
    verification = {"seed": seed, **verify_detector(model, parts, settings, random_frame(settings, seed))}
    takes, gives = tensor_specs(model)
    with atomic_directory(target) as made:
        if here:
            shutil.copytree(folder, made, copy_function=_link, dirs_exist_ok=True)
        else:
            manifest["parts"] = {}
        file = made / DETECTOR
        file.unlink(missing_ok=True)  # an earlier one is a link to the folder's, which stays whole until the end
        file.write_bytes(model.SerializeToString(deterministic=True))
        manifest["e2e"] = {
            "file": DETECTOR,
            "sha256": sha256(file),
            "precision": manifest["precision"],
            "opset": opset_of(model),
            "inputs": takes,
            "outputs": gives,
            "operators": dict(sorted(op_counts(model).items())),
            "verification": verification,
        }
        write_json(made / FILE, manifest)
    return manifest["e2e"]
