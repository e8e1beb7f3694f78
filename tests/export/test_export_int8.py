import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from pytorch_quantization.nn import TensorQuantizer

from qat.core.errors import UserError
from qat.core.tensors import compare_tensors
from qat.engine import Options, build
from qat.export import ExportOptions, Origin, export_parts, torch_parts
from qat.export.lookups import constants
from qat.families.bevfusion.frames import random_frame
from qat.lean.modes import qdq_tracing, quantizers, quantizers_off
from qat.manifest import load_manifest
from qat.runtime import Pipeline

RECIPE = {"method": "max", "frames": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quantized, small_cameras):
    out = tmp_path_factory.mktemp("exported") / "int8"
    export_parts(quantized, out, ExportOptions("int8"), origin=Origin(recipe=RECIPE))
    return out


def test_int8_graphs_hold_one_symmetric_qdq_pair_for_each_quantizer_that_is_on(folder, quantized):
    parts = {"camera": "camera.backbone", "vtransform": "camera.vtransform", "decoder": "fuser", "head": "head.bbox"}
    for own, name in parts.items():
        graph = onnx.load(folder / f"{name}.onnx").graph
        quantize = [node for node in graph.node if node.op_type == "QuantizeLinear"]
        dequantize = [node for node in graph.node if node.op_type == "DequantizeLinear"]
        graph_module = quantized.parts[own]
        modules = dict(graph_module.named_modules())
        # A quantizer that several tensors share is called once for each of them.
        called = [modules[node.target] for node in graph_module.graph.nodes if node.op == "call_module"]
        activations = [m for m in called if isinstance(m, TensorQuantizer) and not m._disabled]
        weights = [m for m in called if hasattr(m, "weight_quantizer") and not m.weight_quantizer._disabled]
        assert len(quantize) == len(dequantize) == len(activations) + len(weights), name
        constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
        constants |= {
            n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"
        }
        for node in quantize:
            zero = constants[node.input[2]]
            assert zero.dtype == np.int8 and not zero.any()
        scales = sorted(float(constants[n.input[1]]) for n in quantize if n.input[0] not in constants)
        expected = sorted(float(q._amax) / 127 for q in activations)
        np.testing.assert_allclose(scales, expected, rtol=1e-6)


def test_manifest_says_which_parts_are_int8_and_how_they_were_calibrated(tmp_path, folder, quantized, small_cameras):
    manifest = load_manifest(folder)
    assert {name: part["precision"] for name, part in manifest["parts"].items()} == {
        "camera.backbone": "int8",
        "camera.vtransform": "fp32",
        "fuser": "int8",
        "head.bbox": "int8",
    }
    assert manifest["calibration"] == RECIPE and manifest["flavour"] == "tensorrt"
    assert manifest["verification"]["passed"]
    again = export_parts(quantized, tmp_path / "again", ExportOptions("int8"), origin=Origin(recipe=RECIPE))
    assert again == manifest
    for part in manifest["parts"].values():
        assert (folder / part["file"]).read_bytes() == (tmp_path / "again" / part["file"]).read_bytes()


def test_a_quantized_detector_exports_to_fp16_without_qdq_and_keeps_its_quantizers(
    tmp_path, quantized, small_cameras, settings
):
    frame = random_frame(settings, seed=1)
    feeds = {"img": frame.img[None], "depth": frame.depth[None]}
    before = torch_parts(quantized)["camera.backbone"].run(feeds)
    manifest = export_parts(quantized, tmp_path / "fp16", ExportOptions("fp16"))
    for part in manifest["parts"].values():
        assert "QuantizeLinear" not in part["operators"]
    after = torch_parts(quantized)["camera.backbone"].run(feeds)
    np.testing.assert_array_equal(after["camera_feature"], before["camera_feature"])


def test_folding_does_not_change_the_detector(tmp_path, quantized, small_config, settings, make_detector):
    detector = make_detector(small_config)
    frame = random_frame(settings, seed=1)
    expected = Pipeline(torch_parts(detector), settings).forward(frame)
    with quantizers_off(quantized):
        found = Pipeline(torch_parts(quantized), settings).forward(frame)
    for name in expected:
        assert compare_tensors(expected[name], found[name])["sqnr_db"] > 80, name


def test_onnxruntime_flavour_is_fused_into_integer_convolutions(tmp_path, folder, quantized, small_cameras, settings):
    before = {name: q._disabled for name, q in quantizers(quantized).items()}
    out = tmp_path / "ort"
    manifest = export_parts(quantized, out, ExportOptions("int8", flavour="onnxruntime"))
    assert manifest["flavour"] == "onnxruntime" and manifest["verification"]["passed"]
    assert {name: q._disabled for name, q in quantizers(quantized).items()} == before

    def integer_convolutions(path):
        layers = build(path / "fuser.onnx", "onnxruntime", "int8", Options(threads=1, cache=None)).profile(runs=1)
        return sum(layer["type"] == "QLinearConv" for layer in layers)

    # of 8 convolutions all but the last, whose output leaves the part in float
    assert integer_convolutions(out) == 7 > integer_convolutions(folder)
    assert (out / "fuser.onnx").stat().st_size < (folder / "fuser.onnx").stat().st_size

    frame = random_frame(settings, seed=2)
    with quantizers_off(quantized):
        exact = Pipeline(torch_parts(quantized), settings).forward(frame)
    plain, tuned = (
        Pipeline.load(path, "onnxruntime", options=Options(threads=1, cache=None)).forward(frame)
        for path in (folder, out)
    )
    for name in settings["head_maps"]:
        # Rounding the residual branches too costs something; u8 gives something back.
        loss = (
            compare_tensors(exact[name], plain[name])["sqnr_db"] - compare_tensors(exact[name], tuned[name])["sqnr_db"]
        )
        assert loss < 6, name


