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
from qat.core.tensors import compare_tensors
from qat.export import pipeline_settings
from qat.export.verify import random_frame
from qat.lean.flavours import FLAVOURS
from qat.lean.modes import quantizers
from qat.models.run import run_frame

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
        self.frame = random_frame(pipeline_settings(config, cameras), 3)
        with torch.inference_mode():
            self.exact = made.flat(run_frame(self.model, self.frame))
            self.rounded = made.flat(run_frame(self.quantized, self.frame))


@pytest.fixture(scope="module", params=list(made.CASES))
def case(request, fresh_config, small_cameras, tmp_path_factory):
    return Case(request.param, fresh_config(), small_cameras, tmp_path_factory.mktemp("old"))


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
    assert not case.quantized.float_names()
