"""PTQ checkpoints of schema 2, which earlier versions wrote, compute what they computed there.

schema2.json has three of small networks, made by tests/make_schema2.py with the code of then: what such a file holds, but for the
config and the weights, which a seed gives again.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from qat.calibrate import load_ptq
from qat.core.errors import UserError
from qat.core.tensors import compare_tensors
from qat.families.bevfusion.frames import random_frame
from qat.families.bevfusion.settings import pipeline_settings
from qat.lean.flavours import FLAVOURS
from qat.lean.modes import quantizers
from qat.model.runners import run_frame

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("make_schema2", HERE.parent / "make_schema2.py")
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)
STORED = json.loads((HERE / "schema2.json").read_text())


class Case:
    """One network, its old checkpoint as a file, and that loaded."""

    def __init__(self, name, base, cameras, folder):
        torch.set_num_threads(1)  # as there: the order of sums
        self.stored = STORED[name]
        config = made.config_of(name, base)
        self.model = made.detector_of(config)
        checkpoint = {**self.stored["checkpoint"], "config": config, "state_dict": self.model.state_dict()}
        for section in ("amax", "equalized"):
            checkpoint[section] = {
                path: made.unpacked(value) if isinstance(value, dict) else torch.tensor(value)
                for path, value in checkpoint[section].items()
            }
        self.checkpoint = checkpoint
        torch.save(checkpoint, folder / "ptq.pth")
        self.quantized, self.recipe = load_ptq(folder / "ptq.pth")
        self.frame = random_frame(pipeline_settings(config), 3)
        with torch.inference_mode():
            self.exact = made.flat(run_frame(self.model, self.frame))
            self.rounded = made.flat(run_frame(self.quantized, self.frame))


@pytest.fixture(scope="module", params=list(made.CASES))
def case(request, fresh_config, small_cameras, tmp_path_factory):
    return Case(request.param, fresh_config(), small_cameras, tmp_path_factory.mktemp("old"))


def seen_then(model):
    """What is off in every flavour, but for the sites that the version which wrote the file did not observe."""
    own = quantizers(model.parts)
    return [name for name in model.float_names() if own[name].role != "integer" or own[name].amax is not None]


def test_the_seed_gives_the_weights_that_were_calibrated(case):
    assert made.digest(case.model.state_dict()) == case.stored["weights_sha256"]


def test_int8_outputs_are_those_of_the_version_that_wrote_it(case):
    """Bit for bit where the float network is bit for bit what it was there; another processor sums in another order."""
    if made.digest(case.exact) == case.stored["float_sha256"]:
        assert made.digest(case.rounded) == case.stored["int8_sha256"]
    for name, value in case.stored["int8"].items():
        then = made.unpacked(value)
        assert compare_tensors(then.numpy(), case.rounded[name].numpy())["sqnr_db"] > 35, name
        lost = compare_tensors(case.exact[name].numpy(), then.numpy())["sqnr_db"]
        assert lost < 35, name  # so that the float network's would not pass


def test_every_quantizer_of_the_file_is_one_of_the_network_with_its_range(case):
    """Those named by the number of a function (quant_mul_1) too: ranges come out as they went in, each where it was."""
    ranges = quantizers(case.quantized.parts)
    then = case.checkpoint["amax"]
    names = {name for name, quantizer in ranges.items() if quantizer.shares is None and quantizer.amax is not None}
    assert len(names) == len(then)
    for name in names & set(then):
        assert torch.equal(ranges[name].amax, then[name]), name
    renamed, moved = sorted(set(then) - names), sorted(names - set(then))
    assert len(renamed) == len(moved)
    assert sorted(float(then[name]) for name in renamed) == sorted(float(ranges[name].amax) for name in moved)
    functions = {"resnet": [], "swin": ["matmul"], "mobilenet": ["mul", "add"]}[_name(case)]
    assert all(any(f".quant_{function}" in name for name in renamed) for function in functions)


def _name(case):
    return next(name for name, stored in STORED.items() if stored is case.stored)


def test_what_was_off_for_want_of_another_flavour_alone_is_on_in_that(case):
    """The file lists outputs of convolutions before adds as off, which the CPU flavours round."""
    off = set(case.checkpoint["disabled"])
    outputs = {name for name in off if name.endswith("_output") and not name.startswith("vtransform.")}
    assert outputs
    for flavour in FLAVOURS:
        with case.quantized.in_flavour(flavour):
            own = quantizers(case.quantized.parts)
            for name in outputs & set(own):
                assert own[name]._disabled == flavour.startswith("tensorrt"), (flavour, name)
    assert not seen_then(case.quantized)


@pytest.fixture(scope="module")
def tuned(fresh_config, small_cameras, tmp_path_factory):
    """The case with trained weights, and a checkpoint of them as it was written then."""
    case = Case(made.TRAINED, fresh_config(), small_cameras, tmp_path_factory.mktemp("tuned"))
    stored = case.stored["trained"]
    ours = case.quantized.weights()
    tables = [name for name in stored["names"] if name not in ours]
    weights = {name: ours[name] * made.GROWTH for name in stored["names"] if name in ours}
    weights |= {name: torch.zeros(3) for name in tables}
    weights |= {name: made.unpacked(value) for name, value in stored["biases"].items()}
    return case, {**case.checkpoint, "weights": weights, "recipe": stored["recipe"]}


def test_trained_weights_load_and_compute_what_they_computed(tuned, tmp_path):
    """With the corrections of the depth map's background in the biases, and tables of indices among the weights."""
    case, checkpoint = tuned
    assert any("_tensor_constant" in name for name in checkpoint["weights"])
    torch.save(checkpoint, tmp_path / "qat.pth")
    model, recipe = load_ptq(tmp_path / "qat.pth")
    assert recipe["background"] == model.background == "absorbed" and len(model.absorbed) == 2
    with torch.inference_mode():
        rounded = made.flat(run_frame(model, case.frame))
    assert not torch.equal(rounded["0.heatmap"], case.rounded["0.heatmap"])
    if made.digest(case.exact) == case.stored["float_sha256"]:
        assert made.digest(rounded) == case.stored["trained"]["int8_sha256"]


