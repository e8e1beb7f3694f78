"""Verification at the export: which frames, which figures, and which layer is named when something is wrong."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import qat.export.bisect as bisect
import qat.export.parts as parts_module
from qat.calibrate import calibrate
from qat.cli import main
from qat.core.errors import UserError
from qat.core.files import sha256
from qat.core.tensors import compare_tensors
from qat.export import ExportOptions, export_parts, torch_parts
from qat.export.bisect import _Calls, _Matches, diagnose
from qat.export.passes import in_flavour
from qat.export.verify import Verification
from qat.families.bevfusion.frames import made_frame, random_frame
from qat.families.bevfusion.settings import pipeline_settings
from qat.lean.flavours import FLAVOURS
from qat.manifest import load_manifest
from qat.runtime.verify import verify_folder
from tests.messages import says

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings(fresh_config, small_cameras):
    return pipeline_settings(fresh_config())


@pytest.fixture(scope="module")
def frames(settings):
    """Two frames that are not the random one."""
    found = [random_frame(settings, seed) for seed in (11, 12)]
    for token, frame in zip(("first", "second"), found, strict=True):
        frame.token = token
    return found


@pytest.fixture(scope="module")
def detector(make_detector, fresh_config):
    return make_detector(fresh_config())


@pytest.fixture(scope="module")
def quantized(make_detector, fresh_config, frames):
    return calibrate(make_detector(fresh_config()), frames, "max")[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, detector, small_cameras, frames):
    folder = tmp_path_factory.mktemp("verified") / "onnx_fp32"
    export_parts(detector, folder, ExportOptions("fp32"), frames=frames)
    return folder


@pytest.fixture(scope="module")
def exported_int8(tmp_path_factory, quantized, small_cameras, frames):
    folder = tmp_path_factory.mktemp("verified") / "onnx_int8"
    export_parts(quantized, folder, ExportOptions("int8"), frames=frames)
    return folder


def running_parts(detector, settings):
    """Parts in PyTorch with what each takes in of the random frame."""
    parts = torch_parts(detector)
    verification = Verification(detector, parts)
    for name, part in parts.items():
        feeds = verification.feeds(name)
        yield name, part, feeds
        verification._advance(name, [part.run(feeds)])


@pytest.fixture(scope="module")
def float_parts(detector, settings):
    return {name: (part, feeds) for name, part, feeds in running_parts(detector, settings)}


@pytest.fixture(scope="module")
def int8_parts(quantized, settings):
    return {name: (part, feeds) for name, part, feeds in running_parts(quantized, settings)}


@pytest.fixture
def faulty(monkeypatch):
    """(part, change) → exports change this part's graph, as a faulty exporter would."""

    def arrange(part, change):
        simplify = parts_module.simplify

        def changed(model, name, **more):
            model = simplify(model, name, **more)
            if name == part:
                change(model.graph)
            return model

        monkeypatch.setattr(parts_module, "simplify", changed)

    return arrange


def test_every_output_has_the_figures_of_every_frame_and_those_of_the_worst(exported, detector, settings, frames):
    manifest = load_manifest(exported)
    assert manifest["verification"]["frames"] == ["made-up:0", "first", "second"]
    made = [made_frame(settings, 0), *frames]
    backbone = torch_parts(detector)["camera.backbone"]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(exported / "camera.backbone.onnx", options)
    expected = {"camera_feature": [], "camera_depth_weights": []}
    for frame in made:
        feeds = {"img": frame.img[None], "depth": frame.depth[None]}
        reference = backbone.run(feeds)
        for name, value in zip(expected, session.run(list(expected), feeds), strict=True):
            expected[name].append(compare_tensors(reference[name], value))
    for name, rows in expected.items():
        found = manifest["parts"]["camera.backbone"]["verification"][name]
        sqnr = [row["sqnr_db"] for row in rows]
        assert found["frames"]["sqnr_db"] == pytest.approx(sqnr, abs=1e-3)
        assert found["frames"]["max_abs"] == pytest.approx([row["max_abs"] for row in rows], rel=1e-3)
        assert found["frames"]["tolerance_db"] == [80.0] * 3
        assert found["frame"] == manifest["verification"]["frames"][int(np.argmin(sqnr))]
        assert found["sqnr_db"] == pytest.approx(min(sqnr), abs=1e-3)
    for part in manifest["parts"].values():
        assert all(len(entry["frames"]["sqnr_db"]) == 3 for entry in part["verification"].values())


