"""PointPillars: the plan's walk and our decoding equal mmdet3d's own, and every stage runs on it."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lidar import POINTPILLARS, changed_config, cloud, need_mmdet3d, write_cloud

from qat.cli import main
from qat.core.errors import UserError
from qat.families import family_named
from qat.families.mmdet3d import pillars
from qat.families.mmdet3d.config import find, read
from qat.families.mmdet3d.exporter import Reference
from qat.families.mmdet3d.inputs import Reader
from qat.families.mmdet3d.model import build
from qat.families.pointpillars.anchors import AnchorDecoder, anchors_of
from qat.families.pointpillars.flow import BOXES, CLASSES, DIRECTIONS
from qat.model.opening import random_model
from qat.model.runners import flow_for, run_frame, torch_feeds, torch_runners
from qat.plan import run
from qat.runtime import Pipeline

need_mmdet3d()


@pytest.fixture(scope="module")
def network():
    return random_model(POINTPILLARS, 0).network


@pytest.fixture(scope="module")
def own(network):
    """mmdet3d's model with the same weights, and its reader."""
    model = build(read(POINTPILLARS))
    model.load_state_dict(network.state_dict())
    return model, Reader(read(POINTPILLARS), model)


def detections_equal(found, expected, close=2e-4):
    assert len(found.scores) == len(expected["scores"]) > 0
    order = np.lexsort((found.boxes[:, 0].round(2), -found.scores.round(4)))
    theirs = np.lexsort((expected["boxes"][:, 0].round(2), -expected["scores"].round(4)))
    np.testing.assert_allclose(found.scores[order], expected["scores"][theirs], atol=close)
    np.testing.assert_array_equal(found.labels[order], expected["labels"][theirs])
    np.testing.assert_allclose(found.boxes[order], expected["boxes"][theirs], atol=20 * close)


def test_the_walk_and_the_boxes_are_mmdet3ds(network, own):
    model, reader = own
    sample = reader.of_points(cloud(), "cloud")
    reference = Reference(model, sample)
    flow = flow_for(network)
    with torch.no_grad():
        tensors = run_frame(network, flow.prepare(cloud()))
    for name, leaf in zip((CLASSES, BOXES, DIRECTIONS), reference.tensors, strict=True):
        torch.testing.assert_close(tensors[name], leaf.value, atol=1e-4, rtol=1e-4)
    found = flow.decode({name: tensors[name].numpy() for name in flow.plan.outputs})
    assert found.convention == "mmdet3d"
    detections_equal(found, reference.boxes.expected)


