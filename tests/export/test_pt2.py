import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from qat.core.errors import UserError
from qat.export import ExportOptions, Origin, torch_parts
from qat.export.pt2 import export_pt2
from qat.families.bevfusion.frames import random_frame
from qat.families.bevfusion.settings import pipeline_settings
from qat.lean.modes import quantizers, quantizers_off
from qat.manifest import load_manifest
from qat.model.quantized import QuantizedModel
from qat.runtime import Pipeline
from tests.messages import refused

PARTS = ["camera.backbone", "camera.vtransform", "fuser", "head.bbox"]


@pytest.fixture(scope="module")
def quantized(make_detector, fresh_config):
    quantized = QuantizedModel(make_detector(fresh_config()))
    for n, quantizer in enumerate(quantized.activation_quantizers().values()):
        quantizer.set_range(torch.tensor(2.0 + n / 10))
    return quantized


@pytest.fixture(scope="module")
def folders(tmp_path_factory, quantized, small_cameras):
    root = tmp_path_factory.mktemp("pt2")
    export_pt2(quantized, root / "fp32", ExportOptions("fp32", parts=["camera.vtransform", "fuser"]))
    export_pt2(quantized, root / "int8", ExportOptions("int8"), origin=Origin(recipe={"method": "given"}))
    return {"fp32": root / "fp32", "int8": root / "int8"}


@pytest.fixture(scope="module")
def programs(folders):
    """The reloaded programs by precision and part."""
    return {
        precision: {file.stem: torch.export.load(file) for file in sorted(folder.glob("*.pt2"))}
        for precision, folder in folders.items()
    }


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_reloaded_programs_give_the_modules_bits(folders, precision):
    manifest = load_manifest(folders[precision], format_of_parts="pt2")
    assert manifest["verification"]["passed"] and manifest["precision"] == precision
    assert list(manifest["parts"]) == (PARTS if precision == "int8" else ["camera.vtransform", "fuser"])
    for part in manifest["parts"].values():
        for figures in part["verification"].values():
            assert figures["passed"] and figures["max_abs"] == 0.0


def test_programs_round_where_quantizers_are_on_and_keep_their_ranges(folders, programs, quantized):
    manifest = load_manifest(folders["int8"], format_of_parts="pt2")
    assert manifest["calibration"] == {"method": "given"}
    for own, name in zip(("camera", "vtransform", "decoder", "head"), PARTS, strict=True):
        graph = quantized.parts[own]
        modules = dict(graph.named_modules())
        called = [modules[node.target] for node in graph.graph.nodes if node.op == "call_module"]
        activations = [m for m in called if m in quantizers(graph).values() and not m._disabled]
        weights = [m for m in called if hasattr(m, "weight_quantizer") and not m.weight_quantizer._disabled]
        operators = manifest["parts"][name]["operators"]
        # A layer of one output channel has one scale, and its rounding is per tensor like an activation's.
        single = [m for m in weights if m.weight_quantizer._amax.numel() == 1]
        per_tensor = operators.get("aten.fake_quantize_per_tensor_affine.tensor_qparams", 0)
        assert per_tensor == len(activations) + len(single)
        assert operators.get("aten.fake_quantize_per_channel_affine.default", 0) == len(weights) - len(single)
        ranges = [value for key, value in programs["int8"][name].state_dict.items() if key.endswith("_amax")]
        found = sorted(float(value) for value in ranges if value.numel() == 1)
        assert found == sorted(
            {float(m._amax) for m in activations} | {float(m.weight_quantizer._amax) for m in single}
        )
    assert manifest["parts"]["camera.vtransform"]["precision"] == "fp32"


def test_files_hold_their_own_weights_and_nothing_of_this_machine(folders, programs):
    prefixes = {
        "camera.backbone": "encoders.camera",
        "camera.vtransform": "encoders.camera.vtransform.downsample",
        "fuser": "decoder",
        "head.bbox": "heads.object",
    }
    for precision, folder in folders.items():
        for name, program in programs[precision].items():
            with zipfile.ZipFile(folder / f"{name}.pt2") as archive:
                contents = [archive.read(entry) for entry in archive.namelist()]
            assert not any(word in content for content in contents for word in (b"site-packages", b"qat.", b"/tmp")), (
                name
            )
            weights = [key for key in program.state_dict if key.endswith("weight")]
            assert weights and all(prefixes[name] in key for key in weights), (precision, name)


