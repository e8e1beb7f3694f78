"""Checkpoints that other tools quantized compute here what they computed there."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from qat.calibrate import load_ptq, save_ptq
from qat.calibrate.foreign import import_checkpoint, load_foreign, load_foreign_file
from qat.calibrate.inspection import inspect_checkpoint
from qat.checkpoints.reading import load_checkpoint
from qat.cli import main
from qat.core.errors import UserError
from qat.families.bevfusion.config import camera_branch
from qat.families.bevfusion.detector import build_model
from qat.families.bevfusion.family import FAMILY
from qat.lean.modes import quantizers
from qat.model.quantized import QuantizedModel
from qat.model.runners import part_modules

MAKE = Path(__file__).parents[1] / "make_bevfusion_ptq.py"
BACKBONE = "encoders.camera.backbone"
FLOAT = "encoders.camera.vtransform.depthnet.6"
LAYER, OTHER = f"{BACKBONE}.layer1.0.conv2", f"{BACKBONE}.layer1.1.conv1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config):
    """What make_bevfusion_ptq.py makes of the tiny detector."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "config.json").write_text(json.dumps(tiny_config))
    command = [sys.executable, "-W", "ignore", str(MAKE), str(folder / "config.json"), str(folder)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def read(folder):
    """The checkpoint as read; not to be changed."""
    return load_checkpoint(folder / "ptq-zip.pth")


@pytest.fixture
def checkpoint(read):
    """The test's own, to change."""
    return {"state_dict": dict(read["state_dict"]), "quantizers": copy.deepcopy(read["quantizers"])}


@pytest.fixture
def load(tiny_config):
    """checkpoint, options → load_foreign's three, for a fresh tiny detector."""

    def load(checkpoint, **options):
        return load_foreign(checkpoint, build_model(tiny_config), "ptq.pth", **options)

    return load


@pytest.fixture(scope="module")
def loaded(read, tiny_config):
    """`load_foreign`'s three of the checkpoint as it is."""
    return load_foreign(read, build_model(tiny_config), "ptq.pth")


def outputs(model, expected):
    cores = [part.core for part in part_modules(model).values()]
    with torch.inference_mode():
        return cores[0](expected["img"], expected["depth"]), cores[2](cores[1](expected["bev"]))


def test_both_of_torchs_formats_read_the_same(folder, read):
    other = load_checkpoint(folder / "ptq-legacy.pth")
    assert list(other["state_dict"]) == list(read["state_dict"]) and list(other["quantizers"]) == list(
        read["quantizers"]
    )
    assert all(torch.equal(value, read["state_dict"][name]) for name, value in other["state_dict"].items())
    for name, theirs in other["quantizers"].items():
        same = read["quantizers"][name]
        assert torch.equal(theirs.pop("amax"), same["amax"]) and theirs.items() <= same.items(), name


def test_it_computes_what_the_pickled_network_computed(folder, loaded, tmp_path):
    quantized, model, report = loaded
    expected = torch.load(folder / "expected.pth")
    logits, middle = outputs(quantized, expected)
    # The same rounded numbers through the same convolutions; the float network is some 29 dB away.
    assert torch.allclose(logits, expected["logits"], atol=1e-5)
    assert torch.allclose(middle, expected["middle"], atol=1e-5)
    assert not torch.allclose(outputs(model, expected)[0], expected["logits"], atol=1e-2)
    assert not report["merged"] and not report["unused"] and not report["also_rounded"] and not report["without_range"]
    save_ptq(tmp_path / "ptq.pth", quantized, model, {"method": "imported"})
    again, _ = load_ptq(tmp_path / "ptq.pth")
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, expected), (logits, middle), strict=True))


def test_folded_weights_come_back_bit_for_bit(read, loaded):
    quantized, _, report = loaded
    assert f"{BACKBONE}.conv1" in report["folded"] and "encoders.camera.vtransform.dtransform.0" in report["folded"]
    for part in quantized.parts.values():
        for name, module in part.named_modules():
            if isinstance(module, torch.nn.Conv2d):
                assert torch.equal(module.weight, read["state_dict"][f"{name}.weight"]), name
                assert torch.equal(module.bias, read["state_dict"][f"{name}.bias"]), name


def test_layers_that_are_off_or_were_never_quantized_stay_float(loaded):
    quantized, _, report = loaded
    off = "encoders.camera.vtransform.depthnet.6"
    assert "switches" in report["float_layers"][off] and off in quantized.inventory["camera"].kept
    assert not quantized.inventory["head"].quantized and not quantized.inventory["head"].quantizers
    assert "heads.object.shared_conv.conv" in report["float_layers"]
    # What CUDA-BEVFusion quantizes and `calibrate` would not is as the checkpoint has it.
    assert "encoders.camera.vtransform.dtransform.0" in quantized.inventory["camera"].quantized


def test_where_consumers_of_one_tensor_disagree_the_largest_range_serves(checkpoint, load):
    theirs = f"{BACKBONE}.layer2.0.downsample.0._input_quantizer"
    checkpoint["quantizers"][theirs]["amax"] = torch.tensor(1000.0)
    quantized, _, report = load(checkpoint)
    (ours,) = report["merged"]
    assert report["merged"][ours][theirs] == 1000 and len(report["merged"][ours]) == 2
    assert float(quantizers(quantized.parts)[ours]._amax) == 1000