def test_int8_has_a_tolerance_of_each_frames_own(exported_int8):
    manifest = load_manifest(exported_int8)
    found = manifest["parts"]["fuser"]["verification"]["middle"]["frames"]
    lost = np.array(found["quantization_db"])
    assert found["float_tolerance_db"] == pytest.approx(np.minimum(80, lost - 3), abs=2e-3)
    # What is twice as noisy as the simulation may be this far from it: noises of amplitudes 1 and √2, opposed.
    assert found["tolerance_db"] == pytest.approx(np.minimum(80, lost - 20 * np.log10(1 + 2**0.5)), abs=2e-3)
    assert len(set(found["tolerance_db"])) == 3 and manifest["verification"]["passed"]


def test_the_same_detector_and_frames_give_the_same_bytes(tmp_path, exported, detector, small_cameras, frames):
    export_parts(detector, tmp_path / "again", ExportOptions("fp32"), frames=frames)
    for file in exported.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    recorded = load_manifest(exported)["verification"]
    assert recorded["sha256"] == sha256(exported / recorded["file"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {name: value[:2] for name, value in f.items()}, "frame odd: found 2 cameras, expected 3"),
        (
            lambda f: f | {"img": f["img"][..., :80]},
            r"frame odd: img: found float32\[3, 3, 64, 80\], expected float32\[3, 3, 64, 96\]",
        ),
        (lambda f: f | {"depth": f["depth"].astype(np.float64)}, "frame odd: depth: found float64"),
        (lambda f: f | {"img": f["img"] * np.float32("nan")}, "frame odd: img: found NaN"),
    ],
)
def test_frames_of_another_rig_are_refused(tmp_path, detector, small_cameras, frames, change, message):
    arrays = {name: value for name, value in vars(frames[0]).items() if name != "token"}
    frame = SimpleNamespace(token="odd", **change(arrays))
    with pytest.raises(UserError, match=message):
        export_parts(detector, tmp_path / "out", ExportOptions("fp32"), frames=[frame])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["fp32", "int8", "onnxruntime"])
def test_every_layer_of_every_part_finds_its_node(exported, exported_int8, float_parts, int8_parts, kind):
    """Matched by the scopes; checked by the weights' names, which the matching does not read."""
    parts, folder = (float_parts, exported) if kind == "fp32" else (int8_parts, exported_int8)
    for name, (part, feeds) in parts.items():
        calls = _Calls(part, feeds)
        model = onnx.load(folder / f"{name}.onnx")
        matches = _Matches(in_flavour(model, FLAVOURS[kind]) if kind == "onnxruntime" else model, calls)
        layers = [i for i, c in enumerate(calls.calls) if hasattr(c.module, "weight") and c.module.weight.ndim > 1]
        missing = {calls.calls[at].path.rpartition("vtransform.")[2] for at in set(layers) - set(matches.names)}
        # the CPU flavours' products leave their results channels-last
        products = {"depthnet.6"} if (kind, name) == ("onnxruntime", "camera.backbone") else set()
        assert layers and missing == products
        for at in set(layers) & set(matches.names):
            node = matches.producer[matches.names[at]]
            while node.op_type in ("Transpose", "Add"):  # a convolution as a matrix product
                node = matches.producer[node.input[0]]
            source = matches.producer.get(node.input[1])
            while source is not None and source.op_type != "Constant" and source.input:
                node, source = source, matches.producer.get(source.input[0])
            weight = node.input[0] if node.op_type.endswith("Linear") else node.input[1]
            if not weight.startswith("onnx::"):  # a folded batch norm takes the name away
                path = weight.removesuffix("_t").removesuffix("_s8").removesuffix(".weight").partition(".")[2]
                assert calls.calls[at].path.endswith(path)


