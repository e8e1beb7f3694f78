"""VoteNet in its split form: tensors and boxes equal mmdet3d's own, and every stage runs on it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from lidar import changed_config, need_mmdet3d
from onnx import TensorProto, helper, numpy_helper

from qat.cli import main
from qat.core.errors import UserError
from qat.core.files import sha256
from qat.families import family_named, of_python_config
from qat.families.mmdet3d.config import find
from qat.families.mmdet3d.model import build
from qat.families.votenet.decode import aligned_nms, detections, split, upright_hulls
from qat.families.votenet.indices import sampled
from qat.model.runners import flow_for, run_frame, to_numpy, torch_feeds, torch_parts, torch_runners
from qat.plan import run
from qat.runtime import Pipeline

need_mmdet3d()

CONFIG = Path(__file__).with_name("votenet_small.py")
REAL = Path("/work/shared/mmdet3d-data/sunrgbd/000017.bin")
FAMILY = family_named("votenet")
DATA = ["--split", "all"]


@pytest.fixture(scope="module")
def network():
    return FAMILY.random(FAMILY.load_config(CONFIG), 0)


@pytest.fixture(scope="module")
def cloud(network):
    """A made-up room."""
    return flow_for(network).made_frame(3).points


def theirs(network, tensors, mode, change=None):
    """What mmdet3d's own model gives for a sampled cloud."""
    from mmdet3d.structures import DepthInstance3DBoxes, Det3DDataSample

    model = copy.deepcopy(network.config["model"])
    (change or (lambda _: None))(model)
    own = build(SimpleNamespace(model=model, source="test"))
    own.load_state_dict(network.state_dict())
    sample = Det3DDataSample(metainfo={"box_type_3d": DepthInstance3DBoxes})
    with torch.inference_mode():
        return own({"points": list(tensors["cloud"])}, [sample], mode=mode)


def ours(network, tensors):
    """The plan's tensors by mmdet3d's names."""
    found = to_numpy(tensors)
    coder = flow_for(network).settings["head"]["coder"]
    made = split(found["cls_preds"], found["reg_preds"], found["aggregated_points"], coder)
    names = ("seed_points", "vote_points", "vote_features", "aggregated_points")
    return {**made, **{name: found[name] for name in names}}


def check_equal(network, tensors, change=None):
    with torch.inference_mode():
        expected = theirs(network, tensors, "tensor", change)
    found = ours(network, tensors)
    assert len(set(found) & set(expected)) == 13
    for name in sorted(set(found) & set(expected)):
        np.testing.assert_allclose(found[name], expected[name].numpy(), atol=2e-4, rtol=1e-4, err_msg=name)


def check_boxes(network, tensors, change=None, settings=None):
    instances = theirs(network, tensors, "predict", change)[0].pred_instances_3d
    outputs = {name: value for name, value in to_numpy(tensors).items()}
    flow = flow_for(network)
    head = settings or flow.settings["head"]
    boxes = detections(*(outputs[n] for n in ("cls_preds", "reg_preds", "aggregated_points", "cloud")), head)
    assert boxes.convention == "depth" and len(boxes) == len(instances.scores_3d) > 0
    np.testing.assert_allclose(boxes.boxes, instances.bboxes_3d.tensor.numpy(), atol=2e-4)
    np.testing.assert_allclose(boxes.scores, instances.scores_3d.numpy(), atol=1e-5)
    np.testing.assert_array_equal(boxes.labels, instances.labels_3d.numpy())


def test_the_walk_and_the_boxes_are_mmdet3ds(network, cloud):
    tensors = run_frame(network, flow_for(network).prepare(cloud))
    check_equal(network, tensors)
    check_boxes(network, tensors)


def test_an_index_off_by_one_shows(network, cloud):
    """A negative control of the comparison with mmdet3d."""
    flow, runners = flow_for(network), torch_runners(network)
    group = runners["group"]

    def shifted(given):
        found = group(given)
        return {**found, "sa2_groups": (found["sa2_groups"] + 1) % 128}

    with torch.inference_mode():
        tensors = run(flow.plan, {**runners, "group": shifted}, torch_feeds(network, flow.feeds([flow.prepare(cloud)])))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_equal(network, tensors)


