"""One count of BEV cells for the checks, the network and the runtime; BEVFusion's for its checkpoints."""

import copy
from decimal import Decimal

import pytest
import torch

from qat.families.bevfusion.config import check_config
from qat.families.bevfusion.detector import build_model
from qat.families.bevfusion.grid import bevfusion_cells, cells
from qat.families.bevfusion.pooling.cpu import PatternCache
from qat.families.bevfusion.pooling.geometry import grid_size
from qat.families.bevfusion.settings import pipeline_settings
from qat.families.bevfusion.state import load_float_model
from qat.model.runners import run_frame
from tests.messages import refused

# Steps that people have, and ends at whole numbers of them.
BOUNDS = [(f"{-half * Decimal(step)}", f"{half * Decimal(step)}", step) for step in ("0.8", "0.3", "0.4", "0.15", "0.6", "0.1")
          for half in range(1, 200)]  # fmt: skip


def test_a_bounds_cells_are_those_of_its_decimal_numbers():
    differ = 0
    for low, high, step in BOUNDS:
        exact = (Decimal(high) - Decimal(low)) / Decimal(step)
        bound = [float(low), float(high), float(step)]
        assert cells(bound) == exact
        differ += bevfusion_cells(bound) != exact
    assert differ > 10  # and int() alone does not
    assert [bevfusion_cells([-half, half, 0.8]) for half in (38.4, 76.8)] == [95, 191]  # mit-han-lab/bevfusion#278
    assert grid_size([-38.4, 38.4, 0.8], [-76.8, 76.8, 0.8], [-10.0, 10.0, 20.0]) == (96, 192, 1)


@pytest.fixture
def wide(tiny_config):
    """(half a side, SECONDFPN or not) → a config of cells of 0.8 m."""

    def make(half, second=False):
        config = copy.deepcopy(tiny_config)
        config["model"]["encoders"]["camera"]["vtransform"].update(xbound=[-half, half, 0.8], ybound=[-half, half, 0.8])
        config["model"]["heads"]["object"]["bbox_coder"].update(pc_range=[-half, -half, -5.0, half, half, 3.0])
        if second:
            config["model"]["decoder"] = {
                "backbone": {"type": "SECOND", "in_channels": 10, "out_channels": [8, 12], "layer_nums": [1, 1],
                             "layer_strides": [1, 2]},
                "neck": {"type": "SECONDFPN", "in_channels": [8, 12], "out_channels": [6, 6], "upsample_strides": [1, 2],
                         "use_conv_for_no_stride": True},
            }  # fmt: skip
        return config

    return make


@pytest.mark.parametrize("second", [False, True], ids=["LSSFPN", "SECONDFPN"])
@pytest.mark.parametrize(("half", "count"), [(38.4, 96), (76.8, 192)])
def test_no_row_is_lost_and_the_checks_count_as_the_network_does(wide, tiny_frames, half, count, second):
    config = wide(half, second)
    check_config(config)
    model = build_model(config).eval()
    with torch.no_grad():
        tensors = run_frame(model, tiny_frames[0])
        bev = tensors["feat_in"]
    side = count // config["model"]["encoders"]["camera"]["vtransform"].get("downsample", 1)
    assert list(bev.shape[2:]) == [count, count] and list(tensors["heatmap_0"].shape[2:]) == [side, side]


def bevfusions(model):
    """Its state dict as BEVFusion would have saved it: nx by int()."""
    state = model.state_dict()
    bounds = model.vtransform.bounds
    state["encoders.camera.vtransform.nx"] = torch.LongTensor([int((b[1] - b[0]) / b[2]) for b in bounds])
    return state


def test_a_checkpoint_with_bevfusions_count_keeps_it_everywhere(wide, tiny_frames, tmp_path, capsys):
    config = wide(38.4)
    built = build_model(config).eval()
    torch.save(bevfusions(built), tmp_path / "m.pth")
    before = copy.deepcopy(config)
    model = load_float_model(config, tmp_path / "m.pth")
    assert config == before
    assert "kept its BEV grid of 95×95×1 cells" in capsys.readouterr().err
    with torch.no_grad():
        tensors, wider = run_frame(model, tiny_frames[0]), run_frame(built, tiny_frames[0])
    assert tensors["pattern"][0].shape == (1, 95, 95)
    settings = pipeline_settings(model.config)["vtransform"]
    cache = PatternCache(*(settings[k] for k in ("image_size", "feature_size", "xbound", "ybound", "zbound", "dbound")))
    frame = tiny_frames[0]
    assert cache.get(
        frame.camera_intrinsics, frame.camera2lidar, frame.img_aug_matrix, frame.lidar_aug_matrix
    ).shape == (1, 95, 95)
    assert torch.equal(
        tensors["feat_in"], wider["feat_in"][:, :, :95, :95]
    )  # the cells that both have are the same ones
    torch.save(model.state_dict(), tmp_path / "again.pth")  # a config that was kept loads again
    check_config(model.config)
    assert load_float_model(model.config, tmp_path / "again.pth").vtransform.nx.tolist() == [95, 95, 1]


def test_bevfusions_count_that_does_not_fit_the_neck_is_one_line(wide, tmp_path):
    config = wide(38.4, second=True)
    config["model"]["encoders"]["camera"]["vtransform"]["downsample"] = 1
    config["model"]["heads"]["object"]["bbox_coder"]["out_size_factor"] = 8
    model = build_model(config)
    torch.save(bevfusions(model), tmp_path / "m.pth")
    with refused("BEVFusion's count of 95×95×1 cells:", "upsample_strides:", "to one size"):
        load_float_model(model.config, tmp_path / "m.pth")