def scale_weight(graph, marker, factor):
    """Multiplies the weight of the convolution whose node's name holds `marker`."""
    node = next(n for n in graph.node if n.op_type == "Conv" and marker in n.name)
    makers = {output: n for n in graph.node for output in n.output}
    name = node.input[1]
    while name in makers and makers[name].op_type != "Constant":
        name = makers[name].input[0]
    initializer = next((i for i in graph.initializer if i.name == name), None)
    holder = makers[name].attribute[0].t if initializer is None else initializer
    values = numpy_helper.to_array(holder) * np.float32(factor)
    holder.CopyFrom(numpy_helper.from_array(values, holder.name))


@pytest.mark.parametrize(
    ("part", "marker", "module", "output"),
    [
        ("camera.backbone", "layer2.0/conv2/", "encoders.camera.backbone.layer2.0.conv2", "camera_feature"),
        (
            "camera.backbone",
            "layer2.0/downsample/downsample.1/",
            "encoders.camera.backbone.layer2.0.downsample.1",
            "camera_depth_weights",
        ),
        ("camera.backbone", "dtransform.3/", "encoders.camera.vtransform.dtransform.3", "camera_feature"),
        ("fuser", "backbone.1.0/conv1/", "decoder.backbone.1.0.conv1", "middle"),
        ("head.bbox", "task_heads.1/rot/rot.0/conv/", "heads.object.task_heads.1.rot.0.conv", "rot_1"),
    ],
)
def test_a_changed_weight_is_named_by_its_layer(exported, float_parts, part, marker, module, output):
    """In the trunk, beside a residual branch, in a second input's branch, and in one of a head's parallel branches."""
    model = onnx.load(exported / f"{part}.onnx")
    scale_weight(model.graph, marker, -3)
    (layer,) = diagnose(model, model, *float_parts[part], output)
    assert layer.what == "output" and layer.module == module and marker in layer.node and layer.operator == "Conv"
    assert layer.sqnr_db < layer.tolerance_db == 80 and (layer.before_db is None or layer.before_db > 80)


def test_a_graph_that_is_right_has_no_first_diverging_layer(exported_int8, int8_parts):
    model = onnx.load(exported_int8 / "fuser.onnx")
    assert diagnose(model, model, *int8_parts["fuser"], "middle") == []


@pytest.mark.parametrize("flavour", ["tensorrt", "onnxruntime"])
def test_a_changed_weight_of_an_int8_graph_is_named_by_its_layer(exported_int8, int8_parts, flavour):
    """By its values: what is changed is the weight before its rounding, and the scale is its quantizer's own."""
    model = onnx.load(exported_int8 / "fuser.onnx")
    scale_weight(model.graph, "/conv1_1/", -0.9)
    graph = in_flavour(model, FLAVOURS[flavour]) if flavour == "onnxruntime" else model
    (layer,) = diagnose(graph, model, *int8_parts["fuser"], "middle")
    assert layer.what == "output" and layer.module == "decoder.backbone.1.0.conv1"
    assert layer.node == "/decoder/conv1_1/Conv" and layer.sqnr_db < 10 < 40 < layer.before_db


def test_a_changed_scale_is_named_by_its_quantizer(exported_int8, int8_parts):
    model = onnx.load(exported_int8 / "fuser.onnx")
    node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and "backbone_1_0_relu/" in n.name)
    holder = next(n for n in model.graph.node if n.output[0] == node.input[1]).attribute[0].t
    holder.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(holder) * np.float32(1.02), holder.name))
    layer = diagnose(model, model, *int8_parts["fuser"], "middle")[0]
    assert layer.what == "scale" and layer.module == "quant_decoder_backbone_1_0_relu"
    assert "found scale" in layer.note and layer.before_db > layer.sqnr_db


