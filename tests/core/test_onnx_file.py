"""What is read of an ONNX file without the onnx package."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qat.core.errors import UserError
from qat.core.onnx_file import check_graph, has_fp16


def save(path: Path, dtype: type, cast: int | None = None) -> Path:
    """y = x + w, w of the dtype; with `cast` the sum is cast to that type and back."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [helper.make_node("Add", ["x", "w"], ["y" if cast is None else "s"])]
    if cast is not None:
        nodes += [helper.make_node("Cast", ["s"], ["c"], to=cast), helper.make_node("Cast", ["c"], ["y"], to=kind)]
    graph = helper.make_graph(
        nodes,
        "add",
        [helper.make_tensor_value_info("x", kind, [3])],
        [helper.make_tensor_value_info("y", kind, [3])],
        [numpy_helper.from_array(np.arange(3, dtype=dtype), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("dtype", "cast", "expected"),
    [
        (np.float32, None, False),
        (np.float16, None, True),
        (np.float32, TensorProto.FLOAT16, True),
        (np.float32, TensorProto.DOUBLE, False),
    ],
)
def test_a_graph_of_fp16_is_told_by_its_weights_or_its_casts(tmp_path, dtype, cast, expected):
    assert has_fp16(save(tmp_path / "g.onnx", dtype, cast)) is expected


def test_a_graph_of_fp16_is_told_by_its_inputs_and_outputs(tmp_path):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), tmp_path / "g.onnx")
    assert has_fp16(tmp_path / "g.onnx")


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    (tmp_path / "g.onnx").write_bytes(b"\x3a\xff\xff")
    with pytest.raises(UserError, match=r"g\.onnx: not an ONNX graph"):
        has_fp16(tmp_path / "g.onnx")


@pytest.mark.parametrize("nested", [False, True])
def test_data_outside_are_found_in_functions_too_and_in_the_graphs_in_their_nodes(tmp_path, nested):
    weight = TensorProto(dims=[3], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="/etc/passwd")
    node = helper.make_node("Constant", [], ["w"], value=weight)
    if nested:
        made = [helper.make_tensor_value_info("w", TensorProto.FLOAT, [3])]
        graphs = {name: helper.make_graph([node], name, [], made) for name in ("then_branch", "else_branch")}
        node = helper.make_node("If", ["c"], ["w"], **graphs)
    opset = helper.make_opsetid("", 13)
    function = helper.make_function("own", "F", ["c"], ["w"], [node], [opset])
    given = [
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [3]),
    ]
    graph = helper.make_graph([helper.make_node("F", ["c"], ["y"], domain="own")], "g", given[:1], given[1:])
    model = helper.make_model(graph, opset_imports=[opset, helper.make_opsetid("own", 1)], functions=[function])
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"g\.onnx: .*data in another file for a function"):
        check_graph(tmp_path / "g.onnx")
