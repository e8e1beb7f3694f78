"""The whole detector, its names, and its checkpoints."""

import copy
import pickle

import numpy as np
import pytest
import torch

from qat.checkpoints.reading import load_checkpoint
from qat.core.errors import UserError
from qat.families.bevfusion.detector import build_model
from qat.families.bevfusion.networks.backbone import build_backbone
from qat.families.bevfusion.state import load_float_model, load_state
from tests.messages import refused


def run(model, frames):
    stack = [
        np.stack([getattr(f, name) for f in frames])
        for name in ("camera_intrinsics", "camera2lidar", "img_aug_matrix", "lidar_aug_matrix")
    ]
    img, depth = (torch.from_numpy(np.stack([getattr(f, name) for f in frames])) for name in ("img", "depth"))
    with torch.inference_mode():
        return model(img, depth, model.patterns(*stack))


def test_a_batch_gives_what_its_samples_give_alone(tiny_model, tiny_frames):
    together = run(tiny_model, tiny_frames[:2])
    for i in range(2):
        alone = run(tiny_model, tiny_frames[i : i + 1])
        for a, b in zip(together, alone, strict=True):
            for name in a:
                assert torch.allclose(a[name][i], b[name][0], atol=1e-4)


def test_the_heads_maps_lie_on_the_bev_grid_x_first(tiny_model, tiny_frames):
    maps = run(tiny_model, tiny_frames[:1])
    assert len(maps) == 3
    assert maps[0]["heatmap"].shape == (1, 5, 16, 16) and maps[2]["vel"].shape == (1, 2, 16, 16)


def test_names_are_bevfusions():
    """BEVFusion's nuscenes/det/centerhead/lssfpn/camera/256x704/resnet config, names written from its modules."""
    tasks = [
        ["car"],
        ["truck", "construction_vehicle"],
        ["bus", "trailer"],
        ["barrier"],
        ["motorcycle", "bicycle"],
        ["pedestrian", "traffic_cone"],
    ]
    camera = {
        "backbone": {"type": "ResNet", "depth": 50, "out_indices": [0, 1, 2, 3]},
        "neck": {
            "type": "SECONDFPN",
            "in_channels": [256, 512, 1024, 2048],
            "out_channels": [128] * 4,
            "upsample_strides": [0.25, 0.5, 1, 2],
        },
        "vtransform": {
            "type": "LSSTransform", "in_channels": 512, "out_channels": 64, "image_size": [256, 704], "feature_size": [16, 44],
            "xbound": [-51.2, 51.2, 0.8], "ybound": [-51.2, 51.2, 0.8], "zbound": [-10.0, 10.0, 20.0], "dbound": [1.0, 60.0, 1.0], "downsample": 1,
        },
    }  # fmt: skip
    config = {
        "image_size": [256, 704],
        "point_cloud_range": [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0],
        "object_classes": [name for task in tasks for name in task],
        "model": {
            "encoders": {"lidar": None, "camera": camera},
            "decoder": {
                "backbone": {"type": "GeneralizedResNet", "in_channels": 64, "blocks": [[2, 128, 2], [2, 256, 2], [2, 512, 1]]},
                "neck": {"type": "LSSFPN", "in_indices": [-1, 0], "in_channels": [512, 128], "out_channels": 256, "scale_factor": 2},
            },
            "heads": {
                "object": {
                    "type": "CenterHead", "in_channels": 256, "tasks": tasks, "share_conv_channel": 64,
                    "common_heads": {"reg": [2, 2], "height": [1, 2], "dim": [3, 2], "rot": [2, 2], "vel": [2, 2]},
                    "separate_head": {"type": "SeparateHead", "init_bias": -2.19, "final_kernel": 3},
                    "test_cfg": {"nms_type": "rotate", "nms_thr": 0.2, "pre_max_size": 1000, "post_max_size": 83},
                    "bbox_coder": {
                        "type": "CenterPointBBoxCoder", "pc_range": [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0], "max_num": 500,
                        "post_center_range": [-61.2, -61.2, -10.0, 61.2, 61.2, 10.0], "out_size_factor": 8, "voxel_size": [0.1, 0.1],
                    },
                }
            },
        },
    }  # fmt: skip
    state = build_model(config).state_dict()
    expected = {
        "encoders.camera.backbone.conv1.weight": (64, 3, 7, 7),
        "encoders.camera.backbone.layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "encoders.camera.backbone.layer4.2.bn3.running_var": (2048,),
        "encoders.camera.neck.deblocks.0.0.weight": (128, 256, 4, 4),
        "encoders.camera.neck.deblocks.2.0.weight": (1024, 128, 1, 1),
        "encoders.camera.neck.deblocks.3.0.weight": (2048, 128, 2, 2),
        "encoders.camera.neck.deblocks.3.1.num_batches_tracked": (),
        "encoders.camera.vtransform.dx": (3,),
        "encoders.camera.vtransform.nx": (3,),
        "encoders.camera.vtransform.frustum": (59, 16, 44, 3),
        "encoders.camera.vtransform.depthnet.weight": (123, 512, 1, 1),
        "encoders.camera.vtransform.depthnet.bias": (123,),
        "decoder.backbone.0.0.conv1.weight": (128, 64, 3, 3),
        "decoder.backbone.2.0.downsample.0.weight": (512, 256, 1, 1),
        "decoder.neck.fuse.0.weight": (256, 640, 1, 1),
        "decoder.neck.upsample.1.weight": (256, 256, 3, 3),
        "heads.object.shared_conv.conv.weight": (64, 256, 3, 3),
        "heads.object.shared_conv.bn.running_mean": (64,),
        "heads.object.task_heads.5.vel.0.conv.weight": (64, 64, 3, 3),
        "heads.object.task_heads.5.heatmap.1.weight": (2, 64, 3, 3),
    }
    for name, shape in expected.items():
        assert tuple(state[name].shape) == shape, name
    assert "heads.object.shared_conv.conv.bias" not in state
    groups = {".".join(name.split(".")[:3]) for name in state}
    assert {g for g in groups if g.startswith("encoders")} == {
        f"encoders.camera.{x}" for x in ("backbone", "neck", "vtransform")
    }


