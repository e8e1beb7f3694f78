"""Configs that cannot be built are refused by name, in one line."""

import copy

import pytest
import yaml

from qat.core.config import check_config, load_config
from qat.core.errors import UserError

CAMERA = "model.encoders.camera"


def put(config, path, value):
    out = copy.deepcopy(config)
    *parents, last = path.split(".")
    target = out
    for key in parents:
        target = target[key]
    target[last] = value
    return out


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{CAMERA}.backbone.type", "SwinTransformer", "'SwinTransformer', expected one of ResNet, timm"),
        (f"{CAMERA}.backbone.dcn", {"type": "DCNv2"}, "deformable"),
        (f"{CAMERA}.neck.type", "FPN", "GeneralizedLSSFPN"),
        (f"{CAMERA}.vtransform.type", "AwareBEVDepth", "AwareBEVDepth"),
        (f"{CAMERA}.vtransform.depth_input", "one-hot", "'one-hot', expected 'scalar'"),
        (f"{CAMERA}.vtransform.height_expand", True, "height_expand: found True, expected False"),
        (f"{CAMERA}.vtransform.add_depth_features", True, "add_depth_features"),
        (f"{CAMERA}.vtransform.use_points", "radar", "'radar'"),
        (f"{CAMERA}.vtransform.downsample", 4, "downsample: found 4"),
        (f"{CAMERA}.vtransform.xbound", [-12.8, 12.8, 0.7], "whole number of steps"),
        (f"{CAMERA}.vtransform.dbound", [1.0, 60.0], "3 numbers"),
        (f"{CAMERA}.vtransform.image_size", [128, 352], "the same as image_size"),
        (f"{CAMERA}.vtransform.feature_size", [7, 12], "one whole stride"),
        (f"{CAMERA}.vtransform.feature_size", [4, 6], "stride 8"),
        ("model.encoders.lidar", {"voxelize": {}}, "only the camera branch"),
        ("model.heads.map", {"type": "BEVSegmentationHead"}, "only object detection"),
        ("model.fuser", {"type": "ConvFuser"}, "model.fuser"),
        ("model.heads.object.type", "TransFusionHead", "expected one of CenterHead"),
        ("model.heads.object.test_cfg.nms_type", ["soft"], "circle or rotate"),
        ("model.heads.object.tasks", [["car"]], "object_classes in their order"),
        ("model.decoder.backbone", None, "model.decoder.backbone.type: missing"),
        ("image_size", "big", "2 numbers"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tiny_config, path, value, message):
    with pytest.raises(UserError) as error:
        check_config(put(tiny_config, path, value), "a.yaml")
    text = str(error.value)
    assert text.startswith("a.yaml: ") and message in text and "\n" not in text


def test_an_unresolved_config_asks_for_the_dumped_one(tiny_config):
    with pytest.raises(UserError, match=r"\$\{image_size\}.*dumped configs.yaml"):
        check_config(put(tiny_config, f"{CAMERA}.vtransform.image_size", "${image_size}"))


def test_a_good_config_survives_the_file(tiny_config, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config))
    assert load_config(tmp_path / "c.yaml") == tiny_config


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "expected a mapping"), ("", "expected a mapping")]
)
def test_a_file_that_is_no_config_is_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
