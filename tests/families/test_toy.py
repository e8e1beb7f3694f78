"""A family in one folder (tests/toy), known by an entry point alone, goes through every verb."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from qat import families
from qat.cli import main
from qat.core.errors import UserError
from qat.data.synth import SynthOptions, generate
from qat.manifest import load_manifest
from qat.runtime import Pipeline

TESTS = Path(__file__).resolve().parents[1]
FLAVOURS = ("tensorrt", "tensorrt-strong", "onnxruntime", "openvino")
BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory):
    """The toy as an installed distribution has it: importable, and named by an entry point."""
    site = tmp_path_factory.mktemp("site")
    info = site / "toy-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{families.GROUP}]\ntoy = toy\n")
    before = list(sys.path)
    sys.path[:0] = [str(site), str(TESTS)]
    for cached in (families.packages, families.state_names):
        cached.cache_clear()
    yield
    sys.path[:] = before
    for cached in (families.packages, families.state_names):
        cached.cache_clear()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the config, a trained-like checkpoint and a data set of two scenes."""
    folder = tmp_path_factory.mktemp("toy")
    options = SynthOptions(scenes=2, seed=3, keyframes=3, width=192, height=128, azimuths=60, sweeps=0, splits={"a": 2})
    generate(folder / "data", options, quiet=True)
    config = {"family": "toy", "size": [64, 96], "width": 16}
    (folder / "toy.yaml").write_text(yaml.safe_dump(config))
    network = families.family_named("toy").random(config, 1)
    torch.save({"state_dict": network.state_dict(), "config": config}, folder / "toy.pth")
    return folder


@pytest.fixture(scope="module")
def ptq(root):
    out = root / "ptq.pth"
    data = ["--data", str(root / "data"), "--split", "a"]
    calibrate = [
        "calibrate",
        "--config",
        str(root / "toy.yaml"),
        "--ckpt",
        str(root / "toy.pth"),
        *data,
        "--out",
        str(out),
    ]
    assert main([*calibrate, "--budget", "0.5", "--budget-split", "a"]) == 0
    assert out.exists() and out.with_suffix(".budget.json").exists()
    return out


@pytest.fixture(scope="module")
def exported(root, ptq):
    """Folders by flavour, and "fp32"; each verified on a made-up frame and on a real one."""
    real = ["--data", str(root / "data"), "--split", "a"]
    found = {}
    for flavour in FLAVOURS:
        found[flavour] = root / f"int8_{flavour}"
        command = ["export", "--ckpt", str(ptq), "--flavour", flavour, "--out", str(found[flavour])]
        assert main([*command, *real]) == 0
    found["fp32"] = root / "fp32"
    assert main(["export", "--ckpt", str(root / "toy.pth"), "--out", str(found["fp32"]), *real]) == 0
    return found


def frames_of(root, network):
    family = families.family_named("toy")
    return family.dataset(root / "data", "a", network.config)


def test_its_checkpoint_names_it_and_its_float_layers_have_their_reasons(root, ptq, capsys):
    assert torch.load(ptq, weights_only=True)["family"] == "toy"
    assert main(["inspect", str(ptq)]) == 0
    assert "its logits are compared across cells" in " ".join(capsys.readouterr().out.split())


def test_a_state_reaches_the_next_frame_of_its_scene_and_no_further(root, ptq):
    from qat.calibrate import load_ptq
    from qat.model.runners import torch_parts

    model, _ = load_ptq(ptq)
    frames = frames_of(root, model)
    assert len({frame.scene for frame in frames}) == 2 and len(frames) == 6

    def run(chosen):
        pipeline = Pipeline(torch_parts(model), model.flow.settings)
        return [pipeline.forward(frame)["heat"] for frame in chosen]

    together = run(frames)
    assert np.array_equal(together[3], run([frames[3]])[0])  # the first of the second scene
    assert not np.array_equal(together[1], run([frames[1]])[0])
    assert len({len(heat) for heat in together}) > 1  # the axis that varies does


def test_sensitivity_health_and_finetune_take_it(root, ptq):
    data = ["--data", str(root / "data"), "--split", "a"]
    assert main(["sensitivity", str(ptq), *data, "--out", str(root / "sensitivity"), "--metric", "map"]) == 0
    found = json.loads((root / "sensitivity" / "sensitivity.json").read_text())
    assert {unit["name"].partition(".")[0] for unit in found["units"]} == {"image", "mixer"}
    assert set(found["together"]["sqnr_db"]) == {"tokens", "outputs", "objects"}
    # A unit behind the picture does no harm before it: the walk begins at its part.
    mixer = next(unit for unit in found["units"] if unit["name"].startswith("mixer."))
    assert mixer["sqnr_db"]["tokens"] == 200.0
    assert main(["health", str(ptq), *data]) == 0
    out = root / "finetune"
    command = ["finetune", "--ckpt", str(ptq), "--data", f"{root / 'data'}:a", "--steps", "2", "--out", str(out)]
    assert main([*command, "--no-augment", "--loss-weight", "outputs=3"]) == 0
    assert main(["export", "--ckpt", str(out / "qat.pth"), "--out", str(root / "qat"), "--frames", "0"]) == 0
    assert main([*command, "--no-augment", "--loss-weight", "bev=3", "--out", str(root / "no")]) == 2


