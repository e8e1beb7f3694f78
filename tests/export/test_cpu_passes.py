"""The passes that bring the last convolutions to integers on a CPU."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qat.export.conv_as_matmul import convs_to_matmuls
from qat.export.global_pool import means_to_pools
from qat.export.hard_sigmoid import hard_sigmoids_to_clips, hard_sigmoids_to_sums
from qat.export.passes import in_flavour
from qat.export.scale_as_depthwise import scales_to_depthwise
from qat.export.scale_as_product import scales_to_products
from qat.export.silu import silus_to_one
from qat.export.sunk_transpose import sink_transposes
from qat.lean.flavours import FLAVOURS

SCALE = np.float32(1 / 32)


def graph(nodes, constants, output_shape, channels=16, sizes=(6, 8)):
    g = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, *sizes])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output_shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(g, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def pair(name, scale="s", zero="z"):
    return [
        helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}_q"]),
        helper.make_node("DequantizeLinear", [f"{name}_q", scale, zero], [f"{name}_dq"]),
    ]


def convolution(out, kernel, dims=2, **attributes):
    """Q ─► DQ ─► Conv with s8 weights and s32 bias, x → c; and its constants."""
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.5, 2, out).astype(np.float32) / 256
    constants = {
        "s": np.asarray(SCALE),
        "z": np.asarray(np.uint8(128)),
        "w_s8": rng.integers(-127, 128, (out, 16, *[kernel] * dims)).astype(np.int8),
        "ws": scales,
        "wz": np.zeros(out, np.int8),
        "b_s32": rng.integers(-4000, 4000, out).astype(np.int32),
        "bs": SCALE * scales,
    }
    nodes = [
        *pair("x"),
        helper.make_node("DequantizeLinear", ["w_s8", "ws", "wz"], ["w"], axis=0),
        helper.make_node("DequantizeLinear", ["b_s32", "bs"], ["b"], axis=0),
        helper.make_node("Conv", ["x_dq", "w", "b"], ["c"], name="conv", kernel_shape=[kernel] * dims, **attributes),
    ]
    return nodes, constants


def run(model, x, optimized=False):
    """The result."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def operators(model, tmp_path):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


@pytest.fixture
def x():
    return np.random.default_rng(1).uniform(-3, 3, (1, 16, 6, 8)).astype(np.float32)


@pytest.mark.parametrize("sizes", [[6, 8], [48]])
def test_a_pointwise_convolution_with_a_float_result_runs_in_integers_as_a_matrix_product(x, sizes, tmp_path):
    nodes, constants = convolution(24, 1, len(sizes))
    nodes.append(helper.make_node("Softmax", ["c"], ["y"], axis=1))
    model = graph(nodes, constants, [1, 24, *sizes], sizes=sizes)
    x = x.reshape(1, 16, *sizes)
    before = run(model, x)
    assert operators(model, tmp_path)["Conv"] == 1
    assert convs_to_matmuls(model) == 1
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model, x), before, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(model, x, optimized=True), before, rtol=1e-5, atol=1e-6)
    found = operators(model, tmp_path)
    assert not {"Conv", "FusedConv", "MatMul", "Gemm", "FusedMatMul"} & set(found)
    assert found["QGemm"] + found["MatMulIntegerToFloat"] == 1


@pytest.mark.parametrize("kernel,attributes", [(3, {"pads": [1, 1, 1, 1]}), (1, {"strides": [2, 2]})])
def test_other_convolutions_stay_as_they_are(kernel, attributes, x):
    nodes, constants = convolution(24, kernel, **attributes)
    nodes.append(helper.make_node("Identity", ["c"], ["y"]))
    size = [6, 8] if kernel == 3 else [3, 4]
    model = graph(nodes, constants, [1, 24, *size])
    before = model.SerializeToString()
    assert convs_to_matmuls(model) == 0 and model.SerializeToString() == before


@pytest.mark.parametrize("relu", [False, True])
def test_a_convolution_whose_result_is_rounded_stays_one(relu):
    nodes, constants = convolution(24, 1)
    if relu:
        nodes.append(helper.make_node("Relu", ["c"], ["r"]))
    model = graph([*nodes, *pair("r" if relu else "c")], constants, [1, 24, 6, 8])
    model.graph.node[-1].output[0] = "y"
    assert convs_to_matmuls(model) == 0


