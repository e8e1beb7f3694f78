"""Configs with unknown types, missing fields, values of another kind, and networks that do not fit each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

CAMERA, DECODER, HEAD = "model.encoders.camera", "model.decoder", "model.heads.object"
STEPS = "data.test.pipeline"
REMOVE = object()


def _put(config: dict, path: str, value: Any) -> dict:
    *keys, last = path.split(".")
    at: Any = config
    for key in keys:
        at = at[int(key)] if isinstance(at, list) else at[key]
    if value is REMOVE:
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    return config


VALUES = [
    (f"{CAMERA}.backbone.type", "VoVNet", "found 'VoVNet', expected one of ResNet, SwinTransformer, timm"),
    (f"{CAMERA}.neck.type", "PAFPN", "found 'PAFPN', expected one of GeneralizedLSSFPN, SECONDFPN"),
    (f"{CAMERA}.vtransform.type", "BEVDepth", "found 'BEVDepth', expected one of LSSTransform, DepthLSSTransform"),
    (f"{DECODER}.backbone.type", "ResNeXt", "found 'ResNeXt', expected one of GeneralizedResNet, SECOND"),
    (f"{HEAD}.type", "TransFusionHead", "found 'TransFusionHead', expected one of CenterHead"),
    (f"{CAMERA}.backbone.model_name", REMOVE, "missing, expected a name"),
    (f"{CAMERA}.backbone.model_name", 3, "found 3, expected a name"),
    (f"{CAMERA}.backbone.model_name", "resnetz99", "expected a timm model"),
    (f"{CAMERA}.backbone.out_indices", [3, 2], "found [3, 2], expected indices of stages, from 0, in ascending order"),
    (f"{CAMERA}.backbone.out_indices", [2, 9], "expected a timm model that has them"),
    (f"{CAMERA}.neck", REMOVE, "missing"),
    (f"{CAMERA}.neck.in_channels", "wide", "found 'wide', expected a list of 2 or more whole numbers"),
    (f"{CAMERA}.neck.in_channels", [48, 100], "expected the channels of the backbone's maps, [48, 192]"),
    (f"{CAMERA}.neck.out_channels", -4, "found -4, expected a whole number from 1"),
    (f"{CAMERA}.neck.upsample_cfg", None, "found null, expected mode nearest or bilinear"),
    (
        f"{CAMERA}.neck.norm_cfg",
        {"eps": None},
        "found {'eps': None}, expected batch norm with eps 1e-5, or null for none",
    ),
    (f"{CAMERA}.vtransform.in_channels", 99, "found 99, expected the neck's 16 channels"),
    (f"{CAMERA}.vtransform.downsample", 3, "found 3, expected 1 or 2"),
    (f"{CAMERA}.vtransform.feature_size", [8, 11], "expected image_size [64, 96] divided by one whole stride"),
    (f"{CAMERA}.vtransform.feature_size", [0, 0], "found [0, 0], expected 2 whole numbers"),
    (f"{CAMERA}.vtransform.feature_size", [float("nan"), 12], "expected 2 whole numbers"),
    (f"{CAMERA}.vtransform.xbound", [-16.0, 16.0, 0.7], "[lower, upper, step] with a whole number of steps between"),
    (f"{CAMERA}.vtransform.ybound", [-12.0, 12.0, 5.0], "[lower, upper, step] with a whole number of steps between"),
    (f"{CAMERA}.vtransform.dbound", [1.0, 13.0, 5.0], "[lower, upper, step] with a whole number of steps between"),
    (f"{CAMERA}.vtransform.dbound", [-5.0, 7.0, 1.0], "expected depths above 0, in front of the camera"),
    (f"{CAMERA}.vtransform.xbound", [-15.0, 16.0, 1.0], "expected a number of steps divisible by downsample, 2"),
    (f"{CAMERA}.vtransform.xbound", [-1e5, 1e5, 1.0], "expected at most 4,096 steps"),
    (f"{CAMERA}.vtransform.xbound", [-16.0, float("inf"), 1.0], "expected 3 numbers"),
    (f"{CAMERA}.vtransform.zbound", [-10.0, 10.0, 5.0], "expected one step: downsample accepts 10 channels"),
    (f"{DECODER}.backbone.in_channels", 11, "found 11, expected the view transform's 10 channels"),
    (f"{DECODER}.backbone.blocks", [[1, 12]], "found [[1, 12]], expected a list of [layers"),
    (f"{DECODER}.backbone.blocks", [[1, 12, 0], [1, 24, 2]], "expected a list of [layers"),
    (f"{DECODER}.neck.in_indices", [-1, 7], "expected indices of the backbone's 2 stages"),
    (f"{DECODER}.neck.in_channels", [24, 13], "expected the channels of the backbone's maps, [24, 12]"),
    (f"{HEAD}.in_channels", 25, "found 25, expected the decoder's 24 channels"),
    (f"{HEAD}.bbox_coder.out_size_factor", 4, "expected 8: the head's cells are 2 m along x, voxel_size is 0.25 m"),
    (f"{HEAD}.bbox_coder.pc_range", [-1.0, -1.0], "expected to start where xbound starts, at -16"),
    (f"{HEAD}.bbox_coder", "coder", "found 'coder', expected a section of keys and values"),
    (f"{HEAD}.bbox_coder.max_num", "all", "found 'all', expected a whole number"),
    (f"{HEAD}.test_cfg.nms_thr", float("nan"), "found nan, expected a number, 0 or more"),
    (f"{HEAD}.test_cfg.nms_type", "soft", "found 'soft', expected circle or rotate"),
    (f"{HEAD}.tasks", 3, "found 3, expected a list of class names"),
    (f"{HEAD}.common_heads.dim", 3, "found 3, expected [channels, convolutions]"),
    (f"{HEAD}.separate_head.final_kernel", 2, "found 2, expected an odd number"),
    ("object_classes", ["car", "car"], "expected a list of classes, each once"),
    ("model.encoders", [1], "found [1], expected a section of keys and values"),
    ("model", REMOVE, "missing"),
    ("image_size", [63, 96], "the same as image_size"),
    ("point_cloud_range", [1, 2], "6 numbers"),
    (STEPS, REMOVE, "missing"),
    (STEPS, "all", "found 'all', expected a list of steps, each with a type"),
    (f"{STEPS}.0.final_dim", REMOVE, "missing, expected 2 whole numbers"),
    (f"{STEPS}.0.final_dim", [32, 48], "found [32, 48], expected image_size [64, 96]"),
    (f"{STEPS}.0.resize_lim", [0, 0], "expected one or two numbers above 0"),
    (f"{STEPS}.1.type", "Dance", "found 'Dance', expected one of LoadMultiViewImageFromFiles,"),
    (f"{STEPS}.2.std", [0, 0, 0], "found [0, 0, 0], expected 3 numbers above 0"),
    (f"{STEPS}.2.mean", [1, 2], "found [1, 2], expected 3 numbers"),
    ("load_dim", 3, "found 3, expected a whole number from 5"),
]


@pytest.mark.parametrize(("path", "value", "words"), VALUES, ids=[f"{path}={str(v)[:12]}" for path, v, _ in VALUES])
def test_a_value_that_makes_no_network(path, value, words, work, bad_config, refused):
    (work / "bad.yaml").write_text(yaml.safe_dump(_put(bad_config(), path, value)))
    common = ["--config", "bad.yaml", "--data", "data"]
    line = refused(["calibrate", *common, "--ckpt", "float.pth", "--out", "ptq.pth"], words)
    assert "bad.yaml" in line or "config: " in line
    where = path.removesuffix(".model_name").removesuffix(".out_indices").removesuffix(".type")
    assert any(name in line for name in (where, where.rpartition(".")[2], "ImageAug3D", STEPS))


def test_an_image_size_that_no_stride_divides(work, bad_config, refused):
    config = _put(_put(bad_config(), "image_size", [68, 100]), f"{CAMERA}.vtransform.image_size", [68, 100])
    (work / "bad.yaml").write_text(yaml.safe_dump(config))
    words = "feature_size: found [8, 12], expected image_size [68, 100] divided by one whole stride"
    refused(["calibrate", "--config", "bad.yaml", "--ckpt", "float.pth", "--data", "data"], "bad.yaml", words)


def test_a_stride_that_the_backbone_has_not(work, bad_config, refused):
    """Of ResNet and Swin the config tells it; of timm's networks timm does."""
    config = bad_config()
    camera = config["model"]["encoders"]["camera"]
    camera["backbone"]["out_indices"], camera["neck"]["in_channels"] = [1, 2], [32, 48]
    (work / "timm.yaml").write_text(yaml.safe_dump(config))
    camera["backbone"] = {"type": "ResNet", "depth": 18, "out_indices": [2, 3]}
    camera["neck"]["in_channels"] = [256, 512]
    (work / "resnet.yaml").write_text(yaml.safe_dump(config))
    for name, found in (("timm.yaml", ""), ("resnet.yaml", "expected image_size [64, 96] at the neck's stride 16")):
        arguments = ["calibrate", "--config", name, "--ckpt", "float.pth", "--data", "data", "--out", "ptq.pth"]
        refused(arguments, found or "expected")