def test_a_tensor_without_a_range_is_not_rounded(checkpoint, load, tmp_path):
    for name in list(checkpoint["quantizers"]):
        if name.endswith("residual_quantizer"):
            del checkpoint["quantizers"][name]
    quantized, model, report = load(checkpoint)
    # A downsampled identity has a quantizer of its own; any other is a convolution's input too, and rounded with it.
    assert sorted(name.rpartition("backbone_")[2] for name in report["without_range"]) == [
        "0_0_downsample_0",
        "1_0_downsample_0",
        "layer2_0_downsample_0",
        "layer3_0_downsample_0",
    ]
    own = quantizers(quantized.parts)
    assert all(own[name]._disabled and own[name].amax is None for name in report["without_range"])
    assert len(report["also_rounded"]) == 4 and any("layer1.0" in name for name in report["also_rounded"])
    save_ptq(tmp_path / "ptq.pth", quantized, model, {"method": "imported"})
    again, _ = load_ptq(tmp_path / "ptq.pth")
    img, depth = torch.randn(2, 3, 64, 96), torch.zeros(2, 1, 64, 96)
    both = quantizers(again.parts)
    for flavour in ("tensorrt", "onnxruntime"):  # which rounds outputs of convolutions too, had they a range
        with torch.inference_mode(), again.in_flavour(flavour), quantized.in_flavour(flavour):
            assert torch.equal(again.parts["camera"](img, depth), quantized.parts["camera"](img, depth))
            assert all(own[name]._disabled and both[name]._disabled for name in report["without_range"])
            assert all(q._disabled for q in both.values() if q.role == "output")
    groups = {f"{g.part}.{g.quantizer}": g for g in inspect_checkpoint(tmp_path / "ptq.pth").groups}
    assert all(groups[name].amax is None and groups[name].state == "off" for name in report["without_range"])


FAULTS = [
    ("input", {"num_bits": 4}, "4 bits"),
    ("input", {"unsigned": True}, "unsigned"),
    ("input", {"amax": None}, "no range"),
    ("input", {"amax": torch.tensor(float("nan"))}, "never calibrated"),
    ("input", {"amax": torch.ones(64)}, "each channel of an activation"),
    ("input", {"special": "it divides its input's channels first (SmoothQuant)"}, "SmoothQuant"),
    ("input", {"disabled": True}, "switches the quantizer of its input off"),
    ("weight", {"disabled": True}, "switches the quantizer of its weights off"),
    ("weight", {"amax": torch.ones(1, 256, 1, 1)}, "not one for each of 256 output channels"),
    ("weight", {"amax": torch.zeros(256, 1, 1, 1)}, "never calibrated"),
    ("weight", {"amax": None, "axis": None}, "no range"),
]


def test_a_layer_whose_range_cannot_be_used_stays_float(checkpoint, load):
    blocks = [f"{BACKBONE}.layer{k}.{i}.conv{j}" for k in (3, 2, 1) for i in (0, 1) for j in (2, 1)]
    # Layers with 256 output channels for the faults of weights.
    layers = blocks[4 : 4 + 7] + blocks[:4]
    for layer, (kind, change, _) in zip(layers, FAULTS, strict=True):
        checkpoint["quantizers"][f"{layer}._{kind}_quantizer"].update(change)
    quantized, _, report = load(checkpoint)
    for layer, (kind, _, reason) in zip(layers, FAULTS, strict=True):
        assert reason in report["float_layers"][layer]
        assert layer not in quantized.inventory["camera"].quantized
        other = "weight" if kind == "input" else "input"
        assert f"{layer}._{other}_quantizer" in report["unused"], (layer, reason)
    assert set(report["float_layers"]) & set(blocks) == set(layers)


def test_weights_without_a_stored_range_or_with_one_for_all_channels(checkpoint, load):
    theirs, other = (checkpoint["quantizers"][f"{name}._weight_quantizer"] for name in (LAYER, OTHER))
    stored, theirs["amax"] = theirs["amax"], None  # dynamic: it takes the largest magnitudes whenever it runs
    other["amax"] = torch.tensor(2.5)
    quantized, _, report = load(checkpoint)
    assert report["own_weights"] == [LAYER]
    dynamic, whole = (quantized.parts["camera"].get_submodule(name).weight_quantizer._amax for name in (LAYER, OTHER))
    assert torch.equal(dynamic, stored)
    assert whole.shape == (64, 1, 1, 1) and bool((whole == 2.5).all())


