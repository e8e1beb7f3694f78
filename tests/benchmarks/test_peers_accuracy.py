import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peers_accuracy.py"


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers_accuracy", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their own module up
    sys.path.insert(0, str(SCRIPT.parent))  # the benchmarks take from each other
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


def two_convolutions(path: Path) -> None:
    """x [1,2,8,8] → 3×3 (rounded input, 4 channels) → 1×1 (float input, 1 channel); same padding."""
    random = np.random.default_rng(0)
    arrays = {
        "scale": np.float32(0.1),
        "zero": np.int8(0),
        "w1": random.standard_normal((4, 2, 3, 3)).astype(np.float32),
        "w2": random.standard_normal((1, 4, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("Conv", ["xd", "w1"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["h", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


def test_integer_share_counts_convolutions_whose_input_is_rounded(peers: ModuleType, tmp_path: Path) -> None:
    two_convolutions(tmp_path / "two.onnx")
    counts, share = peers.integer_convolutions([tmp_path / "two.onnx"])
    assert counts == (1, 2)
    assert share == pytest.approx(4 * 2 * 9 / (4 * 2 * 9 + 4))


def test_a_peer_that_is_not_known_is_refused_with_the_names_that_are(
    peers: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert peers.main(["--peers", "ours,nobody"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "found 'nobody'" in message and "quantize_static:minmax" in message


def test_a_peer_that_is_not_installed_is_skipped_and_told(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "nncf", ("no_such_package", "nncf", "nncf", None))
    said: list[str] = []
    assert not peers.installed("nncf", said.append)
    assert len(said) == 1 and said[0].startswith("nncf: skipped") and said[0].endswith("pip install nncf")


def test_a_peer_and_one_of_its_settings_name_each_setting_once(peers: ModuleType) -> None:
    ours, settings = peers.chosen("ours,nncf:mixed,nncf")
    labels = [setting.label for setting in settings]
    assert ours
    assert len(labels) == len(set(labels)) == sum(s.peer == "nncf" for s in peers.SETTINGS)