@pytest.mark.parametrize(
    "change", [{"sample_mode": "vote"}, {"per_class_proposal": False}, {"score_thr": 0.3, "nms_thr": 0.02}]
)
def test_each_way_to_spread_proposals_and_to_choose_boxes_is_mmdet3ds(network, cloud, change):
    config = copy.deepcopy(network.config)
    config["model"]["test_cfg"].update(change)
    other = FAMILY.build(config)
    other.load_state_dict(network.state_dict())
    tensors = run_frame(other.eval(), flow_for(other).prepare(cloud))
    check_equal(other, tensors)
    check_boxes(other, tensors)


def test_boxes_along_the_axes_are_mmdet3ds(network, cloud):
    """A coder without directions, ScanNet's: yaw is 0."""
    tensors = run_frame(network, flow_for(network).prepare(cloud))

    def upright(model):
        model["bbox_head"]["bbox_coder"]["with_rot"] = False

    head = copy.deepcopy(flow_for(network).settings["head"])
    head["coder"]["rotated"] = False
    check_boxes(network, tensors, upright, head)


def test_a_batch_is_its_clouds_one_by_one(network):
    flow = flow_for(network)
    frames = [flow.made_frame(n) for n in range(3)]
    frames[1].points = frames[1].points[:700]  # fewer than are sampled: they repeat
    with torch.inference_mode():
        together = run(flow.plan, torch_runners(network), torch_feeds(network, flow.feeds(frames)))
        for n, frame in enumerate(frames):
            alone = run_frame(network, frame)
            for name in flow.plan.outputs:
                torch.testing.assert_close(together[name][n : n + 1], alone[name], atol=1e-4, rtol=1e-4)


def test_points_are_sampled_as_mmdet3d_does_and_the_same_ones_each_time(cloud, tmp_path):
    from mmengine.dataset import Compose

    settings = {"points": 1024, "height": True}
    found = sampled(cloud, settings)
    np.testing.assert_array_equal(found, sampled(cloud, settings))
    file = tmp_path / "points.bin"
    file.write_bytes(cloud.tobytes())
    np.random.seed(0)
    steps = [
        {"type": "LoadPointsFromFile", "coord_type": "DEPTH", "shift_height": True, "load_dim": 3, "use_dim": 3},
        {"type": "PointSample", "num_points": 1024},
    ]
    own = Compose(steps)({"lidar_points": {"lidar_path": str(file)}})["points"].tensor.numpy()
    np.testing.assert_array_equal(found, own)


def test_nms_is_mmdet3ds():
    from mmdet3d.models.layers import aligned_3d_nms
    from mmdet3d.structures import DepthInstance3DBoxes

    rng = np.random.default_rng(1)
    boxes = np.concatenate(
        [rng.uniform(-1, 1, (200, 3)), rng.uniform(0.2, 1.5, (200, 3)), rng.uniform(-3, 3, (200, 1))], 1
    ).astype(np.float32)
    boxes[::7, 3] = 0  # without volume
    scores, classes = rng.random(200).astype(np.float32), rng.integers(0, 3, 200)
    hulls = upright_hulls(boxes)
    corners = DepthInstance3DBoxes(torch.from_numpy(boxes)).corners
    np.testing.assert_allclose(hulls, torch.cat([corners.min(1).values, corners.max(1).values], 1).numpy(), atol=1e-5)
    own = aligned_3d_nms(*(torch.from_numpy(x) for x in (hulls, scores, classes)), 0.25)
    found = aligned_nms(hulls, scores, classes, 0.25)
    assert 10 < len(found) < 150
    np.testing.assert_array_equal(found, own.numpy())


