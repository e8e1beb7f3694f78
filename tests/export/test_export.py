import json
import shutil

import numpy as np
import onnx
import pytest
import torch

from qat.export import ExportOptions, Origin, export_parts, torch_parts
from qat.families.bevfusion.settings import pipeline_settings
from qat.manifest import load_manifest
from tests.messages import refused

SHAPES = {
    "camera.backbone": (
        {"img": [1, 3, 3, 64, 96], "depth": [1, 3, 1, 64, 96]},
        {"camera_feature": [3, 8, 12, 10], "camera_depth_weights": [3, 12, 8, 12]},
    ),
    "camera.vtransform": ({"feat_in": [1, 10, 32, 24]}, {"feat_out": [1, 10, 16, 12]}),
    "fuser": ({"camera": [1, 10, 16, 12]}, {"middle": [1, 24, 16, 12]}),
    "head.bbox": (
        {"middle": [1, 24, 16, 12]},
        {
            f"{name}_{task}": [1, channels, 16, 12]
            for task, classes in enumerate((2, 1))
            for name, channels in {"heatmap": classes, "reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}.items()
        },
    ),
}


def shapes(values):
    return {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def test_parts_have_the_documented_names_and_shapes(exported_fp32):
    manifest = load_manifest(exported_fp32)
    assert sorted(p.name for p in exported_fp32.iterdir()) == sorted(
        [*(f"{name}.onnx" for name in SHAPES), "manifest.json", "verification.npz"]
    )
    for name, (inputs, outputs) in SHAPES.items():
        model = onnx.load(exported_fp32 / f"{name}.onnx")
        assert shapes(model.graph.input) == inputs and list(shapes(model.graph.input)) == list(inputs)
        assert shapes(model.graph.output) == outputs and list(shapes(model.graph.output)) == list(outputs)
        assert model.opset_import[0].version == 13
        ops = {node.op_type for node in model.graph.node}
        assert not ops & {"BatchNormalization", "QuantizeLinear", "DequantizeLinear", "Shape"}
        assert {k: v["shape"] for k, v in manifest["parts"][name]["inputs"].items()} == inputs
        assert manifest["parts"][name]["operators"]["Conv"] == sum(n.op_type == "Conv" for n in model.graph.node)
    assert manifest["verification"]["passed"]


def test_manifest_records_source_and_settings(tmp_path, small_config, small_cameras, make_detector):
    checkpoint = tmp_path / "mine" / "float.pth"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"weights")
    export_parts(
        make_detector(small_config), tmp_path / "out", ExportOptions("fp16"), origin=Origin(checkpoint=checkpoint)
    )
    manifest = load_manifest(tmp_path / "out")
    assert manifest["precision"] == "fp16" and "FP16 flag" in manifest["types"]
    # printf weights | sha256sum
    assert manifest["checkpoint"]["sha256"].startswith("9a129038")
    assert manifest["model"] == "mine" and manifest["calibration"] is None
    settings = manifest["pipeline"]
    assert settings == json.loads(json.dumps(pipeline_settings(small_config)))
    assert settings["image"] == {
        "size": [64, 96],
        "resize": 0.5,
        "bottom": 0.0,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert settings["points"]["range"] == [-16.0, -12.0, -5.0, 16.0, 12.0, 3.0]


def test_the_same_detector_gives_the_same_bytes(tmp_path, exported_fp32, small_config, small_cameras, make_detector):
    export_parts(make_detector(small_config), tmp_path / "again", ExportOptions("fp32"))
    for file in exported_fp32.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_lss_transform_has_no_depth_input_and_no_downsampling_no_vtransform(
    tmp_path, small_config, small_cameras, make_detector
):
    transform = small_config["model"]["encoders"]["camera"]["vtransform"]
    transform |= {"type": "LSSTransform", "downsample": 1}
    small_config["model"]["heads"]["object"]["bbox_coder"]["out_size_factor"] = 4
    manifest = export_parts(make_detector(small_config), tmp_path / "out", ExportOptions("fp32"))
    assert list(manifest["parts"]) == ["camera.backbone", "fuser", "head.bbox"]
    assert list(manifest["parts"]["camera.backbone"]["inputs"]) == ["img"]
    assert manifest["parts"]["fuser"]["inputs"]["camera"]["shape"] == [1, 10, 32, 24]
    assert manifest["pipeline"]["depth_input"] is False


def test_deconvolutions_take_in_their_batch_norms(tmp_path, small_config, small_cameras, make_detector):
    small_config["model"]["decoder"] = {
        "backbone": {
            "type": "SECOND",
            "in_channels": 10,
            "out_channels": [12, 24],
            "layer_nums": [1, 1],
            "layer_strides": [1, 2],
        },
        "neck": {
            "type": "SECONDFPN",
            "in_channels": [12, 24],
            "out_channels": [12, 12],
            "upsample_strides": [1, 2],
            "use_conv_for_no_stride": True,
        },
    }
    manifest = export_parts(make_detector(small_config), tmp_path / "out", ExportOptions("fp32"))
    operators = manifest["parts"]["fuser"]["operators"]
    assert operators["ConvTranspose"] == 1 and "BatchNormalization" not in operators
    assert manifest["verification"]["passed"]


def test_a_float_detector_cannot_be_exported_to_int8(tmp_path, small_config, small_cameras, make_detector):
    with refused("found a float detector", "expected a calibrated one", "run calibrate first"):
        export_parts(make_detector(small_config), tmp_path / "out", ExportOptions("int8"))
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_the_previous_folder(
    tmp_path, exported_fp32, small_config, small_cameras, make_detector, monkeypatch
):
    shutil.copytree(exported_fp32, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("qat.export.verify.verify_part", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_parts(make_detector(small_config), tmp_path / "out", ExportOptions("fp16"))
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_verification_fails_on_a_graph_with_other_weights(
    tmp_path, small_config, small_cameras, make_detector, monkeypatch
):
    import qat.export.parts as parts

    simplify = parts.simplify

    def tampered(model, name, **more):
        model = simplify(model, name, **more)
        if name == "fuser":
            weight = next(i for i in model.graph.initializer if len(i.dims) == 4)
            values = onnx.numpy_helper.to_array(weight) * np.float32(1.01)
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return model

    monkeypatch.setattr(parts, "simplify", tampered)
    manifest = export_parts(make_detector(small_config), tmp_path / "out", ExportOptions("fp32"))
    assert not manifest["verification"]["passed"]
    assert not manifest["parts"]["fuser"]["verification"]["middle"]["passed"]
    assert manifest["parts"]["head.bbox"]["verification"]["heatmap_0"]["passed"]


def test_torch_parts_equal_the_detectors_own_forward(small_config, make_detector):
    detector = make_detector(small_config)
    parts = torch_parts(detector)
    torch.manual_seed(1)
    img, depth, bev = torch.randn(1, 3, 3, 64, 96), torch.rand(1, 3, 1, 64, 96) * 10, torch.randn(1, 10, 32, 24)
    with torch.inference_mode():
        weights, context = detector.lift(img, depth)
        expected = detector.bev_head(bev)
    lifted = parts["camera.backbone"].run({"img": img.numpy(), "depth": depth.numpy()})
    np.testing.assert_array_equal(lifted["camera_depth_weights"], weights.numpy())
    np.testing.assert_array_equal(lifted["camera_feature"].transpose(0, 3, 1, 2), context.numpy())
    camera = parts["camera.vtransform"].run({"feat_in": bev.numpy()})["feat_out"]
    maps = parts["head.bbox"].run(parts["fuser"].run({"camera": camera}))
    assert len(maps) == sum(len(task) for task in expected)
    for name, value in maps.items():
        stem, task = name.rsplit("_", 1)
        np.testing.assert_array_equal(value, expected[int(task)][stem].numpy())