def test_trained_weights_of_another_network_are_refused(tuned, tmp_path):
    _, checkpoint = tuned
    weights = dict(checkpoint["weights"])
    weights["head.other.weight"] = torch.ones(1)
    torch.save({**checkpoint, "weights": weights}, tmp_path / "qat.pth")
    with pytest.raises(UserError, match=r"weights differ: head\.other\.weight"):
        load_ptq(tmp_path / "qat.pth")


def test_what_a_budget_left_float_stays_so_in_every_flavour(tuned, tmp_path):
    case, _ = tuned
    kept = ["head.quant_x", "head.heads.object.shared_conv.conv.weight_quantizer"]
    assert set(kept) <= set(case.checkpoint["amax"])
    torch.save({**case.checkpoint, "disabled": [*case.checkpoint["disabled"], *kept]}, tmp_path / "ptq.pth")
    model, _ = load_ptq(tmp_path / "ptq.pth")
    assert seen_then(model) == sorted(kept, key=list(quantizers(model.parts)).index)
    for flavour in FLAVOURS:
        model.use(flavour)
        assert all(quantizers(model.parts)[name]._disabled for name in kept), flavour


def test_a_file_of_schema_1_loads(tuned, tmp_path):
    """It has no equalized channels, and may say nothing of the background."""
    case, _ = tuned
    checkpoint = {name: value for name, value in case.checkpoint.items() if name != "equalized"}
    recipe = {name: value for name, value in checkpoint["recipe"].items() if name != "background"}
    torch.save({**checkpoint, "schema": 1, "recipe": recipe}, tmp_path / "ptq.pth")
    model, _ = load_ptq(tmp_path / "ptq.pth")
    assert not model.equalized and model.background is None
    assert float(quantizers(model.parts)["head.quant_x"].amax) == float(checkpoint["amax"]["head.quant_x"])
