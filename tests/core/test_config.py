"""Configs that cannot be built are refused by name, in one line."""

import copy

import pytest
import yaml

from qat.core.errors import UserError
from qat.families.bevfusion.config import camera_branch, check_config, is_camera_branch, load_config, need_boxes

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
        (f"{CAMERA}.backbone.type", "DLA", "'DLA', expected one of ResNet, SwinTransformer, timm"),
        (f"{CAMERA}.backbone.type", "SwinTransformer", "backbone.depth: found 18, expected no such option"),
        (f"{CAMERA}.backbone.dcn", {"type": "DCNv2"}, "backbone.dcn: found {'type': 'DCNv2'}, expected null"),
        (f"{CAMERA}.backbone.style", "caffe", "'caffe', expected 'pytorch'"),
        (f"{CAMERA}.backbone.avg_down", True, "backbone.avg_down: found True"),
        (f"{CAMERA}.neck.act_cfg", {"type": "GELU"}, "neck.act_cfg: found {'type': 'GELU'}"),
        (f"{CAMERA}.neck.norm_cfg", {"type": "GN", "num_groups": 8}, "expected batch norm with eps 1e-5"),
        (f"{CAMERA}.neck.norm_cfg", {"type": "BN", "eps": 1e-3}, "expected batch norm with eps 1e-5"),
        (f"{CAMERA}.neck.end_level", 1, "neck.end_level: found 1, expected -1"),
        (f"{CAMERA}.neck.extra_convs", True, "no such option: GeneralizedLSSFPN has act_cfg,"),
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
        ("model.heads.object.test_cfg.nms_type", "soft", "circle or rotate"),
        ("model.heads.object.tasks", [["car"]], "object_classes in their order"),
        ("model.heads.object.test_cfg.nms_type", ["rotate"], "a list of 3, one for each task"),
        ("model.heads.object.test_cfg.min_radius", [4.0], "a list of 3, one for each task"),
        ("model.heads.object.test_cfg.nms_thr", None, "nms_thr: found null"),
        ("model.heads.object.test_cfg.nms_scale", [[1.0], [1.0], [1.0]], "a factor for each of"),
        ("model.heads.object.separate_head.type", "DCNSeparateHead", "'DCNSeparateHead', expected one of SeparateHead"),
        ("model.heads.object.separate_head.groups", 2, "no such option: SeparateHead"),
        ("model.heads.object.common_heads.iou", [1, 2], "reg (2), height (1), dim (3), rot (2), vel (2) channels"),
        ("model.heads.object.bbox_coder.max_num", None, "max_num: found null"),
        ("model.heads.object.bbox_coder.post_center_range", [1, 2], "6 numbers"),
        ("model.decoder.neck.extra_upsample", 2, "no such option: LSSFPN"),
        ("model.decoder.backbone", None, "model.decoder.backbone.type: missing"),
        ("image_size", "big", "2 whole numbers"),
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


@pytest.mark.parametrize(
    ("option", "value"), [("add_depth_features", True), ("height_expand", True), ("use_points", "radar")]
)
def test_how_a_depth_map_is_made_is_nothing_to_a_transform_without_one(tiny_config, option, value):
    config = put(tiny_config, f"{CAMERA}.vtransform.{option}", value)
    with pytest.raises(UserError, match=option):
        check_config(config)
    check_config(put(config, f"{CAMERA}.vtransform.type", "LSSTransform"))


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


def test_the_camera_branch_is_taken_out_of_a_camera_and_lidar_models_config(fusion_config, tiny_config, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(fusion_config))
    branch = load_config(tmp_path / "c.yaml", branch="camera")
    camera = tiny_config["model"]["encoders"]["camera"]
    assert branch["model"] == {"encoders": {"camera": camera}, "decoder": None, "heads": None}
    assert branch["data"] == {"test": {"pipeline": tiny_config["data"]["test"]["pipeline"]}}
    assert branch["image_size"] == [64, 96] and "object_classes" not in branch
    assert is_camera_branch(branch) and not is_camera_branch(fusion_config)
    check_config(branch)  # it is a config of its own, which needs no telling
    assert camera_branch(branch) == branch


