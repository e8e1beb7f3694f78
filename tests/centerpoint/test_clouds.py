"""The two graphs fed by the host with clouds of every kind, and the mistakes of the report that this family follows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from lidar import CENTERPOINT, cloud, need_mmdet3d

from qat.cli import main
from qat.core.errors import UserError
from qat.families.mmdet3d.pillars import Canvas, scatter
from qat.model.opening import random_model
from qat.model.runners import TorchPart, flow_for, part_modules, run_frame, torch_feeds, torch_runners
from qat.plan import run
from qat.runtime.pipeline import Pipeline

need_mmdet3d()

POINTS = 20  # max_points of the config
BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def network():
    return random_model(CENTERPOINT, 0).network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("centerpoint") / "fp32"
    assert main(["export", "--init", "random", "--config", str(CENTERPOINT), "--frames", "0", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module", params=BACKENDS)
def pipeline(request, folder):
    return Pipeline.load(folder, request.param, "fp32")


def sparse(count: int = 300) -> np.ndarray:
    """Points so far apart that no pillar is full."""
    points = cloud(count=count, columns=5)
    points[:, :2] = np.random.default_rng(0).uniform(-10, 10, (count, 2))
    return points


def test_pillars_are_as_wide_as_the_fullest(network, pipeline):
    """The encoder takes any number of points; narrow pillars give what full ones give, an empty place of each included."""
    flow = flow_for(network)
    found = flow.voxelize(flow.feeds([flow.prepare(sparse())]))["input_features"]
    assert 1 < found.shape[1] < POINTS
    wide = np.zeros((len(found), POINTS, found.shape[2]), np.float32)
    wide[:, : found.shape[1]] = found
    narrow, full = (
        pipeline.parts["pts_voxel_encoder"].run({"input_features": x})["pillar_features"] for x in (found, wide)
    )
    np.testing.assert_allclose(narrow, full, atol=1e-6)
    with torch.no_grad():
        np.testing.assert_allclose(network.encode(torch.from_numpy(wide)).numpy(), narrow, atol=1e-5)
    # Without the empty place other features come: that is why there is one.
    cut = pipeline.parts["pts_voxel_encoder"].run({"input_features": found[:, :-1]})["pillar_features"]
    assert np.abs(cut - full).max() > 1e-3


@pytest.mark.parametrize("count", [0, 1, 30, 4000])
def test_a_cloud_of_any_size_is_pytorchs(network, pipeline, count):
    points = cloud(count=4000, columns=5)[:count]
    with torch.no_grad():
        expected = run_frame(network, flow_for(network).prepare(points))
    tensors = pipeline.forward(pipeline.flow.prepare(points))
    for name in pipeline.flow.plan.outputs:
        np.testing.assert_allclose(tensors[name], expected[name].numpy(), atol=1e-4, rtol=1e-4)
    pipeline(points)


def test_the_grid_of_one_cloud_does_not_stay_for_the_next(pipeline):
    clouds = [cloud(seed, columns=5) for seed in range(3)]
    alone = [Pipeline(pipeline.parts, pipeline.settings)(points) for points in clouds]
    for points, expected in zip([*clouds, clouds[0]], [*alone, alone[0]], strict=True):
        found = pipeline(points)
        np.testing.assert_array_equal(found.boxes, expected.boxes)
    kept = pipeline.forward(pipeline.flow.prepare(clouds[0]))["spatial_features"]
    before = kept.copy()
    pipeline.forward(pipeline.flow.prepare(clouds[1]))
    np.testing.assert_array_equal(kept, before)


def test_a_canvas_is_emptied():
    rng, canvas = np.random.default_rng(0), Canvas()
    for clouds in (1, 2, 2, 1):
        cells = np.concatenate(
            [
                np.stack([np.full(9, n), np.zeros(9, int), rng.permutation(9), rng.permutation(9)], 1)
                for n in range(clouds)
            ]
        )
        features = rng.normal(size=(len(cells), 1, 3)).astype(np.float32)
        expected = np.zeros((clouds, 3, 9, 9), np.float32)
        expected[cells[:, 0], :, cells[:, 2], cells[:, 3]] = features[:, 0]
        np.testing.assert_array_equal(scatter(features, cells.astype(np.int32), (9, 9), canvas), expected)


def test_most_voxels_and_one_more(network, folder, tmp_path, capsys):
    """At the limit nothing is said; beyond it the rest is left out and said, and both graphs take it."""
    flow = flow_for(network)
    cells = flow.voxelize(flow.feeds([flow.prepare(cloud(columns=5))]))["coors"]
    manifest = json.loads((folder / "manifest.json").read_text())
    for most, words in ((len(cells), ""), (len(cells) - 1, f"expected at most max_voxels {len(cells) - 1:,}")):
        settings = {**manifest["pipeline"], "voxel": {**manifest["pipeline"]["voxel"], "max_voxels": most}}
        engines = Pipeline.load(folder, "onnxruntime", "fp32").parts
        capsys.readouterr()
        found = Pipeline(engines, settings).forward(flow.prepare(cloud(columns=5)))
        assert len(found["coors"]) == most
        error = capsys.readouterr().err
        assert words in error and bool(words) == bool(error)


def test_clouds_of_different_lengths_are_collated(network):
    """One with full pillars, one with few points, none: each as alone."""
    flow = flow_for(network)
    frames = [flow.prepare(points) for points in (sparse(), cloud(columns=5), np.zeros((0, 5), np.float32), sparse(50))]
    with torch.no_grad():
        together = run(flow.plan, torch_runners(network), torch_feeds(network, flow.feeds(frames)))
        for n, frame in enumerate(frames):
            alone = run_frame(network, frame)
            for name in flow.plan.outputs:
                torch.testing.assert_close(together[name][n], alone[name][0], atol=1e-4, rtol=1e-4)


def test_pytorchs_parts_stand_where_engines_do(network, pipeline):
    """They want gradients, and return tuples; there is no metainfo of a sample. The boxes are the engines'."""
    assert any(p.requires_grad for p in network.parameters()) and torch.is_grad_enabled()
    parts = {name: TorchPart(wrapper) for name, wrapper in part_modules(network).items()}
    own, built = Pipeline(parts, pipeline.settings)(cloud(columns=5)), pipeline(cloud(columns=5))
    assert len(own) == len(built) > 0
    np.testing.assert_allclose(own.scores, built.scores, atol=1e-5)


