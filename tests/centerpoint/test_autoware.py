"""Autoware's layout: the maps that its runtime reads, its decoding by definition, its parameter files, and what it cannot load."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import yaml
from lidar import AWML, CENTERPOINT, changed_awml, cloud, need_mmdet3d, write_cloud

from qat.boxes.conventions import convert
from qat.cli import main
from qat.core.errors import UserError
from qat.core.files import sha256
from qat.export.options import ExportOptions
from qat.export.parts import export_parts
from qat.families.centerpoint.autoware import MAPS, Thresholds, decode, older
from qat.model.opening import Source, open_float, open_model, random_model, read_config
from qat.model.runners import detect, flow_for, part_modules
from qat.runtime import Pipeline

need_mmdet3d()

NY, NX = 32, 48  # of the head's maps: not square
DENSE = "pts_backbone_neck_head"


@pytest.fixture(scope="module")
def network():
    return random_model(AWML, 0).network


@pytest.fixture(scope="module")
def settings(network):
    return flow_for(network).settings


def random_maps(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"heatmap": 5, "reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
    maps = {name: rng.normal(size=(1, count, NY, NX)).astype(np.float32) for name, count in shapes.items()}
    maps["heatmap"] = maps["heatmap"] * 2 - 4
    maps["dim"] *= 0.5
    return maps


def as_the_node_does(maps, settings, limits):
    """postprocess_kernel.cu, circle_nms, the node's NMS and box3DToDetectedObject, one cell at a time: (x, y, z, length, width, height,
    yaw, vx, vy, score, label)."""
    from shapely import affinity
    from shapely.geometry import box

    cell, low = settings["voxel"]["size"], settings["voxel"]["range"]
    factor, found = settings["head"]["stride"], []
    for yi in range(NY):
        for xi in range(NX):
            at = {name: maps[name][0, :, yi, xi] for name in MAPS}
            scores = [1 / (1 + math.exp(-logit)) for logit in at["heatmap"]]
            label = scores.index(max(scores))
            x = cell[0] * factor * (xi + at["reg"][0]) + low[0]
            y = cell[1] * factor * (yi + at["reg"][1]) + low[1]
            ring = next((n for n, limit in enumerate(limits.limits) if math.hypot(x, y) < limit), None)
            if ring is None or scores[label] < limits.scores[ring][label]:
                continue
            if math.hypot(*at["rot"]) < limits.yaw_norms[label]:
                continue
            width, length, height = (math.exp(value) for value in at["dim"])
            yaw = -math.atan2(at["rot"][0], at["rot"][1]) - math.pi / 2
            found.append((x, y, at["height"][0], length, width, height, yaw, *at["vel"], scores[label], label))
    found.sort(key=lambda each: -each[9])
    rest = []
    for each in found:
        if all((each[0] - b[0]) ** 2 + (each[1] - b[1]) ** 2 >= limits.circle**2 for b in rest):
            rest.append(each)

    def seen(each):
        x, y, _, length, width, _, yaw = each[:7]
        upright = box(x - length / 2, y - width / 2, x + length / 2, y + width / 2)
        return affinity.rotate(upright, yaw, origin=(x, y), use_radians=True)

    areas = [seen(each) for each in rest]
    return [
        each
        for n, each in enumerate(rest)
        if not any(
            math.dist(each[:2], rest[m][:2]) <= limits.reach
            and areas[n].intersection(areas[m]).area / areas[n].union(areas[m]).area > limits.overlap
            for m in range(n)
        )
    ]


def limits_of(settings, **more):
    usual = Thresholds.of(settings)
    rng = np.random.default_rng(1)
    scores = rng.uniform(0.05, 0.3, usual.scores.shape).astype(np.float32)
    return Thresholds(scores, usual.yaw_norms, (10.0, 20.0, 30.0, 40.0), **more)


def test_decoding_is_autowares(settings):
    maps, limits = random_maps(), limits_of(settings)
    expected = as_the_node_does(maps, settings, limits)
    found = decode(maps, settings, limits)
    assert found.convention == "autoware" and len(found) == len(expected) > 20
    assert list(found.labels) == [each[10] for each in expected]
    np.testing.assert_allclose(found.scores, [each[9] for each in expected], rtol=1e-5)
    np.testing.assert_allclose(
        found.boxes[:, [0, 1, 2, 3, 4, 5, 7, 8]], [[*e[:6], *e[7:9]] for e in expected], atol=2e-4
    )
    turn = found.boxes[:, 6] - [each[6] for each in expected]
    np.testing.assert_allclose(np.sin(turn / 2), 0, atol=1e-5)


@pytest.mark.parametrize("damage", ["unturned", "dim", "transposed", "no sigmoid"])
def test_other_maps_give_other_boxes(settings, damage):
    """The report's mistakes are seen in the boxes."""
    maps, limits = random_maps(), limits_of(settings)
    right = decode(maps, settings, limits)
    turned = older(maps)
    changed = {
        "unturned": {**maps, "rot": turned["rot"]},
        "dim": {**maps, "dim": turned["dim"]},
        "transposed": {n: np.ascontiguousarray(v.swapaxes(2, 3)).reshape(v.shape) for n, v in maps.items()},
        "no sigmoid": {**maps, "heatmap": 1 / (1 + np.exp(-maps["heatmap"]))},
    }[damage]
    wrong = decode(changed, settings, limits)
    assert len(wrong) != len(right) or np.abs(wrong.boxes - right.boxes).max() > 0.1