def test_a_changed_scale_of_a_weight_is_named_with_its_channel(exported_int8, int8_parts):
    model = onnx.load(exported_int8 / "fuser.onnx")
    node = next(n for n in model.graph.node if n.name == "/decoder/conv2/weight_quantizer/QuantizeLinear")
    holder = next(i for i in model.graph.initializer if i.name == node.input[1])
    scales = numpy_helper.to_array(holder).copy()
    scales[5] *= 4
    holder.CopyFrom(numpy_helper.from_array(scales, holder.name))
    layer = diagnose(model, model, *int8_parts["fuser"], "middle")[0]
    assert layer.what == "scale" and layer.module == "decoder.backbone.0.0.conv2"
    assert layer.node == "/decoder/conv2/Conv" and "of channel 5" in layer.note


def test_a_removed_quantizer_is_named(exported_int8, int8_parts):
    model = onnx.load(exported_int8 / "fuser.onnx")
    graph = model.graph
    quantize = next(n for n in graph.node if n.op_type == "QuantizeLinear" and "backbone_1_0_relu/" in n.name)
    dequantize = next(n for n in graph.node if quantize.output[0] in n.input)
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == dequantize.output[0]:
                node.input[i] = quantize.input[0]
    graph.node.remove(quantize)
    graph.node.remove(dequantize)
    layer = diagnose(model, model, *int8_parts["fuser"], "middle")[0]
    assert layer.module == "quant_decoder_backbone_1_0_relu" and "missing" in layer.note
    assert layer.operator == "Conv" and layer.node == "/decoder/conv2_1/Conv"  # which takes it unrounded now
    assert layer.sqnr_db < layer.before_db


def test_a_long_chain_is_searched_in_few_passes(exported, float_parts, monkeypatch):
    model = onnx.load(exported / "camera.backbone.onnx")
    scale_weight(model.graph, "layer2.0/conv1/", -3)
    passes = []
    once = bisect._Search._pass
    monkeypatch.setattr(bisect._Search, "_pass", lambda self, names: (passes.append(len(names)), once(self, names)))
    (layer,) = diagnose(model, model, *float_parts["camera.backbone"], "camera_depth_weights")
    assert layer.module == "encoders.camera.backbone.layer2.0.conv1"
    # Of 40 matched tensors 7, then the 5 between two of these, and once more in the branch that this leads to.
    assert len(passes) <= 5 and max(passes) <= bisect.POINTS


def test_a_failed_export_says_which_layer_and_leaves_the_other_parts_alone(tmp_path, quantized, small_cameras, faulty):
    def enlarge(graph):
        node = next(n for n in graph.node if n.op_type == "QuantizeLinear" and "backbone_1_0_relu/" in n.name)
        holder = next(n for n in graph.node if n.output[0] == node.input[1]).attribute[0].t
        holder.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(holder) * np.float32(1.02), holder.name))

    faulty("fuser", enlarge)
    manifest = export_parts(quantized, tmp_path / "out", ExportOptions("int8", flavour="onnxruntime"))
    assert not manifest["verification"]["passed"]
    layer = manifest["parts"]["fuser"]["divergence"][0]
    assert layer["module"] == "quant_decoder_backbone_1_0_relu" and layer["frame"] == "made-up:0"
    assert not any("divergence" in other for name, other in manifest["parts"].items() if name != "fuser")


def test_a_graph_as_near_to_float64_as_pytorch_passes_below_80_db(
    tmp_path, detector, small_cameras, monkeypatch, faulty
):
    """As with resnest50d, where PyTorch has 73 dB itself: here float32 has less than what is asked."""
    monkeypatch.setattr("qat.core.verification.FP32_DB", 190.0)

    def export():
        manifest = export_parts(detector, tmp_path / "out", ExportOptions("fp32", parts=["fuser"]))
        return manifest["parts"]["fuser"]["verification"]["middle"]

    right = export()
    assert right["passed"] and right["pytorch_db"] < 150
    assert right["tolerance_db"] == pytest.approx(right["pytorch_db"] - 20 * np.log10(2), abs=2e-3)
    assert verify_folder(tmp_path / "out")["passed"]
    faulty("fuser", lambda graph: scale_weight(graph, "backbone.1.0/conv2/", 1 + 1e-5))
    wrong = export()
    assert not wrong["passed"] and 80 < wrong["sqnr_db"] < wrong["tolerance_db"]


