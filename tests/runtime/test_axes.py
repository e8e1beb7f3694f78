"""Sizes of axes that vary, from a manifest to TensorRT's profiles and to what an engine refuses."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from qat.core.errors import UserError
from qat.engine import Options, TensorRtOptions, build
from qat.engine.tensorrt_options import Profile
from qat.plan import BATCH, Axis, Op, Part, Plan, Tensor
from qat.runtime.axes import axes_of, check_profiles, limited, note_axes, options_of_part

MANIFEST = Path("runs/onnx_fp32/manifest.json")
SIZES = {"min": 1, "opt": 64, "max": 256}


def part(shape=("N", 16), **axes):
    return {"inputs": {"x": {"dtype": "float32", "shape": list(shape), **({"axes": axes} if axes else {})}}}


def test_a_manifest_notes_the_plans_axes_and_no_others():
    plan = Plan(
        inputs=("x",),
        steps=(Op("cut", ("x",), ("y",)), Part("mixer", {"y": "y"}, ("z",), "mixer")),
        outputs=("z",),
        tensors={name: Tensor((BATCH, "N", 4)) for name in "xyz"},
        reported={},
        judged={},
        axes={"N": Axis(2, 5, None), "M": Axis()},
    )
    inputs = {"y": {"dtype": "float32", "shape": ["batch", "N", 4]}, "img": {"dtype": "float32", "shape": [1, 3]}}
    note_axes(inputs, plan)
    assert inputs["y"]["axes"] == {"N": {"min": 2, "opt": 5, "max": None}} and "axes" not in inputs["img"]
    assert axes_of({"inputs": inputs}, MANIFEST) == {"y": {1: ("N", Axis(2, 5, None))}}


@pytest.mark.parametrize("sizes", [(3, 2, 4), (1, 5, 4), (-1, 1, 2)])
def test_sizes_out_of_order_are_an_error_of_the_plan(sizes):
    with pytest.raises(ValueError, match="least ≤ usual ≤ most"):
        Axis(*sizes)


def test_profiles_are_those_of_the_axes_where_none_is_given():
    def profiles(part, *given):
        return options_of_part(part, Options(tensorrt=TensorRtOptions(profiles=given)), MANIFEST).tensorrt.profiles

    own = Profile("x", (4, 16), (8, 16), (8, 16))
    elsewhere = Profile("other", (1,), (1,), (1,))  # of another part's input
    assert profiles(part(N=SIZES)) == (Profile("x", (1, 16), (64, 16), (256, 16)),)
    assert profiles(part(N=SIZES), own) == (own,)
    assert profiles(part(N=SIZES), elsewhere) == profiles(part(N=SIZES))
    assert profiles(part(), own) == (own,)
    for without in (part((2, 16)), part(N={**SIZES, "max": None}), part(("batch", "N"), N=SIZES)):
        assert profiles(without) == ()
    least = profiles(part(N={"min": 0, "opt": 0, "max": 9}))[0]
    assert (least.min, least.opt, least.max) == ((1, 16), (1, 16), (9, 16))


def test_a_profile_of_no_parts_input_is_one_line():
    options = Options(tensorrt=TensorRtOptions(profiles=(Profile("z", (1,), (1,), (1,)),)))
    with pytest.raises(UserError, match="onnx: profile of z: no such input, expected of x"):
        check_profiles({"parts": {"mixer": part()}}, options, Path("onnx"))


@pytest.mark.parametrize(
    ("axes", "wrong"),
    [
        ({"N": 3}, "x: axes: N: found int 3"),
        ({"N": {"min": 1, "opt": 2}, "M": SIZES}, "x: axes: M: found list"),
        ({"N": {**SIZES, "opt": 999}}, "x: axes: N: found dict"),
        ({"N": {**SIZES, "min": "1"}}, "x: axes: N: min: found str"),
    ],
)
def test_damaged_axes_are_one_line(axes, wrong):
    with pytest.raises(UserError, match=f"^{MANIFEST}: {wrong}.*: damaged; export again$"):
        axes_of(part(**axes), MANIFEST)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_engine_refuses_sizes_beyond_its_axes(tmp_path, backend):
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 16]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", tensors[:1], tensors[1:])
    path = tmp_path / "mixer.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    engine = build(path, backend, "fp32", Options(1, None))
    assert engine.example_feeds()["x"].shape == (1, 16)
    limited(engine, part(N={"min": 2, "opt": 64, "max": 256}), MANIFEST)
    usual = engine.example_feeds()["x"]
    assert usual.shape == (64, 16)
    for rows in (2, 64, 256):
        assert engine.run({"x": usual[:1].repeat(rows, 0)})["y"].shape == (rows, 16)
    for rows in (1, 257):
        with pytest.raises(
            UserError, match=f"mixer.onnx: input x: found {rows} along its axis N, expected 2 to 256"
        ) as caught:
            engine.run({"x": usual[:1].repeat(rows, 0)})
        assert "\n" not in str(caught.value)
