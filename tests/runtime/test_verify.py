"""`bevqat verify`: the same verdict without PyTorch, and what it refuses."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qat.cli import main
from qat.core.errors import UserError
from qat.core.files import sha256
from qat.core.onnx_file import graph_opset
from qat.core.preprocess import normalize
from qat.core.tensors import compare_tensors
from qat.core.verification import (
    LEAST_VALUES,
    SAMPLE_DB,
    VALUES,
    Summary,
    compare_stored,
    digest,
    pack,
    round_input,
    store,
    unpack,
)
from qat.engine import Options
from qat.export import ExportOptions, export_parts
from qat.families import flow_of
from qat.families.bevfusion.frames import made_frame, random_frame
from qat.families.bevfusion.settings import pipeline_settings
from qat.manifest import load_manifest
from qat.runtime.verify import verify_folder

ROOT = Path(__file__).parents[2]
IMAGE = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def opened(folder):
    manifest = load_manifest(folder)
    return Summary(folder, manifest, flow_of(manifest["pipeline"]))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, make_detector, fresh_config, small_cameras):
    """FP32 parts verified on the random frame and on one of pictures."""
    frame = random_frame(pipeline_settings(fresh_config()), 5)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    frame.img = np.stack([normalize(one, IMAGE["mean"], IMAGE["std"]) for one in pixels])
    frame.token = "pictures"
    folder = tmp_path_factory.mktemp("verified") / "onnx_fp32"
    export_parts(make_detector(fresh_config()), folder, ExportOptions("fp32"), frames=[frame])
    return folder, frame


@pytest.fixture
def folder(tmp_path, exported):
    return shutil.copytree(exported[0], tmp_path / "onnx_fp32")


def rewrite(folder, part, change):
    """Changes a part's graph and records its new hash, as an honest but wrong exporter would have."""
    path = folder / f"{part}.onnx"
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parts"][part]["sha256"] = sha256(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_verdict_and_figures_are_the_exports(folder):
    found = verify_folder(folder)
    manifest = load_manifest(folder)
    assert found["passed"] and list(found["parts"]) == list(manifest["parts"])
    for name, part in found["parts"].items():
        for output, row in part["outputs"].items():
            recorded = manifest["parts"][name]["verification"][output]["frames"]
            for entry in row["frames"]:
                at = manifest["verification"]["frames"].index(entry["frame"])
                assert entry["tolerance_db"] == recorded["tolerance_db"][at]
                # The sums of both are kept in float32, whose own rounding stands at about 150 dB.
                if recorded["sqnr_db"][at] < 140:
                    assert entry["sqnr_db"] == pytest.approx(recorded["sqnr_db"][at], abs=1.0), (name, output)
                    assert entry["max_abs"] <= recorded["max_abs"][at] * 1.001
    frames = {
        name: len(part["outputs"]) and len(next(iter(part["outputs"].values()))["frames"])
        for name, part in found["parts"].items()
    }
    assert frames == {"camera.backbone": 2, "camera.vtransform": 1, "fuser": 1, "head.bbox": 1}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_backend_runs_the_parts_as_it_builds_them(folder, backend):
    found = verify_folder(folder, ["fuser"], backend, Options(threads=1, cache=None))
    assert found["passed"] and found["backend"] == backend and list(found["parts"]) == ["fuser"]


def test_inputs_come_back_bit_for_bit(folder, exported):
    summary = opened(folder)
    inputs = summary.inputs("camera.backbone", 1)
    np.testing.assert_array_equal(inputs["img"][0], exported[1].img)
    np.testing.assert_array_equal(inputs["depth"][0], exported[1].depth)
    names = np.load(folder / "verification.npz").files
    assert "1/camera.backbone/in/img/pixels" in names and "1/fuser/in/camera/cells" in names
    assert not any(name.startswith("0/camera.backbone/in") for name in names)


def test_a_large_input_is_a_patch_repeated(tmp_path, make_detector, fresh_config, small_cameras, monkeypatch):
    monkeypatch.setattr("qat.core.verification.INPUT_MOST", 4000)
    monkeypatch.setattr("qat.core.verification.INPUT_SIDE", 8)
    export_parts(make_detector(fresh_config()), tmp_path / "out", ExportOptions("fp32"))
    summary = opened(tmp_path / "out")
    assert "0/camera.vtransform/in/feat_in/patch_shape" in np.load(tmp_path / "out" / "verification.npz").files
    (value,) = summary.inputs("camera.vtransform", 0).values()
    assert value.shape == (1, 10, 32, 24)
    np.testing.assert_array_equal(value[:, :, :8, :8], value[:, :, 8:16, 16:24])
    assert verify_folder(tmp_path / "out")["passed"]