@pytest.fixture
def checkpoint(tmp_path, make_config, make_detector):
    small_config = make_config()
    for step in small_config["data"]["test"]["pipeline"]:
        if step["type"] == "ImageAug3D":
            step["resize_lim"] = [0.25, 0.25]
    path = tmp_path / "float.pth"
    torch.save({"state_dict": make_detector(small_config).state_dict(), "config": small_config}, path)
    return path


def test_the_command_verifies_on_example_data_unless_told_otherwise(checkpoint, monkeypatch, tmp_path, capsys):
    out = tmp_path / "onnx_fp32" / "manifest.json"
    data = ["--data", str(ROOT / "example-data"), "--split", "calib", "--frames", "1"]
    assert main(["export-camera", "--ckpt", str(checkpoint), *data]) == 0
    used = json.loads(out.read_text())["verification"]["frames"]
    samples = json.loads((ROOT / "example-data/v1.0-synth/sample.json").read_text())
    assert used[0] == "made-up:0" and used[1] in {sample["token"] for sample in samples} and len(used) == 2
    assert main(["verify", str(out.parent)]) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)  # where there is no example-data
    assert main(["export-camera", "--ckpt", str(checkpoint), "--split", "calib"]) == 2
    assert says(capsys.readouterr().err, "error: --split", "--data ROOT")


def test_a_divergence_is_printed(checkpoint, monkeypatch, tmp_path, capsys, faulty):
    monkeypatch.chdir(tmp_path)
    faulty("fuser", lambda graph: scale_weight(graph, "backbone.1.0/conv2/", -3))
    assert main(["export-camera", "--ckpt", str(checkpoint)]) == 1
    assert json.loads((tmp_path / "onnx_fp32/manifest.json").read_text())["verification"]["frames"] == ["made-up:0"]
    error = capsys.readouterr().err
    assert "first diverging layer: Conv /backbone/backbone.1/backbone.1.0/conv2/Conv" in error
    assert "PyTorch's decoder.backbone.1.0.conv2: " in error and "dB before it" in error


def test_a_keyframe_folder_serves_as_data(checkpoint, tmp_path, frames):
    """In mmdetection3d's form, as shared/nuscenes-sample is."""
    from PIL import Image

    from qat.families.bevfusion.config import CAMERAS

    folder = tmp_path / "keyframe"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = {}
    for n, name in enumerate(CAMERAS):
        Image.fromarray(rng.integers(0, 256, (280, 400, 3), dtype=np.uint8)).save(folder / f"{name}.png")
        lidar2cam = np.linalg.inv(random_frame_matrix(n))
        images[name] = {
            "img_path": f"{name}.png",
            "cam2img": [[300, 0, 200], [0, 300, 140], [0, 0, 1]],
            "lidar2cam": lidar2cam.tolist(),
        }
    rng.uniform(-10, 10, (500, 5)).astype(np.float32).tofile(folder / "points.bin")
    sample = {"token": "mine", "images": images, "lidar_points": {"lidar_path": "points.bin"}, "instances": []}
    (folder / "info.json").write_text(json.dumps({"categories": {}, "sample": sample}))
    assert main(["export-camera", "--ckpt", str(checkpoint), "--data", str(folder)]) == 0
    manifest = load_manifest(tmp_path / "onnx_fp32")
    assert manifest["verification"]["frames"] == ["made-up:0", "mine"]
    assert main(["export-camera", "--ckpt", str(checkpoint), "--data", str(folder), "--split", "calib"]) == 2


def random_frame_matrix(n):
    c, s = np.cos(n), np.sin(n)
    matrix = np.eye(4)
    matrix[:3, :3] = [[s, 0, c], [-c, 0, s], [0, -1, 0]]
    return matrix