@pytest.mark.parametrize("kind", ["AlignedAnchor3DRangeGenerator", "Anchor3DRangeGenerator"])
@pytest.mark.parametrize(
    "change", ["as it is", "corners", "all sizes in one range", "velocities", "softmax", "upright", "no directions"]
)
def test_decoding_equals_mmdet3ds_on_random_maps(kind, change):
    """On maps with more rows than columns, of every kind of head that the family takes."""
    config = read(POINTPILLARS)
    model = copy.deepcopy(config.model.to_dict())
    head, generator = model["bbox_head"], model["bbox_head"]["anchor_generator"]
    generator["type"] = kind
    if change == "corners":
        if kind == "Anchor3DRangeGenerator":
            pytest.skip("of aligned anchors alone")
        generator["align_corner"] = True
    elif change == "all sizes in one range":
        generator.update(ranges=generator["ranges"][:1], size_per_range=False)
    elif change == "velocities":
        generator["custom_values"] = [0, 0]
        head["bbox_coder"]["code_size"] = 9
    elif change == "softmax":
        head["loss_cls"] = {"type": "mmdet.CrossEntropyLoss", "use_sigmoid": False}
    elif change == "upright":
        model["test_cfg"].update(use_rotate_nms=False, nms_thr=0.3)
    elif change == "no directions":
        head["use_direction_classifier"] = False
    family = family_named("pointpillars")
    described = {**family.load_config(POINTPILLARS), "model": model}
    settings = family.settings(described)
    built = build(SimpleNamespace(model=model, source="test"))
    rng = np.random.default_rng(4)
    rows, columns = 24, 17
    shapes = {
        CLASSES: built.bbox_head.conv_cls.out_channels,
        BOXES: built.bbox_head.conv_reg.out_channels,
        DIRECTIONS: 12,
    }
    maps = {name: rng.normal(size=(1, count, rows, columns)).astype(np.float32) for name, count in shapes.items()}
    maps[CLASSES] -= 2
    maps[BOXES] *= 0.3
    own_anchors = built.bbox_head.prior_generator.grid_anchors([(rows, columns)], device="cpu")[0]
    ours = anchors_of(settings["head"]["anchors"], rows, columns)
    np.testing.assert_allclose(ours, own_anchors.reshape(ours.shape).numpy(), atol=1e-5)
    from mmdet3d.structures import LiDARInstance3DBoxes

    torch_maps = [[torch.from_numpy(maps[name])] for name in (CLASSES, BOXES, DIRECTIONS)]
    if change == "no directions":  # mmdet3d's own code takes no head without them: directions of 0 are the same
        torch_maps[2] = [torch.zeros(1, 12, rows, columns)]
        torch_maps[2][0][:, ::2] = 1
    predicted = built.bbox_head.predict_by_feat(*torch_maps, batch_input_metas=[{"box_type_3d": LiDARInstance3DBoxes}])[
        0
    ]
    found = AnchorDecoder(settings["head"])(
        maps[CLASSES], maps[BOXES], None if change == "no directions" else maps[DIRECTIONS]
    )
    expected = {
        "boxes": predicted.bboxes_3d.tensor.numpy(),
        "scores": predicted.scores_3d.numpy(),
        "labels": predicted.labels_3d.numpy(),
    }
    if change == "no directions":
        expected["boxes"][:, 6] = found.boxes[:, 6] = 0
    detections_equal(found, expected)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("distance", [True, False])
