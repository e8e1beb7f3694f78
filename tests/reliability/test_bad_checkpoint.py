"""Checkpoints that are none, are damaged, are another network's, or would run something."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import pytest
import torch

from qat.cli import main

PTQ_VERBS = ("inspect", "sensitivity", "export-camera", "finetune", "health", "compare")


class _Runs:
    """Pickled, it is a call of os.system."""

    def __reduce__(self):
        return os.system, ("touch canary",)


def _text(path: Path, _: dict) -> None:
    path.write_text("epoch 1 loss 0.5\n")


def _onnx(path: Path, _: dict) -> None:
    path.write_bytes(Path("fp32/fuser.onnx").read_bytes())


def _picture(path: Path, _: dict) -> None:
    path.write_bytes(next(Path("data/samples/CAM_FRONT").iterdir()).read_bytes())


def _safetensors(path: Path, _: dict) -> None:
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def _torchscript(path: Path, _: dict) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))


def _truncated(path: Path, checkpoint: dict) -> None:
    torch.save(checkpoint, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _truncated_legacy(path: Path, checkpoint: dict) -> None:
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _calling(path: Path, _: dict) -> None:
    torch.save({"state_dict": _Runs()}, path)


def _calling_plainly(path: Path, _: dict) -> None:
    path.write_bytes(pickle.dumps({"state_dict": _Runs()}))


BROKEN = {
    "missing": (lambda path, _: None, "no such file; expected a checkpoint written by torch.save"),
    "folder": (lambda path, _: path.mkdir(), "found a folder, expected a checkpoint written by torch.save"),
    "empty": (lambda path, _: path.write_bytes(b""), "found an empty file, expected a checkpoint"),
    "text": (_text, "found a text file, expected a checkpoint"),
    "onnx": (_onnx, "found an ONNX graph, expected a checkpoint"),
    "picture": (_picture, "found a JPEG picture, expected a checkpoint"),
    "safetensors": (_safetensors, "found a safetensors file, expected a checkpoint"),
    "torchscript": (_torchscript, "damaged (a TorchScript archive); save or fetch it again"),
    "truncated": (_truncated, "damaged (it ends early); save or fetch it again"),
    "truncated legacy": (_truncated_legacy, "more than the file has); save or fetch it again"),
    "calling": (_calling, "pickled objects are not run here"),
    "calling plainly": (_calling_plainly, "not a torch checkpoint"),
    "list": (lambda path, _: torch.save([1, 2], path), "found a list, expected a state dict"),
    "no tensors": (lambda path, _: torch.save({"epoch": 3}, path), "found no tensors under 'state_dict'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_checkpoint(kind, work, verbs, refused):
    """For every verb that reads one; what is pickled in it is not run."""
    make, words = BROKEN[kind]
    make(work / "bad.pth", torch.load("float.pth", weights_only=True))
    for arguments in [*verbs.floats("bad.pth").values(), *verbs.quantized("bad.pth").values()]:
        if not (kind == "folder" and arguments[0] == "health"):  # which reads folders too
            refused(arguments, "bad.pth", words)
    assert not (work / "canary").exists()


def _state(**changes) -> dict:
    return {"state_dict": torch.load("float.pth", weights_only=True)["state_dict"] | changes}


FUSE, CONV = "decoder.neck.fuse.0.weight", "encoders.camera.backbone.layer1.0.conv1.weight"


def test_another_networks_names(work, verbs, refused):
    torch.save({"state_dict": {"conv.weight": torch.zeros(3, 3)}}, work / "bad.pth")
    for verb in ("calibrate", "export-camera", "health", "train"):
        refused(verbs.floats("bad.pth")[verb], "bad.pth: does not fit the config: missing", "unexpected conv.weight")


def test_another_networks_shapes(work, verbs, refused):
    torch.save(_state(**{FUSE: torch.zeros(5, 5, 1, 1)}), work / "bad.pth")
    for verb in ("calibrate", "export-camera", "health", "train"):
        refused(
            verbs.floats("bad.pth")[verb],
            f"bad.pth: {FUSE}: found shape [5, 5, 1, 1], the config makes [24, 36, 1, 1]",
            "use the config that the checkpoint was trained with",
        )


def test_a_weight_that_is_no_tensor(work, verbs, refused):
    torch.save(_state(**{CONV: "text"}), work / "bad.pth")
    for verb in ("calibrate", "export-camera", "health", "train"):
        refused(verbs.floats("bad.pth")[verb], f"bad.pth: {CONV}: found a str, expected a tensor; save")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, work, verbs, refused, capsys):
    """Every verb refuses them but health, which says what they do."""
    weight = torch.load("float.pth", weights_only=True)["state_dict"][CONV].clone()
    weight.view(-1)[3] = value
    torch.save(_state(**{CONV: weight}), work / "bad.pth")
    ptq = torch.load("ptq.pth", weights_only=True)
    torch.save({**ptq, "state_dict": {**ptq["state_dict"], CONV: weight}}, work / "quantized.pth")
    words = (f"{CONV}: found NaN or infinity in 1 of", "expected finite weights", "bevqat health")
    for verb in ("calibrate", "export-camera", "train"):
        refused(verbs.floats("bad.pth")[verb], "bad.pth", *words)
    for verb in ("inspect", "sensitivity", "export-camera", "finetune"):
        refused(verbs.quantized("quantized.pth")[verb], "quantized.pth", *words)
    assert main(verbs.floats("bad.pth")["health"]) == 1


def test_a_float_checkpoint_for_a_quantized_one(verbs, refused):
    for verb in ("inspect", "sensitivity", "finetune"):
        refused(
            verbs.quantized("float.pth")[verb], "float.pth: found a checkpoint without quantizer ranges", "calibrate"
        )
    int8 = [*verbs.floats("float.pth")["export-camera"], "--int8"]
    refused(int8, "float.pth: ", "no scales for INT8", "calibrate")


def test_a_quantized_checkpoint_for_a_float_one(verbs, refused):
    for verb in ("calibrate", "train"):
        refused(verbs.floats("ptq.pth")[verb], "ptq.pth: found a quantized checkpoint, expected", "float")
    refused(verbs.floats("ptq.pth")["import-ptq"], "ptq.pth: found no quantizers of another tool")
    words = "--ckpt: found ptq.pth, a quantized checkpoint, expected the float one"
    refused(verbs.floats("ptq.pth")["compare"], words, "--ckpt names the float checkpoint, --ptq the quantized one")


RANGE = "camera.encoders.camera.backbone.layer1.0.conv1.weight_quantizer"
INPUT = "decoder.quant_x"


def _ranges(ptq: dict, **changes) -> dict:
    return {"amax": ptq["amax"] | changes}


PTQ = {
    "no section amax": (lambda ptq: {"amax": None}, "amax: found none, expected a tensor for each name"),
    "no ranges": (lambda ptq: {"amax": {}}, "found no range (amax) for"),
    "a range missing": (
        lambda ptq: {"amax": {name: value for name, value in ptq["amax"].items() if name != RANGE}},
        f"found no range (amax) for 1 of {{all}} quantizers: {RANGE}",
    ),
    "range nan": (lambda ptq: _ranges(ptq, **{INPUT: torch.tensor(float("nan"))}), f"{INPUT}: found NaN or infinity"),
    "range negative": (
        lambda ptq: _ranges(ptq, **{INPUT: torch.tensor(-2.0)}),
        f"{INPUT}: found a range of -2, expected finite values above 0",
    ),
    "range of zero": (lambda ptq: _ranges(ptq, **{INPUT: torch.tensor(0.0)}), f"{INPUT}: found a range of 0, expected"),
    "range of another shape": (
        lambda ptq: _ranges(ptq, **{RANGE: torch.ones(7)}),
        f"{RANGE}: found a range of shape [7], expected",
    ),
    "range no tensor": (lambda ptq: _ranges(ptq, **{RANGE: [1, 2]}), f"amax: {RANGE}: found a list, expected a tensor"),
    "range unknown": (
        lambda ptq: _ranges(ptq, **{"nothing.q": torch.ones(())}),
        "found quantizers that the network lacks: nothing.q",
    ),
    "newer schema": (lambda ptq: {"schema": 4}, "found schema 4, expected 1 or 2 or 3; update bevqat"),
    "no config": (lambda ptq: {"config": None}, "config: found none, expected a section"),
    "config a list": (lambda ptq: {"config": [1]}, "config: found a list, expected a section"),
    "disabled a number": (lambda ptq: {"disabled": 3}, "disabled: found a int, expected a list of names"),
    "no recipe": (lambda ptq: {"recipe": None}, "recipe: found none, expected a section"),
    "recipe cut": (
        lambda ptq: {"recipe": {**ptq["recipe"], "keep_float": "all"}},
        "recipe: keep_float: found a str, expected a list of patterns",
    ),
    "equalized by zero": (
        lambda ptq: {"equalized": {"decoder.quant_x": torch.zeros(10)}},
        "equalized: decoder.quant_x: found 0, expected values above 0",
    ),
    "weights of another network": (lambda ptq: {"weights": {"a": torch.ones(1)}}, "weights differ: a"),
}


@pytest.mark.parametrize("kind", PTQ)
def test_a_quantized_checkpoint_that_is_damaged(kind, work, verbs, refused):
    """Wholly or partly without amax, too: neither INT8 nor anything else is made of it."""
    change, words = PTQ[kind]
    ptq = torch.load("ptq.pth", weights_only=True)
    torch.save(ptq | change(ptq), work / "bad.pth")
    words = words.replace("{all}", str(len(ptq["amax"])))
    for verb in PTQ_VERBS if kind == "no ranges" else ("inspect", "export-camera"):
        line = refused(verbs.quantized("bad.pth")[verb], "bad.pth", words)
        assert "calibrate again" in line


def test_the_state_of_a_run_that_is_damaged(work, refused):
    """resume.pth of train and of finetune: cut, or of another run."""
    for folder in ("trained", "tuned"):
        (work / folder).mkdir()
        (work / folder / "resume.pth").write_text("cut")
    common = ["--data", "data:calib", "--steps", "1", "--batch", "1"]
    fix = "remove it or choose another --out"
    refused(["train", "--config", "config.yaml", *common, "--out", "trained"], "trained/resume.pth", fix)
    refused(["finetune", "--ckpt", "ptq.pth", *common, "--no-augment", "--out", "tuned"], "tuned/resume.pth", fix)


def test_a_network_whose_values_are_not_finite(work, refused):
    """Its weights are finite and what it computes is not: the line names the frame and the tensor, and ends with the command
    that finds the layer, which can be pasted."""
    import shlex

    wide = torch.full_like(torch.load("float.pth", weights_only=True)["state_dict"][FUSE], 3e38)
    torch.save(_state(**{FUSE: wide}), work / "bad.pth")
    ptq = torch.load("ptq.pth", weights_only=True)
    torch.save({**ptq, "state_dict": {**ptq["state_dict"], FUSE: wide}}, work / "wide.pth")
    common = ["--config", "config.yaml", "--data", "data", "--split", "calib"]
    finds = "finds the layer"
    line = refused(["calibrate", "--ckpt", "bad.pth", *common], "frame ", "quant", "found NaN or infinity in", finds)
    command = shlex.split(line.strip().rpartition("; ")[2].removesuffix(finds))
    assert command == ["bevqat", "health", "bad.pth", *common] and main(command[1:]) == 1
    line = refused(
        ["export-camera", "--ckpt", "bad.pth", *common, "--out", "onnx"], "frame ", "fuser: ", "values of the ref"
    )
    assert f"; bevqat health bad.pth --config config.yaml --data data --split calib {finds}" in line
    line = refused(
        ["sensitivity", "wide.pth", "--data", "data"], "frame ", ": the float network's values are not finite"
    )
    assert f"; bevqat health wide.pth --data data --split calib {finds}" in line
    tune = ["finetune", "--ckpt", "wide.pth", "--data", "data:calib", "--steps", "1", "--batch", "1", "--no-augment"]
    line = refused([*tune, "--out", "tuned"], "frame ", "the float network's values are not finite")
    assert f"; bevqat health wide.pth --data data --split calib {finds}" in line


def test_averaged_weights_that_are_not_there(work, verbs, refused):
    for verb in ("calibrate", "export-camera", "health", "compare", "train"):
        refused(
            [*verbs.floats("float.pth")[verb], "--ema"], "--ema: found no averaged weights in float.pth, expected them"
        )
    for verb in ("export-camera", "health"):
        arguments = [*verbs.quantized("ptq.pth")[verb], "--ema"]
        refused(arguments, "--ema: found ptq.pth, a bevqat checkpoint, which has one set of weights; omit --ema")
    refused(
        ["calibrate", "--config", "config.yaml", "--init", "random", "--ema", "--data", "data"],
        "--ema: found --init random",
    )


def test_every_verb_says_which_weights_it_took_and_ema_takes_the_others(work, verbs, capsys):
    """A file whose plain weights are not finite and whose averaged ones are: what works says which were read."""
    state = _state()["state_dict"]
    spoiled = {**state, FUSE: torch.full_like(state[FUSE], float("nan"))}
    torch.save(
        {"state_dict": spoiled, "state_dict_ema": {f"module.{n}": v for n, v in state.items()}}, work / "both.pth"
    )
    for verb in ("calibrate", "export-camera", "health"):
        arguments = verbs.floats("both.pth")[verb]
        assert main(arguments) == (1 if verb == "health" else 2)
        assert verb != "health" or "not the averaged weights" in capsys.readouterr().err
        assert main([*arguments, "--ema"]) == 0
        assert "note: both.pth: used the averaged weights, state_dict_ema" in capsys.readouterr().err
    assert torch.load("out/ptq.pth", weights_only=True)["recipe"]["float_checkpoint"]["ema"] is True
    compare = ["compare", "--ckpt", "both.pth", "--config", "config.yaml", "--ptq", "out/ptq.pth", "--data", "data"]
    assert main([*compare, "--split", "calib", "--out", "out/compare"]) == 2
    assert "out/ptq.pth: calibrated from the averaged weights of both.pth" in capsys.readouterr().err
    torch.save({"state_dict": state, "state_dict_ema": state}, work / "both.pth")
    exported = ["export-camera", "--ckpt", "both.pth", "--config", "config.yaml", "--frames", "0"]
    assert main([*exported, "--ema", "--out", "averaged"]) == main([*exported, "--out", "plain"]) == 0
    compare = ["compare", "--ckpt", "both.pth", "--config", "config.yaml", "--data", "data"]
    for folder, ema, made in (("averaged", [], "the averaged weights"), ("plain", ["--ema"], "weights that were not")):
        capsys.readouterr()
        assert main([*compare, *ema, "--split", "calib", "--onnx", folder, "--out", "out/compare"]) == 2
        assert f"{folder}: exported from {made}" in capsys.readouterr().err


def test_blocks_that_the_config_has_not(work, verbs, refused):
    block = "encoders.camera.backbone.layer1.5.conv1.weight"
    torch.save(_state(**{block: torch.ones(1)}), work / "bad.pth")
    refused(
        verbs.floats("bad.pth")["calibrate"],
        "bad.pth: does not fit the config: unexpected encoders.camera.backbone.* (1)",
    )