def test_a_trained_heads_boxes_arrive_unturned(settings):
    """Maps as mmdet3d's targets are, of boxes with known headings, through the layout and the node: the same boxes."""
    headings = np.linspace(-3, 3, 12)
    maps = {name: np.zeros_like(value) for name, value in random_maps().items()}
    maps["heatmap"] -= 10
    boxes = []
    for n, yaw in enumerate(headings):
        yi, xi = 2 + 2 * n, 3 + 3 * n
        maps["heatmap"][0, n % 5, yi, xi] = 4
        maps["reg"][0, :, yi, xi] = 0.25, 0.75
        maps["height"][0, 0, yi, xi] = -0.5
        maps["dim"][0, :, yi, xi] = np.log([4.5, 1.9, 1.6])
        maps["rot"][0, :, yi, xi] = np.sin(yaw), np.cos(yaw)
        boxes.append([1.6 * (xi + 0.25) - 38.4, 1.6 * (yi + 0.75) - 25.6, -0.5, 4.5, 1.9, 1.6, yaw, 0, 0])
    found = decode(older(maps), settings, Thresholds.of(settings))
    expected = np.array(boxes, np.float32)
    order = np.argsort(found.boxes[:, 0])
    np.testing.assert_allclose(found.boxes[order], expected, atol=1e-5)
    # mmdet3d's own decoding of the maps before they are turned, in the same convention
    from qat.families import family_named

    flow = family_named("centerpoint").flow(random_model(AWML, 0).network.config)
    own = flow.decode(maps)
    order = np.argsort(own.boxes[:, 0])
    np.testing.assert_allclose(convert(own.boxes[order], "mmdet3d", "autoware"), expected, atol=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same random network in its own form and in Autoware's, FP32, and INT8 for TensorRT."""
    root = tmp_path_factory.mktemp("autoware")
    (root / "clouds").mkdir()
    write_cloud(root / "clouds" / "0.bin", columns=5)
    data = ["--data", str(root / "clouds"), "--split", "all"]
    random = ["--init", "random", "--config", str(AWML)]
    assert main(["calibrate", *random, *data, "--out", str(root / "ptq.pth")]) == 0
    for name, words in {
        "own": [*random, "--fp32"],
        "fp32": [*random, "--fp32", "--layout", "autoware"],
        "int8": ["--ckpt", str(root / "ptq.pth"), "--flavour", "tensorrt-strong", "--layout", "autoware"],
    }.items():
        assert main(["export", *words, *data, "--frames", "1", "--out", str(root / name)]) == 0
    return root


def test_two_maps_are_turned_and_the_order_stays(folders):
    feed = np.random.default_rng(0).random((1, 32, 64, 96)).astype(np.float32)
    found = {}
    for name in ("own", "fp32"):
        session = ort.InferenceSession(folders / name / f"{DENSE}.onnx")
        assert [output.name for output in session.get_outputs()] == MAPS
        found[name] = dict(zip(MAPS, session.run(None, {"spatial_features": feed}), strict=True))
    own, turned = found["own"], found["fp32"]
    for name in ("heatmap", "reg", "height", "vel"):
        np.testing.assert_allclose(turned[name], own[name], atol=1e-6)
    np.testing.assert_allclose(turned["dim"], own["dim"][:, [1, 0, 2]], atol=1e-6)
    np.testing.assert_allclose(turned["rot"], np.stack([-own["rot"][:, 1], -own["rot"][:, 0]], 1), atol=1e-6)
    manifest = json.loads((folders / "fp32" / "manifest.json").read_text())
    assert manifest["pipeline"]["head"]["layout"] == "autoware" and manifest["pipeline"]["head"]["boxes"] == "older"


def test_both_forms_give_the_same_boxes(folders):
    own, turned = (Pipeline.load(folders / name, "onnxruntime", "fp32") for name in ("own", "fp32"))
    points = cloud(columns=4)
    a, b = own(points), turned(points)
    assert len(a) == len(b) > 5 and a.convention == b.convention == "mmdet3d"
    np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-4)


