"""AWML's configs: read without its packages, their features, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from lidar import AWML, changed_awml, cloud, need_mmdet3d, write_cloud

from qat.cli import main
from qat.families.mmdet3d import pillars
from qat.families.mmdet3d.frames import PointFiles
from qat.model.opening import random_model, read_config

need_mmdet3d()

BACKWARD = ('type="PillarFeatureNet"', 'type="BackwardPillarFeatureNet"')


def settings_of(config):
    family, description = read_config(config)
    return family.settings(description)


def test_types_and_columns_are_understood():
    settings = settings_of(AWML)
    assert settings["columns"] == [0, 1, 2, 4] and settings["sweeps"] == {
        "count": 1,
        "pad_empty": True,
        "remove_close": True,
    }
    assert settings["decoration"] == {"columns": 4, "cluster": True, "centre": 3, "distance": False, "legacy": False}
    assert settings["head"]["tasks"] == [["car", "truck", "bus", "bicycle", "pedestrian"]]
    assert settings["channels"] == 32


@pytest.mark.parametrize("features", [9, 10, 11])
@pytest.mark.parametrize("legacy", [False, True])
def test_features_by_definition(tmp_path, features, legacy):
    """Each point's features, computed one by one."""
    changes = {
        9: [BACKWARD],
        10: [],
        11: [("use_dim=[0, 1, 2, 4]", "use_dim=[0, 1, 2, 3, 4]"), ("in_channels=4", "in_channels=5")],
    }[features]
    if legacy:
        changes = [*changes, ("feat_channels=[32, 32]", "feat_channels=[32, 32], legacy=True")]
    config = changed_awml(tmp_path, *changes)
    settings = settings_of(config)
    own, axes = (5 if features == 11 else 4), (2 if features == 9 else 3)
    assert pillars.columns_of(settings["decoration"]) == features
    points = cloud(columns=5)[:, settings["columns"]]
    found, cells, _ = pillars.pillars_of(points, settings)
    size, low = settings["voxel"]["size"], settings["voxel"]["range"]
    for n in (0, len(cells) // 2, len(cells) - 1):
        z, y, x = cells[n]
        index = np.floor((points[:, :3] - low[:3]) / size).astype(int)
        inside = points[(index == (x, y, z)).all(1)][: settings["voxel"]["max_points"]]
        mean = inside[:, :3].mean(0)
        middle = np.array([x, y, z]) * size + np.array(size) / 2 + low[:3]
        for slot, point in enumerate(inside):
            offset = (point[:3] - middle)[:axes]
            raw = np.concatenate([offset, point[axes:]]) if legacy else point
            np.testing.assert_allclose(
                found[n, slot], np.concatenate([raw, point[:3] - mean, offset]), atol=2e-5, rtol=1e-5
            )
        assert not found[n, len(inside) :].any() and len(inside) and found.shape[2] == features == own + 3 + axes


def test_the_encoder_is_what_mmdet3d_builds(tmp_path):
    """The whole `BackwardPillarFeatureNet` of mmdet3d's registry, from raw voxels, equals our features through `encode`."""
    from qat.families.mmdet3d.ops.voxels import voxelize

    config = changed_awml(tmp_path, BACKWARD)
    network = random_model(config, 0).network
    settings = settings_of(config)
    voxel = settings["voxel"]
    points = cloud(columns=5)[:, settings["columns"]]
    voxels, coords, counts = voxelize(points, voxel["size"], voxel["range"], voxel["max_points"], voxel["max_voxels"])
    found, _, _ = pillars.pillars_of(points, settings)
    with torch.no_grad():
        whole = network.pts_voxel_encoder(
            torch.from_numpy(voxels), torch.from_numpy(counts), torch.from_numpy(np.pad(coords, ((0, 0), (1, 0))))
        )
        ours = network.encode(torch.from_numpy(found))[:, 0]
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)
    assert found.shape[2] == 9


def test_a_single_revolution_has_no_age(tmp_path):
    """The fifth column of nuScenes' files is a beam; mmdet3d sets it to 0 before it merges revolutions."""
    points = cloud(columns=5)
    points[:, 4] = 17
    (tmp_path / "cloud.bin").write_bytes(points.tobytes())
    family, description = read_config(AWML)
    frame = family.dataset(tmp_path, "all", description)[0]
    assert frame.points.shape[1] == 4 and not frame.points[:, 3].any()
    untimed = PointFiles(tmp_path, [0, 1, 2, 4], 5)[0]
    assert (untimed.points[:, 3] == 17).all()


def test_calibrate_and_export_both_parts(tmp_path):
    (tmp_path / "clouds").mkdir()
    write_cloud(tmp_path / "clouds" / "0.bin", columns=5)
    data = ["--data", str(tmp_path / "clouds"), "--split", "all"]
    ptq = tmp_path / "ptq.pth"
    assert main(["calibrate", "--init", "random", "--config", str(AWML), *data, "--out", str(ptq)]) == 0
    for words in (["--ckpt", str(ptq)], ["--init", "random", "--config", str(AWML)]):
        assert main(["export", *words, "--out", str(tmp_path / "out"), *data, "--frames", "1"]) == 0
        parts = json.loads((tmp_path / "out" / "manifest.json").read_text())["parts"]
        assert parts["pts_voxel_encoder"]["inputs"]["input_features"]["shape"] == ["voxels", "points_a_voxel", 10]
        assert parts["pts_voxel_encoder"]["outputs"]["pillar_features"]["shape"] == ["voxels", 1, 32]
        assert "BatchNormalization" not in parts["pts_voxel_encoder"]["operators"]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("bbox_coder=dict(", "bbox_coder=dict(y_axis_reference=True, ", "y_axis_reference: found True"),
        ('"projects.CenterPoint.models"', '"projects.ConvNeXt_PC"', "Failed to import projects.ConvNeXt_PC"),
        ("use_dim=[0, 1, 2, 4]", "use_dim=[0, 1, 2, 5]", "use_dim: found [0, 1, 2, 5]"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_named(tmp_path, capsys, before, after, words):
    bad = changed_awml(tmp_path, (before, after))
    assert main(["export", "--init", "random", "--config", str(bad), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()
