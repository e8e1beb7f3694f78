"""BEVFusion's config tree: inheritance by torchpack, and `${…}` read without running anything."""

import copy
import sys

import pytest
import yaml

from qat.core.errors import UserError
from qat.families.bevfusion.config import load_config
from qat.families.bevfusion.config_tree import defaults_above, resolve
from tests.messages import refused

TASKS = [["car"], ["truck", "bus"]]
CLASSES = ["car", "truck", "bus"]
# What the leaf below comes to, as a run would dump it.
DUMPED = {
    "max_epochs": 7,
    "runner": {"type": "Runner", "max_epochs": 7},
    "root": "data/street/",
    "image_size": [64, 96],
    "point_cloud_range": [-12.8, -12.8, -5.0, 12.8, 12.8, 3.0],
    "voxel_size": [0.1, 0.1, 0.4],
    "crop": {"limits": [[0.4, 0.5], [0.45, 0.45]], "mask": {"share": 0.25}},
    "object_classes": CLASSES,
    "test_pipeline": [
        {
            "type": "ImageAug3D",
            "final_dim": [64, 96],
            "resize_lim": [0.45, 0.45],
            "bot_pct_lim": [0.0, 0.25],
        },
        {"type": "ImageNormalize", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
    ],
    "data": {
        "test": {
            "ann_file": "data/street/val.pkl",
            "pipeline": [
                {
                    "type": "ImageAug3D",
                    "final_dim": [64, 96],
                    "resize_lim": [0.45, 0.45],
                    "bot_pct_lim": [0.0, 0.25],
                },
                {"type": "ImageNormalize", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
            ],
        }
    },
    "model": {
        "type": "BEVFusion",
        "encoders": {
            "lidar": None,
            "camera": {
                "backbone": {"type": "ResNet", "depth": 18, "num_stages": 4, "out_indices": [1, 2]},
                "neck": {
                    "type": "SECONDFPN",
                    "in_channels": [128, 256],
                    "out_channels": [8, 8],
                    "upsample_strides": [0.5, 1],
                },
                "vtransform": {
                    "type": "LSSTransform",
                    "in_channels": 16,
                    "out_channels": 10,
                    "image_size": [64, 96],
                    "feature_size": [4, 6],
                    "xbound": [-12.8, 12.8, 0.8],
                    "ybound": [-12.8, 12.8, 0.8],
                    "zbound": [-10.0, 10.0, 20.0],
                    "dbound": [1.0, 13.0, 1.0],
                    "downsample": 1,
                },
            },
        },
        "fuser": None,
        "decoder": {
            "backbone": {"type": "GeneralizedResNet", "in_channels": 10, "blocks": [[1, 8, 2], [1, 12, 1]]},
            "neck": {
                "type": "LSSFPN",
                "in_indices": [-1, 0],
                "in_channels": [12, 8],
                "out_channels": 12,
                "scale_factor": 2,
            },
        },
        "heads": {
            "map": None,
            "object": {
                "type": "CenterHead",
                "in_channels": 12,
                "tasks": TASKS,
                "common_heads": {"reg": [2, 2], "height": [1, 2], "dim": [3, 2], "rot": [2, 2], "vel": [2, 2]},
                "share_conv_channel": 8,
                "test_cfg": {
                    "voxel_size": [0.1, 0.1],
                    "nms_type": ["circle", "rotate"],
                    "min_radius": [4, 1],
                    "nms_thr": 0.2,
                    "pre_max_size": 100,
                    "post_max_size": 50,
                },
                "bbox_coder": {
                    "type": "CenterPointBBoxCoder",
                    "pc_range": [-12.8, -12.8, -5.0, 12.8, 12.8, 3.0],
                    "post_center_range": [-20.0, -20.0, -10.0, 20.0, 20.0, 10.0],
                    "max_num": 50,
                    "out_size_factor": 8,
                    "voxel_size": [0.1, 0.1],
                },
            },
        },
    },
}

LEAF = "configs/street/det/centerhead/lssfpn/camera/64x96/resnet/default.yaml"
# The same as BEVFusion spreads it: what many share is further up, and a file overrides what is above it.
TREE = {
    "configs/default.yaml": """
max_epochs: 20
runner: {type: Runner, max_epochs: "${max_epochs}"}
""",
    "configs/street/default.yaml": """
root: data/street/
image_size: [128, 352]
point_cloud_range: [-12.8, -12.8, -5.0, 12.8, 12.8, 3.0]
voxel_size: [0.1, 0.1, 0.4]
crop: {limits: [[0.4, 0.5], [0.45, 0.45]], mask: {share: 0.0}}
object_classes: [car, truck, bus]
test_pipeline:
  - type: ImageAug3D
    final_dim: ${image_size}
    resize_lim: ${crop.limits[1]}
    bot_pct_lim: [0.0, "${crop.mask.share}"]
  - {type: ImageNormalize, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]}
data:
  test:
    ann_file: ${root + "val.pkl"}
    pipeline: ${test_pipeline}
""",
    "configs/street/det/default.yaml": """
model: {type: BEVFusion, encoders: null, fuser: null, heads: {map: null}}
""",
    "configs/street/det/centerhead/default.yaml": """
crop: {mask: {share: 0.25}}
model:
  heads:
    object:
      type: CenterHead
      in_channels: null
      tasks: [[car], [truck, bus]]
      common_heads: {reg: [2, 2], height: [1, 2], dim: [3, 2], rot: [2, 2], vel: [2, 2]}
      share_conv_channel: 8
      test_cfg:
        {voxel_size: "${voxel_size[:2]}", nms_type: rotate, min_radius: [4, 1], nms_thr: 0.2, pre_max_size: 100, post_max_size: 50}
      bbox_coder:
        type: CenterPointBBoxCoder
        pc_range: ${point_cloud_range}
        post_center_range: [-20.0, -20.0, -10.0, 20.0, 20.0, 10.0]
        max_num: 50
        out_size_factor: 8
        voxel_size: ${voxel_size[:2]}
""",
    "configs/street/det/centerhead/lssfpn/default.yaml": """
max_epochs: 7
model:
  decoder:
    backbone: {type: GeneralizedResNet, in_channels: 336, blocks: [[2, 160, 2], [2, 320, 2], [2, 640, 1]]}
    neck: {type: LSSFPN, in_indices: [-1, 0], in_channels: [640, 160], out_channels: 12, scale_factor: 2}
  heads: {object: {in_channels: 12}}
""",
    "configs/street/det/centerhead/lssfpn/camera/default.yaml": """
model:
  encoders:
    lidar: null
    camera:
      vtransform:
        type: LSSTransform
        image_size: ${image_size}
        xbound: [-12.8, 12.8, 0.8]
        ybound: [-12.8, 12.8, 0.8]
        zbound: [-10.0, 10.0, 20.0]
        dbound: [1.0, 13.0, 1.0]
  heads: {object: {test_cfg: {nms_type: [circle, rotate]}}}
""",
    "configs/street/det/centerhead/lssfpn/camera/64x96/default.yaml": "image_size: [64, 96]",
    LEAF: """
model:
  encoders:
    camera:
      backbone: {type: ResNet, depth: 18, num_stages: 4, out_indices: [1, 2]}
      neck: {type: SECONDFPN, in_channels: [128, 256], out_channels: [8, 8], upsample_strides: [0.5, 1]}
      vtransform:
        in_channels: 16
        out_channels: 10
        feature_size: "${[image_size[0] // 16, image_size[1] // 16]}"
        downsample: 1
  decoder:
    backbone: {in_channels: 10, blocks: [[1, 8, 2], [1, 12, 1]]}
    neck: {in_channels: [12, 8]}
""",
}


@pytest.fixture
def tree(tmp_path):
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_leaf_of_the_tree_comes_to_what_its_run_dumps(tree):
    pytest.importorskip("torchpack.utils.config")
    (tree / "configs.yaml").write_text(yaml.safe_dump(DUMPED))
    assert load_config(tree / LEAF) == load_config(tree / "configs.yaml") == DUMPED


def test_a_default_that_is_no_mapping_is_told_by_its_own_name(tree):
    (tree / "configs/street/det/default.yaml").write_text("- 1")
    with pytest.raises(UserError, match=r"street/det/default\.yaml: found list"):
        load_config(tree / LEAF)


def test_without_torchpack_the_error_names_the_extra_and_the_dumped_file(tree, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchpack.utils.config", None)
    with pytest.raises(
        UserError, match=r"pip install 'bevqat\[bevfusion\]', or give the run's dumped configs\.yaml"
    ) as error:
        load_config(tree / LEAF)
    assert str(error.value).startswith(str(tree / LEAF)) and "\n" not in str(error.value)


def test_a_dumped_config_inherits_nothing(tree):
    (tree / "configs/run").mkdir()
    (tree / "configs/run/configs.yaml").write_text(yaml.safe_dump(DUMPED))
    assert defaults_above(tree / "configs/run/configs.yaml")
    assert load_config(tree / "configs/run/configs.yaml") == DUMPED


def test_a_file_by_itself_may_have_expressions_too(tmp_path):
    config = copy.deepcopy(DUMPED)
    config["model"]["encoders"]["camera"]["vtransform"]["feature_size"] = "${[size // 16 for_each]}"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    with refused("c.yaml: model.encoders.camera.vtransform.feature_size:", "not an expression"):
        load_config(tmp_path / "c.yaml")
    config["model"]["encoders"]["camera"]["vtransform"]["feature_size"] = (
        "${[image_size[0] // 16, image_size[1] // 16]}"
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert load_config(tmp_path / "c.yaml") == DUMPED


VALUES = {
    "n": 3,
    "x": 0.5,
    "size": [64, 96, 128],
    "name": "a/",
    "deep": {"er": {"list": [1, [2, 3]]}},
    "same": "${size}",
}


@pytest.mark.parametrize(
    "expression",
    [
        "n", "size", "size[:2]", "size[-1]", "size[::2]", "size[n - 2]", "deep.er.list[1][0]", "deep['er']", "name + 'b'",
        "size + [n]", "[size[0] // 8, size[1] // 8]", "-n * (2 + x) / 4 % 3", "(n, x)", "[True, None, 'none']", "3 - -n",
    ],
)  # fmt: skip
def test_an_expression_has_pythons_value(expression):
    class Keys(dict):
        __getattr__ = dict.__getitem__

    names = {k: v for k, v in VALUES.items() if k != "same"}
    names["deep"] = Keys(er=Keys(VALUES["deep"]["er"]))
    expected = eval(expression, {}, names)
    found = resolve({**VALUES, "y": {"z": ["${" + expression + "}"]}}, "c.yaml")["y"]["z"][0]
    assert found == (list(expected) if isinstance(expected, tuple) else expected)


def test_what_an_expression_names_may_be_one_itself():
    found = resolve({**VALUES, "a": "${same[1]}", "b": {"c": "${a + 1}"}, "d": ["${b}"], "e": "${ d }"}, "c.yaml")
    assert found["a"] == 96 and found["e"] == [{"c": 97}] and found["same"] == [64, 96, 128]
    assert resolve({"a": "from ${n}", "n": 1}, "c.yaml")["a"] == "from ${n}"  # BEVFusion leaves it too


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("__import__('os').system('true')", "is not supported"),
        ("open('x', 'w')", "is not supported"),
        ("size.__class__", "there is no key '__class__'"),
        ("().__class__", "there is no key '__class__'"),
        ("[i for i in size]", "is not supported"),
        ("(lambda: 0)()", "is not supported"),
        ("f'{n}'", "is not supported"),
        ("n ** 9", "is not supported"),
        ("b'x'", "is not supported"),
        ("name * 1000000000", "'a/' is not a number"),
        ("[0] * 1000000000", "[0] is not a number"),
        ("'%9999999d' % n", "is not a number"),
        ("n // 0", "ZeroDivisionError"),
        ("size[7]", "IndexError"),
        ("size['a']", "TypeError"),
        ("n[0]", "TypeError"),
        ("deep.size", "there is no key 'size'"),
        ("sizes", "there is no key 'sizes'"),
        ("n +", "not an expression"),
        ("n}${x", "not an expression"),
        ("-" * 2000 + "n", "at most 1000 characters"),
        ("(" * 400 + "n" + ")" * 400, "not an expression"),
        ("here", "refers to itself, ${here} → ${here}"),
    ],
)
def test_what_is_no_plain_expression_is_refused_and_not_run(expression, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        resolve({**VALUES, "here": "${" + expression + "}"}, "c.yaml")
    text = str(error.value)
    assert text.startswith("c.yaml: here: found ") and message in text and "\n" not in text
    assert not list(tmp_path.iterdir())


def test_a_circle_through_containers_is_found():
    with pytest.raises(UserError, match=r"refers to itself, \$\{b\} → \$\{a\} → \$\{b\}"):
        resolve({"a": {"x": ["${b}"]}, "b": "${a}"}, "c.yaml")