FILES = {
    "missing": (None, "cannot be read: No such file"),
    "empty": (b"", "found NoneType, expected a mapping with BEVFusion's keys"),
    "list": (b"[1, 2]", "found list, expected a mapping"),
    "syntax": (b"model: [1, 2\nfoo: }", "not valid YAML"),
    "tag": (b'!!python/object/apply:os.system ["touch canary"]', "could not determine a constructor"),
    "bytes": (bytes(range(128, 256)), "cannot be read"),
    "within itself": (b"model: &a\n  encoders: *a\n", "check its anchors"),
    "without end": (
        b"a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 10)) for c in range(98, 107)),
        "check its anchors",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_config(kind, work, refused):
    content, words = FILES[kind]
    if content is not None:
        (work / "bad.yaml").write_bytes(content)
    for verb in (
        ["calibrate", "--ckpt", "float.pth", "--data", "data", "--out", "ptq.pth"],
        ["export-camera", "--ckpt", "float.pth", "--data", "data", "--out", "onnx"],
        ["train", "--data", "data:calib", "--out", "trained"],
        ["show", "--data", "data", "--out", "sheet.png"],
        ["compare", "--ckpt", "float.pth", "--fp32", "fp32", "--data", "data", "--out", "compared"],
    ):
        refused([*verb, "--config", "bad.yaml"], "bad.yaml", words)
    assert not Path("canary").exists()


def test_a_config_of_another_network(work, bad_config, refused):
    """Its own sizes fit; the checkpoint's are others."""
    config = bad_config()
    config["model"]["decoder"]["neck"]["out_channels"] = config["model"]["heads"]["object"]["in_channels"] = 12
    (work / "bad.yaml").write_text(yaml.safe_dump(config))
    for verb in ("calibrate", "export-camera"):
        arguments = [verb, "--config", "bad.yaml", "--ckpt", "float.pth", "--data", "data", "--out", "x"]
        refused(
            arguments, "float.pth: decoder.neck.fuse.0.weight", "use the config that the checkpoint was trained with"
        )


def test_training_needs_its_own_sections(work, bad_config, refused):
    config = bad_config()
    del config["model"]["heads"]["object"]["train_cfg"]
    (work / "bad.yaml").write_text(yaml.safe_dump(config))
    arguments = ["train", "--config", "bad.yaml", "--data", "data:calib", "--steps", "1", "--out", "trained"]
    refused(arguments, f"bad.yaml: {HEAD}.train_cfg.point_cloud_range: missing, expected 6 numbers")
