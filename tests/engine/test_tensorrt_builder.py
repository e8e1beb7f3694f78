"""What is decided before TensorRT is called: typing by graph and release, sidecars, interrupts. Releases are stand-ins here;
test_tensorrt_lab.py asks the real modules the same.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qat.core.errors import UserError
from qat.core.onnx_file import read_outline
from qat.engine import BACKENDS, TensorRtOptions
from qat.engine.tensorrt_builder import (
    Interrupt,
    PlanFacts,
    Typing,
    check_facts,
    choose_typing,
    last_message,
    one_line,
    read_facts,
    sidecar_path,
    timing_cache,
    write_plan,
)
from qat.engine.tensorrt_capabilities import Capabilities

WEAK, BOTH, STRONG = ("8.5.3.1", "8.6.1"), ("10.0.1", "10.16.1.11"), ("11.4.0.106",)
VERSIONS = (*WEAK, *BOTH, *STRONG)


@pytest.fixture
def typing_of(stand_in):
    """(graph, precision, version, options) → the typing that is chosen."""

    def choose(path: Path, precision: str, version: str, **options) -> Typing:
        capabilities = Capabilities(stand_in(version))
        return choose_typing(path, read_outline(path), precision, TensorRtOptions(**options), capabilities)

    return choose


@pytest.fixture
def refusal(typing_of):
    """The same where it is an error → its one line."""

    def refuse(path: Path, precision: str, version: str, **options) -> str:
        with pytest.raises(UserError) as caught:
            typing_of(path, precision, version, **options)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
        return str(caught.value)

    return refuse


def test_capabilities_are_asked_of_the_module(stand_in):
    can = {version: Capabilities(stand_in(version)) for version in VERSIONS}
    assert [v for v in VERSIONS if can[v].weak_typing] == [*WEAK, *BOTH]
    assert [v for v in VERSIONS if can[v].strong_typing] == [*BOTH, *STRONG]
    assert [v for v in VERSIONS if can[v].explicit_batch_flag] == [*WEAK]
    assert [v for v in VERSIONS if not can[v].version_compatible] == ["8.5.3.1"]
    assert [v for v in VERSIONS if not can[v].optimization_level] == ["8.5.3.1"]
    assert [v for v in VERSIONS if can[v].progress] == [*BOTH, *STRONG]
    assert [v for v in VERSIONS if "CUDNN" not in can[v].tactic_sources] == [*STRONG]
    assert {v: can[v].memory_attribute for v in VERSIONS}["10.0.1"] == "device_memory_size"
    assert can["11.4.0.106"].memory_attribute == "device_memory_size_v2"
    # The version string decides nothing.
    renamed = stand_in("11.4.0.106")
    renamed.__version__ = "8.5.3"
    assert not Capabilities(renamed).weak_typing


@pytest.mark.parametrize("version", [*WEAK, *BOTH])
def test_q_dq_on_fp32_types_takes_builder_flags(graphs, version, typing_of):
    assert typing_of(graphs["int8"], "int8", version) == Typing(False, ("INT8", "FP16"))
    assert typing_of(graphs["int8"], "int8", version, fp16=False) == Typing(False, ("INT8",))
    assert typing_of(graphs["fp32"], "fp32", version) == Typing(False, ())
    assert typing_of(graphs["fp32"], "fp16", version) == Typing(False, ("FP16",))


@pytest.mark.parametrize("version", [*WEAK, *BOTH])
def test_a_part_that_stays_float_in_an_int8_export_takes_fp16_alone(graphs, version, typing_of):
    assert typing_of(graphs["fp32"], "int8", version) == Typing(False, ("FP16",))


@pytest.mark.parametrize("version", [*BOTH, *STRONG])
def test_the_strong_flavour_is_built_strongly_typed(graphs, version, typing_of):
    assert typing_of(graphs["int8-strong"], "int8", version) == Typing(True, ())
    assert typing_of(graphs["fp16-strong"], "fp16", version) == Typing(True, ())


@pytest.mark.parametrize("version", WEAK)
def test_tensorrt_8_refuses_the_strong_flavour_by_name(graphs, version, refusal):
    said = refusal(graphs["int8-strong"], "int8", version)
    assert f"TensorRT {version}" in said and "opset 19" in said and said.endswith("export with --flavour tensorrt")


@pytest.mark.parametrize("version", STRONG)
def test_tensorrt_11_wants_the_strong_flavour(graphs, version, typing_of, refusal):
    for form, precision in (("int8", "int8"), ("fp32", "fp16"), ("fp32", "int8")):
        assert refusal(graphs[form], precision, version).endswith("export with --flavour tensorrt-strong")
    # FP32 types say FP32: that is what is asked for here.
    assert typing_of(graphs["fp32"], "fp32", version) == Typing(True, ())
    assert typing_of(graphs["int8"], "int8", version, fp16=False) == Typing(True, ())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_precision_that_the_graph_contradicts_is_refused(graphs, version, refusal):
    assert "found Q/DQ in the graph" in refusal(graphs["int8"], "fp16", version)
    assert "found FP16 types" in refusal(graphs["fp16-strong"], "fp32", version)
    assert "u8 Q/DQ" in refusal(graphs["cpu"], "int8", version)


def test_fp16_types_without_q_dq_go_to_tensorrt_8_with_its_flag(tmp_path, typing_of, refusal):
    weight = numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float16), "w")
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [1, c, 5, 5]) for n, c in (("x", 3), ("y", 4))]
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", tensors[:1], tensors[1:], [weight])
    for opset in (13, 19):
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), tmp_path / f"{opset}.onnx")
    assert typing_of(tmp_path / "13.onnx", "fp16", "8.5.3.1") == Typing(False, ("FP16",))
    assert typing_of(tmp_path / "13.onnx", "fp16", "10.0.1") == Typing(True, ())
    assert "found opset 19, expected 17 at most" in refusal(tmp_path / "19.onnx", "fp16", "8.5.3.1")


def test_the_outline_is_what_onnx_says(graphs):
    for path in graphs.values():
        model, outline = onnx.load(path), read_outline(path)
        assert outline.opset == model.opset_import[0].version
        assert [node.kind for node in outline.nodes] == [node.op_type for node in model.graph.node]
        assert [node.name for node in outline.nodes] == [node.name for node in model.graph.node]
        assert [node.inputs for node in outline.nodes] == [list(node.input) for node in model.graph.node]
        assert outline.inputs == [value.name for value in model.graph.input]
        assert outline.dynamic == []
        for tensor in model.graph.initializer:
            assert outline.types[tensor.name] == tensor.data_type


def test_quantized_are_the_convolutions_between_q_dq(graphs):
    convolutions = [n.name for n in onnx.load(graphs["int8"]).graph.node if n.op_type in ("Conv", "ConvTranspose")]
    assert read_outline(graphs["int8"]).quantized == convolutions
    assert read_outline(graphs["int8-strong"]).quantized == convolutions
    assert read_outline(graphs["fp32"]).quantized == []


def test_dynamic_axes_are_seen(tmp_path):
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("a", ["n", 3]), ("b", [2, 3]), ("y", None))
    ]
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["y"])], "g", values[:2], values[2:])
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    outline = read_outline(tmp_path / "g.onnx")
    assert (outline.inputs, outline.dynamic) == (["a", "b"], ["a"])
    assert outline.nodes[0].label == "node_of_y"  # as TensorRT's parser names a node without a name


@pytest.mark.parametrize("content", [b"", b"\x00", b"not a graph at all", b"\x3a\xff\xff\xff\x7fabc", b"\x08\x08"])
def test_a_file_that_is_no_graph_is_one_line(tmp_path, content):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not an ONNX graph") as caught:
        read_outline(path)
    assert "\n" not in str(caught.value)


def facts(**changes) -> PlanFacts:
    known = PlanFacts(
        tensorrt="8.5.3.1", gpu="NVIDIA H200", capability="9.0", precision="int8", strongly_typed=False, onnx="fuser.onnx",
        onnx_sha256="", quantized=("/conv/Conv",), options=TensorRtOptions().described(), build_seconds=1.0,
    )  # fmt: skip
    return replace(known, **changes)


def written(folder: Path, plan: bytes = b"a plan", **changes) -> Path:
    path = folder / "fuser.plan"
    write_plan(path, plan, facts(plan_sha256=hashlib.sha256(plan).hexdigest(), **changes))
    return path


def test_a_plan_stays_tensorrts_own_file_beside_its_sidecar(tmp_path):
    path = written(tmp_path)
    assert path.read_bytes() == b"a plan"
    assert sidecar_path(path).name == "fuser.plan.json"
    assert json.loads(sidecar_path(path).read_text())["gpu"] == "NVIDIA H200"
    found = read_facts(path)
    assert found is not None and found.quantized == ("/conv/Conv",) and found.precision == "int8"


def test_a_sidecar_of_other_bytes_counts_as_none(tmp_path):
    path = written(tmp_path)
    path.write_bytes(b"built by trtexec since")
    assert read_facts(path) is None
    sidecar_path(path).unlink()
    assert read_facts(path) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "bevqat-plan", "schema": 1, "colour": "red"}'])
def test_a_damaged_sidecar_is_one_line(tmp_path, content):
    path = written(tmp_path)
    sidecar_path(path).write_text(content)
    with pytest.raises(UserError, match=r"fuser\.plan\.json") as caught:
        read_facts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("here", "said"),
    [
        (("10.0.1", "NVIDIA H200", "9.0"), "built by TensorRT 8.5.3.1, found 10.0.1 here; build it again here"),
        (("8.5.3.1", "Orin", "8.7"), "built for NVIDIA H200 (compute capability 9.0), found Orin (8.7) here"),
        (("8.5.3.1", "NVIDIA H100", "9.0"), "built for NVIDIA H200, found NVIDIA H100 here"),
    ],
)
def test_a_plan_for_another_version_or_gpu_is_refused_by_its_sidecar(tmp_path, here, said):
    path = written(tmp_path)
    with pytest.raises(UserError) as caught:
        check_facts(path, facts(), *here)
    assert str(caught.value).startswith(str(path)) and said in str(caught.value)
    check_facts(path, facts(), "8.5.3.1", "NVIDIA H200", "9.0")


def test_a_version_compatible_plan_goes_to_a_later_version(tmp_path):
    options = TensorRtOptions(version_compatible=True).described()
    check_facts(tmp_path / "p.plan", facts(options=options), "10.0.1", "NVIDIA H200", "9.0")


class Cache:
    """A timing cache as the builder's configuration hands out."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytearray:
        return bytearray(self.content)