def test_a_stage_after_the_last_output_is_not_built():
    names = build_backbone({"type": "timm", "model_name": "resnet18", "out_indices": [2, 3]}).state_dict()
    assert any(name.startswith("layer3") for name in names) and not any(name.startswith("layer4") for name in names)


def test_an_unknown_backbone_is_named():
    with pytest.raises(UserError, match="resnet19"):
        build_backbone({"type": "timm", "model_name": "resnet19", "out_indices": [2]})


def test_a_saved_model_reloads_equal(tiny_model, tiny_config, tmp_path):
    for value in ({"state_dict": tiny_model.state_dict(), "meta": {"x": 1}}, tiny_model.state_dict()):
        torch.save(value, tmp_path / "m.pth")
        again = load_float_model(tiny_config, tmp_path / "m.pth")
        assert all(
            torch.equal(a, b)
            for a, b in zip(again.state_dict().values(), tiny_model.state_dict().values(), strict=True)
        )


def test_missing_and_unexpected_names_are_grouped(tiny_model):
    state = copy.copy(tiny_model.state_dict())
    del state["decoder.neck.fuse.0.weight"], state["decoder.neck.fuse.3.weight"]
    state["encoders.lidar.backbone.x"] = torch.zeros(1)
    state["encoders.camera.backbone.fc.weight"] = torch.zeros(1)  # a classifier does no harm
    with refused("missing decoder.neck.fuse.* (2)", "unexpected encoders.lidar.backbone.* (1)"):
        load_state(tiny_model, state, "x.pth")


def test_another_shape_is_named(tiny_model):
    state = dict(tiny_model.state_dict())
    state["decoder.neck.fuse.0.weight"] = torch.zeros(3, 3, 1, 1)
    with refused("decoder.neck.fuse.0.weight", "found shape [3, 3, 1, 1]"):
        load_state(tiny_model, state, "x.pth")


def test_a_checkpoint_of_another_grid_is_refused(tiny_model):
    """Its tensors have the same shapes, but its features belong in other places."""
    state = dict(tiny_model.state_dict())
    state["encoders.camera.vtransform.dx"] = torch.tensor([0.6, 0.6, 20.0])
    with refused("vtransform.dx", "found [0.6, 0.6, 20], the config's bounds make [0.8, 0.8, 20]"):
        load_state(tiny_model, state, "x.pth")
    name = "encoders.camera.vtransform.frustum"
    state = dict(tiny_model.state_dict())
    state[name] = state[name] + 1e-5  # torch.linspace, which BEVFusion uses, rounds otherwise than numpy's
    load_state(tiny_model, state, "x.pth")
    state[name] = state[name] + 1.0
    with pytest.raises(UserError, match=r"frustum: found \[1\.0"):
        load_state(tiny_model, state, "x.pth")


class Bomb:
    """A pickle that would write a file if it were run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_code_is_not_run(tmp_path):
    flag = tmp_path / "ran"
    torch.save({"state_dict": {"x": torch.zeros(1)}, "bomb": Bomb(str(flag))}, tmp_path / "bomb.pth")
    assert list(load_checkpoint(tmp_path / "bomb.pth")["state_dict"]) == ["x"]
    torch.save(Bomb(str(flag)), tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="pickled objects"):
        load_checkpoint(tmp_path / "bomb.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(str(flag))))
    with pytest.raises(UserError, match="not a torch checkpoint"):
        load_checkpoint(tmp_path / "plain.pth")
    assert not flag.exists()


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "missing", "no tensors"])
def test_damaged_checkpoints_are_one_line(tiny_model, tmp_path, damage):
    path = tmp_path / "m.pth"
    torch.save({"state_dict": tiny_model.state_dict()}, path)
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "text":
        path.write_text("weights")
    elif damage == "missing":
        path.unlink()
    else:
        torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