def test_cells_of_the_host_follow_the_network_to_its_device(network):
    """Voxels and cells come from numpy; what is made of them lies where the network is. "meta" stands for another device here."""
    away = random_model(CENTERPOINT, 0).network.to("meta")
    flow = flow_for(network)
    ops = torch_runners(away)
    found = ops["voxelize"]({"points": flow.feeds([flow.prepare(cloud(columns=5))])["points"]})
    assert {value.device.type for value in found.values()} == {"meta"}
    pillars = torch_runners(network)["voxelize"](flow.feeds([flow.prepare(cloud(columns=5))]))
    on_cpu = network.encode(pillars["input_features"]).detach()
    grid = torch_runners(network)["scatter"]({"pillar_features": on_cpu, "coors": pillars["coors"].numpy()})
    assert grid["spatial_features"].device.type == "cpu" and grid["spatial_features"].any()


def test_shapes_that_are_not_the_graphs_are_refused(pipeline):
    """A transposed grid, pillars without their axis of one, features in the place of pillars: a line each, not other numbers."""
    encoder, dense = (pipeline.parts[name] for name in ("pts_voxel_encoder", "pts_backbone_neck_head"))
    tensors = pipeline.forward(pipeline.flow.prepare(cloud(columns=5)))
    grid = tensors["spatial_features"]
    assert grid.shape[2] != grid.shape[3]
    for engine, feeds in (
        (dense, {"spatial_features": grid.swapaxes(2, 3)}),
        (dense, {"spatial_features": grid[0]}),
        (encoder, {"input_features": tensors["pillar_features"]}),
        (encoder, {"input_features": tensors["input_features"].swapaxes(0, 1).swapaxes(1, 2)}),
    ):
        with pytest.raises(UserError, match=r"found float32\[[\d, ]+\]"):
            engine.run({name: np.ascontiguousarray(value) for name, value in feeds.items()})
