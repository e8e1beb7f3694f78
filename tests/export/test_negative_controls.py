"""Verification that can fail: graphs damaged in ways that happen fail at every site, and right ones pass.

Segments of a graph are checked on given codes, so damage at one site changes nothing at another: most kinds of damage are done
to all sites at once, and each site must fail. Scales and zero points are damaged one by one, for a scale that is doubled on both
sides of a concatenation is no damage to it.
"""

import functools
import json
import shutil

import numpy as np
import onnx
import pytest
import timm
import torch
from controls import FLAVOURS, int8_parts, undetected
from damage import KINDS, Opened, damage

from qat.core.files import sha256
from qat.core.onnx_cut import Cut
from qat.core.sites import tile
from qat.engine import Options
from qat.engine.onnxruntime_backend import PlainGraph
from qat.export import ExportOptions, export_parts
from qat.families.bevfusion.frames import random_frame
from qat.families.bevfusion.settings import pipeline_settings
from qat.runtime.verify import verify_folder

BY_VALUE = ("scale x2", "zero point off by one")


@pytest.fixture(scope="module", params=FLAVOURS)
def exported(request, tmp_path_factory, quantized, small_cameras, settings):
    """One flavour's INT8 parts, verified on a frame that the ranges were not made from."""
    folder = tmp_path_factory.mktemp("right") / request.param
    manifest = export_parts(
        quantized, folder, ExportOptions("int8", flavour=request.param), frames=[random_frame(settings, 3)]
    )
    assert manifest["verification"]["passed"]
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_damage_fails_at_every_site(exported, kind):
    count = 0
    for _, part, data, sites, feeds in int8_parts(exported):
        shapes = {name: site.shape for name, site in sites.items()}
        damaged, done = damage(data, kind, list(sites), shapes)
        missed = undetected(data, damaged, done, sites, feeds, part["sites"]["pairs"])
        # Where two swapped channels are never positive before their ReLU, or are not this output's, nothing changes.
        assert not any(missed.values()), missed
        assert kind == "channels swapped" or not missed
        count += len(done) - len(missed)
    assert count > 40


@pytest.mark.parametrize("kind", BY_VALUE)
def test_a_wrong_grid_shows_in_the_codes_too(exported, kind):
    """Without looking at scales and zero points: site by site, on what one segment gives."""
    ((_, _, data, sites, feeds),) = [row for row in int8_parts(exported) if row[0] == "fuser"]
    codes = {name: tile(site.patch, site.shape) for name, site in sites.items() if site.patch is not None}
    for site in Cut(data).pairs:
        damaged, (done,) = damage(data, kind, [site], {})
        graph, takes, names = Cut(damaged).segments([site])
        runner = PlainGraph(graph)
        given = {**feeds, **codes}
        found = runner.run({name: given[name].astype(runner.inputs[name].dtype) for name in takes})[names[site]]
        assert not sites[done].compare(found, Cut(data).pairs[site])["passed"], site