def test_a_whole_camera_and_lidar_config_is_refused_with_the_flag_that_mends_it(fusion_config):
    with pytest.raises(UserError, match=r"encoders\.lidar: found .*--prefix encoders\.camera"):
        check_config(fusion_config)


def test_outside_the_camera_branch_nothing_is_looked_at(fusion_config):
    config = put(fusion_config, "model", {"encoders": fusion_config["model"]["encoders"]})
    config = put(config, "model.encoders.lidar", {"voxelize": "${voxels}"})
    config = {**config, "object_classes": "${classes}", "point_cloud_range": None, "data": "${data}"}
    config["test_pipeline"] = fusion_config["data"]["test"]["pipeline"]  # an undumped config's name for it
    with pytest.raises(UserError, match=r"data\.test\.pipeline: missing"):
        check_config({**config, "data": {"train": 1}, "test_pipeline": None}, branch="camera")
    config["data"] = None
    check_config(config, branch="camera")
    assert not {"object_classes", "point_cloud_range"} & camera_branch(config).keys()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{CAMERA}.neck.type", "FPN", "neck.type: found 'FPN'"),
        (f"{CAMERA}.vtransform.feature_size", [4, 6], "stride 8"),
        (f"{CAMERA}.vtransform", None, "vtransform.type: missing"),
        (f"{CAMERA}.backbone.type", "${type}", "a resolved value"),
        (CAMERA, None, f"{CAMERA}: missing"),
        ("image_size", None, "image_size: missing"),
        ("data.test.pipeline", None, "data.test.pipeline: missing"),
        (
            "data.test.pipeline",
            [{"type": "ImageAug3D", "final_dim": "${image_size}"}],
            "data.test.pipeline.0.final_dim",
        ),
    ],
)
def test_what_the_camera_branch_needs_is_checked(fusion_config, path, value, message):
    with pytest.raises(UserError) as error:
        check_config(put(fusion_config, path, value), "a.yaml", "camera")
    text = str(error.value)
    assert text.startswith("a.yaml: ") and message in text and "\n" not in text


def test_a_camera_branch_is_refused_where_boxes_are_needed(fusion_config, tiny_config):
    need_boxes(tiny_config, "--budget", "leave it out")
    with pytest.raises(UserError, match=r"--budget: found a camera branch.* no boxes, .*; leave it out$"):
        need_boxes(camera_branch(fusion_config), "--budget", "leave it out")


@pytest.mark.parametrize(
    ("step", "key", "value", "expected"),
    [
        ("ImageAug3D", "rand_rotate", True, "no such option: ImageAug3D has bot_pct_lim"),
        ("ImageAug3D", "rot_lim", [-5.4, 5.4], "0: test data is not augmented"),
        ("ImageAug3D", "is_train", True, "false"),
        ("ImageNormalize", "to_rgb", True, "no such option: ImageNormalize has mean, std"),
        ("LoadPointsFromFile", "use_dim", [0, 1, 3], "3 or more, or a list that starts with 0, 1, 2"),
        ("LoadPointsFromFile", "coord_type", "CAMERA", "LIDAR"),
        ("LoadPointsFromFile", "reduce_beams", 4, "32 or null"),
        ("LoadPointsFromMultiSweeps", "load_augmented", "pointpainting", "null"),
        ("LoadMultiViewImageFromFiles", "file_client_args", {}, "no such option: LoadMultiViewImageFromFiles has"),
        ("GlobalRotScaleTrans", "trans_lim", 0.5, "0: test data is not augmented"),
        ("PhotoMetricDistortion", "prob", 0.5, "other types are not supported"),
    ],
)
def test_every_key_of_a_test_pipelines_step_is_honoured_or_refused(tiny_config, step, key, value, expected):
    config = copy.deepcopy(tiny_config)
    steps = config["data"]["test"]["pipeline"]
    at = next((n for n, one in enumerate(steps) if one["type"] == step), None)
    if at is None:
        steps.append({"type": step})
        at = len(steps) - 1
    steps[at][key] = value
    with pytest.raises(UserError) as error:
        check_config(config)
    found = str(error.value)
    assert f"data.test.pipeline.{at}." in found and expected in found and "\n" not in found
    check_config(tiny_config)