SCRIPT = """
import json, sys
sys.modules["qat"] = sys.modules["pytorch_quantization"] = None  # importing them raises
import numpy as np, torch
folder = sys.argv[1]
parts = json.load(open(f"{folder}/manifest.json"))["parts"]
arrays = dict(np.load(sys.argv[2]))
for name in ("camera.vtransform", "fuser"):
    part = parts[name]
    module = torch.export.load(f"{folder}/{part['file']}").module()
    given = [torch.from_numpy(arrays[f"{name}:{tensor}"]) for tensor in part["inputs"]]
    with torch.inference_mode():
        found = module(*given)
    found = found if isinstance(found, tuple) else (found,)
    for tensor, value in zip(part["outputs"], found, strict=True):
        assert list(value.shape) == part["outputs"][tensor]["shape"]
        difference = (value - torch.from_numpy(arrays[f"{name}:{tensor}"])).abs().max()
        print(json.dumps([name, tensor, float(difference)]))
"""


def test_programs_run_where_bevqat_is_not_installed(tmp_path, folders, quantized, small_cameras, fresh_config):
    settings = pipeline_settings(fresh_config())
    frame = random_frame(settings, 3)
    parts = torch_parts(quantized)
    tensors = {"img": frame.img[None], "depth": frame.depth[None], **Pipeline(parts, settings).forward(frame)}
    tensors["camera"] = tensors["feat_out"]
    arrays = {
        f"{name}:{tensor}": tensors[tensor]
        for name, part in parts.items()
        for tensor in (*part.wrapper.inputs, *part.wrapper.outputs)
    }
    np.savez(tmp_path / "arrays.npz", **arrays)
    (tmp_path / "load.py").write_text(SCRIPT)
    command = [sys.executable, "load.py", str(folders["int8"]), "arrays.npz"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [tensor for _, tensor, _ in rows] == ["feat_out", "middle"]
    # Another process may sum in another order (its number of threads), and a value at a rounding threshold moves by a step.
    for _, tensor, difference in rows:
        assert difference <= 0.1 * np.abs(tensors[tensor]).max()


def test_a_quantized_detector_gives_a_float_program_and_is_left_as_it_was(folders, quantized):
    manifest = load_manifest(folders["fp32"], format_of_parts="pt2")
    assert not any("fake_quantize" in key for part in manifest["parts"].values() for key in part["operators"])
    with torch.inference_mode():
        x = torch.randn(1, 10, 16, 12, generator=torch.Generator().manual_seed(0))
        rounded = quantized.parts["decoder"](x)
        with quantizers_off(quantized):
            assert not torch.equal(quantized.parts["decoder"](x), rounded)
    assert all("_quant_forward" not in vars(quantizer) for quantizer in quantizers(quantized).values())


def test_batch_norms_of_a_float_detector_stay_as_they_are(tmp_path, make_detector, small_config):
    manifest = export_pt2(make_detector(small_config), tmp_path / "out", ExportOptions("fp32", parts=["fuser"]))
    assert manifest["verification"]["passed"] and list(manifest["parts"]) == ["fuser"]
    assert manifest["parts"]["fuser"]["operators"]["aten.batch_norm.default"] > 0


def test_the_same_detector_gives_the_same_bytes(tmp_path, folders, quantized, small_cameras):
    export_pt2(quantized, tmp_path / "again", ExportOptions("fp32", parts=["fuser"]))
    assert (tmp_path / "again" / "fuser.pt2").read_bytes() == (folders["fp32"] / "fuser.pt2").read_bytes()


def test_a_program_that_computes_something_else_fails_verification(tmp_path, quantized, monkeypatch):
    import qat.export.pt2 as pt2

    honest = pt2.trace_program

    def flawed(wrapper, inputs):
        program = honest(wrapper, inputs)
        state = program.state_dict
        key = next(key for key in state if key.endswith("weight"))
        state[key] = torch.nn.Parameter(state[key] * 1.01, requires_grad=False)
        return program

    monkeypatch.setattr(pt2, "trace_program", flawed)
    manifest = export_pt2(quantized, tmp_path / "out", ExportOptions("fp32", parts=["fuser"]))
    assert not manifest["verification"]["passed"]
    assert (
        not manifest["parts"]["fuser"]["verification"]["middle"]["passed"]
        and (tmp_path / "out" / "fuser.pt2").is_file()
    )


def test_wrong_use_is_told_in_one_line(tmp_path, folders, make_detector, small_config):
    with refused("found parts of format pt2", "expected onnx: those are for torch"):
        Pipeline.load(folders["fp32"], "onnxruntime")
    with refused("precision", "found 'fp16'", "expected one of fp32, int8 for the pt2 format"):
        export_pt2(make_detector(small_config), tmp_path, ExportOptions("fp16"))
    with pytest.raises(UserError, match="found a float detector, expected a calibrated one"):
        export_pt2(make_detector(small_config), tmp_path, ExportOptions("int8"))
    with pytest.raises(UserError, match="parts: found 'decoder', expected some of"):
        export_pt2(make_detector(small_config), tmp_path, ExportOptions("fp32", parts=["decoder"]))
    assert not list(tmp_path.iterdir())