def fix(folder, name, data):
    """A part's graph becomes another, and the manifest has its hash: as a wrong exporter, or somebody by hand, would have it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / manifest["parts"][name]["file"]
    path.write_bytes(data)
    manifest["parts"][name]["sha256"] = sha256(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.nightly if at % 3 else []) for at, kind in enumerate(KINDS)]
)
def test_the_command_fails_and_names_the_layer(exported, tmp_path, kind):
    """One site that is drawn, of the decoder: `bevqat verify` as it is used."""
    folder = shutil.copytree(exported, tmp_path / "damaged")
    ((name, part, data, sites, _),) = [row for row in int8_parts(folder) if row[0] == "fuser"]
    pairs = [pair for pair in Cut(data).pairs if Opened(data).weighted(pair)]
    site = pairs[int(np.random.default_rng(len(kind)).integers(len(pairs)))]
    if kind == "channels swapped":
        site = next(s for s in pairs if "downsample" in s)  # without a ReLU behind it
    damaged, done = damage(data, kind, [site], {name: s.shape for name, s in sites.items()})
    assert done == [site]
    fix(folder, name, damaged)
    found = verify_folder(folder, [name])["parts"][name]
    module = next(entry["module"] for entry in part["sites"]["pairs"] if entry["tensor"] == site)
    assert not found["passed"] and any(module in problem for problem in found["problems"])


def test_a_lost_and_an_added_pair_fail(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "damaged")
    ((name, _, data, _, _),) = [row for row in int8_parts(folder) if row[0] == "fuser"]
    model = onnx.load_from_string(data)
    site = next(s for s in Cut(data).pairs if "downsample" in s)
    quantize = next(n for n in model.graph.node if site in n.output)
    for dequantize in [n for n in model.graph.node if site in n.input]:
        for node in model.graph.node:
            for at, read in enumerate(node.input):
                if read == dequantize.output[0]:
                    node.input[at] = quantize.input[0]
        model.graph.node.remove(dequantize)
    model.graph.node.remove(quantize)
    fix(folder, name, model.SerializeToString())
    problems = verify_folder(folder, [name])["parts"][name]["problems"]
    assert problems == [f"{site}: a quantizer that only the manifest has"]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_engine_that_is_damaged_grossly_fails(exported, tmp_path, backend):
    """End to end alone, and in integers: within 7.7 dB of the quantization's own noise, beside its simulation, and 3 dB of float."""
    if exported.name == "tensorrt-strong":
        pytest.skip("CPU backends compute FP16 graphs in FP32")
    folder = shutil.copytree(exported, tmp_path / "damaged")
    options = Options(threads=1, cache=None)
    assert verify_folder(folder, ["fuser"], backend, options)["passed"]
    ((name, _, data, sites, _),) = [row for row in int8_parts(folder) if row[0] == "fuser"]
    damaged, _ = damage(data, "weights to 5 bits", list(sites), {})
    fix(folder, name, damaged)
    assert not verify_folder(folder, [name], backend, options)["passed"]


@pytest.fixture(scope="module")
def padded(make_detector, fresh_config):
    """A detector whose first pooling takes zeros around it, and negative values: as timm's BiT."""
    detector = make_detector(fresh_config())
    trunk = detector.encoders["camera"]["backbone"]
    trunk = next(
        module for module in trunk.modules() if isinstance(getattr(module, "maxpool", None), torch.nn.MaxPool2d)
    )
    trunk.act1 = torch.nn.Identity()
    trunk.maxpool = torch.nn.Sequential(torch.nn.ConstantPad2d(1, 0.0), torch.nn.MaxPool2d(3, 2))
    return detector


# In the onnxruntime flavour Q/DQ stand between the two, which keeps the optimizer from joining them.
@pytest.mark.parametrize("flavour", ["fp32", "tensorrt", "tensorrt-strong", "openvino"])
def test_an_optimizer_that_breaks_the_graph_fails(
    tmp_path, padded, settings, small_cameras, calibrate_largest, monkeypatch, flavour
):
    detector = padded if flavour == "fp32" else calibrate_largest(padded, settings)

    def export():
        kind = ("fp32", "tensorrt") if flavour == "fp32" else ("int8", flavour)
        folder = tmp_path / "out"
        return export_parts(detector, folder, ExportOptions(kind[0], flavour=kind[1], parts=["camera.backbone"]))

    if flavour == "fp32":  # the others' right exports are below
        assert export()["verification"]["passed"]
    monkeypatch.setattr("qat.export.parts.pads_into_pools", lambda model: 0)
    manifest = export()
    assert not manifest["verification"]["passed"]
    part = manifest["parts"]["camera.backbone"]
    if flavour == "fp32":
        figures = part["verification"]["camera_feature"]
        assert figures["sqnr_db"] > figures["tolerance_db"] > figures["optimized_db"]
    else:
        assert part["divergence"][0]["note"].endswith("with ONNX Runtime's optimizer on")
    assert not verify_folder(tmp_path / "out")["passed"]