def test_int8_is_strongly_typed_with_float_inputs_and_outputs(folders):
    graph = onnx.load(folders / "int8" / f"{DENSE}.onnx").graph
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    assert any(node.op_type == "DequantizeLinear" for node in graph.node)
    text = (folders / "int8" / "ml_package.param.yaml").read_text()
    assert yaml.safe_load(text)["/**"]["ros__parameters"]["trt_precision"] == "strongly-typed"


def test_verify_finds_maps_that_are_not_turned(folders, tmp_path, capsys):
    """A negative control: the file of the own form under the manifest of Autoware's."""
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(folders / "fp32", folder)
    assert main(["verify", str(folder)]) == 0
    shutil.copy(folders / "own" / f"{DENSE}.onnx", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parts"][DENSE]["sha256"] = sha256(folder / f"{DENSE}.onnx")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(folder)]) == 1
    shown = capsys.readouterr()
    assert "rot" in shown.out + shown.err


def test_parameter_files(folders):
    package = yaml.safe_load((folders / "fp32" / "ml_package.param.yaml").read_text())["/**"]["ros__parameters"]
    assert package["version"] == "v4.1" and package["trt_precision"] == "fp32"
    assert (folders / "fp32" / package["head_onnx_path"]).is_file()
    assert (folders / "fp32" / package["encoder_onnx_path"]).is_file()
    model = package["model_params"]
    assert model["class_names"] == ["CAR", "TRUCK", "BUS", "BICYCLE", "PEDESTRIAN"]
    assert model["encoder_in_feature_size"] == 10 and model["point_feature_size"] == 4
    assert model["max_voxel_size"] == 2000 and model["downsample_factor"] == 2
    assert model["yaw_norm_thresholds"] == [0.3, 0.3, 0.3, 0.3, 0.0]
    assert set(model["detection_score_thresholds"]["min_confidence_scores"]) == set(model["class_names"])
    remapper = yaml.safe_load((folders / "fp32" / package["class_remapper_param_path"]).read_text())
    matrices = remapper["/**"]["ros__parameters"]
    assert {len(values) for values in matrices.values()} == {64} and not any(matrices["allow_remapping_by_area_matrix"])


def saved(network, path, **meta):
    torch.save({"state_dict": network.state_dict(), "meta": meta}, path)
    return path


def test_an_older_head_is_not_turned_and_decoded_as_such(network, tmp_path):
    """A checkpoint from before mmdet3d 1.0 with the same boxes: its last layers are turned."""
    old = random_model(AWML, 0).network
    head = old.pts_bbox_head.task_heads[0]
    with torch.no_grad():
        for layer, order, sign in ((head.dim[-1], [1, 0, 2], 1), (head.rot[-1], [1, 0], -1)):
            layer.weight.copy_(sign * layer.weight[order])
            layer.bias.copy_(sign * layer.bias[order])
    old = open_float(Source(saved(old, tmp_path / "old.pth", mmdet3d_version="0.17.1"), AWML)).network
    new = open_float(Source(saved(network, tmp_path / "new.pth", mmengine_version="0.10.7"), AWML)).network
    flow = flow_for(new)
    frame = flow.prepare(cloud(columns=4))
    a, b = (next(iter(detect(each, [frame]).values())) for each in (new, old))
    assert len(a) == len(b) > 5
    np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-4)
    files = {}
    for name, each in {"old": old, "new": new}.items():
        export_parts(each, tmp_path / name, ExportOptions(layout="autoware"))
        files[name] = ort.InferenceSession(tmp_path / name / f"{DENSE}.onnx")
    feed = np.random.default_rng(0).random((1, 32, 64, 96)).astype(np.float32)
    for one, other in zip(*(session.run(None, {"spatial_features": feed}) for session in files.values()), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert "Neg" not in {node.op_type for node in onnx.load(tmp_path / "old" / f"{DENSE}.onnx").graph.node}


def test_an_unknown_origin_is_refused(network, tmp_path):
    unknown = open_model(saved(network, tmp_path / "model.pth"), AWML).network
    with pytest.raises(UserError, match="neither mmengine_version nor mmdet3d_version"):
        export_parts(unknown, tmp_path / "out", ExportOptions(layout="autoware"))
    assert not (tmp_path / "out").exists() and "layout" not in unknown.config


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("feat_channels=[32, 32]", "feat_channels=[32, 32], legacy=True", "legacy of the encoder: found True"),
        ("max_num_points=32", "max_num_points=20", "max_num_points: found 20, expected 32"),
        ("use_dim=[0, 1, 2, 4]", "use_dim=[0, 1, 2, 3]", "columns of a point with 10 features: found [0, 1, 2, 3]"),
        ("feat_channels=[32, 32]", "feat_channels=[32, 32], with_distance=True", "with_distance: found True"),
    ],
)  # fmt: skip
def test_what_its_runtime_cannot_load_is_named(tmp_path, capsys, before, after, words):
    changed = changed_awml(tmp_path, (before, after))
    flags = ["--init", "random", "--config", str(changed), "--layout", "autoware", "--out", str(tmp_path / "out")]
    assert main(["export", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: layout autoware: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_models_and_forms_are_refused(folders, tmp_path, capsys):
    two = ["--init", "random", "--config", str(CENTERPOINT), "--layout", "autoware", "--out", str(tmp_path / "out")]
    assert main(["export", *two]) == 2
    assert "channels of the encoder: found 16, expected 32" in capsys.readouterr().err
    for words, says in (
        (["--flavour", "openvino"], "found int8 in flavour openvino"),
        (["--flavour", "tensorrt"], "tensorrt-strong, which INT8 needs"),
        (["--flavour", "tensorrt-strong", "--io", "fp16"], "io: found fp16, expected fp32"),
        (["--flavour", "tensorrt-strong", "--dynamic-batch"], "batch"),
    ):
        out = ["--layout", "autoware", "--out", str(tmp_path / "out"), "--frames", "0"]
        assert main(["export", "--ckpt", str(folders / "ptq.pth"), *words, *out]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_parts_change_inside_the_export_alone(network, tmp_path):
    export_parts(network, tmp_path / "out", ExportOptions(layout="autoware"))
    assert "layout" not in network.config and type(part_modules(network)[DENSE]).__name__ == "PartModule"
    assert read_config(AWML)[1].get("layout") is None