@pytest.mark.parametrize("offsets", [(True, True), (True, False), (False, True)])
def test_decoration_is_mmdet3ds(legacy, distance, offsets):
    from mmdet3d.models.voxel_encoders import PillarFeatureNet

    settings = {
        "voxel": {
            "size": [0.4, 0.5, 4.0],
            "range": [0.0, -12.8, -3.0, 35.2, 12.8, 1.0],
            "max_points": 8,
            "max_voxels": 3000,
        },
        "decoration": {
            "columns": 4,
            "cluster": offsets[0],
            "centre": 3 * offsets[1],
            "distance": distance,
            "legacy": legacy,
        },
    }
    net = PillarFeatureNet(
        in_channels=4, feat_channels=(8,), with_distance=distance, with_cluster_center=offsets[0], with_voxel_center=offsets[1],
        voxel_size=settings["voxel"]["size"], point_cloud_range=settings["voxel"]["range"], legacy=legacy,
    ).eval()  # fmt: skip
    features, cells, left_out = pillars.pillars_of(cloud(), settings)
    assert left_out == 0 and features.shape[2] == pillars.columns_of(settings["decoration"])
    seen = []
    net.pfn_layers[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    from qat.families.mmdet3d.ops.voxels import voxelize

    voxels, coords, counts = voxelize(
        cloud(), *(settings["voxel"][k] for k in ("size", "range", "max_points", "max_voxels"))
    )
    with torch.no_grad():
        net(torch.from_numpy(voxels), torch.from_numpy(counts), torch.from_numpy(np.pad(coords, ((0, 0), (1, 0)))))
    np.testing.assert_array_equal(coords, cells)
    np.testing.assert_allclose(features, seen[0].numpy(), atol=2e-5)


def test_a_batch_is_its_clouds_one_by_one(network):
    flow = flow_for(network)
    frames = [flow.prepare(cloud(seed, count)) for seed, count in ((1, 3000), (2, 500), (3, 1500))]
    with torch.no_grad():
        together = run(flow.plan, torch_runners(network), torch_feeds(network, flow.feeds(frames)))
        for n, frame in enumerate(frames):
            alone = run_frame(network, frame)
            for name in flow.plan.outputs:
                torch.testing.assert_close(together[name][n], alone[name][0], atol=1e-4, rtol=1e-4)


def test_an_empty_cloud_one_point_and_points_outside(network):
    flow = flow_for(network)
    for points in (np.zeros((0, 4), np.float32), cloud() + np.float32([500, 0, 0, 0]), cloud(count=4000)[:1]):
        with torch.no_grad():
            tensors = run_frame(network, flow.prepare(points))
        assert all(torch.isfinite(tensors[name]).all() for name in flow.plan.outputs)
        flow.decode({name: tensors[name].numpy() for name in flow.plan.outputs})
    grid = run_frame(network, flow.prepare(np.zeros((0, 4), np.float32)))["spatial_features"]
    assert not grid.any()


def test_points_that_are_none_are_refused_or_left_out(network):
    flow = flow_for(network)
    bad = cloud()
    bad[7] = np.nan
    assert len(flow.prepare(bad).points) == len(bad) - 1
    with pytest.raises(UserError, match=r"points: found float32\[4000,3\], expected float32\[M,4 or more\]"):
        flow.prepare(cloud()[:, :3])
    with pytest.raises(UserError, match=r"found float64"):
        flow.prepare(cloud().astype(np.float64))


def test_voxels_beyond_the_limit_are_said(network, capsys):
    config = copy.deepcopy(network.config)
    config["model"]["data_preprocessor"]["voxel_layer"]["max_voxels"] = (50, 50)
    flow = family_named("pointpillars").flow(config)
    found = flow.voxelize(flow.feeds([flow.prepare(cloud())]))
    assert len(found["coors"]) == 50
    assert "expected at most max_voxels 50" in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(tmp_path_factory, network):
    """A PTQ checkpoint of two clouds, and its INT8 parts for each CPU backend."""
    root = tmp_path_factory.mktemp("pointpillars")
    torch.save({"state_dict": network.state_dict()}, root / "model.pth")
    (root / "clouds").mkdir()
    for n in range(2):
        write_cloud(root / "clouds" / f"{n}.bin", seed=n)
    data = ["--data", str(root / "clouds"), "--split", "all"]
    ptq = ["--ckpt", str(root / "model.pth"), "--config", str(POINTPILLARS), *data, "--out", str(root / "ptq.pth")]
    assert main(["calibrate", *ptq]) == 0
    for flavour in ("onnxruntime", "openvino", "tensorrt"):
        out = ["--flavour", flavour, "--out", str(root / flavour), "--frames", "1"]
        assert main(["export", "--ckpt", str(root / "ptq.pth"), *out, *data]) == 0
    return root


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_int8_parts_give_boxes_on_both_backends(exported, network, backend):
    manifest = json.loads((exported / backend / "manifest.json").read_text())
    assert manifest["pipeline"]["family"] == "pointpillars" and manifest["verification"]["passed"]
    parts = manifest["parts"]
    assert parts["pts_voxel_encoder"]["precision"] == "fp32" and parts["pts_backbone_neck_head"]["precision"] == "int8"
    assert parts["pts_backbone_neck_head"]["operators"]["ConvTranspose"] == 3
    built = exported / f"built-{backend}"
    assert main(["build", "--onnx", str(exported / backend), "--backend", backend, "--out", str(built)]) == 0
    boxes = Pipeline.load(built)(cloud())
    assert len(boxes.scores) > 0 and np.isfinite(boxes.boxes).all()


def test_onnxruntime_alone_gets_rounded_maps(exported):
    """Its convolutions are integers only where their outputs are rounded; another backend's maps stay float."""
    import onnx

    rounded = {}
    for flavour in ("onnxruntime", "openvino", "tensorrt"):
        graph = onnx.load(exported / flavour / "pts_backbone_neck_head.onnx").graph
        makers = {name: node.op_type for node in graph.node for name in node.output}
        rounded[flavour] = [makers[output.name] == "DequantizeLinear" for output in graph.output]
    assert rounded == {"onnxruntime": [True] * 3, "openvino": [False] * 3, "tensorrt": [False] * 3}


def test_verify_finds_a_damaged_part(exported, tmp_path, capsys):
    """A negative control: one weight scale of the graph is doubled."""
    import shutil

    import onnx
    from onnx import numpy_helper

    folder = tmp_path / "damaged"
    shutil.copytree(exported / "onnxruntime", folder)
    assert main(["verify", str(folder)]) == 0
    file = folder / "pts_backbone_neck_head.onnx"
    model = onnx.load(file)
    scales = {node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    damaged = next(
        i for i in model.graph.initializer if i.name in scales and i.dims
    )  # a weight's, a value for each channel
    damaged.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(damaged) * np.float32(2), damaged.name))
    onnx.save(model, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    from qat.core.files import sha256

    manifest["parts"]["pts_backbone_neck_head"]["sha256"] = sha256(file)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(folder)]) == 1
    assert "pts_backbone_neck_head" in capsys.readouterr().err


