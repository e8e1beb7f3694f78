"""What an export can be asked for: operator set, batch, some parts alone, more parts in INT8, seven-bit weights."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from qat.core.errors import UserError
from qat.export import ExportOptions, export_parts
from qat.families.bevfusion.frames import random_frame
from qat.lean.modes import quantizers
from qat.manifest import load_manifest
from qat.runtime import Pipeline


def run(path, feeds):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("opset", [16, 20])
@pytest.mark.parametrize("flavour", ["tensorrt", "onnxruntime"])
def test_another_opset_is_written_and_verified(tmp_path, quantized, small_cameras, opset, flavour):
    manifest = export_parts(quantized, tmp_path / "out", ExportOptions("int8", opset=opset, flavour=flavour))
    assert manifest["verification"]["passed"] and manifest["opset"] == opset
    for part in manifest["parts"].values():
        assert onnx.load(tmp_path / "out" / part["file"]).opset_import[0].version == opset


def test_a_batch_of_two_gives_what_two_runs_of_one_give(tmp_path, quantized, settings, small_cameras):
    export_parts(quantized, tmp_path / "one", ExportOptions("int8"))
    manifest = export_parts(quantized, tmp_path / "two", ExportOptions("int8", batch=2))
    assert manifest["batch"] == 2 and manifest["verification"]["passed"]
    assert manifest["parts"]["camera.backbone"]["inputs"]["img"]["shape"] == [2, 3, 3, 64, 96]
    assert manifest["parts"]["fuser"]["outputs"]["middle"]["shape"][0] == 2
    frames = [random_frame(settings, seed) for seed in (1, 2)]
    single = [
        run(tmp_path / "one" / "camera.backbone.onnx", {"img": f.img[None], "depth": f.depth[None]}) for f in frames
    ]
    both = run(
        tmp_path / "two" / "camera.backbone.onnx",
        {name: np.stack([getattr(f, name) for f in frames]) for name in ("img", "depth")},
    )
    for name, value in both.items():
        np.testing.assert_allclose(value, np.concatenate([s[name] for s in single]), atol=1e-5)


@pytest.mark.parametrize("precision,flavour", [("fp32", "tensorrt"), ("int8", "tensorrt"), ("int8", "onnxruntime")])
def test_a_dynamic_batch_runs_any_number_of_samples(tmp_path, quantized, settings, small_cameras, precision, flavour):
    out = tmp_path / "out"
    manifest = export_parts(quantized, out, ExportOptions(precision, flavour=flavour, dynamic_batch=True))
    assert manifest["batch"] is None
    assert manifest["verification"]["passed"]
    backbone = manifest["parts"]["camera.backbone"]
    assert backbone["inputs"]["img"]["shape"] == ["batch", 3, 3, 64, 96]
    assert backbone["outputs"]["camera_feature"]["shape"][0] == "views"
    frames = [random_frame(settings, seed) for seed in (1, 2, 3)]
    three = run(
        out / "camera.backbone.onnx",
        {name: np.stack([getattr(f, name) for f in frames]) for name in ("img", "depth")},
    )
    assert three["camera_feature"].shape[0] == 9
    last = run(out / "camera.backbone.onnx", {"img": frames[2].img[None], "depth": frames[2].depth[None]})
    np.testing.assert_allclose(three["camera_feature"][6:], last["camera_feature"], atol=1e-5)
    Pipeline.load(out, "onnxruntime").forward(frames[0])


def test_some_parts_alone_are_the_same_files(tmp_path, quantized, small_cameras):
    chosen = ["camera.vtransform", "fuser"]
    for flavour in ("tensorrt", "onnxruntime"):
        export_parts(quantized, tmp_path / "all", ExportOptions("int8", flavour=flavour))
        export_parts(quantized, tmp_path / "some", ExportOptions("int8", flavour=flavour, parts=chosen))
        assert list(load_manifest(tmp_path / "some")["parts"]) == chosen
        assert sorted(p.name for p in (tmp_path / "some").glob("*.onnx")) == [f"{n}.onnx" for n in chosen]
        for name in chosen:
            both = [(tmp_path / folder / f"{name}.onnx").read_bytes() for folder in ("all", "some")]
            assert both[0] == both[1]
    with pytest.raises(UserError, match=r"parts camera\.backbone, head\.bbox"):
        Pipeline.load(tmp_path / "some", "onnxruntime")


@pytest.mark.parametrize("flavour", ["tensorrt", "onnxruntime"])
def test_the_vtransform_is_int8_where_asked_for(tmp_path, quantized, small_cameras, flavour):
    before = {name: q._disabled for name, q in quantizers(quantized).items()}
    manifest = export_parts(
        quantized, tmp_path / "out", ExportOptions("int8", flavour=flavour, parts_int8=["vtransform"])
    )
    part = manifest["parts"]["camera.vtransform"]
    assert part["precision"] == "int8" and part["verification"]["feat_out"]["passed"] and part["scales"]["passed"]
    model = onnx.load(tmp_path / "out" / "camera.vtransform.onnx")
    producers = {output: node for node in model.graph.node for output in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 3
    for node in convolutions:
        assert [producers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
    assert before == {name: q._disabled for name, q in quantizers(quantized).items()}
    assert quantized.parts_off == ("vtransform",)


def test_reduced_range_keeps_weights_to_seven_bits(tmp_path, quantized, small_cameras):
    ranges = {name: q.range.clone() for name, q in quantizers(quantized).items()}
    manifest = export_parts(
        quantized, tmp_path / "out", ExportOptions("int8", flavour="onnxruntime", reduce_range=True)
    )
    assert manifest["reduce_range"] and manifest["verification"]["passed"]
    largest = 0
    for part in manifest["parts"].values():
        graph = onnx.load(tmp_path / "out" / part["file"]).graph
        weights = [numpy_helper.to_array(i) for i in graph.initializer if i.data_type == onnx.TensorProto.INT8]
        largest = max([largest, *(int(np.abs(w.astype(int)).max()) for w in weights if w.ndim == 4)])
    assert largest == 63
    for name, quantizer in quantizers(quantized).items():
        assert (quantizer.range == ranges[name]).all(), name


@pytest.mark.parametrize(
    "form,message",
    [
        ({"opset": 12}, "opset: found 12, expected 13 to 20"),
        ({"batch": 0}, "batch: found 0, expected at least 1"),
        ({"parts": ["camera.neck"]}, "parts: found 'camera.neck', expected some of camera.backbone"),
        ({"parts_int8": ["head"]}, "parts-int8: found 'head', expected a part that calibrate kept float: vtransform"),
        ({"reduce_range": True}, "reduce-range: found flavour tensorrt, expected onnxruntime"),
    ],
)
def test_a_form_that_cannot_be_is_refused_by_its_flag(tmp_path, quantized, small_cameras, form, message):
    with pytest.raises(UserError, match=message):
        export_parts(quantized, tmp_path / "out", ExportOptions("int8", **form))
    assert not (tmp_path / "out").exists()