@pytest.fixture(scope="module")
def exported(tmp_path_factory, network):
    """A PTQ checkpoint of two rooms, and FP32 and INT8 parts."""
    root = tmp_path_factory.mktemp("votenet")
    torch.save({"state_dict": network.state_dict()}, root / "model.pth")
    (root / "rooms").mkdir()
    flow = flow_for(network)
    for n in range(2):
        points = np.zeros((len(flow.made_frame(n).points), 6), np.float32)
        points[:, :3] = flow.made_frame(n).points
        (root / "rooms" / f"{n}.bin").write_bytes(points.tobytes())
    data = ["--data", str(root / "rooms"), *DATA]
    ptq = ["--ckpt", str(root / "model.pth"), "--config", str(CONFIG), *data, "--out", str(root / "ptq.pth")]
    assert main(["calibrate", *ptq]) == 0
    for flavour in ("onnxruntime", "openvino", "tensorrt"):
        out = ["--flavour", flavour, "--out", str(root / flavour), "--frames", "1"]
        assert main(["export", "--ckpt", str(root / "ptq.pth"), *out, *data]) == 0
    float_ = ["--ckpt", str(root / "model.pth"), "--config", str(CONFIG), "--out", str(root / "fp32"), "--frames", "1"]
    assert main(["export", *float_, *data]) == 0
    return root


def test_parts_take_indices_and_have_plain_gathers_only(exported):
    for name in ("fp32", "onnxruntime", "openvino", "tensorrt"):
        manifest = json.loads((exported / name / "manifest.json").read_text())
        assert manifest["pipeline"]["family"] == "votenet" and manifest["verification"]["passed"]
        assert manifest["opset"] == 13 and list(manifest["parts"]) == ["backbone", "head"]
        inputs = manifest["parts"]["backbone"]["inputs"]
        assert len(inputs) == 13 and inputs["sa1_groups"] == {"dtype": "int32", "shape": [1, 128, 16]}
        assert manifest["parts"]["head"]["inputs"]["vote_groups"]["dtype"] == "int32"
        for part in manifest["parts"].values():
            assert not set(part["operators"]) & {"Loop", "Scan", "TopK", "ScatterND", "LpNormalization"}
            assert part["precision"] == ("fp32" if name == "fp32" else "int8")


def test_every_convolution_is_int8_on_a_cpu(exported):
    """Of the tensorrt flavour those in 1d are float."""
    for name, expected in (("onnxruntime", 0), ("openvino", 0), ("tensorrt", 7)):
        floats = 0
        for part in ("backbone", "head"):
            graph = onnx.load(exported / name / f"{part}.onnx").graph
            made = {output: node.op_type for node in graph.node for output in node.output}
            layers = [node for node in graph.node if node.op_type in ("Conv", "MatMul")]
            floats += sum(made.get(layer.input[1]) != "DequantizeLinear" for layer in layers)
        assert floats == expected, name


@pytest.mark.parametrize(
    ("folder", "backend"),
    [("fp32", "onnxruntime"), ("fp32", "openvino"), ("onnxruntime", "onnxruntime"), ("openvino", "openvino")],
)
def test_the_pipeline_gives_pytorchs_boxes_on_both_backends(exported, network, cloud, folder, backend):
    if folder == "fp32":
        reference = Pipeline(torch_parts(network), flow_for(network).settings)
    else:
        from qat.calibrate import load_ptq

        model, _ = load_ptq(exported / "ptq.pth")
        model.use(folder)
        reference = Pipeline(torch_parts(model), flow_for(model).settings)
    pipeline = Pipeline.load(exported / folder, backend)
    found, expected = (one.forward(one.flow.prepare(cloud)) for one in (pipeline, reference))
    noise = found["vote_points"] - expected["vote_points"]
    ratio = 10 * np.log10(np.square(expected["vote_points"]).sum() / np.square(noise).sum())
    assert ratio > (80 if folder == "fp32" else 30)
    boxes, own = pipeline.decode(found), reference.decode(expected)
    assert boxes.convention == "depth" and len(boxes) > 0 and np.isfinite(boxes.boxes).all()
    if folder == "fp32":
        np.testing.assert_allclose(boxes.boxes, own.boxes, atol=1e-3)
        np.testing.assert_allclose(boxes.scores, own.scores, atol=1e-3)


def _off_by_one(graph):
    """The first cells' neighbours are those before them."""
    graph.initializer.append(numpy_helper.from_array(np.int32(1), "one"))
    for node in graph.node:
        node.input[:] = ["shifted" if name == "sa1_groups" else name for name in node.input]
    graph.node.insert(0, helper.make_node("Sub", ["sa1_groups", "one"], ["shifted"]))


