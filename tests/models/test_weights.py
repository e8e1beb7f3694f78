"""Which tensors of a checkpoint are loaded: wrappers' prefixes, averaged copies, number formats, and what may be left out."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from qat.checkpoints.reading import load_checkpoint
from qat.core.errors import UserError
from qat.families.bevfusion.state import load_float_model, load_state
from tests.messages import refused, says

FUSE = "decoder.neck.fuse.0.weight"


@pytest.fixture
def saved(tmp_path):
    """value → a file of torch.save's."""

    def save(value):
        torch.save(value, tmp_path / "m.pth")
        return tmp_path / "m.pth"

    return save


def same(model, state):
    own = model.state_dict()
    return all(torch.equal(own[name], state[name].to(own[name].dtype)) for name in own)


def other(state):
    """Weights that are not the same."""
    return {
        name: value * 0.5 if value.is_floating_point() and "vtransform" not in name else value
        for name, value in state.items()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floating_point_formats_load_and_the_geometry_stays_exact(tiny_model, saved, dtype):
    """FP16 has 0.5 pixels of precision at 800; the frustum is the config's."""
    state = tiny_model.state_dict()
    path = saved({"state_dict": {n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()}})
    found = load_float_model(tiny_model.config, path).state_dict()
    for name, value in found.items():
        fixed = name.rpartition(".")[2] in ("dx", "bx", "nx", "frustum")
        expected = state[name] if fixed or not state[name].is_floating_point() else state[name].to(dtype).float()
        assert value.dtype == state[name].dtype and torch.equal(value, expected), name


def test_integers_for_weights_are_refused(tiny_model, saved):
    state = {**tiny_model.state_dict(), FUSE: tiny_model.state_dict()[FUSE].to(torch.int8)}
    with pytest.raises(UserError, match=rf"{FUSE}: found int8, expected floating-point weights"):
        load_float_model(tiny_model.config, saved(state))


def test_another_geometry_in_fp16_is_still_refused(tiny_model, saved):
    state = {n: v.half() if v.is_floating_point() else v for n, v in tiny_model.state_dict().items()}
    state["encoders.camera.vtransform.dx"] = state["encoders.camera.vtransform.dx"] * 1.05
    with pytest.raises(UserError, match="the config's bounds make"):
        load_float_model(tiny_model.config, saved(state))


class Lightning(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


@pytest.mark.parametrize(
    "wrap", ["DataParallel", "compile", "compile inside", "both", "Lightning", "AveragedModel", "by hand"]
)
def test_wrappers_prefixes_are_taken_off(tiny_model, saved, wrap):
    """The names are those that torch's own wrappers make."""
    state = tiny_model.state_dict()
    model = copy.deepcopy(tiny_model)
    if wrap == "compile inside":
        camera = model.encoders["camera"]
        camera["neck"] = torch.compile(camera["neck"])
    wrapped = {
        "DataParallel": nn.DataParallel,
        "compile": torch.compile,
        "both": lambda m: nn.DataParallel(torch.compile(m)),
        "Lightning": Lightning,
        "AveragedModel": AveragedModel,
    }.get(wrap, lambda m: m)(model)
    names = wrapped.state_dict()
    if wrap == "by hand":
        names = {f"module.model.{name}": value for name, value in names.items()}
    assert wrap == "by hand" or set(names) != set(state)
    assert same(load_float_model(tiny_model.config, saved({"state_dict": names})), state)


def test_what_lies_beside_the_prefix_is_refused_and_not_dropped(tiny_model, saved):
    names = {f"model.{name}": value for name, value in tiny_model.state_dict().items()} | {"loss.weight": torch.ones(3)}
    with pytest.raises(UserError, match=r"unexpected loss\.weight"):
        load_float_model(tiny_model.config, saved({"state_dict": names}))


def test_a_name_with_and_without_a_prefix_is_refused(tiny_model, saved):
    names = {**tiny_model.state_dict(), f"_orig_mod.{FUSE}": torch.ones(1)}
    with pytest.raises(UserError, match="with and without a wrapper's prefix"):
        load_float_model(tiny_model.config, saved({"state_dict": names}))


def buffers_of_mmcv(state, average, tracked):
    """As mmcv's EMAHook registers them: a buffer for each entry, dots as underscores. tracked: batches counted in either."""
    both = {**state, **{"ema_" + name.replace(".", "_"): value for name, value in average.items()}}
    return {
        name: torch.tensor(tracked[name.startswith("ema_")]) if name.endswith("num_batches_tracked") else value
        for name, value in both.items()
    }


FILES = {
    "timm": lambda state, average: {"state_dict": state, "state_dict_ema": average},
    "model_ema": lambda state, average: {"model": state, "model_ema": average},
    "nested": lambda state, average: {"model": state, "ema": {"module": average, "updates": 7}},
    "wrapped": lambda state, average: {
        "state_dict": {f"module.{n}": v for n, v in state.items()},
        "state_dict_ema": {f"module.{n}": v for n, v in average.items()},
    },
    "buffers": lambda state, average: {"state_dict": buffers_of_mmcv(state, average, (5, 5))},
    "buffers in the middle of an epoch": lambda state, average: {"state_dict": buffers_of_mmcv(state, average, (5, 0))},
}


@pytest.mark.parametrize("kind", FILES)
def test_of_two_sets_of_weights_ema_takes_the_averaged(tiny_model, saved, capsys, kind):
    state = tiny_model.state_dict()
    average = other(state)
    path = saved(FILES[kind](state, average))
    assert load_float_model(tiny_model.config, path).state_dict()[FUSE].equal(state[FUSE])
    said = capsys.readouterr().err
    assert said.startswith(f"note: {path}: used state_dict, not the averaged weights, ") and says(said, "--ema")
    found = load_float_model(tiny_model.config, path, ema=True)
    assert found.state_dict()[FUSE].equal(average[FUSE]) and not average[FUSE].equal(state[FUSE])
    assert f"note: {path}: used the averaged weights, " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mmengine", "mmcv"])
@pytest.mark.parametrize("ema", [False, True])
def test_where_the_two_were_swapped_on_saving_the_state_dict_is_the_average(tiny_model, saved, capsys, kind, ema):
    """mmengine does so always and keeps a counter; mmcv at the end of an epoch, where the copy has the counted batches."""
    raw = tiny_model.state_dict()
    average = other(raw)
    before = {"steps": torch.tensor(3), **{f"module.{name}": value for name, value in raw.items()}}
    value = {"state_dict": average, "ema_state_dict": before}
    if kind == "mmcv":
        value = {"state_dict": buffers_of_mmcv(average, raw, (0, 5))}
    found = load_float_model(tiny_model.config, saved(value), ema=ema)
    assert found.state_dict()[FUSE].equal(average[FUSE])
    assert says(capsys.readouterr().err, "used state_dict", "averaged")


def test_averaged_parameters_alone_are_joined_with_the_buffers(tiny_model, saved):
    """mmcv's hook averages parameters; running means are in the state dict only."""
    state = tiny_model.state_dict()
    average = {name: value for name, value in other(state).items() if "running" not in name and "tracked" not in name}
    found = load_float_model(tiny_model.config, saved({"state_dict": {
        **state, **{"ema_" + name.replace(".", "_"): value for name, value in average.items()}
    }}), ema=True)  # fmt: skip
    assert same(found, {**state, **average})


def test_ema_without_averaged_weights_is_refused(tiny_model, saved, capsys):
    path = saved(tiny_model.state_dict())
    with refused("--ema", "found no averaged weights in", ", expected them under state_dict_ema"):
        load_checkpoint(path, ema=True)
    load_float_model(tiny_model.config, path)
    assert capsys.readouterr().err == ""


def test_averaged_weights_alone_need_the_flag(tiny_model, saved):
    state = tiny_model.state_dict()
    path = saved({"state_dict_ema": state})
    with refused("found only averaged weights", "expected a state_dict", "--ema"):
        load_checkpoint(path)
    assert same(load_float_model(tiny_model.config, path, ema=True), state)


BACKBONE = "encoders.camera.backbone."


@pytest.mark.parametrize(
    "name", ["layer2.2.conv1.weight", "layer3.0.conv2_offset.weight", "conv1.bias", "pos_embed", "bn1.weight_g"]
)
def test_a_tensor_inside_a_module_that_is_used_is_never_dropped(tiny_model, name):
    """ResNet-34 has a third block in layer2, where ResNet-18 has two, of the same shapes."""
    state = {**tiny_model.state_dict(), BACKBONE + name: torch.ones(1)}
    with refused("m.pth: does not fit the config: unexpected encoders.camera.backbone"):
        load_state(tiny_model, state, "m.pth")


def test_modules_of_the_backbone_that_are_not_used_are_left_out_and_listed(tiny_model, capsys):
    """The classifier, and the stage after the last map."""
    more = {BACKBONE + name: torch.ones(1) for name in ("fc.weight", "fc.bias", "layer4.0.conv1.weight")}
    load_state(tiny_model, {**tiny_model.state_dict(), **more}, "m.pth")
    listed = "encoders.camera.backbone.fc.* (2), encoders.camera.backbone.layer4.* (1)"
    assert capsys.readouterr().err == (
        f"note: m.pth: left out {listed}: modules of the backbone that this config does not use\n"
    )


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_that_hold_no_dense_values_are_refused(tiny_model, saved, kind):
    value = tiny_model.state_dict()[FUSE]
    value = value.to_sparse() if kind == "sparse" else value.to("meta")
    found = "a sparse_coo tensor" if kind == "sparse" else "a tensor without values"
    with pytest.raises(UserError, match=rf"{FUSE}: found {found}, expected a dense one"):
        load_state(tiny_model, {**tiny_model.state_dict(), FUSE: value}, "m.pth")