def test_onnxruntime_flavour_knows_the_sign_of_what_comes_out_of_the_part_before(tmp_path, quantized, small_cameras):
    export_parts(quantized, tmp_path / "ort", ExportOptions("int8", flavour="onnxruntime"))
    for part, tensor in (("fuser", "camera"), ("head.bbox", "middle")):
        graph = onnx.load(tmp_path / "ort" / f"{part}.onnx").graph
        (rounding,) = (n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == tensor)
        zero = constants(graph)[rounding.input[2]]
        assert zero.dtype == np.uint8 and zero == 0, part


def test_onnxruntime_flavour_is_for_int8_alone(tmp_path, quantized):
    with pytest.raises(UserError, match="flavour onnxruntime: found precision fp16, expected int8"):
        export_parts(quantized, tmp_path / "out", ExportOptions("fp16", flavour="onnxruntime"))


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_engines_run_int8_like_the_fake_quantized_detector(folder, quantized, settings, backend):
    frame = random_frame(settings, seed=2)
    simulated = Pipeline(torch_parts(quantized), settings).forward(frame)
    with quantizers_off(quantized):
        exact = Pipeline(torch_parts(quantized), settings).forward(frame)
    found = Pipeline.load(folder, backend, options=Options(threads=1, cache=None)).forward(frame)
    for name in settings["head_maps"]:
        quantization = compare_tensors(exact[name], simulated[name])["sqnr_db"]
        # An engine that fuses layers rounds some tensors elsewhere: its own rounding noise is at most as strong.
        assert compare_tensors(simulated[name], found[name])["sqnr_db"] > quantization - 3, name


def _with_fuser(monkeypatch, change):
    """Makes the export change the fuser's graph, as a faulty exporter would."""
    import qat.export.parts as parts

    simplify = parts.simplify

    def faulty(model, name, **more):
        model = simplify(model, name, **more)
        if name == "fuser":
            change(model.graph)
        return model

    monkeypatch.setattr(parts, "simplify", faulty)


def test_verification_fails_on_a_graph_with_another_scale(tmp_path, quantized, small_cameras, monkeypatch):
    def enlarge(graph):
        node = next(n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "camera")
        holder = next(n for n in graph.node if n.output[0] == node.input[1])
        value = numpy_helper.to_array(holder.attribute[0].t) * np.float32(1.02)
        holder.attribute[0].t.CopyFrom(numpy_helper.from_array(value))

    _with_fuser(monkeypatch, enlarge)
    manifest = export_parts(quantized, tmp_path / "int8", ExportOptions("int8"))
    assert not manifest["verification"]["passed"]
    assert manifest["parts"]["fuser"]["scales"]["missing"] == manifest["parts"]["fuser"]["scales"]["unknown"] == 1
    assert manifest["parts"]["camera.backbone"]["scales"]["passed"]


def test_verification_fails_on_a_graph_that_lost_a_quantizer(tmp_path, quantized, small_cameras, monkeypatch):
    def lose(graph):
        node = next(n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "camera")
        pair = next(n for n in graph.node if n.input and n.input[0] == node.output[0])
        for other in graph.node:
            for i, name in enumerate(other.input):
                if name == pair.output[0]:
                    other.input[i] = "camera"
        graph.node.remove(node)
        graph.node.remove(pair)

    _with_fuser(monkeypatch, lose)
    manifest = export_parts(quantized, tmp_path / "int8", ExportOptions("int8"))
    assert not manifest["verification"]["passed"] and manifest["parts"]["fuser"]["scales"]["missing"] == 1


def test_verification_fails_on_other_int8_weights(tmp_path, quantized, small_cameras, monkeypatch):
    def change(graph):
        weight = next(i for i in graph.initializer if len(i.dims) == 4)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[::-1], weight.name))

    _with_fuser(monkeypatch, change)
    manifest = export_parts(quantized, tmp_path / "int8", ExportOptions("int8"))
    assert not manifest["parts"]["fuser"]["verification"]["middle"]["passed"]


def test_tracing_mode_is_restored(quantized, tmp_path, small_cameras):
    kind = type(next(iter(quantizers(quantized).values())))
    before = kind.use_fb_fake_quant
    with pytest.raises(RuntimeError), qdq_tracing():
        assert kind.use_fb_fake_quant
        raise RuntimeError
    assert kind.use_fb_fake_quant == before


def test_openvino_runs_the_convolutions_in_int8(folder):
    engine = build(folder / "fuser.onnx", "openvino", "int8", Options(threads=1, cache=None))
    kinds = [layer["precision"] for layer in engine.profile(runs=1) if layer["type"] == "Convolution"]
    assert len(kinds) == 8 and set(kinds) <= {"i8", "u8"}