@pytest.mark.parametrize(
    ("array", "form"),
    [
        (normalize(np.arange(3 * 4 * 5, dtype=np.uint8).reshape(4, 5, 3), **IMAGE)[None], "pixels"),
        (round_input(np.random.default_rng(0).standard_normal((1, 4, 5, 6))), "cells"),
        (np.where(np.arange(60).reshape(1, 1, 60) % 20, 0, np.pi).astype(np.float32), "steps"),
        (np.random.default_rng(0).standard_normal((1, 3, 4, 5)).astype(np.float32), "raw"),
        (np.zeros((1, 4, 5, 6), np.float32), "cells"),
        (np.zeros((2, 1, 3), np.float32), "steps"),
        (np.full((1, 2, 3, 3), -0.0, np.float32), "cells"),
    ],
)
def test_each_form_is_exact(array, form):
    packed = pack(array, IMAGE)
    assert form in packed
    found = unpack(packed, array.shape, IMAGE)
    assert found.dtype == np.float32 and found.tobytes() == np.ascontiguousarray(array).tobytes()


def test_rounding_keeps_five_bits_and_rounds_half_to_even():
    assert round_input(np.array([33, 34, 35, 37, -37, 0, 1e30, 3e-39], np.float32))[:6].tolist() == [
        32,
        34,
        36,
        36,
        -36,
        0,
    ]
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * np.float32(1e10)
    assert np.abs(round_input(values) / values - 1).max() <= 2.0**-5
    indices = np.arange(-3, 70000, 7, dtype=np.int32).reshape(1, -1, 1)
    assert round_input(indices) is indices
    again = unpack(pack(indices, None), indices.shape, None)
    assert again.dtype == np.int32 and np.array_equal(again, indices)
    np.testing.assert_array_equal(round_input(round_input(values)), round_input(values))


def test_an_output_is_kept_in_half_precision_where_that_is_enough():
    reference = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    (half,) = store(reference, 30.0).values()
    (full,) = store(reference, 80.0).values()  # FP16 holds it to 74 dB
    assert half.dtype == np.float16 and full.dtype == np.float32 and half.shape == full.shape == reference.shape
    assert store(reference * 1e6, 30.0)["whole"].dtype == np.float32  # beyond its range
    found, slack = compare_stored({"whole": half}, reference * np.float32(1.1))
    assert slack == 0 and found["sqnr_db"] == pytest.approx(20, abs=0.05)
    assert compare_stored({"whole": full}, reference)[0]["sqnr_db"] == 200


def test_of_a_large_output_some_values_of_every_stretch_are_kept():
    reference = np.random.default_rng(3).standard_normal((1, 8, 100, 100)).astype(np.float32)
    stored = store(reference, 80.0, outputs=VALUES // LEAST_VALUES)
    assert list(stored) == ["some"] and stored["some"].size == LEAST_VALUES
    noise = np.random.default_rng(4).standard_normal(reference.shape).astype(np.float32) * np.float32(1e-3)
    found, slack = compare_stored(stored, reference + noise)
    assert slack == SAMPLE_DB
    assert found["sqnr_db"] == pytest.approx(compare_tensors(reference, reference + noise)["sqnr_db"], abs=SAMPLE_DB)
    one = reference.copy()
    one[0, 5] *= 1.01  # a channel alone
    assert compare_stored(stored, one)[0]["sqnr_db"] < 60


def test_the_random_frame_is_the_same_everywhere(fresh_config, small_cameras):
    """Figures of PCG64's stream, worked out once; its distribution: mean 0, variance 1, one pixel in twenty deep."""
    frame = random_frame(pipeline_settings(fresh_config()), 0)
    words = np.random.PCG64([0, 2]).random_raw(1)[0]
    quarters = [(int(words) >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]
    assert frame.img.ravel()[0] == np.float32((sum(quarters) - 131070) / math.sqrt((65536**2 - 1) / 3))
    assert frame.img.mean() == pytest.approx(0, abs=0.02) and frame.img.std() == pytest.approx(1, abs=0.02)
    assert (frame.depth > 0).mean() == pytest.approx(0.05, abs=0.01)
    assert frame.depth[frame.depth > 0].min() >= 1 and frame.depth.max() <= 13


def test_the_made_up_frame_is_shaped_as_real_ones_are(fresh_config, small_cameras):
    settings = pipeline_settings(fresh_config())
    frame, again = made_frame(settings, 0), made_frame(settings, 0)
    assert digest({"img": frame.img}) == digest({"img": again.img}) and frame.token == "made-up:0"
    assert digest({"img": frame.img}) != digest({"img": made_frame(settings, 1).img})
    assert "pixels" in pack(frame.img[None], settings["image"])  # of 8-bit images
    steps = [np.abs(np.diff(frame.img, axis=-1))[..., at].mean() for at in (0, 1)]
    assert steps[0] == 0 < steps[1] < frame.img.std()  # neighbours are alike
    found = frame.depth[frame.depth > 0]
    assert 0.005 < (frame.depth > 0).mean() < 0.04 and 1 <= found.min() < found.max() <= 13
    assert not frame.depth[:, :, : int(0.4 * 64)].any()


def test_a_changed_file_fails_and_the_other_parts_are_verified(folder, capsys):
    path = folder / "fuser.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    (folder / "head.bbox.onnx").unlink()
    assert main(["verify", str(folder)]) == 1
    output = capsys.readouterr()
    assert "error: fuser.onnx: found sha256" in output.err and "error: head.bbox.onnx: no such file" in output.err
    assert output.err.count("error") == 2 and "feat_out" in output.out


def test_a_graph_that_computes_something_else_fails(folder, tmp_path, capsys):
    def change(model):
        weight = next(i for i in model.graph.initializer if len(i.dims) == 4)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.1), weight.name))

    rewrite(folder, "fuser", change)
    assert main(["verify", str(folder), "--part", "fuser", "--json", str(tmp_path / "found.json")]) == 1
    assert "fuser.onnx: middle: found" in capsys.readouterr().err
    found = json.loads((tmp_path / "found.json").read_text())
    row = found["parts"]["fuser"]["outputs"]["middle"]
    assert not found["passed"] and not row["passed"] and 30 < row["sqnr_db"] < 80


