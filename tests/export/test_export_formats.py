"""What export-camera writes beside plain parts, from the command line on."""

import json

import numpy as np
import onnx
import pytest
import torch
import yaml

from qat.calibrate import load_ptq, save_ptq
from qat.cli import main
from qat.core.errors import UserError
from qat.export import ExportOptions, export_parts
from qat.export.lookups import constants
from qat.families.bevfusion.frames import random_frame
from qat.manifest import load_manifest
from qat.runtime import Pipeline
from tests.messages import says


@pytest.fixture(autouse=True)
def away_from_example_data(tmp_path, monkeypatch):
    """Exports here are verified on the made-up frame alone."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def ptq(tmp_path_factory, tiny_config, make_tiny_model, tiny_frames):
    """A PTQ checkpoint of the tiny detector, with six cameras as the command expects."""
    from qat.calibrate import calibrate

    model = make_tiny_model()
    quantized, _ = calibrate(model, tiny_frames)
    path = tmp_path_factory.mktemp("ptq") / "ptq.pth"
    save_ptq(path, quantized, model, {"method": "mse", "frames": 3})
    return path


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_strongly_typed_parts_verify_and_run(ptq, tmp_path, capsys, precision):
    out = tmp_path / "strong"
    command = ["export-camera", "--ckpt", str(ptq), f"--{precision}", "--flavour", "tensorrt-strong", "--out", str(out)]
    assert main(command) == 0
    manifest = load_manifest(out)
    fuser = manifest["parts"]["fuser"]
    assert fuser["precision"] == precision
    assert fuser["opset"] == (19 if precision == "int8" else 13)
    types = {i.data_type for i in onnx.load(out / "fuser.onnx").graph.initializer}
    assert (onnx.TensorProto.FLOAT16 in types) == (precision != "fp32")
    assert (onnx.TensorProto.INT8 in types) == (precision == "int8")
    assert manifest["parts"]["camera.vtransform"]["precision"] == ("fp32" if precision == "fp32" else "fp16")
    capsys.readouterr()
    assert main(["verify", str(out)]) == 0
    if precision == "int8":
        return  # ONNX Runtime 1.31 brings Q/DQ around a concatenation to a kernel that takes no FP16 scales
    pipeline = Pipeline.load(out, "onnxruntime")
    assert np.isfinite(pipeline.forward(random_frame(manifest["pipeline"], 1))["middle"]).all()


def test_fp16_inputs_and_outputs(ptq, tmp_path, capsys):
    out = tmp_path / "strong"
    command = ["export-camera", "--ckpt", str(ptq), "--flavour", "tensorrt-strong", "--io", "fp16", "--out", str(out)]
    assert main(command) == 0
    for part in load_manifest(out)["parts"].values():
        assert {spec["dtype"] for spec in (*part["inputs"].values(), *part["outputs"].values())} == {"float16"}
    assert main(["verify", str(out)]) == 0
    with pytest.raises(UserError, match="found FP16 inputs and outputs, expected FP32"):
        Pipeline.load(out, "onnxruntime")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_programs_of_torch_export(ptq, tmp_path, capsys, precision):
    out = tmp_path / "pt2"
    command = ["export-camera", "--ckpt", str(ptq), f"--{precision}", "--format", "pt2", "--parts", "fuser"]
    assert main([*command, "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["fuser.pt2", "manifest.json"]
    program = torch.export.load(out / "fuser.pt2")
    quantized, _ = load_ptq(ptq)
    x = torch.rand(1, 10, 16, 16)
    if precision == "int8":
        with torch.inference_mode():
            torch.testing.assert_close(program.module()(x), quantized.parts["decoder"](x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "flags,parts",
    [
        (["--format", "pt2", "--opset", "17"], ("--opset: ", "--format pt2")),
        (["--format", "pt2", "--flavour", "openvino"], ("--flavour: ", "--format pt2")),
        (["--io", "fp16"], ("io fp16: found flavour tensorrt in int8",)),
        (["--seed", "3"], ("--seed: ", "--init random")),
        (["--fp32", "--flavour", "openvino"], ("flavour openvino: found precision fp32", "expected int8")),
        (["--fp16", "--flavour", "onnxruntime"], ("flavour onnxruntime: found precision fp16", "expected int8")),
    ],
)
def test_flags_that_do_not_go_together_are_refused(ptq, tmp_path, capsys, flags, parts):
    out = tmp_path / "out"
    assert main(["export-camera", "--ckpt", str(ptq), "--out", str(out), *flags]) == 2
    error = capsys.readouterr().err
    assert says(error, *parts) and error.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(
    "flags,parts",
    [
        (["--format", "onnx-e2e"], ("onnx-e2e was removed", "--format", "Pipeline", "bevqat benchmark")),
        (["--calibration-cache"], ("--calibration-cache was removed", "omit it")),
    ],
)
def test_what_was_removed_is_refused_with_what_to_use_instead(tmp_path, capsys, flags, parts):
    with pytest.raises(SystemExit) as ended:
        main(["export-camera", "--ckpt", "model.pth", "--out", str(tmp_path / "out"), *flags])
    assert ended.value.code == 2
    assert says(capsys.readouterr().err.splitlines()[-1], *parts)


def test_random_weights_export_without_a_checkpoint(tmp_path, tiny_config, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config))
    base = ["export-camera", "--config", str(tmp_path / "config.yaml"), "--init", "random"]
    hashes = []
    for seed, name in (("0", "a"), ("0", "b"), ("1", "c")):
        assert main([*base, "--seed", seed, "--parts", "fuser", "--out", str(tmp_path / name)]) == 0
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["checkpoint"] is None
        hashes.append(manifest["parts"]["fuser"]["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]
    assert main([*base, "--int8"]) == 2
    assert "calibrate --init random" in capsys.readouterr().err


@pytest.mark.parametrize("flavour", ["onnxruntime", "openvino"])
def test_cpu_flavours_have_products_of_integers_and_channels_last(tmp_path, quantized, small_cameras, flavour):
    manifest = export_parts(quantized, tmp_path / "out", ExportOptions("int8", flavour=flavour))
    assert manifest["verification"]["passed"]
    operators = manifest["parts"]["camera.backbone"]["operators"]
    # to the product's rows, and the depth weights back; around the depth map's first convolution, a product too
    assert operators["MatMul"] == 1 and operators["Transpose"] == 4
    graph = onnx.load(tmp_path / "out" / "camera.backbone.onnx").graph
    known = constants(graph)
    zero_points = {known[node.input[2]].dtype for node in graph.node if node.op_type == "QuantizeLinear"}
    assert zero_points == {np.dtype(np.uint8)}