def test_every_flavour_is_verified_and_keeps_the_axis_that_varies(exported):
    for name, folder in exported.items():
        manifest = load_manifest(folder)
        assert manifest["verification"]["passed"], name
        assert manifest["pipeline"]["family"] == "toy" and list(manifest["parts"]) == ["image", "mixer"]
        tokens = manifest["parts"]["mixer"]["inputs"]["tokens"]
        assert tokens["shape"] == ["N", 16] and tokens["axes"] == {"N": {"min": 1, "opt": 64, "max": 256}}
        assert main(["verify", str(folder)]) == 0
    operators = load_manifest(exported["onnxruntime"])["parts"]["mixer"]["operators"]
    assert operators["QuantizeLinear"] > 0


def test_a_damaged_graph_fails_verification(exported, tmp_path):
    import shutil

    import onnx

    from qat.core.files import sha256, write_json

    folder = tmp_path / "damaged"
    shutil.copytree(exported["tensorrt"], folder)
    model = onnx.load(folder / "mixer.onnx")
    bias = max((i for i in model.graph.initializer if len(i.dims) == 1 and i.data_type == 1), key=lambda i: i.dims[0])
    values = onnx.numpy_helper.to_array(bias).copy()
    values += 10 * np.abs(values).max()
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, folder / "mixer.onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parts"]["mixer"]["sha256"] = sha256(folder / "mixer.onnx")
    write_json(folder / "manifest.json", manifest)
    assert main(["verify", str(folder)]) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_engines_give_the_boxes_of_pytorch(root, exported, backend):
    from qat.model.opening import open_model
    from qat.model.runners import torch_parts

    out = root / f"engines_{backend}"
    for _ in range(2):  # the second time from the cache of built engines, which OpenVINO cannot export again
        assert main(["build", "--onnx", str(exported["fp32"]), "--backend", backend, "--out", str(out)]) == 0
    network = open_model(root / "toy.pth").network
    reference = Pipeline(torch_parts(network), families.family_named("toy").settings(network.config))
    pipeline = Pipeline.load(out)
    for frame in frames_of(root, network):
        expected, found = reference.detect_sample(frame), pipeline.detect_sample(frame)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
    for loaded in (pipeline, Pipeline.load(exported["fp32"], backend)):
        assert loaded.parts["mixer"].example_feeds()["tokens"].shape == (64, 16)
        with pytest.raises(UserError, match="input tokens: found 257 along its axis N, expected 1 to 256"):
            loaded.parts["mixer"].run({"tokens": np.zeros((257, 16), np.float32)})
    raw = pipeline.flow.raw_frames(1)[0]
    pipeline.reset()
    assert len(pipeline(*raw.raw)) > 0 and set(pipeline.timing_ms) >= {"image", "gather", "mixer", "remember", "decode"}


def test_compare_benchmark_and_report_take_it(root, ptq, exported):
    folders = ["--onnx", *(str(exported[name]) for name in ("fp32", *BACKENDS))]
    source = ["--ckpt", str(root / "toy.pth"), "--ptq", str(ptq), "--data", str(root / "data"), "--split", "a"]
    few = ["--rounds", "1", "--repeats", "1", "--resamples", "0"]
    assert main(["compare", *source, *folders, *few, "--out", str(root / "compare")]) == 0
    results = json.loads((root / "compare" / "results.json").read_text())
    assert {row["backend"] for row in results["rows"]} == {"pytorch", *BACKENDS}
    assert (
        set(results["rows"][1]["sqnr_db"]) == {"feat", "tokens", "outputs"} and results["tensors"]["feat"] == "picture"
    )
    assert main(["report", str(root / "compare" / "results.json"), "--out", str(root / "page.html")]) == 0
    assert "picture" in (root / "page.html").read_text()
    command = ["benchmark", "--onnx", str(exported["fp32"]), str(exported["openvino"]), "--out", str(root / "bench")]
    assert main([*command, "--rounds", "2", "--repeats", "1"]) == 0
    rows = json.loads((root / "bench" / "benchmark.json").read_text())["rows"]
    assert all({"image", "gather", "mixer", "remember"} <= set(row["sections"]) for row in rows)


def test_health_of_its_parts_reads_data_by_its_own_config(root, exported, capsys):
    data = ["--data", str(root / "data"), "--split", "a"]
    assert main(["health", str(exported["tensorrt"]), *data, "--config", str(root / "toy.yaml")]) == 0
    capsys.readouterr()
    assert main(["health", str(exported["tensorrt"]), *data]) == 2
    assert "found parts of the family toy" in capsys.readouterr().err


def test_an_unknown_family_is_one_line(root, tmp_path, capsys):
    (tmp_path / "other.yaml").write_text("family: nobody\nsize: [64, 96]\n")
    arguments = ["calibrate", "--config", str(tmp_path / "other.yaml"), "--ckpt", str(root / "toy.pth")]
    assert main([*arguments, "--data", str(root / "data"), "--split", "a", "--out", str(tmp_path / "p.pth")]) == 2
    error = capsys.readouterr().err
    assert "family" in error and "'nobody'" in error and "toy" in error and error.count("\n") == 1