def test_export_mmdet3d_int8_goes_through_the_same_stages(tmp_path, capsys):
    data = write_cloud(tmp_path / "cloud.bin")
    out = tmp_path / "out"
    words = ["--data", str(data), "--output", str(out), "--format", "onnx", "--int8"]
    assert main(["export-mmdet3d", str(POINTPILLARS), *words]) == 0
    int8 = json.loads((out / "metadata.json").read_text())["int8"]
    assert set(int8["flavours"]) == {"tensorrt", "tensorrt-strong", "onnxruntime", "openvino"}
    assert int8["int8_share_of_macs"] > 0.8 and int8["parts_off"] == ["encoder"]
    for flavour, entry in int8["flavours"].items():
        part = entry["parts"]["pts_backbone_neck_head"]
        assert entry["passed"] and part["precision"] == "int8" and part["sqnr_db_beside_float"] > 10
        assert (out / "int8" / flavour / part["file"]).is_file()
    assert "<h2>INT8</h2>" in (out / "inputs.html").read_text()
    assert "encoder" in capsys.readouterr().out
    words = [
        "second_hv_secfpn_8xb6-80e_kitti-3d-car.py",
        "--use-random-data",
        "--int8",
        "--output",
        str(tmp_path / "no"),
    ]
    assert main(["export-mmdet3d", *words]) == 2
    assert "expected PillarFeatureNet" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('type="SECOND"', 'type="ResNet"', "backbone: found 'ResNet', expected SECOND; export it whole"),
        ('type="DeltaXYZWLHRBBoxCoder"', 'type="PGDBBoxCoder"', "found 'PGDBBoxCoder'"),
        ("upsample_strides=[1, 2, 4]", "upsample_strides=[1, 2, 2]", "upsample_strides"),
        ("use_dim=4", "use_dim=[0, 1, 3]", "use_dim: found [0, 1, 3], expected columns"),
        ("voxel=True,", 'voxel=True, voxel_type="dynamic",', "voxel_type: found dynamic, expected hard"),
    ],
)
def test_what_the_family_cannot_take_is_named(tmp_path, before, after, words):
    path = changed_config(POINTPILLARS, tmp_path, before, after)
    with pytest.raises(UserError) as refused:
        family_named("pointpillars").load_config(path)
    assert words in str(refused.value), refused.value


def test_verbs_that_need_tables_refuse_bin_files_in_a_line(exported, capsys):
    data = f"{exported / 'clouds'}:all"
    words = [
        "--ckpt",
        str(exported / "ptq.pth"),
        "--data",
        data,
        "--no-augment",
        "--steps",
        "1",
        "--out",
        str(exported / "qat.pth"),
    ]
    assert main(["finetune", *words]) == 2
    assert "found .bin files, expected nuScenes-format data" in capsys.readouterr().err


def test_shipped_configs_open():
    for name in (
        "pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py",
        "pointpillars_hv_secfpn_8xb6-160e_kitti-3d-car.py",
    ):
        family = family_named("pointpillars")
        flow = family.flow(family.load_config(find(name)))
        assert flow.plan.tensors[CLASSES].shape == ("B", flow.plan.tensors[CLASSES].shape[1], 248, 216)
