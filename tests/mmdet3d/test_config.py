"""mmdet3d configs by path and by name, of 1.x and 0.x; what is wrong with one is said in a line."""

from __future__ import annotations

from pathlib import Path

import pytest
from lidar import CENTERPOINT, POINTPILLARS, need_mmdet3d

from qat.core.errors import UserError
from qat.families.mmdet3d.config import family_in, find, read, shipped

need_mmdet3d()


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("hv_pointpillars_secfpn_6x8_160e_kitti-3d-3class.py", "pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py"),
        ("hv_pointpillars_secfpn_6x8_160e_kitti-3d-car", "pointpillars_hv_secfpn_8xb6-160e_kitti-3d-car.py"),
        (
            "configs/pointpillars/hv_pointpillars_fpn_sbn-all_4x8_2x_nus-3d.py",
            "pointpillars_hv_fpn_sbn-all_8xb4-2x_nus-3d.py",
        ),
        ("hv_pointpillars_fpn_sbn-all_fp16_2x8_2x_nus-3d.py", "pointpillars_hv_fpn_sbn-all_8xb2-amp-2x_nus-3d.py"),
        (
            "centerpoint_02pillar_second_secfpn_4x8_cyclic_20e_nus.py",
            "centerpoint_pillar02_second_secfpn_8xb4-cyclic-20e_nus-3d.py",
        ),
        (
            "configs/centerpoint/centerpoint_02pillar_second_secfpn_circlenms_4x8_cyclic_20e_nus.py",
            "centerpoint_pillar02_second_secfpn_head-circlenms_8xb4-cyclic-20e_nus-3d.py",
        ),
        ("votenet_16x8_sunrgbd-3d-10class.py", "votenet_8xb16_sunrgbd-3d.py"),
        ("votenet_8x8_scannet-3d-18class.py", "votenet_8xb8_scannet-3d.py"),
        ("hv_second_secfpn_6x8_80e_kitti-3d-car.py", "second_hv_secfpn_8xb6-80e_kitti-3d-car.py"),
        ("3dssd_4x4_kitti-3d-car.py", "3dssd_4xb4_kitti-3d-car.py"),
        ("mmdet3d/configs/votenet/votenet_8xb16_sunrgbd-3d.py", "votenet_8xb16_sunrgbd-3d.py"),
    ],
)
def test_names_of_both_releases_find_the_shipped_config(older, newer):
    assert find(older).name == newer


def test_every_shipped_config_is_found_by_its_own_name():
    every = [p for p in shipped().rglob("*.py") if "_base_" not in p.parts]
    assert len(every) > 100
    for path in every:
        assert find(path.name).name == path.name, path


def test_families_of_configs():
    assert family_in(POINTPILLARS) == "pointpillars"
    assert family_in(CENTERPOINT) == "centerpoint"
    with pytest.raises(UserError, match=r"SECOND|VoxelNet.*HardSimpleVFE.*export it whole"):
        family_in(find("second_hv_secfpn_8xb6-80e_kitti-3d-car.py"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = dict(", ("SyntaxError", "mmdet3d 1.x config")),
        ("x = 1", ("found no model with a type", "model = dict(type=…)")),
        ("_base_ = './gone.py'\nmodel = dict(type='VoxelNet')", ("_base_", "gone.py")),
        ("model = dict(type='VoxelNet')\ndata = dict(test=dict())", ("0.x config", "1.x config of the same model")),
        ("model = dict(type='VoxelNet')", ("no test_dataloader",)),
        ("raise ValueError('from the config')", ("ValueError", "from the config")),
    ],
)
def test_a_config_that_is_none_is_one_line(tmp_path, text, words):
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read(path)
    message = str(refused.value)
    assert message.startswith(str(path)) and all(word in message for word in words), message


def test_no_such_config():
    with pytest.raises(UserError, match=r"nothing_like_it\.py: found no such file, expected an mmdet3d config"):
        find(Path("nothing_like_it.py"))


def test_a_module_that_is_unknown_is_named(tmp_path):
    from qat.families.mmdet3d.model import build

    path = tmp_path / "config.py"
    path.write_text(POINTPILLARS.read_text().replace('type="SECOND"', 'type="SECONDEST"'))
    with pytest.raises(UserError, match=r"SECONDEST.*expected a model that mmdet3d 1.4 can build"):
        build(read(path))


def test_classes_of_shipped_pillar_models_are_those_of_their_tasks_and_data():
    """mmdet3d's CenterPoint configs have another order than the base that they inherit."""
    from qat.model.opening import read_config

    for name in (
        "centerpoint_pillar02_second_secfpn_head-circlenms_8xb4-cyclic-20e_nus-3d.py",
        "pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py",
        "pointpillars_hv_secfpn_8xb6-160e_kitti-3d-car.py",
    ):
        path = find(name)
        family, described = read_config(path)
        classes = family.settings(described)["classes"]
        assert classes == list(read(path).test_dataloader.dataset.metainfo.classes)
        tasks = [own for task in family.settings(described)["head"].get("tasks", ()) for own in task]
        assert tasks in ([], classes)