def test_values_that_are_not_finite_fail(folder, capsys):
    def change(model):
        bias = next(i for i in model.graph.initializer if len(i.dims) == 1)
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * np.float32("nan"), bias.name))

    rewrite(folder, "camera.vtransform", change)
    assert main(["verify", str(folder), "--part", "camera.vtransform"]) == 1
    assert "NaN or infinite values" in capsys.readouterr().err


def test_another_opset_or_tensor_is_told(folder):
    def change(model):
        model.opset_import[0].version = 14
        model.graph.input[0].name = "kamera"
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                if name == "camera":
                    node.input[i] = "kamera"

    rewrite(folder, "fuser", change)
    found = verify_folder(folder, ["fuser"])
    assert found["parts"]["fuser"]["problems"] == [
        "opset: found 14, the manifest has 13",
        "inputs: found kamera, the manifest has camera",
    ]
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parts"]["head.bbox"]["outputs"]["reg_0"]["shape"][1] = 5
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify_folder(folder, ["head.bbox"])["parts"]["head.bbox"]["problems"]
    assert problem == "output reg_0: found float32[1,2,16,12], the manifest has float32[1,5,16,12]"


def test_opsets_are_read_as_onnx_reads_them(tmp_path, exported):
    for part in ("fuser", "head.bbox"):
        path = exported[0] / f"{part}.onnx"
        assert graph_opset(path) == onnx.load(path).opset_import[0].version
    model = onnx.load(exported[0] / "fuser.onnx")
    del model.opset_import[:]
    model.opset_import.extend([onnx.helper.make_opsetid("com.microsoft", 1), onnx.helper.make_opsetid("", 300)])
    (tmp_path / "two.onnx").write_bytes(model.SerializeToString())
    assert graph_opset(tmp_path / "two.onnx") == 300
    (tmp_path / "cut.onnx").write_bytes(model.SerializeToString()[:1000])
    with pytest.raises(UserError, match=r"cut\.onnx: not an ONNX graph"):
        graph_opset(tmp_path / "cut.onnx")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: no such file"),
        (lambda f: (f / "verification.npz").unlink(), "verification.npz: no such file"),
        (lambda f: (f / "verification.npz").write_bytes(b"x"), "verification.npz: found sha256"),
    ],
)
def test_what_cannot_be_verified_is_status_2(folder, capsys, spoil, message):
    spoil(folder)
    assert main(["verify", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_an_unknown_part_is_bad_use(folder, capsys):
    assert main(["verify", str(folder), "--part", "neck"]) == 2
    assert "part: found 'neck', expected one of camera.backbone" in capsys.readouterr().err


def test_an_export_without_verification_data_says_so(folder, capsys):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["verification"]["file"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(folder)]) == 2
    assert "export again" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../x.onnx", "/etc/passwd", "a/../../x", "..\\x.onnx", "C:\\x.onnx", "", None, 3])
@pytest.mark.parametrize("where", ["part", "verification"])
def test_files_outside_the_folder_are_refused(folder, name, where):
    manifest = json.loads((folder / "manifest.json").read_text())
    (manifest["parts"]["fuser"] if where == "part" else manifest["verification"])["file"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="expected the name of a file in the manifest's folder"):
        load_manifest(folder, check_files=False)


def test_it_runs_with_onnxruntime_alone(folder, exported):
    code = f"""
import sys
for name in ("torch", "torchvision", "timm", "onnx", "onnxsim", "openvino", "yaml", "omegaconf", "nuscenes",
             "pytorch_quantization", "scipy"):
    sys.modules[name] = None
from qat.cli import main
sys.exit(main(["verify", {str(folder)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 parts match PyTorch" in done.stdout
