"""The camera branch only: built without a decoder and a head, and found in state dicts under a prefix."""

import copy

import numpy as np
import pytest
import torch

from qat.core.errors import UserError
from qat.families.bevfusion.config import camera_branch
from qat.families.bevfusion.detector import build_model
from qat.families.bevfusion.state import load_float_branch, load_state, take_branch
from qat.model.runners import flow_for, run_frame
from tests.messages import refused


@pytest.fixture
def branch(fusion_config):
    return build_model(camera_branch(fusion_config)).eval()


def test_it_holds_the_camera_encoder_and_nothing_else(branch, tiny_model):
    whole = tiny_model.state_dict()
    own = {name: tensor.shape for name, tensor in branch.state_dict().items()}
    assert own == {name: tensor.shape for name, tensor in whole.items() if name.startswith("encoders.camera.")}


def test_it_gives_the_whole_detectors_bev_features(branch, tiny_model, make_fusion_state, tiny_frames):
    assert load_state(branch, make_fusion_state(), "m.pth", "encoders.camera") == 6
    with torch.inference_mode():
        expected = run_frame(tiny_model, tiny_frames[0])["feat_out"]
        maps = run_frame(branch, tiny_frames[0])
    assert flow_for(branch).plan.outputs == ("feat_out",) and maps["feat_out"].shape == (1, 10, 16, 16)
    assert torch.equal(maps["feat_out"], expected)


def test_what_is_behind_the_branch_is_refused(branch, tiny_frames):
    for method in (branch.decode_bev, branch.head, branch.bev_head):
        with pytest.raises(UserError, match="found a camera branch"):
            method(torch.zeros(1, 10, 32, 32))
    with pytest.raises(UserError, match="--budget: found a camera branch"):
        flow_for(branch).need_boxes("--budget", "omit it")


@pytest.mark.parametrize(
    ("prefix", "before"),
    [
        ("encoders.camera", "encoders.camera."),
        ("encoders.camera.", "encoders.camera."),
        ("module.encoders.camera", "module.encoders.camera."),
        ("", ""),
    ],
)
def test_the_prefix_is_where_the_branch_lies_in_the_file(
    branch, fusion_config, make_fusion_state, tmp_path, prefix, before
):
    state = make_fusion_state()
    renamed = {
        f"{before}{name.removeprefix('encoders.camera.')}": tensor
        for name, tensor in state.items()
        if name.startswith("encoders.camera.")
    }
    if before.startswith("module."):
        renamed |= {f"module.{name}": tensor for name, tensor in state.items() if name not in branch.state_dict()}
    torch.save(renamed, tmp_path / "m.pth")
    found, left_out = load_float_branch(branch.config, tmp_path / "m.pth", prefix)
    assert left_out == (6 if before.startswith("module.") else 0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize("prefix", ["encoders.cam", "", "encoders.lidar", "encoders.camera.backbone"])
def test_a_prefix_without_a_camera_branch_names_the_one_that_has_it(make_fusion_state, prefix):
    with refused(f"--prefix: found {prefix!r}", "m.pth", "expected 'encoders.camera'"):
        take_branch(make_fusion_state(), prefix, "m.pth")


def test_a_file_without_a_camera_branch_lists_its_names(make_fusion_state):
    state = {name: tensor for name, tensor in make_fusion_state().items() if "camera" not in name}
    with refused("expected backbone, neck and vtransform", "decoder.back"):
        take_branch(state, "encoders.camera", "m.pth")


@pytest.mark.parametrize(("prefix", "shown"), [("encoders.camera", "encoders.camera.neck"), ("", "neck.lateral_convs")])
def test_tensors_missing_from_the_branch_are_listed_by_the_files_names(branch, make_fusion_state, prefix, shown):
    state = {
        f"{prefix}.{name[16:]}".removeprefix("."): tensor
        for name, tensor in make_fusion_state().items()
        if name.startswith("encoders.camera.") and ".lateral_convs.0.conv" not in name
    }
    with pytest.raises(UserError, match=rf"m\.pth: does not fit the config: missing {shown}\..* \(1\)$"):
        load_state(branch, state, "m.pth", prefix)


def test_inside_the_prefix_names_shapes_and_geometry_are_as_strict_as_ever(branch, make_fusion_state):
    for name, value, message in (
        ("encoders.camera.radar.weight", torch.zeros(1), "unexpected encoders.camera.radar"),
        ("encoders.camera.vtransform.depthnet.0.weight", torch.zeros(1), "found shape"),
        ("encoders.camera.vtransform.dx", torch.tensor([0.6, 0.6, 20.0]), "the config's bounds make"),
    ):
        with pytest.raises(UserError, match=message):
            load_state(branch, make_fusion_state() | {name: value}, "m.pth", "encoders.camera")


def test_a_whole_models_state_without_the_prefix_names_the_flag(branch, make_fusion_state):
    with refused("unexpected", "its camera branch fits:", "--prefix encoders.camera"):
        load_state(branch, make_fusion_state(), "m.pth")
    state = copy.copy(make_fusion_state())
    del state["encoders.camera.vtransform.dx"]
    with pytest.raises(UserError) as error:
        load_state(branch, state, "m.pth")
    assert "fits" not in str(error.value)


def test_a_branchs_geometry_pools_as_the_whole_detectors(branch, tiny_model, tiny_frames):
    frame = tiny_frames[0]
    matrices = (frame.camera_intrinsics, frame.camera2lidar, frame.img_aug_matrix, frame.lidar_aug_matrix)
    ((own,), (whole,)) = (model.patterns(*(m[None] for m in matrices)) for model in (branch, tiny_model))
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(own, name), value)