NETWORKS = ("test_resnet", "test_convnext", "test_efficientnet", "test_nfnet", "resnet10t", "mobilenetv3_small_050")


@functools.cache
def stages(name):
    """Indices and channels of a network's features at strides 8 and 16."""
    info = timm.create_model(name, features_only=True).feature_info
    chosen = [info.reduction().index(stride) for stride in (8, 16)]
    return chosen, [info.channels()[at] for at in chosen]


def variant(seed, config):
    """A config (changed in place) and a number of cameras that follow from a number: networks, image sizes, BEV grids that are
    oblong and off centre, one to three cameras."""
    random = np.random.default_rng(seed)
    model, size = config["model"], [64, int(random.choice([64, 96]))]
    step = float(random.choice([0.8, 1.0]))
    low = [step * -4 * int(random.integers(1, 5)) for _ in range(2)]
    bounds = [[a, a + step * 8 * int(random.integers(2, 4)), step] for a in low]
    area = [low[0], low[1], -5.0, bounds[0][1], bounds[1][1], 3.0]
    camera = model["encoders"]["camera"]
    camera["vtransform"].update(
        image_size=size, feature_size=[n // 8 for n in size], xbound=bounds[0], ybound=bounds[1]
    )
    config.update(image_size=size, point_cloud_range=area, voxel_size=[step / 4, step / 4, 8.0])
    name = str(random.choice(NETWORKS))
    chosen, channels = stages(name)
    camera["backbone"] = {"type": "timm", "model_name": name, "out_indices": chosen}
    camera["neck"]["in_channels"] = channels
    head = model["heads"]["object"]
    head["tasks"] = [["car", "truck", "pedestrian"]]
    head["bbox_coder"].update(pc_range=area, voxel_size=[step / 4, step / 4])
    head["test_cfg"].update(min_radius=[1.0], nms_type=["rotate"])
    for one in config["data"]["test"]["pipeline"]:
        if one["type"] == "ImageAug3D":
            one["final_dim"] = size
        elif one["type"] == "PointsRangeFilter":
            one["point_cloud_range"] = area
    return config, int(random.integers(1, 4)), name


def check_right(seed, tmp_path, fresh_config, make_detector, calibrate_largest):
    config, cameras, name = variant(seed, fresh_config())
    config["cameras"] = [f"CAM_{n}" for n in range(cameras)]
    settings = pipeline_settings(config)
    detector = calibrate_largest(make_detector(config, seed), settings)
    flavour = FLAVOURS[seed % len(FLAVOURS)]
    manifest = export_parts(
        detector,
        tmp_path / "out",
        ExportOptions("int8", flavour=flavour, parts_int8=["vtransform"] if seed % 3 == 0 else []),
        frames=[random_frame(settings, seed)] if seed % 4 == 3 else (),
    )
    what = {
        part: (entry.get("sites"), entry.get("divergence"), entry["verification"])
        for part, entry in manifest["parts"].items()
        if not entry.get("sites", {"passed": True})["passed"]
        or not all(figures["passed"] for figures in entry["verification"].values())
    }
    assert manifest["verification"]["passed"], (name, flavour, what)
    found = verify_folder(tmp_path / "out")
    assert found["passed"], {part: entry["problems"] for part, entry in found["parts"].items()}


BY_DAY = (0, 1, 2, 3, 6)  # every flavour and network that the first twelve have, with and without what is optional


@pytest.mark.parametrize(
    "seed", [seed if seed in BY_DAY else pytest.param(seed, marks=pytest.mark.nightly) for seed in range(200)]
)
def test_a_right_export_passes(seed, tmp_path, fresh_config, make_detector, calibrate_largest):
    check_right(seed, tmp_path, fresh_config, make_detector, calibrate_largest)