def modelopt(state):
    """Ranges by ModelOpt's names for a network whose batch norm is not folded, as its `mto.save` file reads."""
    found = {}
    plain = {"disabled": False, "num_bits": 8, "axis": None, "unsigned": False, "special": None}
    for name, weight in state.items():
        if name.endswith(".weight") and weight.ndim == 4:
            layer = name.removesuffix(".weight")
            amax = weight.abs().amax((1, 2, 3), keepdim=True)
            found[f"{layer}.input_quantizer"] = {**plain, "amax": torch.tensor(4.0)}
            found[f"{layer}.weight_quantizer"] = {**plain, "amax": amax, "axis": (0,)}
            found[f"{layer}.output_quantizer"] = {**plain, "amax": None, "disabled": True}
    return found


def test_ranges_of_unfolded_weights_follow_them_through_folding(folder, load):
    state = torch.load(folder / "float.pth")
    quantized, model, report = load({"state_dict": state, "quantizers": modelopt(state)})
    assert not report["folded"] and not report["float_layers"] and not report["unused"]
    calibrated = QuantizedModel(model, (), {})  # whose ranges are those of the folded weights
    own, other = quantizers(quantized.parts), quantizers(calibrated.parts)
    weights = [name for name in own if name.endswith("weight_quantizer")]
    assert len(weights) > 60
    for name in weights:
        assert torch.allclose(own[name]._amax, other[name]._amax, rtol=1e-5), name
    assert not any(
        q._disabled for n, q in own.items() if n.endswith("weight_quantizer") and "vtransform." not in n[:11]
    )
    assert all(q._disabled for q in quantizers(quantized.parts["vtransform"]).values())  # as CUDA-BEVFusion builds it


def test_names_outside_the_model_are_an_error_unless_they_are_to_be_ignored(checkpoint, load):
    checkpoint["state_dict"]["encoders.lidar.backbone.conv.weight"] = torch.ones(1)
    checkpoint["quantizers"]["fuser.0._input_quantizer"] = checkpoint["quantizers"][f"{LAYER}._input_quantizer"]
    with pytest.raises(UserError, match=r"unexpected encoders\.lidar\.backbone"):
        load(checkpoint)
    checkpoint["quantizers"]["neck.quant_add._input_quantizer"] = checkpoint["quantizers"][f"{LAYER}._input_quantizer"]
    _, _, report = load(checkpoint, ignore_prefixes=("encoders.lidar.", "fuser."))
    assert report["ignored"] == 2 and list(report["unused"]) == ["neck.quant_add._input_quantizer"]


def test_a_checkpoint_without_ranges_for_this_network_is_refused(checkpoint, load):
    with pytest.raises(UserError, match="found no quantizers"):
        load({"state_dict": checkpoint["state_dict"]})
    other = {f"img_{name}": value for name, value in checkpoint["quantizers"].items()}
    with pytest.raises(UserError, match="of which none matches"):
        load({"state_dict": checkpoint["state_dict"], "quantizers": other})


def test_it_is_imported_and_exported_from_the_command_line(folder, tmp_path, tiny_config, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config))
    files = ["--ckpt", str(folder / "ptq-zip.pth"), "--config", str(tmp_path / "config.yaml")]
    assert main(["import-ptq", *files, "--out", str(tmp_path / "ptq.pth")]) == 0
    told = capsys.readouterr().out
    assert "activation ranges imported" in told and FLOAT in told
    load_ptq(tmp_path / "ptq.pth")
    for source in (["--ckpt", str(tmp_path / "ptq.pth")], files):
        out = tmp_path / f"onnx{len(source)}"
        assert main(["export-camera", *source, "--parts", "camera.backbone", "--out", str(out)]) == 0
    graphs = [(tmp_path / name / "camera.backbone.onnx").read_bytes() for name in ("onnx2", "onnx4")]
    assert graphs[0] == graphs[1] and b"QuantizeLinear" in graphs[0]


def test_the_camera_branch_of_it_alone(folder, tmp_path, tiny_config):
    branch = camera_branch(tiny_config)
    path = folder / "ptq-zip.pth"
    quantized, model, report = load_foreign_file(path, load_checkpoint(path), FAMILY, branch, "encoders.camera")
    assert set(quantized.parts) == {"camera", "vtransform"} and report["mapped"] and report["ignored"]
    save_ptq(tmp_path / "ptq.pth", quantized, model, {"method": "imported"})
    again, _ = load_ptq(tmp_path / "ptq.pth")
    expected = torch.load(folder / "expected.pth", weights_only=True)
    with torch.inference_mode():
        both = [q.parts["camera"](expected["img"], expected["depth"]) for q in (quantized, again)]
    assert torch.equal(*both)
    dotted, _, _ = load_foreign_file(path, load_checkpoint(path), FAMILY, branch, "encoders.camera.")
    assert {name: q._disabled for name, q in quantizers(dotted).items()} == {
        name: q._disabled for name, q in quantizers(quantized).items()
    }
    with pytest.raises(UserError, match=r"--prefix: found 'camera'"):
        load_foreign_file(path, load_checkpoint(path), FAMILY, branch, "camera")


def test_a_float_checkpoint_is_not_imported(tmp_path, tiny_model):
    torch.save({"state_dict": tiny_model.state_dict()}, tmp_path / "float.pth")
    with pytest.raises(UserError, match="found no quantizers of another tool"):
        import_checkpoint(tmp_path / "float.pth", tmp_path / "ptq.pth")