class Config:
    """The four calls of IBuilderConfig that concern the timing cache; refuses content that it does not know."""

    def __init__(self) -> None:
        self.cache: Cache | None = None

    def create_timing_cache(self, content: bytes) -> Cache | None:
        return None if content.startswith(b"damaged") else Cache(content)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache if not cache.content.startswith(b"other") else None
        return self.cache is not None

    def get_timing_cache(self) -> Cache | None:
        return self.cache


class Log:
    def __init__(self) -> None:
        self.errors = ["a cache that does not fit"]


@pytest.mark.parametrize("earlier", [None, b"known ", b"damaged", b"other GPU"])
def test_the_timing_cache_is_read_and_written_whole(tmp_path, earlier):
    path, config = tmp_path / "timing.cache", Config()
    if earlier is not None:
        path.write_bytes(earlier)
    with timing_cache(config, path, Log()):
        assert config.cache is not None
        config.cache.content += b"measured"
    assert path.read_bytes() == (b"known measured" if earlier == b"known " else b"measured")
    assert [file.name for file in tmp_path.iterdir()] == ["timing.cache"]


def test_an_interrupted_build_leaves_the_timing_cache_as_it_was(tmp_path):
    path, config = tmp_path / "timing.cache", Config()
    path.write_bytes(b"known ")
    with pytest.raises(KeyboardInterrupt), timing_cache(config, path, Log()):
        assert config.cache is not None
        config.cache.content += b"half"
        raise KeyboardInterrupt
    assert path.read_bytes() == b"known "
    assert [file.name for file in tmp_path.iterdir()] == ["timing.cache"]