def test_a_convolution_with_a_rounding_anywhere_behind_stays_one():
    nodes, constants = convolution(24, 1)
    nodes += [helper.make_node("Sigmoid", ["c"], ["g"]), helper.make_node("Mul", ["c", "g"], ["r"]), *pair("r")]
    nodes[-1].output[0] = "y"
    assert convs_to_matmuls(graph(nodes, constants, [1, 24, 6, 8])) == 0


def sliced(last):
    """x ─► NCHW ─► two Slices over channels, of which one ends in a Softmax and the other in `last`."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Slice", ["t", "zero", "three", "one"], ["a"], name="a"),
        helper.make_node("Softmax", ["a"], ["y"], axis=1, name="softmax"),
        helper.make_node("Slice", ["t", "three", "eight", "one"], ["b"], name="b"),
        last,
    ]
    constants = {name: np.array([value]) for name, value in {"zero": 0, "one": 1, "three": 3, "eight": 8}.items()}
    model = graph(nodes, constants, [1, 3, 16, 6])
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, list("abcd")))
    return model


def run_both(model, x):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y", "z"], {"x": x})


def test_channels_stay_last_through_slices_and_a_softmax(x):
    model = sliced(helper.make_node("Transpose", ["b"], ["z"], perm=[0, 2, 3, 1], name="back"))
    before = run_both(model, x)
    assert sink_transposes(model) == 3  # the one given, then each of those that it became
    onnx.checker.check_model(model, full_check=True)
    for found, expected in zip(run_both(model, x), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert [node.op_type for node in model.graph.node] == ["Slice", "Softmax", "Transpose", "Slice"]
    assert [value.name for value in model.graph.output] == ["y", "z"]


def test_a_transpose_that_something_else_reads_stays(x):
    model = sliced(helper.make_node("Relu", ["t"], ["z"]))
    before = model.SerializeToString()
    assert sink_transposes(model) == 0 and model.SerializeToString() == before


def scaling(kernel=1, inputs=1, rounded=True):
    """x ─► Conv (float) ─► Relu ─► Q ─► DQ ─► y, or without the rounding."""
    rng = np.random.default_rng(3)
    constants = {
        "s": np.asarray(SCALE),
        "z": np.asarray(np.uint8(0)),
        "w": rng.normal(size=(5, inputs, kernel, kernel)).astype(np.float32),
        "b": rng.normal(size=5).astype(np.float32),
    }
    pads = [kernel // 2] * 4
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="/dt/Conv", kernel_shape=[kernel] * 2, pads=pads),
        helper.make_node("Relu", ["c"], ["r"]),
        *pair("r"),
    ]
    if not rounded:
        nodes[2:] = [helper.make_node("Identity", ["r"], ["r_dq"])]
        del constants["s"], constants["z"]
    nodes.append(helper.make_node("Identity", ["r_dq"], ["y"]))
    return graph(nodes, constants, [1, 5, 6, 8], inputs)


@pytest.mark.parametrize("optimized", [False, True])
def test_a_convolution_that_only_scales_one_channel_becomes_a_product(optimized):
    x = np.random.default_rng(4).uniform(-4, 4, (1, 1, 6, 8)).astype(np.float32)
    model = scaling()
    expected = run(model, x, optimized)
    assert scales_to_products(model) == 1
    onnx.checker.check_model(model, full_check=True)
    found = run(model, x, optimized)
    assert "Conv" not in {node.op_type for node in model.graph.node}
    # a rounding may fall to the other side where the sum ends in another last bit
    assert np.mean(found == expected) > 0.98 and np.abs(found - expected).max() <= SCALE * 1.001


@pytest.mark.parametrize("shape", [{"kernel": 3}, {"inputs": 2}, {"rounded": False}])
def test_other_convolutions_are_left_as_they_are(shape):
    model = scaling(**shape)
    before = model.SerializeToString()
    assert scales_to_products(model) == 0 and model.SerializeToString() == before


def behind_a_rounding(*nodes, shape=(1, 16, 6, 8), **constants):
    """x ─► Q ─► DQ ─► the nodes ─► y."""
    known = {"s": np.asarray(SCALE), "z": np.asarray(np.uint8(128)), **constants}
    return graph([*pair("x"), *nodes], known, list(shape))


def unit(scale=1 / 255, zero=0):
    """The constants of a rounding of 0 … 1."""
    return {"h_scale": np.asarray(scale, np.float32), "h_zero": np.asarray(zero, np.uint8)}


def hard_swish(out="y"):
    return [
        helper.make_node("HardSigmoid", ["x_dq"], ["h"], name="h", alpha=1 / 6, beta=0.5),
        *pair("h", "h_scale", "h_zero"),
        helper.make_node("Mul", ["x_dq", "h_dq"], [out]),
    ]


def test_a_silu_behind_a_rounding_is_one_operator(x, tmp_path):
    silu = [helper.make_node("Sigmoid", ["x_dq"], ["g"]), helper.make_node("Mul", ["g", "x_dq"], ["m"], name="m")]
    model = behind_a_rounding(*silu, *pair("m"), helper.make_node("Identity", ["m_dq"], ["y"]))
    before = run(model, x)
    assert operators(model, tmp_path)["QuickGelu"] == 0
    assert silus_to_one(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert operators(model, tmp_path)["QuickGelu"] == 1
    for optimized in (False, True):  # a step where a value lies between two
        found = run(model, x, optimized)
        assert np.abs(found - before).max() <= SCALE * 1.001 and (found == before).mean() > 0.999
    assert silus_to_one(model) == 0


@pytest.mark.parametrize("change", ["float", "gate", "reader"])
def test_other_sigmoids_stay(change):
    source = "x" if change == "float" else "x_dq"
    other = "x" if change == "gate" else source
    nodes = [helper.make_node("Sigmoid", [source], ["g"]), helper.make_node("Mul", ["g", other], ["y"])]
    if change == "reader":
        nodes[1:] = [helper.make_node("Mul", ["g", other], ["m"]), helper.make_node("Add", ["m", "g"], ["y"])]
    assert silus_to_one(behind_a_rounding(*nodes)) == 0


def test_a_mean_over_height_and_width_is_pooled_in_integers(x, tmp_path):
    mean = helper.make_node("ReduceMean", ["x_dq"], ["m"], axes=[-1, 2])
    model = behind_a_rounding(mean, *pair("m"), helper.make_node("Identity", ["m_dq"], ["y"]), shape=(1, 16, 1, 1))
    before = run(model, x)
    assert means_to_pools(model) == 1
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(run(model, x), before)
    assert operators(model, tmp_path)["QLinearGlobalAveragePool"] == 1


@pytest.mark.parametrize("attributes", [{"axes": [1, 2]}, {"axes": [2, 3], "keepdims": 0}, {"axes": [3]}, {}])
def test_other_means_stay(attributes):
    model = behind_a_rounding(helper.make_node("ReduceMean", ["x_dq"], ["m"], **attributes), *pair("m"))
    assert means_to_pools(model) == 0


def test_a_mean_that_is_not_rounded_stays():
    mean = helper.make_node("ReduceMean", ["x_dq"], ["y"], axes=[2, 3])
    assert means_to_pools(behind_a_rounding(mean, shape=(1, 16, 1, 1))) == 0


def test_a_hard_swish_runs_in_integers(x, tmp_path):
    constants = {**unit(), "s2": np.asarray(3 / 255, np.float32), "z2": np.asarray(10, np.uint8)}
    model = behind_a_rounding(*hard_swish("m"), *pair("m", "s2", "z2"), **constants)
    model.graph.node[-1].output[0] = "y"
    before = run(model, x)
    assert hard_sigmoids_to_sums(model) == 1
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model, x), before, atol=3 / 255 * 1.001)
    assert (run(model, x) == before).mean() > 0.99
    np.testing.assert_allclose(run(model, x, optimized=True), before, atol=2 * 3 / 255 * 1.001)
    found = operators(model, tmp_path)
    assert found["QLinearAdd"] == found["QLinearMul"] == 1 and not {"HardSigmoid", "Mul", "Add"} & set(found)


@pytest.mark.parametrize("constants", [unit(1 / 200), unit(zero=3)])
def test_a_hard_sigmoid_stays_whose_rounding_does_not_saturate_where_it_does(constants):
    assert hard_sigmoids_to_sums(behind_a_rounding(*hard_swish(), **constants)) == 0


def test_a_hard_sigmoid_of_what_is_not_rounded_stays_on_onnxruntime_and_is_a_clip_on_openvino(x):
    nodes = [
        helper.make_node("HardSigmoid", ["x"], ["h"], name="h", alpha=1 / 6, beta=0.5),
        *pair("h", "h_scale", "h_zero"),
    ]
    nodes[-1].output[0] = "y"
    model = behind_a_rounding(*nodes, **unit())
    before = run(model, x)
    assert hard_sigmoids_to_sums(model) == 0
    assert hard_sigmoids_to_clips(model) == 1
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model, x), before, atol=1 / 255 * 1.001)
    assert "HardSigmoid" not in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize(
    "flavour,expected", [("onnxruntime", {"Add", "GlobalAveragePool"}), ("openvino", {"Clip", "ReduceMean"})]
)
def test_each_backend_has_its_own_rewrites(flavour, expected):
    nodes = [*hard_swish("m"), *pair("m"), helper.make_node("ReduceMean", ["m_dq"], ["p"], axes=[2, 3]), *pair("p")]
    nodes[-1].output[0] = "y"
    model = behind_a_rounding(*nodes, shape=(1, 16, 1, 1), **unit())
    model = in_flavour(model, FLAVOURS[flavour])
    assert expected <= {node.op_type for node in model.graph.node}


def scale_and_shift(scale, shift, relu, order=("x_dq", "a")):
    """Q ─► DQ ─► · a ─► + b (─► Relu) ─► Q ─► DQ, x → y."""
    constants = {
        "s": np.asarray(SCALE),
        "z": np.asarray(np.uint8(128)),
        "t": np.asarray(SCALE / 3, np.float32),
        "u": np.asarray(np.uint8(0 if relu else 100)),
        "a": scale.reshape(1, -1, 1, 1),
        "b": shift.reshape(1, -1, 1, 1),
    }
    nodes = [*pair("x"), helper.make_node("Mul", list(order), ["m"]), helper.make_node("Add", ["m", "b"], ["c"])]
    nodes += [helper.make_node("Relu", ["c"], ["r"])] if relu else []
    model = graph([*nodes, *pair("r" if relu else "c", "t", "u")], constants, [1, len(scale), 6, 8], len(scale))
    model.graph.node[-1].output[0] = "y"
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("relu", [False, True])
def test_a_scale_and_a_shift_between_roundings_run_as_one_integer_convolution(x, relu, tmp_path):
    rng = np.random.default_rng(0)
    scale, shift = rng.normal(0, 1, 16).astype(np.float32), rng.normal(0, 1, 16).astype(np.float32)
    scale[3], shift[4], shift[5], scale[6], shift[6] = 0, 0, 100, 1e-9, 1
    model = scale_and_shift(scale, shift, relu, ("x_dq", "a") if relu else ("a", "x_dq"))
    before = run(model, x)
    assert scales_to_depthwise(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert not {"Mul", "Add"} & {node.op_type for node in model.graph.node}
    for optimized in (False, True):
        different = run(model, x, optimized) != before
        assert different.mean() < 0.01  # a tie may fall on the other side: the bias is within 1/254 of a step
        np.testing.assert_allclose(run(model, x, optimized), before, atol=float(SCALE / 3) * 1.01)
    assert operators(model, tmp_path)["QLinearConv"] == 1


def test_a_scale_and_a_shift_that_something_else_reads_or_that_no_rounding_follows_stay():
    ones = np.ones(16, np.float32)
    for change in ("float behind", "float before", "output", "one number"):
        model = scale_and_shift(ones, ones, False)
        if change == "float behind":
            model.graph.node[4].op_type = "Sigmoid"
            del model.graph.node[4].input[1:], model.graph.node[5:]
            model.graph.node[4].output[0] = "y"
        elif change == "float before":
            model.graph.node[2].input[0] = "x"
        elif change == "output":
            model.graph.output.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, [1, 16, 6, 8]))
        else:
            (a,) = (value for value in model.graph.initializer if value.name == "a")
            a.CopyFrom(numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "a"))
        before = model.SerializeToString()
        assert scales_to_depthwise(model) == 0 and model.SerializeToString() == before, change