def _swapped(graph):
    """Two channels of cls_preds change places."""
    shape = [d.dim_value for d in graph.output[0].type.tensor_type.shape.dim]
    order = [1, 0, *range(2, shape[1])]
    graph.initializer.append(numpy_helper.from_array(np.array(order, np.int64), "order"))
    for node in graph.node:
        node.output[:] = ["before" if name == "cls_preds" else name for name in node.output]
    graph.node.append(helper.make_node("Gather", ["before", "order"], ["cls_preds"], axis=1))


def _doubled(graph):
    """One weight scale is doubled."""
    scales = {node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    one = next(i for i in graph.initializer if i.name in scales and i.dims and i.data_type == TensorProto.FLOAT)
    one.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(one) * np.float32(2), one.name))


@pytest.mark.parametrize(
    ("folder", "part", "damage"),
    [("fp32", "backbone", _off_by_one), ("fp32", "head", _swapped), ("onnxruntime", "backbone", _doubled)],
)
def test_verify_finds_a_damaged_part(exported, tmp_path, capsys, folder, part, damage):
    """Negative controls."""
    copied = tmp_path / "damaged"
    shutil.copytree(exported / folder, copied)
    assert main(["verify", str(copied)]) == 0
    file = copied / f"{part}.onnx"
    model = onnx.load(file)
    damage(model.graph)
    onnx.checker.check_model(model)
    onnx.save(model, file)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["parts"][part]["sha256"] = sha256(file)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(copied)]) == 1
    assert part in capsys.readouterr().err


def test_points_that_are_none_are_refused_or_left_out(network, cloud):
    flow = flow_for(network)
    bad = cloud.copy()
    bad[7] = np.nan
    assert len(flow.prepare(bad).points) == len(bad) - 1
    for points, words in (
        (cloud[:, :2], r"points: found float32\[1280,2\], expected float32\[M,3 or more\]"),
        (cloud.astype(np.float64), "found float64"),
        (cloud[:0], r"points: found \[0, 3\], expected float32\[M,3 or more\] with a point in it"),
        (np.full_like(cloud, np.inf), r"found \[0, 3\]"),
    ):
        with pytest.raises(UserError, match=words):
            flow.prepare(points)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('sample_mode="seed"', 'sample_mode="random"', "sample_mode: found 'random', expected 'seed' or 'vote'"),
        ('dict(type="PointSample", num_points=1024)', "", "found no PointSample"),
        ("num_points=1024", "num_points=1024, sample_range=40.0", "sample_range: found 40.0, expected none"),
        ("in_channels=4", "in_channels=3", "in_channels of points with 4 columns: found 3"),
        ("num_classes=3", "num_classes=4", "num_classes of 3 names: found 4, expected 3"),
        ('pool_mod="max"', 'pool_mod="max", fps_mod=["F-FPS"]', "fps_mod: found ['F-FPS']"),
        ("use_dim=[0, 1, 2]", "use_dim=[0, 2, 1]", "use_dim: found [0, 2, 1], expected columns"),
    ],
)
def test_what_the_family_cannot_take_is_named(tmp_path, before, after, words):
    path = changed_config(CONFIG, tmp_path, before, after)
    with pytest.raises(UserError) as refused:
        FAMILY.load_config(path)
    assert words in str(refused.value), refused.value


def test_shipped_configs_open():
    for name, points in (("votenet_8xb16_sunrgbd-3d.py", 20000), ("votenet_8xb8_scannet-3d.py", 40000)):
        assert of_python_config(find(name)) == "votenet"
        flow = FAMILY.flow(FAMILY.load_config(find(name)))
        assert flow.plan.tensors["cloud"].shape == ("B", points, 4)
        assert flow.plan.tensors["vote_points"].shape == ("B", 1024, 3)
    with pytest.raises(UserError, match="found H3DNet"):
        of_python_config(find("h3dnet_8xb3_scannet-seg.py"))


@pytest.mark.nightly
@pytest.mark.skipif(not REAL.is_file(), reason="mmdet3d's example data is not here")
def test_the_full_size_network_on_a_real_cloud_is_mmdet3ds():
    network = FAMILY.random(FAMILY.load_config(find("votenet_8xb16_sunrgbd-3d.py")), 0)
    tensors = run_frame(network, FAMILY.dataset(REAL, "all", network.config)[0])
    check_equal(network, tensors)
    check_boxes(network, tensors)