def test_ctrl_c_is_kept_until_tensorrt_has_returned():
    """In a process of its own: the test runner's may ignore the signal, or end by it."""
    code = """
        import os, signal
        from qat.engine.tensorrt_builder import Interrupt

        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with Interrupt(stops=True) as interrupt:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(10**6):  # the signal is handled between two of Python's own steps
                    if interrupt.asked:
                        break
                print("reached", interrupt.asked)
        except KeyboardInterrupt:
            print("raised", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
        """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n") == ["reached True", "raised True", ""]
    assert "Ctrl-C again ends at once" in ran.stderr


def test_ctrl_c_stays_ignored_where_it_is():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt(stops=True) as interrupt:  # as in a worker, whose parent ends it
            os.kill(os.getpid(), signal.SIGINT)
        assert not interrupt.asked and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_is_told_rather_than_a_warning():
    assert last_message(SimpleNamespace(errors=["first", "the\ncause"], warnings=["a remark"])) == "the cause"
    assert last_message(SimpleNamespace(errors=[], warnings=["one", "two"])) == "two"
    assert last_message(SimpleNamespace(errors=[], warnings=[])) == "no cause given"


def test_messages_become_one_line():
    assert one_line("a\n  b\tc") == "a b c"
    assert len(one_line("x" * 1000)) == 401


def test_the_backend_is_known_by_name():
    assert BACKENDS["tensorrt"].device == "cuda:0" and BACKENDS["tensorrt"].flavour == "tensorrt"
